#include "ops/subsampling.h"

#include <algorithm>
#include <cmath>

#include "base/status.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

constexpr int64_t kTaps = 3;

// The 3 × 3 neighbours of every second band, one after the other: patches [bands_out, 9 · channels].
void GatherPatches(ConstMatrix src, int64_t first_row, int64_t channels, Matrix patches) {
  const int64_t bands = src.cols / channels;
  for (int64_t out = 0; out < patches.rows; ++out) {
    float* patch = patches.row(out);
    for (int64_t dt = 0; dt < kTaps; ++dt) {
      const int64_t row = first_row + dt;
      for (int64_t db = 0; db < kTaps; ++db, patch += channels) {
        const int64_t band = 2 * out - 1 + db;
        if (row < 0 || row >= src.rows || band < 0 || band >= bands) {
          std::fill_n(patch, channels, 0.0f);
        } else {
          std::copy_n(src.row(row) + band * channels, channels, patch);
        }
      }
    }
  }
}

void NormRelu(float* x, const std::vector<float>& weight, float eps) {
  const auto n = static_cast<int64_t>(weight.size());
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(n);
  float squares = 0.0f;
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) {
    x[i] = std::max(0.0f, (x[i] - mean) * inverse * weight[static_cast<size_t>(i)]);
  }
}

}  // namespace

void Subsample(const SubsamplingStep& step, ConstMatrix src, int64_t src_first, int64_t dst_first,
               Matrix dst) {
  const int64_t channels = step.channels_out();
  const int64_t taps = kTaps * kTaps * step.channels_in;
  const int64_t bands = src.cols / step.channels_in;
  GL_CHECK(dst.cols == Halved(bands) * channels);
  GL_CHECK(static_cast<int64_t>(step.weight.size()) == taps * channels);
  const int64_t work = Halved(bands) * taps * static_cast<int64_t>(sizeof(float));
  ForRows(dst.rows, work, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> scratch;
    scratch.resize(static_cast<size_t>(Halved(bands) * taps));
    const Matrix patches(scratch.data(), Halved(bands), taps);
    for (int64_t i = begin; i < end; ++i) {
      GatherPatches(src, 2 * (dst_first + i) - 1 - src_first, step.channels_in, patches);
      float* out = dst.row(i);
      std::fill_n(out, dst.cols, 0.0f);
      for (int64_t band = 0; band < patches.rows; band += kMaxKernelRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kMaxKernelRows, patches.rows - band));
        Kernels().accumulate_f32(out + band * channels, channels, patches.row(band), taps,
                                 step.weight.data(), channels, rows, taps, channels, {});
      }
      for (int64_t band = 0; band < patches.rows; ++band) {
        NormRelu(out + band * channels, step.norm, step.eps);
      }
    }
  });
}

}  // namespace gemloupe
