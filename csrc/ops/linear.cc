#include "ops/linear.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "base/first_error.h"
#include "base/thread_pool.h"
#include "kernels/packed_layout.h"
#include "ops/convert.h"
#include "ops/dispatch.h"
#include "ops/onednn.h"

namespace gemloupe {
namespace {

// A slice of weights small enough to stay in a core's L2 while the groups of rows pass over it.
constexpr int64_t kSliceBytes = 256 * 1024;
// A slice of packed weights, which one pass reads.
constexpr int64_t kPackedSliceBytes = 1024 * 1024;
// Most outputs of one oneDNN call: wide enough for its blocking, small enough to share among threads.
constexpr int64_t kOnednnSlice = 256;
// Rows from which turning a slice of weights over pays: oneDNN is a sixth faster with columns.
constexpr int64_t kColumnsRows = 128;
// Rows of one such call; their outputs and the slice stay in the second-level cache.
constexpr int64_t kColumnsBlock = 256;

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
  }
  return "";
}

// Scratch of one thread that lives as long as the thread and only grows; one for each use.
enum class Use { kForm, kColumns };
template <typename T, Use use = Use::kForm>
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
           end - begin, k, {});
  }
}

// Rows [begin, end) as float32, until the thread asks for others.
const float* FloatRows(const TensorView& weight, int64_t begin, int64_t end) {
  if (weight.dtype == DType::kFloat32 && IsAligned<float>(weight.data)) {
    return reinterpret_cast<const float*>(RowData(weight, begin));
  }
  const int64_t count = (end - begin) * weight.shape[1];
  float* widened = ThreadScratch<float>(count);
  WidenToFloat(widened, RowData(weight, begin), weight.dtype, count);
  return widened;
}

// Many rows: the slice's columns are laid out once, then multiplied with block after block of rows.
Status OnednnColumnsSlice(ConstMatrix src, const TensorView& weight, int64_t begin, int64_t end,
                          Matrix dst) {
  const int64_t k = weight.shape[1];
  // Not a power of two: the rows of a panel would share their places in the cache.
  const int64_t stride = end - begin + kPanelRows;
  float* columns = ThreadScratch<float, Use::kColumns>(stride * k);
  for (int64_t row = begin; row < end; row += kPanelRows) {
    const int64_t rows = std::min<int64_t>(kPanelRows, end - row);
    const float* of_weight = FloatRows(weight, row, row + rows);
    Kernels().transpose(columns + (row - begin), stride, of_weight, k, rows, k);
  }
  const ConstMatrix right(columns, k, end - begin, stride);
  const int64_t blocks = (src.rows + kColumnsBlock - 1) / kColumnsBlock;
  const int64_t block = (src.rows + blocks - 1) / blocks;
  for (int64_t row = 0; row < src.rows; row += block) {
    const int64_t rows = std::min(block, src.rows - row);
    GL_RETURN_IF_ERROR(
        OnednnMatmulColumnsF32(src.RowRange(row, rows), right, dst.RowRange(row, rows)));
  }
  return absl::OkStatus();
}

Status OnednnFloat32Slice(ConstMatrix src, const TensorView& weight, int64_t begin, int64_t end,
                          Matrix dst) {
  if (src.rows >= kColumnsRows) return OnednnColumnsSlice(src, weight, begin, end, dst);
  const int64_t k = weight.shape[1];
  return OnednnMatmulF32(src, ConstMatrix(FloatRows(weight, begin, end), end - begin, k), dst);
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
      if (first > 0) {
        // A slice that begins inside a panel (small models only): its outputs move to the front.
        for (int64_t i = 0; i < here; ++i) {
          float* row = unpacked + i * kPanelRows;
          std::copy(row + first, row + kPanelRows, row);
        }
      }
      kernels.panel_matmul_f32(dst.data + (output - begin), dst.stride, src.data + at, src.stride,
                               src.rows, unpacked, here, static_cast<int>(count), at > 0);
    }
    output += count;
  }
}

bool UsesGemm(int64_t rows, DType dtype) {
  return rows > kMaxKernelRows && QuantKernelsInUse().gemm[PackedFormat(dtype)] != nullptr;
}

// Rows that lie side by side for a product of `rows` rows and outputs from `begin` on; gemm does not
// begin inside a panel.
int64_t GroupWidth(int64_t rows, DType dtype, int64_t begin) {
  return begin % kPanelRows == 0 && UsesGemm(rows, dtype) ? QuantKernelsInUse().gemm_rows
                                                          : std::min<int64_t>(rows, kMatmulRows);
}

// The arrays of quantised rows, one after the other.
int64_t QuantizedWords(int64_t rows, int64_t padded, int64_t width) {
  const int64_t all = (rows + width - 1) / width * width;
  return all * (padded / 4 + 4 * (padded / kGroup));
}
QuantizedRows QuantizedAt(int32_t* memory, int64_t rows, int64_t padded, int64_t width) {
  const int64_t all = (rows + width - 1) / width * width;
  const int64_t groups = all * (padded / kGroup);
  int32_t* after = memory + all * (padded / 4);
  return {.q = memory,
          .scale = reinterpret_cast<float*>(after),
          .start = after + groups,
          .half_start = after + 2 * groups,
          .scaled_sum = reinterpret_cast<float*>(after + 3 * groups),
          .padded = padded,
          .width = width};
}

// Copies one array's entries of row `from` (rows of width 1) to row `to`.
template <class T>
void CopyEntries(const T* src, int64_t from, T* dst, int64_t to, int64_t entries, int64_t width) {
  const T* at = src + from * entries;
  T* out = dst + to / width * entries * width + to % width;
  for (int64_t i = 0; i < entries; ++i) out[i * width] = at[i];
}

// Whether rows of this width stand as tiles.
bool IsTiled(int64_t width) {
  return QuantKernelsInUse().gemm_tiles && width == QuantKernelsInUse().gemm_rows;
}

// Rows [begin, end) of dst become rows[begin … end) of src, which has width 1.
void GatherQuantized(const QuantizedRows& src, std::span<const int64_t> rows, int64_t begin,
                     int64_t end, const QuantizedRows& dst) {
  const int64_t groups = src.padded / kGroup;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = rows[static_cast<size_t>(i)];
    if (IsTiled(dst.width)) {
      for (int64_t group = 0; group < groups; ++group) {
        constexpr int64_t kWords = kGroup / 4;
        std::memcpy(dst.q + ((i / dst.width * groups + group) * dst.width + i % dst.width) * kWords,
                    src.q + (row * groups + group) * kWords, kGroup);
      }
    } else {
      CopyEntries(src.q, row, dst.q, i, src.padded / 4, dst.width);
    }
    CopyEntries(src.scale, row, dst.scale, i, groups, dst.width);
    CopyEntries(src.start, row, dst.start, i, groups, dst.width);
    CopyEntries(src.half_start, row, dst.half_start, i, groups, dst.width);
    CopyEntries(src.scaled_sum, row, dst.scaled_sum, i, groups, dst.width);
  }
}

void QuantizedSlice(const QuantizedRows& src, int64_t rows, const TensorView& weight, int64_t begin,
                    int64_t end, Matrix dst) {
  const auto* panels = static_cast<const uint8_t*>(weight.data);
  const QuantKernels& kernels = QuantKernelsInUse();
  const int format = PackedFormat(weight.dtype);
  const int64_t k = weight.shape[1];
  if (src.width > kMatmulRows) {
    GL_CHECK(begin % kPanelRows == 0);
    alignas(64) uint8_t scratch[kGemmScratchBytes];
    kernels.gemm[format](dst.data, dst.stride, src, rows, panels, begin, end, k, scratch);
    return;
  }
  for (int64_t row = 0; row < rows; row += src.width) {
    kernels.matmul[format](dst.row(row), dst.stride, src, row / src.width,
                           static_cast<int>(std::min(src.width, rows - row)), panels, begin, end,
                           k);
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

// Outputs of one slice of a product.
int64_t SliceOutputs(Engine engine, const TensorView& weight, int64_t outputs, int64_t rows) {
  const auto row_bytes =
      static_cast<int64_t>(MatrixBytes(weight.dtype, kPanelRows, weight.shape[1]) / kPanelRows);
  const int64_t cached =
      std::clamp<int64_t>(kSliceBytes / std::max<int64_t>(row_bytes, 1) / 16 * 16, 16, 4096);
  switch (engine) {
    case Engine::kKernels: return cached;
    case Engine::kOnednnFloat32:
    case Engine::kOnednnBfloat16: {
      // As many for each thread.
      const int64_t threads = ThreadPool::Get().threads();
      const int64_t each = (outputs + kOnednnSlice * threads - 1) / (kOnednnSlice * threads);
      const int64_t size = (outputs + each * threads - 1) / (each * threads);
      return std::max<int64_t>((size + kPanelRows - 1) / kPanelRows, 1) * kPanelRows;
    }
    default: break;
  }
  if (rows <= kMaxKernelRows) {
    // Large enough for streams far apart, small enough to share fairly.
    const int64_t fair = outputs / (4 * ThreadPool::Get().threads());
    const int64_t wanted = std::min(kPackedSliceBytes / std::max<int64_t>(row_bytes, 1), fair);
    return std::max<int64_t>(wanted / kPanelRows, 1) * kPanelRows;
  }
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

void LinearInput::Prepare(Engine engine, int64_t width) {
  const int64_t rows = src_.rows;
  const int64_t k = src_.cols;
  const bool held = std::any_of(quantized_.begin(), quantized_.end(),
                                [&](const QuantizedRows& form) { return form.width == width; });
  if (engine == Engine::kQuantized && !held) {
    const int64_t padded = (k + kSuperTileElements - 1) / kSuperTileElements * kSuperTileElements;
    const int64_t words = QuantizedWords(rows, padded, width);
    auto* memory = arena_->New<int32_t>(words);
    if (rows % width != 0) std::memset(memory, 0, static_cast<size_t>(words) * 4);
    const QuantizedRows form = QuantizedAt(memory, rows, padded, width);
    quantized_.push_back(form);
    if (IsTiled(width)) {
      Prepare(engine, 1);
      const QuantizedRows source = quantized(1);
      std::vector<int64_t> order(static_cast<size_t>(rows));
      std::iota(order.begin(), order.end(), 0);
      ForRows((rows + width - 1) / width, width * k, [&](int64_t begin, int64_t end) {
        GatherQuantized(source, order, begin * width, std::min(rows, end * width), form);
      });
      return;
    }
    ForRows(rows, k * static_cast<int64_t>(sizeof(float)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        QuantKernelsInUse().quantize_row(form, row, src_.row(row), k);
      }
    });
  }
  if (engine == Engine::kOnednnBfloat16 && bfloat16_.data == nullptr) {
    auto* rounded = arena_->New<uint16_t>(rows * k);
    ForRows(rows, k * static_cast<int64_t>(sizeof(float)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        Kernels().f32_to_bf16(rounded + row * k, src_.row(row), k);
      }
    });
    bfloat16_ = MatrixView<const uint16_t>(rounded, rows, k);
  }
}

const QuantizedRows& LinearInput::quantized(int64_t width) const {
  const auto form = std::find_if(quantized_.begin(), quantized_.end(),
                                 [&](const QuantizedRows& f) { return f.width == width; });
  GL_CHECK(form != quantized_.end());
  return *form;
}

namespace {

// The rows before the tail, then the tail, each as a product of its own.
Status LinearWithTail(ConstMatrix src, std::span<const LinearJob> jobs, MatmulPath path,
                      Arena& arena) {
  const int64_t body = src.rows - path.tail_rows;
  const int64_t tail = path.tail_rows;
  path.tail_rows = 0;
  std::vector<LinearJob> part(jobs.begin(), jobs.end());
  for (const auto& [begin, rows] : {std::pair{int64_t{0}, body}, std::pair{body, tail}}) {
    for (size_t i = 0; i < part.size(); ++i) part[i].dst = jobs[i].dst.RowRange(begin, rows);
    GL_RETURN_IF_ERROR(Linear(src.RowRange(begin, rows), part, path, arena));
  }
  return absl::OkStatus();
}

}  // namespace

Status Linear(ConstMatrix src, std::span<const LinearJob> jobs, const MatmulPath& path,
              Arena& arena) {
  if (path.tail_rows > 0 && path.tail_rows < src.rows) {
    return LinearWithTail(src, jobs, path, arena);
  }
  struct Slices {
    const LinearJob* job;
    Engine engine;
    int64_t first;  // index of its first slice
    int64_t size;   // outputs per slice
    int64_t width;  // of the quantised rows
  };
  const Arena::Scope scope(arena);
  LinearInput input(src, arena);
  std::vector<Slices> plan;
  int64_t slices = 0;
  int64_t bytes = 0;
  for (const LinearJob& job : jobs) {
    const TensorView& weight = *job.weight;
    GL_CHECK(weight.shape.size() == 2 && weight.shape[1] == src.cols);
    GL_CHECK(job.dst.rows == src.rows && job.first + job.dst.cols <= weight.shape[0]);
    const Engine engine = ChooseEngine(src.rows, weight.dtype, path);
    ReportDispatch(engine, src, weight, path);
    const int64_t width =
        engine == Engine::kQuantized ? GroupWidth(src.rows, weight.dtype, job.first) : 1;
    input.Prepare(engine, width);
    const Slices part = {&job, engine, slices, SliceOutputs(engine, weight, job.dst.cols, src.rows),
                         width};
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
        QuantizedSlice(input.quantized(part.width), src.rows, *job.weight, begin, end, dst);
        break;
      case Engine::kPanelsFloat32: PanelsFloat32Slice(src, *job.weight, begin, end, dst); break;
    }
  };
  if (bytes < kInlineBytes && src.rows <= kMaxKernelRows) {
    for (int64_t slice = 0; slice < slices; ++slice) run_slice(slice, 0);
  } else {
    ThreadPool::Get().ParallelFor(slices, run_slice);
  }
  return error.Take();
}

void LinearAlone(ConstMatrix src, ConstMatrix weight, Matrix dst) {
  for (int64_t row = 0; row < src.rows; row += kMaxKernelRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kMaxKernelRows, src.rows - row));
    Kernels().matmul_f32(dst.row(row), dst.stride, src.row(row), src.stride, weight.data,
                         weight.stride, rows, weight.rows, weight.cols, {});
  }
}

Status LinearSlice(const LinearInput& input, std::span<const int64_t> rows,
                   const TensorView& weight, int64_t begin, int64_t end, Matrix dst,
                   const MatmulPath& path) {
  const auto count = static_cast<int64_t>(rows.size());
  const Engine engine = ChooseEngine(count, weight.dtype, path);
  if (engine == Engine::kQuantized) {
    const QuantizedRows& all = input.quantized();
    const int64_t width = GroupWidth(count, weight.dtype, begin);
    const int64_t words = QuantizedWords(count, all.padded, width);
    auto* memory = ThreadScratch<int32_t>(words);
    if (count % width != 0) std::memset(memory, 0, static_cast<size_t>(words) * 4);
    const QuantizedRows some = QuantizedAt(memory, count, all.padded, width);
    GatherQuantized(all, rows, 0, count, some);
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
