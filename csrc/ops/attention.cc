#include "ops/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/memory.h"
#include "base/status.h"
#include "base/thread_pool.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Query rows (a position and a head each) that go over a key block together. Their q and z stay in
// the second-level cache beside the block: 48 · 512 floats are 96 KiB.
constexpr int64_t kTileRows = 48;
// Up to this many rows read the stored elements; more rows share a copy widened to float32.
constexpr int64_t kDirectRows = 16;
// Most floats of partial results, where tiles could be shared instead of chunks.
constexpr int64_t kMaxSplitFloats = 8 << 20;
// Rows of 512 floats would all fall into the same sets of the first-level cache.
constexpr int64_t kPadding = 16;
// Rows of one kernel call on a widened block: the shape that fills the registers best.
constexpr int kWideRows = 6;

MatmulKernel ScoreKernel(DType dtype) {
  return dtype == DType::kInt8 ? Kernels().matmul_i8 : MatmulKernelFor(dtype);
}

AccumulateKernel ValueKernel(DType dtype) {
  return dtype == DType::kInt8 ? Kernels().accumulate_i8 : AccumulateKernelFor(dtype);
}

// Memory of one thread that grows to the largest use and stays: decoding allocates nothing.
class Buffer {
 public:
  float* Floats(int64_t count) {
    const auto bytes = static_cast<size_t>(count) * sizeof(float);
    if (memory_.size() < bytes) memory_ = AlignedBuffer(bytes);
    return reinterpret_cast<float*>(memory_.data());
  }

 private:
  AlignedBuffer memory_;
};

// Softmax of some rows over a part of the positions, not yet divided by its sum.
struct Partial {
  float* max = nullptr;  // [R] largest score
  float* sum = nullptr;  // [R] Σ exp(score − max); 0: nothing was seen
  float* z = nullptr;    // [R, H] Σ exp(score − max) · v, dims as stored

  static int64_t Floats(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }
  static Partial At(float* memory, int64_t rows, int64_t head_dim) {
    return {memory + rows * head_dim, memory + rows * (head_dim + 1), memory};
  }
};

// Adds `part` to what row r of `total` has seen so far: earlier positions.
void Merge(const Partial& total, const Partial& part, int64_t r, int64_t head_dim) {
  if (part.sum[r] == 0.0f) return;
  float* z = total.z + r * head_dim;
  const float* added = part.z + r * head_dim;
  if (total.sum[r] == 0.0f) {
    total.max[r] = part.max[r];
    total.sum[r] = part.sum[r];
    std::copy_n(added, head_dim, z);
    return;
  }
  const float max = std::max(total.max[r], part.max[r]);
  const float shrink = total.max[r] == max ? 1.0f : std::exp(total.max[r] - max);
  const float factor = part.max[r] == max ? 1.0f : std::exp(part.max[r] - max);
  total.max[r] = max;
  total.sum[r] = total.sum[r] * shrink + part.sum[r] * factor;
  if (shrink != 1.0f) Kernels().scale(z, z, shrink, head_dim);
  Kernels().add_scaled(z, added, factor, head_dim);
}

// Rows of a tile: queries of one key-value head, positions ascending, the heads of a group side by
// side. q [R, stride]: the dims in the order of the stored values (times w), then the rotated dims.
struct Tile {
  int64_t kv_head = 0;
  int64_t rows = 0;
  int64_t stride = 0;
  float* q = nullptr;
  std::array<KeyRange, kTileRows> range;
};

// What the kernels read of one block and head: scores are
// score_scale ⊙ (q[:value_dims] · vᵀ) + key_scale ⊙ (q[value_dims:] · kᵀ), the first only if derived.
struct BlockView {
  DType dtype;
  const uint8_t* keys;
  const uint8_t* values;
  const float* key_scales;
  const float* value_scales;
  int64_t key_stride;  // elements from row to row
  int64_t value_stride;
  // What the products with the keys and with the values fetch meanwhile.
  Fetch key_fetch;
  Fetch value_fetch;
};

class Attender {
 public:
  Attender(ConstMatrix q, const KvView& kv, const KeyRange* ranges, Matrix z)
      : q_(q), kv_(kv), ranges_(ranges), z_(z), head_dim_(kv.layout.head_dim) {
    const int64_t heads = q.cols / head_dim_;
    group_ = heads / kv.layout.num_heads;
    GL_CHECK(group_ * kv.layout.num_heads * head_dim_ == q.cols);
    value_dims_ = kv.layout.derived ? head_dim_ - 2 * kv.layout.pairs : 0;
    stride_ = value_dims_ + kv.layout.key_dims() + kPadding;
    line_rows_ = q.rows * group_;
    tiles_per_head_ = (line_rows_ + kTileRows - 1) / kTileRows;
    first_ = ranges[0].begin;
    last_ = ranges[q.rows - 1].end;
    GL_CHECK(first_ >= kv.first_block * kKvBlock);
    GL_CHECK(last_ <= (kv.first_block + static_cast<int64_t>(kv.blocks.size())) * kKvBlock);
  }

  void Run();

 private:
  int64_t tiles() const { return tiles_per_head_ * kv_.layout.num_heads; }
  // Chunks that hold positions [first_, last_).
  int64_t first_chunk() const { return kv_.chunks.Of(first_); }
  int64_t chunks() const { return kv_.chunks.Of(last_ - 1) - first_chunk() + 1; }
  // Rows of the largest tile.
  int64_t tile_rows() const { return std::min(kTileRows, line_rows_); }

  Tile MakeTile(int64_t index, float* q) const;
  void AttendChunk(const Tile& tile, int64_t chunk, const Partial& part, float* wide) const;
  void AddBlock(const Tile& tile, int64_t block, const BlockView& view, const Partial& part,
                int64_t first, int rows) const;
  BlockView Stored(int64_t block, int64_t kv_head) const;
  BlockView Widened(const BlockView& stored, float* wide) const;
  void Finish(const Partial& total, int64_t index, int64_t r) const;
  void RunTile(int64_t index) const;
  void RunSplit() const;

  ConstMatrix q_;
  const KvView& kv_;
  const KeyRange* ranges_;
  Matrix z_;
  int64_t head_dim_;
  int64_t group_;       // query heads of one key-value head
  int64_t value_dims_;  // dims whose scores come from the stored values
  int64_t stride_;      // floats of a row of a tile's q
  int64_t line_rows_;   // rows of one key-value head
  int64_t tiles_per_head_;
  int64_t first_;  // positions that any row sees: [first_, last_)
  int64_t last_;
};

Tile Attender::MakeTile(int64_t index, float* q) const {
  Tile tile;
  tile.kv_head = index / tiles_per_head_;
  const int64_t begin = index % tiles_per_head_ * kTileRows;
  tile.rows = std::min(kTileRows, line_rows_ - begin);
  tile.stride = stride_;
  tile.q = q;
  const int64_t pairs = kv_.layout.pairs;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t t = (begin + r) / group_;
    const int64_t head = tile.kv_head * group_ + (begin + r) % group_;
    const float* src = q_.row(t) + head * head_dim_;
    float* dst = q + r * stride_;
    tile.range[static_cast<size_t>(r)] = ranges_[t];
    if (!kv_.layout.derived) {
      std::copy_n(src, head_dim_, dst);
      continue;
    }
    // q · (w ⊙ v) = (q ⊙ w) · v.
    ForStoredDims(kv_.layout, [&](int64_t dim, int64_t at, int64_t count) {
      if (at < value_dims_) Kernels().mul(dst + at, src + dim, kv_.key_weight + dim, count);
    });
    std::copy_n(src, pairs, dst + value_dims_);
    std::copy_n(src + head_dim_ / 2, pairs, dst + value_dims_ + pairs);
  }
  return tile;
}

BlockView Attender::Stored(int64_t block, int64_t kv_head) const {
  const KvBlockLayout& layout = kv_.layout;
  const uint8_t* data = kv_.blocks[static_cast<size_t>(block - kv_.first_block)];
  BlockView view = {layout.dtype,
                    data + layout.keys(kv_head),
                    data + layout.values(kv_head),
                    nullptr,
                    nullptr,
                    layout.key_dims(),
                    head_dim_,
                    {},
                    {}};
  if (layout.scaled()) {
    view.key_scales = reinterpret_cast<const float*>(data + layout.key_scales(kv_head));
    view.value_scales = reinterpret_cast<const float*>(data + layout.value_scales(kv_head));
  }
  return view;
}

BlockView Attender::Widened(const BlockView& stored, float* wide) const {
  const KvBlockLayout& layout = kv_.layout;
  BlockView view = stored;
  view.dtype = DType::kFloat32;
  view.key_stride = layout.key_dims() + kPadding;
  view.value_stride = head_dim_ + kPadding;
  float* wide_values = wide + kKvBlock * view.key_stride;
  for (int64_t at = 0; at < kKvBlock; ++at) {
    WidenKv(wide + at * view.key_stride, stored.keys + at * layout.key_bytes(), stored.dtype,
            layout.key_dims());
    WidenKv(wide_values + at * view.value_stride, stored.values + at * layout.value_bytes(),
            stored.dtype, head_dim_);
  }
  view.keys = reinterpret_cast<const uint8_t*>(wide);
  view.values = reinterpret_cast<const uint8_t*>(wide_values);
  return view;
}

// Adds one key block to the running softmax of rows [first, first + rows) of the tile.
void Attender::AddBlock(const Tile& tile, int64_t block, const BlockView& view, const Partial& part,
                        int64_t first, int rows) const {
  const int64_t block_begin = block * kKvBlock;
  const auto row_begin = [&](int64_t r) {
    return std::max(tile.range[static_cast<size_t>(r)].begin - block_begin, int64_t{0});
  };
  const auto row_end = [&](int64_t r) {
    return std::min(tile.range[static_cast<size_t>(r)].end - block_begin, kKvBlock);
  };
  // Ranges ascend: the rows that see this block are consecutive.
  while (rows > 0 && row_begin(first) >= row_end(first)) ++first, --rows;
  while (rows > 0 && row_begin(first + rows - 1) >= row_end(first + rows - 1)) --rows;
  if (rows == 0) return;
  const int64_t begin = row_begin(first);
  const int64_t end = row_end(first + rows - 1);
  const int64_t count = end - begin;
  const int64_t element =
      view.dtype == DType::kInt8 ? 1 : static_cast<int64_t>(DTypeSize(view.dtype));
  const int64_t key_dims = kv_.layout.key_dims();
  const uint8_t* keys = view.keys + begin * view.key_stride * element;
  const uint8_t* values = view.values + begin * view.value_stride * element;
  const float* q = tile.q + first * tile.stride;

  alignas(64) float scores[kMaxKernelRows * kKvBlock];
  alignas(64) float unrotated[kMaxKernelRows * kKvBlock];
  const MatmulKernel matmul = ScoreKernel(view.dtype);
  if (key_dims > 0) {
    matmul(scores, kKvBlock, q + value_dims_, tile.stride, keys, view.key_stride, rows, count,
           key_dims, view.key_fetch);
  } else {
    std::fill_n(scores, rows * kKvBlock, 0.0f);
  }
  if (value_dims_ > 0) {
    matmul(unrotated, kKvBlock, q, tile.stride, values, view.value_stride, rows, count, value_dims_,
           {});
  }
  for (int i = 0; i < rows; ++i) {
    const int64_t r = first + i;
    float* row = scores + i * kKvBlock;
    float* row_unrotated = unrotated + i * kKvBlock;
    if (view.key_scales != nullptr) {
      Kernels().mul(row, row, view.key_scales + begin, count);
      if (value_dims_ > 0) {
        Kernels().mul(row_unrotated, row_unrotated, view.value_scales + begin, count);
      }
    }
    if (value_dims_ > 0) Kernels().add(row, row, row_unrotated, count);
    float* visible = row + (row_begin(r) - begin);
    const int64_t seen = row_end(r) - row_begin(r);
    const float max = std::max(part.max[r], Kernels().max(visible, seen));
    const float shrink = part.max[r] == max ? 1.0f : std::exp(part.max[r] - max);
    // Only the visible scores, in place: the order of the sum is the row's own.
    const float sum = Kernels().exp_sum(visible, visible, max, seen);
    std::fill(row, visible, 0.0f);
    std::fill(visible + seen, row + count, 0.0f);
    part.sum[r] = part.sum[r] * shrink + sum;
    part.max[r] = max;
    if (view.value_scales != nullptr) Kernels().mul(row, row, view.value_scales + begin, count);
    float* z = part.z + r * head_dim_;
    if (shrink != 1.0f) Kernels().scale(z, z, shrink, head_dim_);
  }
  ValueKernel(view.dtype)(part.z + first * head_dim_, head_dim_, scores, kKvBlock, values,
                          view.value_stride, rows, count, head_dim_, view.value_fetch);
}

// The softmax of every row of the tile over the positions of one chunk. wide: room for a block of
// keys and values as float32.
void Attender::AttendChunk(const Tile& tile, int64_t chunk, const Partial& part,
                           float* wide) const {
  std::fill_n(part.max, tile.rows, kMinusInfinity);
  std::fill_n(part.sum, tile.rows, 0.0f);
  std::fill_n(part.z, tile.rows * head_dim_, 0.0f);
  const int64_t begin = std::max(tile.range[0].begin, kv_.chunks.Begin(chunk));
  const int64_t end =
      std::min(tile.range[static_cast<size_t>(tile.rows - 1)].end, kv_.chunks.Begin(chunk + 1));
  const KvBlockLayout& layout = kv_.layout;
  const bool direct = tile.rows <= kDirectRows;
  for (int64_t block = begin / kKvBlock; block * kKvBlock < end; ++block) {
    BlockView view = Stored(block, tile.kv_head);
    if (!direct && view.dtype != DType::kFloat32) view = Widened(view, wide);
    // Each product fetches what the one after it reads; where blocks are copied, the next block.
    if ((block + 1) * kKvBlock < end) {
      const BlockView next = Stored(block + 1, tile.kv_head);
      const Fetch keys = {next.keys, kKvBlock * layout.key_bytes()};
      view.value_fetch = keys;
      if (!direct) {
        view.key_fetch = keys;
        view.value_fetch = {next.values, kKvBlock * layout.value_bytes()};
      }
    }
    if (direct) view.key_fetch = {view.values, kKvBlock * layout.value_bytes()};
    const int64_t step = direct ? kMaxKernelRows : kWideRows;
    for (int64_t r = 0; r < tile.rows; r += step) {
      if (r > 0) view.key_fetch = view.value_fetch = {};  // once a block
      AddBlock(tile, block, view, part, r, static_cast<int>(std::min(step, tile.rows - r)));
    }
  }
}

// Divides by the sum and brings the dims of row r of tile `index` back into their order.
void Attender::Finish(const Partial& total, int64_t index, int64_t r) const {
  const int64_t row = index % tiles_per_head_ * kTileRows + r;
  const int64_t head = index / tiles_per_head_ * group_ + row % group_;
  float* dst = z_.row(row / group_) + head * head_dim_;
  const float* src = total.z + r * head_dim_;
  const float factor = 1.0f / total.sum[r];
  ForStoredDims(kv_.layout, [&](int64_t dim, int64_t at, int64_t count) {
    Kernels().scale(dst + dim, src + at, factor, count);
  });
}

// One tile over all of its chunks.
void Attender::RunTile(int64_t index) const {
  thread_local Buffer buffer;
  const int64_t partial = Partial::Floats(kTileRows, head_dim_);
  const int64_t q_floats = kTileRows * stride_;
  float* memory = buffer.Floats(q_floats + 2 * partial +
                                kKvBlock * (kv_.layout.key_dims() + head_dim_ + 2 * kPadding));
  const Tile tile = MakeTile(index, memory);
  const Partial total = Partial::At(memory + q_floats, kTileRows, head_dim_);
  const Partial part = Partial::At(memory + q_floats + partial, kTileRows, head_dim_);
  std::fill_n(total.sum, tile.rows, 0.0f);
  const int64_t end = tile.range[static_cast<size_t>(tile.rows - 1)].end;
  for (int64_t chunk = kv_.chunks.Of(tile.range[0].begin); kv_.chunks.Begin(chunk) < end; ++chunk) {
    AttendChunk(tile, chunk, part, memory + q_floats + 2 * partial);
    for (int64_t r = 0; r < tile.rows; ++r) Merge(total, part, r, head_dim_);
  }
  for (int64_t r = 0; r < tile.rows; ++r) Finish(total, index, r);
}

// Few tiles: their chunks are spread over the threads.
void Attender::RunSplit() const {
  thread_local Buffer buffer;
  const int64_t rows = tile_rows();
  const int64_t partial = Partial::Floats(rows, head_dim_);
  const int64_t chunks = this->chunks();
  float* memory = buffer.Floats(tiles() * chunks * partial);
  const auto part_of = [&](int64_t index, int64_t chunk) {
    return Partial::At(memory + (index * chunks + chunk) * partial, rows, head_dim_);
  };
  ThreadPool::Get().ParallelFor(tiles() * chunks, [&](int64_t task, int) {
    thread_local Buffer scratch;
    const int64_t q_floats = kTileRows * stride_;
    float* own =
        scratch.Floats(q_floats + kKvBlock * (kv_.layout.key_dims() + head_dim_ + 2 * kPadding));
    const Tile tile = MakeTile(task / chunks, own);
    AttendChunk(tile, first_chunk() + task % chunks, part_of(task / chunks, task % chunks),
                own + q_floats);
  });
  ForRows(tiles() * rows, chunks * head_dim_ * static_cast<int64_t>(sizeof(float)),
          [&](int64_t begin, int64_t end) {
            for (int64_t at = begin; at < end; ++at) {
              const int64_t index = at / rows;
              const int64_t r = at % rows;
              if (index % tiles_per_head_ * kTileRows + r >= line_rows_) continue;
              const Partial total = part_of(index, 0);
              for (int64_t chunk = 1; chunk < chunks; ++chunk) {
                Merge(total, part_of(index, chunk), r, head_dim_);
              }
              Finish(total, index, r);
            }
          });
}

void Attender::Run() {
  ThreadPool& pool = ThreadPool::Get();
  const int64_t threads = pool.threads();
  const int64_t bytes = (last_ - first_) * kv_.layout.bytes() / kKvBlock;
  if (threads == 1 || bytes * std::max<int64_t>(1, q_.rows / 8) < kInlineBytes) {
    for (int64_t index = 0; index < tiles(); ++index) RunTile(index);
    return;
  }
  const int64_t split_floats = tiles() * chunks() * Partial::Floats(tile_rows(), head_dim_);
  if (chunks() > 1 && tiles() < 4 * threads &&
      (tiles() < threads || split_floats < kMaxSplitFloats)) {
    RunSplit();
  } else {
    pool.ParallelFor(tiles(), [&](int64_t index, int) { RunTile(index); });
  }
}

}  // namespace

void Attention(ConstMatrix q, const KvView& kv, const KeyRange* ranges, Matrix z) {
  if (q.rows > 0) Attender(q, kv, ranges, z).Run();
}

}  // namespace gemloupe
