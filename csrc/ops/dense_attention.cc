#include "ops/dense_attention.h"

#include <algorithm>

#include "base/first_error.h"
#include "base/thread_pool.h"
#include "ops/dispatch.h"
#include "ops/onednn.h"

namespace gemloupe {
namespace {

// Queries of one task: their scores for 2,304 keys are 1.2 MB, which the second-level cache holds.
constexpr int64_t kQueries = 128;

float* Scores(int64_t count) {
  static thread_local AlignedBuffer buffer;
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  if (buffer.size() < bytes) buffer = AlignedBuffer(bytes);
  return reinterpret_cast<float*>(buffer.data());
}

ConstMatrix Columns(ConstMatrix x, int64_t begin, int64_t count) {
  return {x.data + begin, x.rows, count, x.stride};
}

}  // namespace

Status DenseAttention(ConstMatrix q, ConstMatrix k, ConstMatrix v, int64_t head_dim, Matrix z,
                      const MatmulPath& path, Arena& arena) {
  GL_CHECK(q.rows == k.rows && k.rows == v.rows && k.cols == v.cols && z.cols == q.cols);
  const int64_t heads = q.cols / head_dim;
  const int64_t group = q.cols / k.cols;
  const Arena::Scope scope(arena);
  // Our kernels read the right side of a product [k, n] by columns, oneDNN faster by rows.
  const bool by_rows = ChooseEngine(q.rows, DType::kFloat32, path) == Engine::kOnednnFloat32;
  const ConstMatrix turned = by_rows ? k : v;
  const Matrix columns = arena.NewMatrix(turned.cols, turned.rows);  // [K · H, T]
  ThreadPool::Get().ParallelFor(turned.cols / head_dim, [&](int64_t head, int) {
    Kernels().transpose(columns.row(head * head_dim), columns.stride, turned.data + head * head_dim,
                        turned.stride, turned.rows, head_dim);
  });
  const int64_t blocks = (q.rows + kQueries - 1) / kQueries;
  FirstError error;
  ThreadPool::Get().ParallelFor(heads * blocks, [&](int64_t task, int) {
    const int64_t head = task / blocks;
    const int64_t first = task % blocks * kQueries;
    const int64_t rows = std::min(kQueries, q.rows - first);
    const int64_t kv_begin = head / group * head_dim;
    const Matrix scores(Scores(kQueries * k.rows), rows, k.rows);
    const ConstMatrix queries = Columns(q.RowRange(first, rows), head * head_dim, head_dim);
    const Matrix out(z.row(first) + head * head_dim, rows, head_dim, z.stride);
    const ConstMatrix of_head(columns.RowRange(kv_begin, head_dim));
    if (by_rows) {
      error.Add(OnednnMatmulColumnsF32(queries, of_head, scores));
    } else {
      LinearAlone(queries, Columns(k, kv_begin, head_dim), scores);
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* of = scores.row(row);
      const float max = Kernels().max(of, scores.cols);
      const float sum = Kernels().exp_sum(of, of, max, scores.cols);
      Kernels().scale(of, of, 1.0f / sum, scores.cols);
    }
    if (by_rows) {
      error.Add(OnednnMatmulColumnsF32(scores, Columns(v, kv_begin, head_dim), out));
    } else {
      LinearAlone(scores, of_head, out);
    }
  });
  return error.Take();
}

}  // namespace gemloupe
