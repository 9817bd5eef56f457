// The scalar twins of the quantised kernels: they read the formats element by element.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "base/dtype.h"
#include "kernels/packed_layout.h"
#include "kernels/quant_table.h"

namespace gemloupe {
namespace {

float Half(const uint8_t* p, int64_t i) {
  uint16_t bits;
  std::memcpy(&bits, p + 2 * i, 2);
  return Float16ToFloat(bits);
}

// The integer of row o and element e (0 … 63) in the lines of 64 elements.
int LowFour(const uint8_t* lines, int o, int e) {
  const int byte = lines[64 * (e % 32 / 4) + 4 * o + e % 4];
  return e < 32 ? byte & 15 : byte >> 4;
}
int HighTwo(const uint8_t* lines, int o, int e) {
  const int quad = e % 32 / 4;
  const int pair = 2 * (e / 32) + quad % 2;
  return lines[64 * (quad / 2) + 4 * o + e % 4] >> (2 * pair) & 3;
}
int HighOne(const uint8_t* lines, int o, int e) {
  const int quad = e % 32 / 4;
  return lines[64 * (quad / 4) + 4 * o + e % 4] >> (4 * (e / 32) + quad % 4) & 1;
}

// Each format: the integer u of row o at element e of a tile, and the factors of its group.
struct Group {
  float scale;  // w = scale · (u − zero) − min
  float min;    // 0 in formats without one
  int zero;
  int half_scale[2];  // of the group's two halves; {1, 1} where the format has none
};

template <size_t kBytes, int kZero, int kBits>
struct SimpleFormat {
  static constexpr int kElements = kTileElements;
  static constexpr size_t kTileBytes = kBytes;
  static int Integer(const uint8_t* tile, int o, int e) {
    const uint8_t* lines = tile + kTileScaleBytes;
    if constexpr (kBits == 8) return lines[64 * (e / 4) + 4 * o + e % 4];
    int u = LowFour(lines, o, e);
    if constexpr (kBits == 6) u |= HighTwo(lines + 512, o, e) << 4;
    return u;
  }
  static Group GroupOf(const uint8_t* tile, int o, int block) {
    return {Half(tile, 16 * block + o), 0.0f, kZero, {1, 1}};
  }
};
using Int4 = SimpleFormat<kInt4TileBytes, kInt4Zero, 4>;
using Int6 = SimpleFormat<kInt6TileBytes, kInt6Zero, 6>;
using Int8 = SimpleFormat<kInt8TileBytes, kInt8Zero, 8>;

template <size_t kBytes, int kBits>
struct MinFormat {  // int4_k, int5_k
  static constexpr int kElements = kSuperTileElements;
  static constexpr size_t kTileBytes = kBytes;
  static int Integer(const uint8_t* tile, int o, int e) {
    const uint8_t* lines = tile + 320 + e / 64 * (kBits == 4 ? 512 : 640);
    int u = LowFour(lines, o, e % 64);
    if constexpr (kBits == 5) u |= HighOne(lines + 512, o, e % 64) << 4;
    return u;
  }
  static Group GroupOf(const uint8_t* tile, int o, int block) {
    return {Half(tile, o) * static_cast<float>(tile[64 + 16 * block + o]),
            Half(tile, 16 + o) * static_cast<float>(tile[192 + 16 * block + o]),
            0,
            {1, 1}};
  }
};
using Int4K = MinFormat<kInt4KTileBytes, 4>;
using Int5K = MinFormat<kInt5KTileBytes, 5>;

struct Int6K {
  static constexpr int kElements = kSuperTileElements;
  static constexpr size_t kTileBytes = kInt6KTileBytes;
  static int Integer(const uint8_t* tile, int o, int e) {
    const uint8_t* lines = tile + 320 + e / 64 * 768;
    return LowFour(lines, o, e % 64) | HighTwo(lines + 512, o, e % 64) << 4;
  }
  static Group GroupOf(const uint8_t* tile, int o, int block) {
    const auto* scales = reinterpret_cast<const int8_t*>(tile + 64 + 32 * block);
    return {Half(tile, o), 0.0f, kInt6Zero, {scales[o], scales[16 + o]}};
  }
};

template <class Format>
constexpr bool kHasMin = std::is_same_v<Format, Int4K> || std::is_same_v<Format, Int5K>;

template <class Format>
const uint8_t* PanelOf(const uint8_t* panels, int64_t output, int64_t k) {
  const int64_t tiles = (k + Format::kElements - 1) / Format::kElements;
  return panels + static_cast<size_t>(output / kPanelRows * tiles) * Format::kTileBytes;
}

// Where entry i of `row` stands in an array of n entries a row.
int64_t Place(const QuantizedRows& rows, int64_t row, int64_t n, int64_t i) {
  return (row / rows.width * n + i) * rows.width + row % rows.width;
}

int8_t Element(const QuantizedRows& rows, int64_t row, int64_t i) {
  int8_t four[4];
  std::memcpy(four, rows.q + Place(rows, row, rows.padded / 4, i / 4), 4);
  return four[i % 4];
}

template <class Format>
float Dot(const QuantizedRows& src, int64_t row, const uint8_t* panel, int o, int64_t k) {
  float acc = 0.0f;
  for (int64_t group = 0; group < (k + kGroup - 1) / kGroup; ++group) {
    const int64_t at = group * kGroup;
    const uint8_t* tile = panel + static_cast<size_t>(at / Format::kElements) * Format::kTileBytes;
    const int first = static_cast<int>(at % Format::kElements);
    const Group g = Format::GroupOf(tile, o, first / kGroup);
    int32_t sum = 0;
    for (int i = 0; i < kGroup; ++i) {
      sum += g.half_scale[i / 16] * (Format::Integer(tile, o, first + i) - g.zero) *
             Element(src, row, at + i);
    }
    const int64_t place = Place(src, row, src.padded / kGroup, group);
    acc = std::fma(static_cast<float>(sum), g.scale * src.scale[place], acc);
    if (kHasMin<Format>) acc = std::fma(-g.min, src.scaled_sum[place], acc);
  }
  return acc;
}

template <class Format>
void Matmul(float* dst, int64_t dst_stride, const QuantizedRows& src, int64_t group, int rows,
            const uint8_t* panels, int64_t begin, int64_t end, int64_t k) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t i = begin; i < end; ++i) {
      dst[r * dst_stride + i - begin] =
          Dot<Format>(src, group * src.width + r, PanelOf<Format>(panels, i, k), i % kPanelRows, k);
    }
  }
}

template <class Format>
void Unpack(float* dst, const uint8_t* panel, int64_t begin, int64_t count) {
  for (int64_t at = begin; at < begin + count; ++at) {
    const uint8_t* tile = panel + static_cast<size_t>(at / Format::kElements) * Format::kTileBytes;
    const int e = static_cast<int>(at % Format::kElements);
    for (int o = 0; o < kPanelRows; ++o) {
      const Group g = Format::GroupOf(tile, o, e / kGroup);
      // Two roundings, as in GGUF's definition: (d · scale) · u, then − dmin · min.
      const float scale = g.scale * static_cast<float>(g.half_scale[e % kGroup / 16]);
      const float scaled = scale * static_cast<float>(Format::Integer(tile, o, e) - g.zero);
      dst[(at - begin) * kPanelRows + o] = kHasMin<Format> ? scaled - g.min : scaled;
    }
  }
}

void QuantizeRow(const QuantizedRows& dst, int64_t row, const float* src, int64_t k) {
  for (int64_t group = 0; group < dst.padded / kGroup; ++group) {
    const int64_t at = group * kGroup;
    const int count = static_cast<int>(std::min<int64_t>(std::max<int64_t>(k - at, 0), kGroup));
    float most = 0.0f;
    bool finite = true;
    for (int i = 0; i < count; ++i) {
      most = std::max(most, std::fabs(src[at + i]));
      finite = finite && std::isfinite(src[at + i]);
    }
    const bool zero = !finite || most < 1e-30f;
    const float inverse = zero ? 0.0f : 127.0f / most;
    int32_t sums[2] = {0, 0};
    for (int quad = 0; quad < kGroup / 4; ++quad) {
      int8_t q[4];
      for (int i = 0; i < 4; ++i) {
        const int e = 4 * quad + i;
        const bool rounds = e < count && !zero;
        q[i] = rounds ? static_cast<int8_t>(std::nearbyint(src[at + e] * inverse)) : int8_t{0};
        sums[e / 16] += q[i];
      }
      std::memcpy(dst.q + Place(dst, row, dst.padded / 4, at / 4 + quad), q, 4);
    }
    const int64_t place = Place(dst, row, dst.padded / kGroup, group);
    const float scale =
        !finite ? std::numeric_limits<float>::quiet_NaN() : (zero ? 0.0f : most / 127.0f);
    dst.scale[place] = scale;
    dst.start[place] = -8 * (sums[0] + sums[1]);
    dst.half_start[place] = -8 * sums[0];
    dst.scaled_sum[place] = scale * static_cast<float>(sums[0] + sums[1]);
  }
}

void PanelMatmulF32(float* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                    int64_t rows, const float* panel, int64_t k, int outputs, bool add) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int o = 0; o < outputs; ++o) {
      float acc = add ? dst[r * dst_stride + o] : 0.0f;
      for (int64_t i = 0; i < k; ++i) {
        acc = std::fma(src[r * src_stride + i], panel[i * kPanelRows + o], acc);
      }
      dst[r * dst_stride + o] = acc;
    }
  }
}

constexpr QuantKernels kTable = {
    .name = "portable",
    .quantize_row = QuantizeRow,
    .matmul = {Matmul<Int4>, Matmul<Int6>, Matmul<Int8>, Matmul<Int4K>, Matmul<Int5K>,
               Matmul<Int6K>},
    .gemm = {},
    .gemm_rows = 0,
    .gemm_tiles = false,
    .unpack = {Unpack<Int4>, Unpack<Int6>, Unpack<Int8>, Unpack<Int4K>, Unpack<Int5K>,
               Unpack<Int6K>},
    .panel_matmul_f32 = PanelMatmulF32,
};

}  // namespace

const QuantKernels& PortableQuantKernels() { return kTable; }

}  // namespace gemloupe
