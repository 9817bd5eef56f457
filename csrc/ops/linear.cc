#include "ops/linear.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "base/thread_pool.h"
#include "kernels/packed_layout.h"
#include "ops/convert.h"
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
// Elements along k that are unpacked to float32 at once: 16 rows of them fill half of L1.
constexpr int64_t kUnpackedElements = 256;

const char* EngineName(Engine engine) {
  switch (engine) {
    case Engine::kKernels: return "float kernels";
    case Engine::kOnednnFloat32: return "oneDNN float32";
    case Engine::kOnednnBfloat16: return "oneDNN bfloat16";
    case Engine::kQuantized: return "quantised kernels, int8 activations";
    case Engine::kPanelsFloat32: return "unpacked panels, float32 activations";
    case Engine::kPanelsBfloat16: return "unpacked panels, AMX bfloat16";
  }
  return "";
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

// Packed weights times float32 activations, one stretch of k after the other.
void PanelsFloat32Slice(ConstMatrix src, const TensorView& weight, int64_t begin, int64_t end,
                        Matrix dst) {
  const QuantKernels& kernels = QuantKernelsInUse();
  const int64_t k = weight.shape[1];
  const int64_t elements = BlockElements(weight.dtype);
  float unpacked[kUnpackedElements * kPanelRows];
  for (int64_t output = begin; output < end;) {
    const int64_t first = output % kPanelRows;
    const int64_t count = std::min(kPanelRows - first, end - output);
    for (int64_t at = 0; at < k; at += kUnpackedElements) {
      const int64_t here = std::min(kUnpackedElements, k - at);
      kernels.unpack[PackedFormat(weight.dtype)](unpacked, PanelData(weight, output), at,
                                                 (here + elements - 1) / elements * elements);
      if (first == 0) {
        kernels.panel_matmul_f32(dst.data + (output - begin), dst.stride, src.data + at, src.stride,
                                 src.rows, unpacked, here, static_cast<int>(count), at > 0);
      } else {
        // A slice that begins inside a panel (small models only): its outputs move to the front.
        float shifted[kUnpackedElements * kPanelRows] = {};
        for (int64_t i = 0; i < here; ++i) {
          std::copy_n(unpacked + i * kPanelRows + first, count, shifted + i * kPanelRows);
        }
        kernels.panel_matmul_f32(dst.data + (output - begin), dst.stride, src.data + at, src.stride,
                                 src.rows, shifted, here, static_cast<int>(count), at > 0);
      }
    }
    output += count;
  }
}

int ZeroOf(DType dtype) {
  switch (dtype) {
    case DType::kInt4: return kInt4Zero;
    case DType::kInt6: return kInt6Zero;
    case DType::kInt8: return kInt8Zero;
    default: return 0;
  }
}

bool UsesGemm(int64_t rows, DType dtype) {
  return rows > kMaxKernelRows && QuantKernelsInUse().gemm[PackedFormat(dtype)] != nullptr;
}

// Bytes of the arrays of InterleavedRows, one after the other.
struct InterleavedSize {
  int64_t groups;
  int64_t q;  // elements of each array
  int64_t scale;
  InterleavedSize(int64_t rows, int64_t padded)
      : groups((rows + kGemmRows - 1) / kGemmRows),
        q(groups * (padded / 4) * kGemmRows),
        scale(groups * (padded / kGroup) * kGemmRows) {}
  int64_t words() const { return q + 2 * scale; }
};

InterleavedRows InterleavedAt(int32_t* memory, int64_t rows, int64_t padded) {
  const InterleavedSize size(rows, padded);
  return {memory, reinterpret_cast<float*>(memory + size.q), memory + size.q + size.scale, padded};
}

// Interleaves one group of rows; row_of(i) is the row of src that becomes row i.
template <class RowOf>
void InterleaveGroup(const QuantizedRows& src, const RowOf& row_of, int64_t group, int64_t rows,
                     int zero, const InterleavedRows& dst) {
  const int64_t quads = src.padded / 4;
  const int64_t scales = src.padded / kGroup;
  int32_t* q = dst.q + group * quads * kGemmRows;
  float* scale = dst.scale + group * scales * kGemmRows;
  int32_t* start = dst.start + group * scales * kGemmRows;
  for (int r = 0; r < kGemmRows; ++r) {
    const int64_t i = group * kGemmRows + r;
    if (i >= rows) {
      for (int64_t j = 0; j < quads; ++j) q[j * kGemmRows + r] = 0;
      for (int64_t j = 0; j < scales; ++j) scale[j * kGemmRows + r] = 0.0f;
      for (int64_t j = 0; j < scales; ++j) start[j * kGemmRows + r] = 0;
      continue;
    }
    const int64_t row = row_of(i);
    const int8_t* from = src.q + row * src.padded;
    for (int64_t j = 0; j < quads; ++j) std::memcpy(q + j * kGemmRows + r, from + 4 * j, 4);
    for (int64_t j = 0; j < scales; ++j) {
      scale[j * kGemmRows + r] = src.scale[row * scales + j];
      start[j * kGemmRows + r] = -zero * src.sum[row * scales + j];
    }
  }
}

void GemmSlice(const InterleavedRows& src, int64_t rows, const TensorView& weight, int64_t begin,
               int64_t end, Matrix dst) {
  GL_CHECK(begin % kPanelRows == 0);
  alignas(64) uint8_t scratch[kGemmScratchBytes];
  QuantKernelsInUse().gemm[PackedFormat(weight.dtype)](dst.data, dst.stride, src, rows,
                                                       static_cast<const uint8_t*>(weight.data),
                                                       begin, end, weight.shape[1], scratch);
}

void QuantizedSlice(const QuantizedRows& src, int64_t rows, const TensorView& weight, int64_t begin,
                    int64_t end, Matrix dst) {
  const QuantKernels::Matmul matmul = QuantKernelsInUse().matmul[PackedFormat(weight.dtype)];
  for (int64_t row = 0; row < rows; row += kMaxKernelRows) {
    matmul(dst.row(row), dst.stride, src, row,
           static_cast<int>(std::min<int64_t>(kMaxKernelRows, rows - row)),
           static_cast<const uint8_t*>(weight.data), begin, end, weight.shape[1]);
  }
}

void ReportDispatch(Engine engine, ConstMatrix src, const TensorView& weight,
                    const MatmulPath& path) {
  if (!VerboseDispatch()) return;
  std::fprintf(stderr, "gemloupe: matmul [%lld, %lld] x [%lld, %lld] %s: %s%s\n",
               static_cast<long long>(src.rows), static_cast<long long>(src.cols),
               static_cast<long long>(weight.shape[0]), static_cast<long long>(weight.shape[1]),
               DTypeName(weight.dtype), EngineName(engine),
               path.row_exact ? " (row-exact pass)" : "");
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

// Outputs of one slice of a product.
int64_t SliceOutputs(Engine engine, const TensorView& weight, int64_t outputs, int64_t rows) {
  const auto row_bytes =
      static_cast<int64_t>(MatrixBytes(weight.dtype, kPanelRows, weight.shape[1]) / kPanelRows);
  const int64_t cached =
      std::clamp<int64_t>(kSliceBytes / std::max<int64_t>(row_bytes, 1) / 16 * 16, 16, 4096);
  switch (engine) {
    case Engine::kKernels: return cached;
    case Engine::kOnednnFloat32:
    case Engine::kOnednnBfloat16: return kOnednnSlice;
    default: break;
  }
  if (rows <= kMaxKernelRows) return cached;
  // Enough slices to share among the threads; enough panels in each to use what it has in L2.
  const int64_t shared = outputs / (6 * ThreadPool::Get().threads()) / kPanelRows * kPanelRows;
  return std::clamp<int64_t>(shared, kPanelRows, 16 * kPanelRows);
}

}  // namespace

Engine ChooseEngine(int64_t rows, DType dtype, const MatmulPath& path) {
  if (IsPacked(dtype)) {
    return path.float32_activations ? Engine::kPanelsFloat32 : Engine::kQuantized;
  }
  if (path.row_exact || rows <= kMaxKernelRows) return Engine::kKernels;
  if (ActiveIsa() == Isa::kPortable) return Engine::kKernels;  // portable calls no foreign code
  const bool cpu_has_bf16 = ActiveIsa() >= Isa::kAvx512Bf16;
  if (path.bfloat16 && dtype == DType::kBfloat16 && cpu_has_bf16) return Engine::kOnednnBfloat16;
  // Widening a 16-bit panel for oneDNN costs more than our kernels lose on fewer rows.
  if (dtype != DType::kFloat32 && rows <= kWidenedRows) return Engine::kKernels;
  return Engine::kOnednnFloat32;
}

void LinearInput::Prepare(Engine engine) {
  const int64_t rows = src_.rows;
  const int64_t k = src_.cols;
  if (engine == Engine::kQuantized && quantized_.q == nullptr) {
    const int64_t padded = (k + kSuperTileElements - 1) / kSuperTileElements * kSuperTileElements;
    const int64_t groups = padded / kGroup;
    quantized_ = {arena_->New<int8_t>(rows * padded), arena_->New<float>(rows * groups),
                  arena_->New<int32_t>(rows * groups), arena_->New<int32_t>(rows * groups), padded};
    ForRows(rows, k * static_cast<int64_t>(sizeof(float)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        QuantKernelsInUse().quantize_row(quantized_, row, src_.row(row), k);
      }
    });
  }
  if ((engine == Engine::kOnednnBfloat16 || engine == Engine::kPanelsBfloat16) &&
      bfloat16_.data == nullptr) {
    auto* rounded = arena_->New<uint16_t>(rows * k);
    ForRows(rows, k * static_cast<int64_t>(sizeof(float)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        Kernels().f32_to_bf16(rounded + row * k, src_.row(row), k);
      }
    });
    bfloat16_ = MatrixView<const uint16_t>(rounded, rows, k);
  }
}

Status Linear(ConstMatrix src, std::span<const LinearJob> jobs, const MatmulPath& path,
              Arena& arena) {
  struct Slices {
    const LinearJob* job;
    Engine engine;
    int64_t first;  // index of its first slice
    int64_t size;   // outputs per slice
    InterleavedRows interleaved;
  };
  const Arena::Scope scope(arena);
  LinearInput input(src, arena);
  std::vector<Slices> plan;
  int64_t slices = 0;
  int64_t bytes = 0;
  std::pair<int, InterleavedRows> interleaved = {-1, {}};  // of one zero
  for (const LinearJob& job : jobs) {
    const TensorView& weight = *job.weight;
    GL_CHECK(weight.shape.size() == 2 && weight.shape[1] == src.cols);
    GL_CHECK(job.dst.rows == src.rows && job.first + job.dst.cols <= weight.shape[0]);
    const Engine engine = ChooseEngine(src.rows, weight.dtype, path);
    ReportDispatch(engine, src, weight, path);
    input.Prepare(engine);
    Slices part = {&job, engine, slices, SliceOutputs(engine, weight, job.dst.cols, src.rows), {}};
    if (engine == Engine::kQuantized && UsesGemm(src.rows, weight.dtype)) {
      const int zero = ZeroOf(weight.dtype);
      if (interleaved.first != zero) {
        const InterleavedSize size(src.rows, input.quantized().padded);
        interleaved = {zero, InterleavedAt(arena.New<int32_t>(size.words()), src.rows,
                                           input.quantized().padded)};
        ThreadPool::Get().ParallelFor(size.groups, [&](int64_t group, int) {
          InterleaveGroup(
              input.quantized(), [](int64_t i) { return i; }, group, src.rows, zero,
              interleaved.second);
        });
      }
      part.interleaved = interleaved.second;
    }
    plan.push_back(part);
    // Slices end at panels, whatever the job's first output is.
    slices += (job.first % kPanelRows + job.dst.cols + part.size - 1) / part.size;
    bytes += static_cast<int64_t>(MatrixBytes(weight.dtype, job.dst.cols, weight.shape[1])) +
             job.dst.cols * src.rows * static_cast<int64_t>(sizeof(float));
  }
  FirstError error;
  const auto run_slice = [&](int64_t slice, int) {
    size_t at = plan.size() - 1;
    while (plan[at].first > slice) --at;
    const Slices& part = plan[at];
    const LinearJob& job = *part.job;
    const int64_t base = job.first - job.first % kPanelRows + (slice - part.first) * part.size;
    const int64_t begin = std::max(job.first, base);
    const int64_t end = std::min(job.first + job.dst.cols, base + part.size);
    const Matrix dst(job.dst.data + (begin - job.first), job.dst.rows, end - begin, job.dst.stride);
    switch (part.engine) {
      case Engine::kKernels: KernelSlice(src, *job.weight, begin, end, dst); break;
      case Engine::kOnednnFloat32:
        error.Add(OnednnFloat32Slice(src, *job.weight, begin, end, dst));
        break;
      case Engine::kOnednnBfloat16:
        error.Add(OnednnBfloat16Slice(input.bfloat16(), *job.weight, begin, end, dst));
        break;
      case Engine::kQuantized:
        if (part.interleaved.q != nullptr && begin % kPanelRows == 0) {
          GemmSlice(part.interleaved, src.rows, *job.weight, begin, end, dst);
        } else {
          QuantizedSlice(input.quantized(), src.rows, *job.weight, begin, end, dst);
        }
        break;
      case Engine::kPanelsFloat32:
      case Engine::kPanelsBfloat16: PanelsFloat32Slice(src, *job.weight, begin, end, dst); break;
    }
  };
  if (bytes < kInlineBytes && src.rows <= kMaxKernelRows) {
    for (int64_t slice = 0; slice < slices; ++slice) run_slice(slice, 0);
  } else {
    ThreadPool::Get().ParallelFor(slices, run_slice);
  }
  return error.Take();
}

Status LinearSlice(const LinearInput& input, std::span<const int64_t> rows,
                   const TensorView& weight, int64_t begin, int64_t end, Matrix dst,
                   const MatmulPath& path) {
  const auto count = static_cast<int64_t>(rows.size());
  const Engine engine = ChooseEngine(count, weight.dtype, path);
  if (engine == Engine::kQuantized) {
    const QuantizedRows& all = input.quantized();
    const int64_t groups = all.padded / kGroup;
    if (UsesGemm(count, weight.dtype) && begin % kPanelRows == 0) {
      const InterleavedSize size(count, all.padded);
      const InterleavedRows some =
          InterleavedAt(ThreadScratch<int32_t>(size.words()), count, all.padded);
      for (int64_t group = 0; group < size.groups; ++group) {
        InterleaveGroup(
            all, [&](int64_t i) { return rows[static_cast<size_t>(i)]; }, group, count,
            ZeroOf(weight.dtype), some);
      }
      GemmSlice(some, count, weight, begin, end, dst);
      return absl::OkStatus();
    }
    auto* memory = ThreadScratch<uint8_t>(count * (all.padded + 3 * 4 * groups));
    QuantizedRows some = {reinterpret_cast<int8_t*>(memory),
                          reinterpret_cast<float*>(memory + count * all.padded), nullptr, nullptr,
                          all.padded};
    some.sum = reinterpret_cast<int32_t*>(some.scale + count * groups);
    some.half_sum = some.sum + count * groups;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows[static_cast<size_t>(i)];
      std::copy_n(all.q + row * all.padded, all.padded, some.q + i * all.padded);
      std::copy_n(all.scale + row * groups, groups, some.scale + i * groups);
      std::copy_n(all.sum + row * groups, groups, some.sum + i * groups);
      std::copy_n(all.half_sum + row * groups, groups, some.half_sum + i * groups);
    }
    QuantizedSlice(some, count, weight, begin, end, dst);
    return absl::OkStatus();
  }
  // The float engines read consecutive rows.
  static thread_local std::vector<float> gathered;
  const int64_t k = input.src().cols;
  gathered.resize(static_cast<size_t>(count * k));
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(input.src().row(rows[static_cast<size_t>(i)]), k, gathered.data() + i * k);
  }
  const ConstMatrix src(gathered.data(), count, k);
  switch (engine) {
    case Engine::kKernels: KernelSlice(src, weight, begin, end, dst); return absl::OkStatus();
    case Engine::kOnednnFloat32: return OnednnFloat32Slice(src, weight, begin, end, dst);
    case Engine::kOnednnBfloat16: {
      std::vector<uint16_t> rounded(gathered.size());
      Kernels().f32_to_bf16(rounded.data(), gathered.data(), count * k);
      return OnednnBfloat16Slice({rounded.data(), count, k}, weight, begin, end, dst);
    }
    default: PanelsFloat32Slice(src, weight, begin, end, dst); return absl::OkStatus();
  }
}

}  // namespace gemloupe
