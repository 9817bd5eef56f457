#ifndef GEMLOUPE_OPS_QUANTIZER_H_
#define GEMLOUPE_OPS_QUANTIZER_H_

#include <cstdint>

namespace gemloupe {

// Quantises x [32] to x ≈ scale · (u − zero), zero = 2^(bits − 1), for 4, 6 or 8 bits: the float16 scale
// (its bits; it may be negative) is the one of least squared error among candidates that bring the
// largest element to each of the lattice's outer points. A group that already lies on a 4-bit lattice
// (every element d · whole number) is recovered as it is. False where a scale is not finite.
bool QuantizeGroup(const float* x, int bits, uint8_t* u, uint16_t* scale);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_QUANTIZER_H_
