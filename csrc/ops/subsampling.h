#ifndef GEMLOUPE_OPS_SUBSAMPLING_H_
#define GEMLOUPE_OPS_SUBSAMPLING_H_

#include <cstdint>
#include <vector>

#include "base/tensor.h"

namespace gemloupe {

// A 3 × 3 convolution over (time, band) with stride 2 and a border of zeros, a mean-subtracting norm
// over the channels of each band, and ReLU.
struct SubsamplingStep {
  std::vector<float> weight;  // [3, 3, channels_in, channels_out]: (time, band)
  std::vector<float> norm;    // [channels_out]
  int64_t channels_in = 1;
  float eps = 0.0f;

  int64_t channels_out() const { return static_cast<int64_t>(norm.size()); }
};

// Times that halve: t of n becomes (t + 1) / 2 of (n + 1) / 2.
inline int64_t Halved(int64_t n) { return (n + 1) / 2; }

// dst row i is time dst_first + i: [bands / 2, channels_out] of the times 2t − 1, 2t and 2t + 1, of
// which src holds those from src_first on, [bands, channels_in] each. Times that it lacks are zeros.
void Subsample(const SubsamplingStep& step, ConstMatrix src, int64_t src_first, int64_t dst_first,
               Matrix dst);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_SUBSAMPLING_H_
