#include "ops/audio_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/status.h"
#include "ops/dispatch.h"
#include "ops/rows.h"

namespace gemloupe {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// The keys [begin, begin + count) that row t of the queries sees.
struct Window {
  int64_t begin;
  int64_t count;
};
Window WindowOf(const AudioAttentionShape& shape, int64_t t, int64_t before) {
  const int64_t begin = std::max<int64_t>(0, before + t + 1 - shape.window);
  return {begin, before + t + 1 - begin};
}

// Scores [count] of one query and head; `content` and `result` hold count values.
void WindowScores(const AudioAttentionShape& shape, const float* q, ConstMatrix keys, Window window,
                  int64_t head, float* content, float* result) {
  const int64_t column = head * shape.head_dim;
  const MatmulKernel matmul = Kernels().matmul_f32;
  matmul(content, window.count, q + column, 0, keys.row(window.begin) + column, keys.stride, 1,
         window.count, shape.head_dim, {});
  const ConstMatrix r = shape.distances;
  matmul(result, window.count, q + column, 0, r.row(shape.window - window.count) + column, r.stride,
         1, window.count, shape.head_dim, {});
  Kernels().add(result, result, content, window.count);
  Kernels().softcap(result, shape.softcap, window.count);
}

void SoftmaxOf(float* x, int64_t n) {
  const float max = Kernels().max(x, n);
  const float sum = Kernels().exp_sum(x, x, max, n);
  Kernels().scale(x, x, 1.0f / sum, n);
}

// z of one row and head += weights [count] · values.
void AddValues(const AudioAttentionShape& shape, const float* weights, ConstMatrix values,
               Window window, int64_t head, float* z) {
  const int64_t column = head * shape.head_dim;
  std::fill_n(z + column, shape.head_dim, 0.0f);
  Kernels().accumulate_f32(z + column, shape.head_dim, weights, window.count,
                           values.row(window.begin) + column, values.stride, 1, window.count,
                           shape.head_dim, {});
}

int64_t RowWork(const AudioAttentionShape& shape, int64_t cols) {
  return 2 * shape.window * cols * static_cast<int64_t>(sizeof(float));
}

}  // namespace

void AudioAttention(const AudioAttentionShape& shape, ConstMatrix q, ConstMatrix keys,
                    ConstMatrix values, Matrix z) {
  const int64_t before = keys.rows - q.rows;
  const int64_t heads = q.cols / shape.head_dim;
  GL_CHECK(before >= 0 && values.rows == keys.rows && shape.distances.rows == shape.window);
  ForRows(q.rows, RowWork(shape, q.cols), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(2 * shape.window));
    float* content = scratch.data();
    float* weights = content + shape.window;
    for (int64_t t = begin; t < end; ++t) {
      const Window window = WindowOf(shape, t, before);
      for (int64_t head = 0; head < heads; ++head) {
        WindowScores(shape, q.row(t), keys, window, head, content, weights);
        SoftmaxOf(weights, window.count);
        AddValues(shape, weights, values, window, head, z.row(t));
      }
    }
  });
}

void AudioAttentionScores(const AudioAttentionShape& shape, ConstMatrix q, ConstMatrix keys,
                          Matrix scores) {
  const int64_t before = keys.rows - q.rows;
  ForRows(scores.rows, RowWork(shape, shape.head_dim), [&](int64_t begin, int64_t end) {
    std::vector<float> content(static_cast<size_t>(shape.window));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t t = row % q.rows;
      const Window window = WindowOf(shape, t, before);
      std::fill_n(scores.row(row), scores.cols, kNothing);
      WindowScores(shape, q.row(t), keys, window, row / q.rows, content.data(),
                   scores.row(row) + window.begin);
    }
  });
}

void AudioAttentionPattern(ConstMatrix scores, Matrix pattern) {
  ForRows(scores.rows, scores.cols * static_cast<int64_t>(sizeof(float)),
          [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
              std::copy_n(scores.row(row), scores.cols, pattern.row(row));
              // A query whose every key was taken away looks at nothing.
              if (Kernels().max(pattern.row(row), scores.cols) == kNothing) {
                std::fill_n(pattern.row(row), scores.cols, 0.0f);
              } else {
                SoftmaxOf(pattern.row(row), scores.cols);
              }
            }
          });
}

void AudioAttentionOutput(const AudioAttentionShape& shape, ConstMatrix pattern, ConstMatrix values,
                          Matrix z) {
  const int64_t before = values.rows - z.rows;
  ForRows(z.rows, RowWork(shape, z.cols), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Window window = WindowOf(shape, t, before);
      for (int64_t head = 0; head < z.cols / shape.head_dim; ++head) {
        const float* weights = pattern.row(head * z.rows + t) + window.begin;
        AddValues(shape, weights, values, window, head, z.row(t));
      }
    }
  });
}

}  // namespace gemloupe
