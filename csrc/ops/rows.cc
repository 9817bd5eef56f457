#include "ops/rows.h"

#include <cmath>
#include <cstring>

#include "base/status.h"
#include "ops/convert.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

int64_t RowBytes(ConstMatrix x) { return x.cols * static_cast<int64_t>(sizeof(float)); }

}  // namespace

void RmsNorm(ConstMatrix src, const float* weight, int64_t width, float eps, Matrix dst) {
  GL_CHECK(src.rows == dst.rows && src.cols == dst.cols && src.cols % width == 0);
  ForRows(src.rows, RowBytes(src), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < src.cols; column += width) {
        Kernels().rms_norm(dst.row(row) + column, src.row(row) + column, weight, width, eps);
      }
    }
  });
}

void LayerNorm(ConstMatrix src, const float* weight, const float* bias, float eps, Matrix dst) {
  ForRows(src.rows, 4 * RowBytes(src), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = src.row(row);
      float* out = dst.row(row);
      double sum = 0.0;
      for (int64_t i = 0; i < src.cols; ++i) sum += x[i];
      const double mean = sum / static_cast<double>(src.cols);
      double squares = 0.0;
      for (int64_t i = 0; i < src.cols; ++i) squares += (x[i] - mean) * (x[i] - mean);
      const double variance = squares / static_cast<double>(src.cols);
      const auto scale = static_cast<float>(1.0 / std::sqrt(variance + static_cast<double>(eps)));
      const auto shift = static_cast<float>(mean);
      for (int64_t i = 0; i < src.cols; ++i) out[i] = (x[i] - shift) * scale * weight[i] + bias[i];
    }
  });
}

void GeluMul(ConstMatrix gate, ConstMatrix up, Matrix dst) {
  ForRows(dst.rows, 4 * RowBytes(gate), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Kernels().gelu_mul(dst.row(row), gate.row(row), up.row(row), dst.cols);
    }
  });
}

void SigmoidMul(ConstMatrix x, ConstMatrix gate, Matrix dst) {
  ForRows(dst.rows, 4 * RowBytes(x), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Kernels().sigmoid_mul(dst.row(row), x.row(row), gate.row(row), dst.cols);
    }
  });
}

void Clamp(ConstMatrix src, float low, float high, Matrix dst) {
  ForRows(dst.rows, RowBytes(src), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Kernels().clamp(dst.row(row), src.row(row), low, high, dst.cols);
    }
  });
}

void AddScaled(ConstMatrix src, float factor, Matrix dst) {
  ForRows(dst.rows, RowBytes(src), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Kernels().add_scaled(dst.row(row), src.row(row), factor, dst.cols);
    }
  });
}

void Add(ConstMatrix a, ConstMatrix b, Matrix dst) {
  ForRows(dst.rows, RowBytes(a), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Kernels().add(dst.row(row), a.row(row), b.row(row), dst.cols);
    }
  });
}

void Scale(ConstMatrix src, float factor, Matrix dst) {
  ForRows(dst.rows, RowBytes(src), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Kernels().scale(dst.row(row), src.row(row), factor, dst.cols);
    }
  });
}

void Softcap(float cap, Matrix x) {
  ForRows(x.rows, RowBytes(x), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) Kernels().softcap(x.row(row), cap, x.cols);
  });
}

void Softmax(ConstMatrix src, Matrix dst) {
  ForRows(src.rows, RowBytes(src), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float max = Kernels().max(src.row(row), src.cols);
      const float sum = Kernels().exp_sum(dst.row(row), src.row(row), max, src.cols);
      Kernels().scale(dst.row(row), dst.row(row), 1.0f / sum, src.cols);
    }
  });
}

void CopyRows(ConstMatrix src, Matrix dst) {
  GL_CHECK(src.rows == dst.rows && src.cols == dst.cols);
  for (int64_t row = 0; row < src.rows; ++row) {
    std::memcpy(dst.row(row), src.row(row), static_cast<size_t>(src.cols) * sizeof(float));
  }
}

void GatherRows(const TensorView& table, const int32_t* ids, int64_t column, float factor,
                Matrix dst) {
  ForRows(dst.rows, RowBytes(dst), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      GL_CHECK(ids[row] >= 0 && ids[row] < table.shape[0]);
      ReadRowPart(table, ids[row], column, dst.cols, dst.row(row));
      Kernels().scale(dst.row(row), dst.row(row), factor, dst.cols);
    }
  });
}

}  // namespace gemloupe
