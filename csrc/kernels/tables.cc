#include "kernels/kernel_table.h"
#include "kernels/quant_table.h"

namespace gemloupe {

#if defined(__x86_64__)

// Defined in simd_table.cc, once per instruction set, and in quant_avx2.cc and quant_vnni.cc.
namespace avx2 {
extern const KernelTable kTable;
extern const QuantKernels kQuantTable;
}  // namespace avx2
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_vnni {
extern const QuantKernels kQuantTable;
}
namespace amx {
extern const QuantKernels::Gemm kGemms[kNumPackedFormats];
}

const KernelTable* Avx2Kernels() { return &avx2::kTable; }
const KernelTable* Avx512Kernels() { return &avx512::kTable; }
const QuantKernels* Avx2QuantKernels() { return &avx2::kQuantTable; }
const QuantKernels* VnniQuantKernels() { return &avx512_vnni::kQuantTable; }
const QuantKernels* AmxQuantKernels() {
  static const QuantKernels table = [] {
    QuantKernels kernels = avx512_vnni::kQuantTable;
    kernels.name = "amx";
    for (int i = 0; i < kNumPackedFormats; ++i) kernels.gemm[i] = amx::kGemms[i];
    kernels.gemm_rows = 16;
    kernels.gemm_tiles = true;
    return kernels;
  }();
  return &table;
}

#else

const KernelTable* Avx2Kernels() { return nullptr; }
const KernelTable* Avx512Kernels() { return nullptr; }
const QuantKernels* Avx2QuantKernels() { return nullptr; }
const QuantKernels* VnniQuantKernels() { return nullptr; }
const QuantKernels* AmxQuantKernels() { return nullptr; }

#endif

}  // namespace gemloupe
