#include "formats/pack_quantized.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "ops/dispatch.h"

namespace gemloupe {
namespace {

constexpr int64_t kGroup = kPackQuantizedGroup;
constexpr int64_t kGroupBytes = kGroup / 2;
constexpr int64_t kQ4BlockBytes = 2 + kGroupBytes;  // float16 scale, then the integers

// The scales of one row, as float32 [k / 32].
void ReadScales(const TensorView& scales, int64_t row, float* dst) {
  const int64_t groups = scales.shape[1];
  const auto bytes = static_cast<int64_t>(DTypeSize(scales.dtype));
  WidenToFloat(dst, static_cast<const uint8_t*>(scales.data) + row * groups * bytes, scales.dtype,
               groups);
}

int Element(const uint8_t* group, int64_t i) { return (group[i / 2] >> (i % 2 * 4)) & 15; }

}  // namespace

bool ScalesAreExactInFloat16(const TensorView& scales) {
  const int64_t groups = scales.shape[1];
  std::atomic<bool> exact{true};
  ForRows(scales.shape[0], groups * static_cast<int64_t>(DTypeSize(scales.dtype)),
          [&](int64_t begin, int64_t end) {
            std::vector<float> row(static_cast<size_t>(groups));
            for (int64_t i = begin; i < end && exact; ++i) {
              ReadScales(scales, i, row.data());
              for (const float scale : row) {
                if (Float16ToFloat(FloatToFloat16(scale)) != scale) exact = false;
              }
            }
          });
  return exact;
}

void PackQuantizedToQ4(const PackQuantized& matrix, int64_t begin, int64_t end, void* dst) {
  const int64_t groups = matrix.scales.shape[1];
  ForRows(end - begin, groups * kQ4BlockBytes, [&](int64_t first, int64_t last) {
    std::vector<float> scales(static_cast<size_t>(groups));
    for (int64_t row = first; row < last; ++row) {
      ReadScales(matrix.scales, begin + row, scales.data());
      const uint8_t* group = matrix.packed + (begin + row) * groups * kGroupBytes;
      uint8_t* block = static_cast<uint8_t*>(dst) + row * groups * kQ4BlockBytes;
      for (const float scale : scales) {
        const uint16_t half = FloatToFloat16(scale);
        std::memcpy(block, &half, sizeof(half));
        // q4_0 pairs elements j and j + 16.
        for (int64_t j = 0; j < kGroupBytes; ++j) {
          block[2 + j] =
              static_cast<uint8_t>(Element(group, j) | Element(group, j + kGroupBytes) << 4);
        }
        group += kGroupBytes;
        block += kQ4BlockBytes;
      }
    }
  });
}

void PackQuantizedToFloat32(const PackQuantized& matrix, int64_t begin, int64_t end, float* dst) {
  const int64_t groups = matrix.scales.shape[1];
  ForRows(end - begin, groups * kGroup * 4, [&](int64_t first, int64_t last) {
    std::vector<float> scales(static_cast<size_t>(groups));
    for (int64_t row = first; row < last; ++row) {
      ReadScales(matrix.scales, begin + row, scales.data());
      const uint8_t* group = matrix.packed + (begin + row) * groups * kGroupBytes;
      float* out = dst + row * groups * kGroup;
      for (const float scale : scales) {
        for (int64_t i = 0; i < kGroup; ++i) {
          out[i] = scale * static_cast<float>(Element(group, i) - 8);
        }
        group += kGroupBytes;
        out += kGroup;
      }
    }
  });
}

}  // namespace gemloupe
