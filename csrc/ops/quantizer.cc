#include "ops/quantizer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/dtype.h"
#include "kernels/packed_layout.h"

namespace gemloupe {
namespace {

// Rounds to the nearest whole number, |x| < 2²²; compiles to two vector additions.
inline float Round(float x) {
  constexpr float kMagic = 0x1.8p23f;
  return (x + kMagic) - kMagic;
}

// Σ x u and Σ u² for u = clamp(round(x · inverse)): the best scale for these integers is their ratio.
struct Fit {
  float xu = 0.0f;
  float uu = 0.0f;
  // How much of Σ x² the best scale explains.
  float gain() const { return uu > 0.0f ? xu * xu / uu : 0.0f; }
};

Fit FitTo(const float* x, float inverse, float low, float high) {
  float xu[kGroup];
  float uu[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const float u = std::min(std::max(Round(x[i] * inverse), low), high);
    xu[i] = x[i] * u;
    uu[i] = u * u;
  }
  for (int half = kGroup / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      xu[i] += xu[i + half];
      uu[i] += uu[i + half];
    }
  }
  return {xu[0], uu[0]};
}

// The step d of the coarsest lattice of up to ±8 steps on which every element lies, up to the rounding of
// d · u to bfloat16 (a checkpoint trained for 4-bit weights is stored so); 0 where there is none.
float LatticeStep(const float* x, float most) {
  for (int steps = 1; steps <= 8; ++steps) {
    const float d = steps < 8 ? most / static_cast<float>(steps) : most / -8.0f;
    const float inverse = 1.0f / d;
    bool fits = true;
    Fit fit;
    for (int i = 0; i < kGroup && fits; ++i) {
      const float u = Round(x[i] * inverse);
      fits = std::fabs(x[i] - d * u) <= 0x1p-8f * std::fabs(x[i]);
      fits = fits && u >= -8.0f && u <= 7.0f;
      fit.xu += x[i] * u;
      fit.uu += u * u;
    }
    if (fits) return fit.xu / fit.uu;
  }
  return 0.0f;
}

}  // namespace

bool QuantizeGroup(const float* x, int bits, uint8_t* u, uint16_t* scale) {
  const int zero = 1 << (bits - 1);
  const auto low = static_cast<float>(-zero);
  const auto high = static_cast<float>(zero - 1);
  float most = 0.0f;
  bool finite = true;
  for (int i = 0; i < kGroup; ++i) {
    finite = finite && std::isfinite(x[i]);
    if (std::fabs(x[i]) > std::fabs(most)) most = x[i];
  }
  const float size = std::fabs(most);
  if (!finite || size < 1e-30f) {
    std::memset(u, zero, kGroup);
    *scale = finite ? 0 : FloatToFloat16(std::nanf(""));
    return finite;
  }
  float step = LatticeStep(x, most);
  Fit best;
  const auto consider = [&](float target) {  // the integer that the largest element goes to
    const Fit fit = FitTo(x, target / most, low, high);
    if (fit.gain() > best.gain()) best = fit;
  };
  // The whole range, with either sign of the scale, and a little less and more of it: clipping the
  // largest element can pay.
  if (step == 0.0f) {
    consider(low);
    consider(high);
    for (const float part : {0.25f, 0.5f, 0.75f, 1.0f, 1.25f}) {
      const float more = part * static_cast<float>(zero) / 8.0f;
      if (bits == 8) break;  // eight bits gain nothing from it
      consider(low - more);
      consider(low + more);
      consider(high + more);
    }
    step = best.xu / best.uu;
  }
  *scale = FloatToFloat16(step);
  const float rounded = Float16ToFloat(*scale);
  if (!std::isfinite(rounded)) return false;
  if (rounded == 0.0f) {  // smaller than float16 can scale
    std::memset(u, zero, kGroup);
    return true;
  }
  const float inverse = 1.0f / rounded;
  for (int i = 0; i < kGroup; ++i) {
    const float whole = std::min(std::max(Round(x[i] * inverse), low), high);
    u[i] = static_cast<uint8_t>(static_cast<int>(whole) + zero);
  }
  return true;
}

}  // namespace gemloupe
