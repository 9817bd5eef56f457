#include "ops/attention_steps.h"

#include <algorithm>
#include <limits>

#include "base/thread_pool.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

}  // namespace

void AttentionScores(ConstMatrix q, ConstMatrix keys, int64_t head_dim, const KeyRange* ranges,
                     Matrix scores) {
  const int64_t group = q.cols / keys.cols;
  ThreadPool::Get().ParallelFor(scores.rows, [&](int64_t at, int) {
    const int64_t head = at / q.rows;
    const int64_t t = at % q.rows;
    float* row = scores.row(at);
    std::fill_n(row, scores.cols, kMinusInfinity);
    const auto [begin, end] = ranges[t];
    MatmulKernelFor(DType::kFloat32)(row + begin, scores.stride, q.row(t) + head * head_dim,
                                     q.stride, keys.row(begin) + head / group * head_dim,
                                     keys.stride, 1, end - begin, head_dim, {});
  });
}

void AttentionPattern(ConstMatrix scores, int64_t rows, const KeyRange* ranges, Matrix pattern) {
  ThreadPool::Get().ParallelFor(scores.rows, [&](int64_t at, int) {
    const auto [begin, end] = ranges[at % rows];
    float* row = pattern.row(at);
    std::fill_n(row, pattern.cols, 0.0f);
    const float* src = scores.row(at) + begin;
    const float max = Kernels().max(src, end - begin);
    if (max == kMinusInfinity) return;
    const float sum = Kernels().exp_sum(row + begin, src, max, end - begin);
    Kernels().scale(row + begin, row + begin, 1.0f / sum, end - begin);
  });
}

void AttentionOutput(ConstMatrix pattern, ConstMatrix values, int64_t head_dim,
                     const KeyRange* ranges, Matrix z) {
  const int64_t group = z.cols / values.cols;
  ThreadPool::Get().ParallelFor(pattern.rows, [&](int64_t at, int) {
    const int64_t head = at / z.rows;
    const int64_t t = at % z.rows;
    const auto [begin, end] = ranges[t];
    float* dst = z.row(t) + head * head_dim;
    std::fill_n(dst, head_dim, 0.0f);
    AccumulateKernelFor(DType::kFloat32)(dst, z.stride, pattern.row(at) + begin, pattern.stride,
                                         values.row(begin) + head / group * head_dim, values.stride,
                                         1, end - begin, head_dim, {});
  });
}

}  // namespace gemloupe
