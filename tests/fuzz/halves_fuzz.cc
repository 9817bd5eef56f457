// float → half → float: the result is one of the two neighbours, and converting again changes nothing.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/dtype.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  for (; size >= sizeof(float); data += sizeof(float), size -= sizeof(float)) {
    float x;
    std::memcpy(&x, data, sizeof(x));
    const uint16_t float16 = gemloupe::FloatToFloat16(x);
    const uint16_t bfloat16 = gemloupe::FloatToBfloat16(x);
    const float from_float16 = gemloupe::Float16ToFloat(float16);
    const float from_bfloat16 = gemloupe::Bfloat16ToFloat(bfloat16);
    GL_CHECK(std::isnan(x) == std::isnan(from_float16));
    GL_CHECK(std::isnan(x) == std::isnan(from_bfloat16));
    if (std::isnan(x)) continue;
    GL_CHECK(std::signbit(x) == std::signbit(from_float16));
    GL_CHECK(gemloupe::FloatToFloat16(from_float16) == float16);
    GL_CHECK(gemloupe::FloatToBfloat16(from_bfloat16) == bfloat16);
    // Half a unit in the last place: 2^-11 relative, and 2^-25 below the smallest normal half.
    if (std::fabs(x) < 65504.0f) {
      GL_CHECK(std::fabs(from_float16 - x) <= std::fmax(std::fabs(x) * 0x1p-11f, 0x1p-25f));
    }
    if (std::fabs(x) < 0x1p127f && std::fabs(x) > 0x1p-126f) {
      GL_CHECK(std::fabs(from_bfloat16 - x) <= std::fabs(x) * 0x1p-8f);
    }
  }
  return 0;
}
