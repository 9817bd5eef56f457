#include "ops/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/status.h"
#include "base/thread_pool.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Query rows that go over the same key block before the next one is fetched.
constexpr int64_t kTileRows = 64;

// Up to kMaxKernelRows rows (a position and a head of the group each) against one key-value head.
struct RowGroup {
  int rows = 0;
  std::array<const float*, kMaxKernelRows> q;
  std::array<float*, kMaxKernelRows> z;
  std::array<KeyRange, kMaxKernelRows> range;
  std::array<float, kMaxKernelRows> max;  // running maximum of the scores
  std::array<float, kMaxKernelRows> sum;  // running Σ exp(score − max)
};

// Scratch of one task, on the stack of its thread.
struct Scratch {
  alignas(64) float scores[kMaxKernelRows * kKvBlock];
};

// Adds one key block to the running softmax of every row of the group that sees any of it.
void AddBlock(RowGroup& group, const void* keys, const void* values, int64_t block, DType dtype,
              int64_t head_dim, int64_t q_stride, int64_t z_stride, Scratch& scratch) {
  const int64_t block_begin = block * kKvBlock;
  // Rows of a group stand in ascending position, and so do their ranges: the rows that see this
  // block are consecutive.
  int first = group.rows;
  int last = -1;
  int64_t begin = kKvBlock;
  int64_t end = 0;
  for (int r = 0; r < group.rows; ++r) {
    const int64_t row_begin = std::max(group.range[r].begin - block_begin, int64_t{0});
    const int64_t row_end = std::min(group.range[r].end - block_begin, kKvBlock);
    if (row_begin >= row_end) continue;
    first = std::min(first, r);
    last = r;
    begin = std::min(begin, row_begin);
    end = std::max(end, row_end);
  }
  if (last < 0) return;
  const int rows = last - first + 1;
  const auto element = static_cast<int64_t>(DTypeSize(dtype));
  const auto* key = static_cast<const uint8_t*>(keys) + begin * head_dim * element;
  const auto* value = static_cast<const uint8_t*>(values) + begin * head_dim * element;
  MatmulKernelFor(dtype)(scratch.scores, kKvBlock, group.q[first], q_stride, key, head_dim, rows,
                         end - begin, head_dim);
  for (int i = 0; i < rows; ++i) {
    const int r = first + i;
    float* scores = scratch.scores + i * kKvBlock;
    const int64_t row_begin = std::max(group.range[r].begin - block_begin, int64_t{0});
    const int64_t row_end = std::min(group.range[r].end - block_begin, kKvBlock);
    if (row_begin >= row_end) {
      std::fill_n(scores, end - begin, 0.0f);
      continue;
    }
    std::fill(scores, scores + (row_begin - begin), kMinusInfinity);
    std::fill(scores + (row_end - begin), scores + (end - begin), kMinusInfinity);
    const float max = std::max(group.max[r], Kernels().max(scores, end - begin));
    const float shrink = group.max[r] == max ? 1.0f : std::exp(group.max[r] - max);
    // A fixed window of the block keeps the order of the sum independent of the group's other rows.
    float* visible = scores + (row_begin - begin);
    const float sum = Kernels().exp_sum(visible, visible, max, row_end - row_begin);
    std::fill(scores, visible, 0.0f);
    std::fill(scores + (row_end - begin), scores + (end - begin), 0.0f);
    group.sum[r] = group.sum[r] * shrink + sum;
    group.max[r] = max;
    if (shrink != 1.0f) Kernels().scale(group.z[r], group.z[r], shrink, head_dim);
  }
  AccumulateKernelFor(dtype)(group.z[first], z_stride, scratch.scores, kKvBlock, value, head_dim,
                             rows, end - begin, head_dim);
}

}  // namespace

void Attention(ConstMatrix q, const KvView& kv, const KeyRange* ranges, Matrix z) {
  const int64_t head_dim = kv.head_dim;
  const int64_t heads = q.cols / head_dim;
  const int64_t group_heads = heads / kv.num_heads;
  GL_CHECK(group_heads * kv.num_heads * head_dim == q.cols);

  int64_t first_key = std::numeric_limits<int64_t>::max();
  int64_t last_key = 0;
  for (int64_t t = 0; t < q.rows; ++t) {
    first_key = std::min(first_key, ranges[t].begin);
    last_key = std::max(last_key, ranges[t].end);
  }
  GL_CHECK(first_key >= kv.first_block * kKvBlock);
  GL_CHECK(last_key <= (kv.first_block + static_cast<int64_t>(kv.keys.size())) * kKvBlock);

  // A row group is one head at consecutive positions (prefill) or heads at one position (decode):
  // either way its rows are evenly spaced in q and z.
  const bool by_head = q.rows == 1;
  const int64_t row_stride = by_head ? head_dim : q.stride;
  const int64_t z_stride = by_head ? head_dim : z.stride;
  const int64_t lines = by_head ? kv.num_heads : heads;      // independent runs of rows
  const int64_t line_rows = by_head ? group_heads : q.rows;  // rows of each
  int64_t tile = kTileRows;
  if (by_head) {
    // The heads that share keys are spread over the threads; few rows, so small tiles.
    const int64_t tiles = std::max<int64_t>(1, ThreadPool::Get().threads() / kv.num_heads);
    tile = std::clamp<int64_t>((group_heads + tiles - 1) / tiles, 1, kTileRows);
  }
  const int64_t tiles_per_line = (line_rows + tile - 1) / tile;

  const auto run_tile = [&](int64_t task, int) {
    const int64_t line = task / tiles_per_line;
    const int64_t tile_begin = task % tiles_per_line * tile;
    const int64_t tile_end = std::min(line_rows, tile_begin + tile);
    const int64_t kv_head = by_head ? line : line / group_heads;
    std::array<RowGroup, (kTileRows + kMaxKernelRows - 1) / kMaxKernelRows> groups;
    size_t group_count = 0;
    int64_t begin = std::numeric_limits<int64_t>::max();
    int64_t end = 0;
    for (int64_t row = tile_begin; row < tile_end; ++row) {
      if ((row - tile_begin) % kMaxKernelRows == 0) groups[group_count++].rows = 0;
      RowGroup& group = groups[group_count - 1];
      const int64_t t = by_head ? 0 : row;
      const int64_t head = by_head ? kv_head * group_heads + row : line;
      const int r = group.rows++;
      group.q[r] = q.row(t) + head * head_dim;
      group.z[r] = z.row(t) + head * head_dim;
      group.range[r] = ranges[t];
      group.max[r] = kMinusInfinity;
      group.sum[r] = 0.0f;
      std::fill_n(group.z[r], head_dim, 0.0f);
      begin = std::min(begin, ranges[t].begin);
      end = std::max(end, ranges[t].end);
    }
    Scratch scratch;
    const int64_t offset =
        kv_head * kKvBlock * head_dim * static_cast<int64_t>(DTypeSize(kv.dtype));
    for (int64_t block = begin / kKvBlock; block * kKvBlock < end; ++block) {
      const auto at = static_cast<size_t>(block - kv.first_block);
      const auto* keys = static_cast<const uint8_t*>(kv.keys[at]) + offset;
      const auto* values = static_cast<const uint8_t*>(kv.values[at]) + offset;
      for (size_t g = 0; g < group_count; ++g) {
        AddBlock(groups[g], keys, values, block, kv.dtype, head_dim, row_stride, z_stride, scratch);
      }
    }
    for (size_t g = 0; g < group_count; ++g) {
      for (int r = 0; r < groups[g].rows; ++r) {
        Kernels().scale(groups[g].z[r], groups[g].z[r], 1.0f / groups[g].sum[r], head_dim);
      }
    }
  };

  const int64_t tasks = lines * tiles_per_line;
  const int64_t bytes = (last_key - first_key) * kv.num_heads * head_dim * 2 *
                        static_cast<int64_t>(DTypeSize(kv.dtype));
  if (tasks == 1 || bytes * std::max<int64_t>(1, q.rows / 8) < kInlineBytes) {
    for (int64_t task = 0; task < tasks; ++task) run_tile(task, 0);
  } else {
    ThreadPool::Get().ParallelFor(tasks, run_tile);
  }
}

}  // namespace gemloupe
