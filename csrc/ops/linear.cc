#include "ops/linear.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "ops/dispatch.h"
#include "ops/onednn.h"

namespace gemloupe {
namespace {

// A slice of weights small enough to stay in a core's L2 while the groups of rows pass over it.
constexpr int64_t kSliceBytes = 256 * 1024;
// Outputs of one oneDNN call: wide enough for its blocking, small enough to share among threads.
constexpr int64_t kOnednnSlice = 256;

// Rows up to which 16-bit weights go to our kernels; measured on a Xeon with AVX-512 (the two meet
// between 48 and 64 rows).
constexpr int64_t kWidenedRows = 48;

enum class Engine { kKernels, kOnednnFloat32, kOnednnBfloat16 };

const char* EngineName(Engine engine) {
  switch (engine) {
    case Engine::kKernels: return "kernels";
    case Engine::kOnednnFloat32: return "oneDNN float32";
    case Engine::kOnednnBfloat16: return "oneDNN bfloat16";
  }
  return "";
}

Engine ChooseEngine(int64_t rows, DType dtype, MatmulPath path) {
  if (path == MatmulPath::kRowExact || rows <= kMaxKernelRows) return Engine::kKernels;
  if (ActiveIsa() == Isa::kPortable) return Engine::kKernels;  // portable calls no foreign code
  const bool cpu_has_bf16 = ActiveIsa() >= Isa::kAvx512Bf16;
  if (path == MatmulPath::kBfloat16 && dtype == DType::kBfloat16 && cpu_has_bf16) {
    return Engine::kOnednnBfloat16;
  }
  // Widening a 16-bit panel for oneDNN costs more than our kernels lose on fewer rows.
  if (dtype != DType::kFloat32 && rows <= kWidenedRows) return Engine::kKernels;
  return Engine::kOnednnFloat32;
}

// Scratch of one thread that lives as long as the thread and only grows.
template <typename T>
T* ThreadScratch(int64_t count) {
  static thread_local AlignedBuffer buffer;
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  if (buffer.size() < bytes) buffer = AlignedBuffer(bytes);
  return reinterpret_cast<T*>(buffer.data());
}

template <typename T>
bool IsAligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(T) == 0;
}

const uint8_t* RowData(const TensorView& weight, int64_t row) {
  return static_cast<const uint8_t*>(weight.data) +
         static_cast<size_t>(row * weight.shape[1]) * DTypeSize(weight.dtype);
}

void KernelSlice(ConstMatrix src, const TensorView& weight, int64_t begin, int64_t end,
                 Matrix dst) {
  const MatmulKernel matmul = MatmulKernelFor(weight.dtype);
  const int64_t k = weight.shape[1];
  for (int64_t row = 0; row < src.rows; row += kMaxKernelRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kMaxKernelRows, src.rows - row));
    matmul(dst.row(row), dst.stride, src.row(row), src.stride, RowData(weight, begin), k, rows,
           end - begin, k);
  }
}

Status OnednnFloat32Slice(ConstMatrix src, const TensorView& weight, int64_t begin, int64_t end,
                          Matrix dst) {
  const int64_t k = weight.shape[1];
  const float* panel = nullptr;
  if (weight.dtype == DType::kFloat32 && IsAligned<float>(weight.data)) {
    panel = reinterpret_cast<const float*>(RowData(weight, begin));
  } else {
    float* widened = ThreadScratch<float>((end - begin) * k);
    WidenToFloat(widened, RowData(weight, begin), weight.dtype, (end - begin) * k);
    panel = widened;
  }
  return OnednnMatmulF32(src, ConstMatrix(panel, end - begin, k), dst);
}

Status OnednnBfloat16Slice(MatrixView<const uint16_t> src, const TensorView& weight, int64_t begin,
                           int64_t end, Matrix dst) {
  const int64_t k = weight.shape[1];
  const auto* panel = reinterpret_cast<const uint16_t*>(RowData(weight, begin));
  if (!IsAligned<uint16_t>(panel)) {
    uint16_t* copy = ThreadScratch<uint16_t>((end - begin) * k);
    std::memcpy(copy, panel, static_cast<size_t>((end - begin) * k) * sizeof(uint16_t));
    panel = copy;
  }
  return OnednnMatmulBf16(src, MatrixView<const uint16_t>(panel, end - begin, k), dst);
}

std::vector<uint16_t> RoundRows(ConstMatrix src) {
  std::vector<uint16_t> rounded(static_cast<size_t>(src.rows * src.cols));
  for (int64_t row = 0; row < src.rows; ++row) {
    Kernels().f32_to_bf16(rounded.data() + row * src.cols, src.row(row), src.cols);
  }
  return rounded;
}

void ReportDispatch(Engine engine, ConstMatrix src, const TensorView& weight, MatmulPath path) {
  if (!VerboseDispatch()) return;
  std::fprintf(stderr, "gemloupe: matmul [%lld, %lld] x [%lld, %lld] %s: %s%s\n",
               static_cast<long long>(src.rows), static_cast<long long>(src.cols),
               static_cast<long long>(weight.shape[0]), static_cast<long long>(weight.shape[1]),
               DTypeName(weight.dtype), EngineName(engine),
               engine != Engine::kKernels      ? ""
               : path == MatmulPath::kRowExact ? " (row-exact pass)"
               : src.rows <= kWidenedRows      ? " (few rows)"
                                               : " (portable)");
}

// The first failure among tasks that run at the same time.
class FirstError {
 public:
  void Add(Status status) {
    if (status.ok()) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if (status_.ok()) status_ = std::move(status);
  }
  Status Take() { return std::move(status_); }

 private:
  std::mutex mutex_;
  Status status_;
};

}  // namespace

Status Linear(ConstMatrix src, std::span<const LinearJob> jobs, MatmulPath path) {
  struct Slices {
    const LinearJob* job;
    Engine engine;
    int64_t first;  // index of its first slice
    int64_t size;   // outputs per slice
  };
  std::vector<Slices> plan;
  std::vector<uint16_t> rounded;
  int64_t slices = 0;
  int64_t bytes = 0;
  for (const LinearJob& job : jobs) {
    const TensorView& weight = *job.weight;
    GL_CHECK(weight.shape.size() == 2 && weight.shape[1] == src.cols);
    GL_CHECK(job.dst.rows == src.rows && job.dst.cols == weight.shape[0]);
    const Engine engine = ChooseEngine(src.rows, weight.dtype, path);
    ReportDispatch(engine, src, weight, path);
    if (engine == Engine::kOnednnBfloat16 && rounded.empty()) rounded = RoundRows(src);
    const int64_t row_bytes = weight.shape[1] * static_cast<int64_t>(DTypeSize(weight.dtype));
    const int64_t size =
        engine == Engine::kKernels
            ? std::clamp<int64_t>(kSliceBytes / std::max<int64_t>(row_bytes, 1) / 16 * 16, 16, 4096)
            : kOnednnSlice;
    plan.push_back({&job, engine, slices, size});
    slices += (weight.shape[0] + size - 1) / size;
    bytes += weight.shape[0] * (row_bytes + src.rows * static_cast<int64_t>(sizeof(float)));
  }
  FirstError error;
  const auto run_slice = [&](int64_t slice, int) {
    size_t at = plan.size() - 1;
    while (plan[at].first > slice) --at;
    const LinearJob& job = *plan[at].job;
    const int64_t begin = (slice - plan[at].first) * plan[at].size;
    const int64_t end = std::min(job.weight->shape[0], begin + plan[at].size);
    const Matrix dst(job.dst.data + begin, job.dst.rows, end - begin, job.dst.stride);
    switch (plan[at].engine) {
      case Engine::kKernels: KernelSlice(src, *job.weight, begin, end, dst); break;
      case Engine::kOnednnFloat32:
        error.Add(OnednnFloat32Slice(src, *job.weight, begin, end, dst));
        break;
      case Engine::kOnednnBfloat16:
        error.Add(OnednnBfloat16Slice({rounded.data(), src.rows, src.cols}, *job.weight, begin, end,
                                      dst));
        break;
    }
  };
  if (bytes < kInlineBytes && src.rows <= kMaxKernelRows) {
    for (int64_t slice = 0; slice < slices; ++slice) run_slice(slice, 0);
  } else {
    ThreadPool::Get().ParallelFor(slices, run_slice);
  }
  return error.Take();
}

Status LinearSlice(ConstMatrix src, const TensorView& weight, int64_t begin, int64_t end,
                   Matrix dst, MatmulPath path) {
  switch (ChooseEngine(src.rows, weight.dtype, path)) {
    case Engine::kKernels: KernelSlice(src, weight, begin, end, dst); return absl::OkStatus();
    case Engine::kOnednnFloat32: return OnednnFloat32Slice(src, weight, begin, end, dst);
    case Engine::kOnednnBfloat16: {
      const std::vector<uint16_t> rounded = RoundRows(src);
      return OnednnBfloat16Slice({rounded.data(), src.rows, src.cols}, weight, begin, end, dst);
    }
  }
  return absl::InternalError("unknown matmul engine");
}

}  // namespace gemloupe
