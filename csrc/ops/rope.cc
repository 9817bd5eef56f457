#include "ops/rope.h"

#include <cmath>

#include "base/status.h"
#include "ops/dispatch.h"

namespace gemloupe {

std::vector<float> InverseFrequencies(const RopeSpec& spec) {
  std::vector<float> inv_freq(static_cast<size_t>(spec.pairs));
  for (int64_t i = 0; i < spec.pairs; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(spec.head_dim);
    inv_freq[static_cast<size_t>(i)] = 1.0f / std::pow(spec.theta, exponent) / spec.factor;
  }
  return inv_freq;
}

RopeAngles ComputeRopeAngles(const std::vector<float>& inv_freq,
                             const std::vector<int64_t>& positions, Arena& arena) {
  const auto rows = static_cast<int64_t>(positions.size());
  const auto pairs = static_cast<int64_t>(inv_freq.size());
  const Matrix cos = arena.NewMatrix(rows, pairs);
  const Matrix sin = arena.NewMatrix(rows, pairs);
  // About 40 ns for a sine and a cosine: weigh the fork by that, not by bytes.
  ForRows(rows, 128 * pairs, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto position = static_cast<float>(positions[static_cast<size_t>(row)]);
      for (int64_t i = 0; i < pairs; ++i) {
        const float angle = position * inv_freq[static_cast<size_t>(i)];
        cos.row(row)[i] = std::cos(angle);
        sin.row(row)[i] = std::sin(angle);
      }
    }
  });
  return {cos, sin};
}

void ApplyRope(const RopeAngles& angles, int64_t head_dim, Matrix x) {
  GL_CHECK(x.rows == angles.cos.rows && x.cols % head_dim == 0);
  ForRows(x.rows, 2 * x.cols * static_cast<int64_t>(sizeof(float)),
          [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
              for (int64_t column = 0; column < x.cols; column += head_dim) {
                Kernels().rope(x.row(row) + column, angles.cos.row(row), angles.sin.row(row),
                               angles.cos.cols, head_dim / 2);
              }
            }
          });
}

void ApplyAxialRope(const RopeAngles& columns, const RopeAngles& rows, int64_t head_dim, Matrix x) {
  GL_CHECK(x.rows == columns.cos.rows && x.cols % head_dim == 0 && head_dim % 4 == 0);
  const int64_t pairs = head_dim / 4;
  GL_CHECK(columns.cos.cols == pairs && rows.cos.cols == pairs);
  ForRows(
      x.rows, 2 * x.cols * static_cast<int64_t>(sizeof(float)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t column = 0; column < x.cols; column += head_dim) {
            float* head = x.row(row) + column;
            Kernels().rope(head, columns.cos.row(row), columns.sin.row(row), pairs, pairs);
            Kernels().rope(head + 2 * pairs, rows.cos.row(row), rows.sin.row(row), pairs, pairs);
          }
        }
      });
}

}  // namespace gemloupe
