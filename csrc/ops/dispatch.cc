#include "ops/dispatch.h"

#include <algorithm>
#include <cstring>

#include "base/thread_pool.h"

namespace gemloupe {
namespace {

struct Dispatch {
  Status status;
  Isa isa = Isa::kPortable;
  const KernelTable* kernels = nullptr;
  const QuantKernels* quant_kernels = nullptr;
};

Dispatch Choose() {
  Dispatch dispatch;
  StatusOr<Isa> isa = SelectedIsa();
  if (!isa.ok()) {
    dispatch.status = isa.status();
    return dispatch;
  }
  dispatch.isa = *isa;
  if (*isa >= Isa::kAvx512) dispatch.kernels = Avx512Kernels();
  if (dispatch.kernels == nullptr && *isa >= Isa::kAvx2) dispatch.kernels = Avx2Kernels();
  if (dispatch.kernels == nullptr) dispatch.kernels = &PortableKernels();
  if (*isa >= Isa::kAmx) dispatch.quant_kernels = AmxQuantKernels();
  if (dispatch.quant_kernels == nullptr && *isa >= Isa::kAvx512Vnni) {
    dispatch.quant_kernels = VnniQuantKernels();
  }
  if (dispatch.quant_kernels == nullptr && *isa >= Isa::kAvx2) {
    dispatch.quant_kernels = Avx2QuantKernels();
  }
  if (dispatch.quant_kernels == nullptr) dispatch.quant_kernels = &PortableQuantKernels();
  if (VerboseDispatch()) {
    std::fprintf(
        stderr,
        "gemloupe: cpu %s, detected %s, using %s with the %s kernels, quantised weights with "
        "the %s kernels\n",
        CpuModelName().c_str(), IsaName(DetectedIsa()), IsaName(*isa), dispatch.kernels->name,
        dispatch.quant_kernels->name);
  }
  return dispatch;
}

const Dispatch& Chosen() {
  static const Dispatch dispatch = Choose();
  return dispatch;
}

}  // namespace

Status InitDispatch() { return Chosen().status; }

Isa ActiveIsa() { return Chosen().isa; }

const KernelTable& Kernels() {
  GL_CHECK(Chosen().kernels != nullptr);
  return *Chosen().kernels;
}

const QuantKernels& QuantKernelsInUse() {
  GL_CHECK(Chosen().quant_kernels != nullptr);
  return *Chosen().quant_kernels;
}

MatmulKernel MatmulKernelFor(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return Kernels().matmul_f32;
    case DType::kFloat16: return Kernels().matmul_f16;
    case DType::kBfloat16: return Kernels().matmul_bf16;
    default: break;
  }
  GL_CHECK(false);
  return nullptr;
}

AccumulateKernel AccumulateKernelFor(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return Kernels().accumulate_f32;
    case DType::kFloat16: return Kernels().accumulate_f16;
    case DType::kBfloat16: return Kernels().accumulate_bf16;
    default: break;
  }
  GL_CHECK(false);
  return nullptr;
}

void WidenToFloat(float* dst, const void* src, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::kFloat32: std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float)); return;
    case DType::kFloat16: Kernels().f16_to_f32(dst, src, n); return;
    case DType::kBfloat16: Kernels().bf16_to_f32(dst, src, n); return;
    default: GL_CHECK(IsPlain(dtype));
  }
}

void RoundFromFloat(void* dst, const float* src, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::kFloat32: std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float)); return;
    case DType::kFloat16: Kernels().f32_to_f16(static_cast<uint16_t*>(dst), src, n); return;
    case DType::kBfloat16: Kernels().f32_to_bf16(static_cast<uint16_t*>(dst), src, n); return;
    default: GL_CHECK(IsPlain(dtype));
  }
}

void ForRows(int64_t rows, int64_t bytes_per_row,
             FunctionRef<void(int64_t begin, int64_t end)> fn) {
  ThreadPool& pool = ThreadPool::Get();
  if (rows <= 1 || pool.threads() == 1 || rows * bytes_per_row < kInlineBytes) {
    if (rows > 0) fn(0, rows);
    return;
  }
  const int64_t rows_per_chunk =
      std::max<int64_t>(1, std::max(kInlineBytes / 2 / std::max<int64_t>(bytes_per_row, 1),
                                    rows / (8 * pool.threads())));
  const int64_t chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  pool.ParallelFor(chunks, [&](int64_t chunk, int) {
    fn(chunk * rows_per_chunk, std::min(rows, (chunk + 1) * rows_per_chunk));
  });
}

}  // namespace gemloupe
