#ifndef GEMLOUPE_OPS_ROPE_H_
#define GEMLOUPE_OPS_ROPE_H_

#include <cstdint>
#include <vector>

#include "base/memory.h"
#include "base/tensor.h"

namespace gemloupe {

// How the heads of one layer type rotate. `pairs` of the head_dim / 2 pairs (i, i + head_dim / 2)
// rotate, with inv_freq[i] = theta^(−2i / head_dim) / factor; the others keep their values
// ("proportional" RoPE; pairs = head_dim / 2 is the default kind).
struct RopeSpec {
  float theta = 0.0f;
  float factor = 1.0f;
  int64_t head_dim = 0;
  int64_t pairs = 0;

  bool operator==(const RopeSpec&) const = default;
};

// inv_freq [pairs], by scalar powf: the vector variants of other libraries differ in the last bit.
std::vector<float> InverseFrequencies(const RopeSpec& spec);

// Cosines and sines [T, pairs] of one pass.
struct RopeAngles {
  ConstMatrix cos;
  ConstMatrix sin;
};

// angle = float(position) · inv_freq in float32, as the reference computes it: a more exact angle is
// another one at far positions.
RopeAngles ComputeRopeAngles(const std::vector<float>& inv_freq,
                             const std::vector<int64_t>& positions, Arena& arena);

// Rotates the heads of x [T, N · head_dim] in place.
void ApplyRope(const RopeAngles& angles, int64_t head_dim, Matrix x);

// Rotates the first half of every head of x [T, N · head_dim] by `columns`, the second by `rows`: the
// angles [T, head_dim / 4] of a patch's place in its image.
void ApplyAxialRope(const RopeAngles& columns, const RopeAngles& rows, int64_t head_dim, Matrix x);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_ROPE_H_
