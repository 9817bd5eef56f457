#include "kernels/kernel_table.h"

namespace gemloupe {

#if defined(__x86_64__)

// Defined in simd_table.cc, once per instruction set.
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}

const KernelTable* Avx2Kernels() { return &avx2::kTable; }
const KernelTable* Avx512Kernels() { return &avx512::kTable; }

#else

const KernelTable* Avx2Kernels() { return nullptr; }
const KernelTable* Avx512Kernels() { return nullptr; }

#endif

}  // namespace gemloupe
