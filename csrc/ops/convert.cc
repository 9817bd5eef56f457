#include "ops/convert.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/blocks.h"
#include "kernels/packed_layout.h"
#include "kernels/quant_table.h"
#include "ops/dispatch.h"
#include "ops/quantizer.h"

namespace gemloupe {
namespace {

template <class Block>
Block LoadBlock(const uint8_t* row, int64_t index) {
  Block block;
  std::memcpy(&block, row + static_cast<size_t>(index) * sizeof(Block), sizeof(Block));
  return block;
}

// The 6-bit scale and min of group g (0 … 7): groups 0–3 in the low 6 bits of bytes 0–3 and 4–7, groups
// 4–7 in the halves of bytes 8–11 with the two high bits of bytes 0–3 and 4–7.
struct ScaleMin {
  uint8_t scale;
  uint8_t min;
};
ScaleMin ScaleMinOf(const uint8_t* scales, int g) {
  if (g < 4)
    return {static_cast<uint8_t>(scales[g] & 63), static_cast<uint8_t>(scales[4 + g] & 63)};
  return {static_cast<uint8_t>((scales[4 + g] & 15) | (scales[g - 4] >> 6 << 4)),
          static_cast<uint8_t>((scales[4 + g] >> 4) | (scales[g] >> 6 << 4))};
}

// The unsigned integers of one block, in order.
void Integers(const BlockQ4_0& block, uint8_t* u) {
  for (int i = 0; i < 16; ++i) {
    u[i] = block.u[i] & 15;
    u[16 + i] = block.u[i] >> 4;
  }
}
void Integers(const BlockQ8_0& block, uint8_t* u) {
  for (int i = 0; i < 32; ++i) u[i] = static_cast<uint8_t>(block.q[i] + kInt8Zero);
}
void Integers(const BlockQ4K& block, uint8_t* u) {
  for (int c = 0; c < 4; ++c) {
    for (int i = 0; i < 32; ++i) {
      u[64 * c + i] = block.u[32 * c + i] & 15;
      u[64 * c + 32 + i] = block.u[32 * c + i] >> 4;
    }
  }
}
void Integers(const BlockQ5K& block, uint8_t* u) {
  for (int c = 0; c < 4; ++c) {
    for (int i = 0; i < 32; ++i) {
      const int high = block.high[i] >> (2 * c);
      u[64 * c + i] = static_cast<uint8_t>((block.u[32 * c + i] & 15) | (high & 1) << 4);
      u[64 * c + 32 + i] = static_cast<uint8_t>((block.u[32 * c + i] >> 4) | (high & 2) << 3);
    }
  }
}
void Integers(const BlockQ6K& block, uint8_t* u) {
  for (int c = 0; c < 2; ++c) {
    for (int part = 0; part < 4; ++part) {
      for (int i = 0; i < 32; ++i) {
        const int low = block.low[64 * c + 32 * (part % 2) + i] >> (4 * (part / 2)) & 15;
        const int high = block.high[32 * c + i] >> (2 * part) & 3;
        u[128 * c + 32 * part + i] = static_cast<uint8_t>(low | high << 4);
      }
    }
  }
}

void Values(const BlockQ4_0& block, float* w) {
  uint8_t u[32];
  Integers(block, u);
  const float d = Float16ToFloat(block.d);
  for (int i = 0; i < 32; ++i) w[i] = d * static_cast<float>(u[i] - kInt4Zero);
}
void Values(const BlockQ8_0& block, float* w) {
  const float d = Float16ToFloat(block.d);
  for (int i = 0; i < 32; ++i) w[i] = d * static_cast<float>(block.q[i]);
}
template <class Block>
void ValuesWithMin(const Block& block, float* w) {
  uint8_t u[256];
  Integers(block, u);
  const float d = Float16ToFloat(block.d);
  const float dmin = Float16ToFloat(block.dmin);
  for (int g = 0; g < 8; ++g) {
    const ScaleMin factors = ScaleMinOf(block.scales, g);
    const float scale = d * static_cast<float>(factors.scale);
    const float min = dmin * static_cast<float>(factors.min);
    for (int i = 32 * g; i < 32 * g + 32; ++i) w[i] = scale * static_cast<float>(u[i]) - min;
  }
}
void Values(const BlockQ4K& block, float* w) { ValuesWithMin(block, w); }
void Values(const BlockQ5K& block, float* w) { ValuesWithMin(block, w); }
void Values(const BlockQ6K& block, float* w) {
  uint8_t u[256];
  Integers(block, u);
  const float d = Float16ToFloat(block.d);
  for (int i = 0; i < 256; ++i) {
    const float scale = d * static_cast<float>(block.scales[i / 16]);
    w[i] = scale * static_cast<float>(u[i] - kInt6Zero);
  }
}

template <class Block>
void ReadBlocks(const uint8_t* row, int64_t begin, int64_t count, float* dst) {
  float values[Block::kElements];
  for (int64_t at = begin; at < begin + count;) {
    const int64_t first = at % Block::kElements;
    const int64_t now = std::min<int64_t>(Block::kElements - first, begin + count - at);
    Values(LoadBlock<Block>(row, at / Block::kElements), values);
    std::memcpy(dst + (at - begin), values + first, static_cast<size_t>(now) * sizeof(float));
    at += now;
  }
}

void ReadBlockedRow(DType dtype, const uint8_t* row, int64_t begin, int64_t count, float* dst) {
  switch (dtype) {
    case DType::kQ4_0: return ReadBlocks<BlockQ4_0>(row, begin, count, dst);
    case DType::kQ8_0: return ReadBlocks<BlockQ8_0>(row, begin, count, dst);
    case DType::kQ4K: return ReadBlocks<BlockQ4K>(row, begin, count, dst);
    case DType::kQ5K: return ReadBlocks<BlockQ5K>(row, begin, count, dst);
    case DType::kQ6K: return ReadBlocks<BlockQ6K>(row, begin, count, dst);
    default: GL_CHECK(IsBlocked(dtype));
  }
}

void ReadPackedRow(const TensorView& matrix, int64_t row, int64_t begin, int64_t count,
                   float* dst) {
  const int64_t elements = BlockElements(matrix.dtype);
  const int64_t first = begin / elements * elements;
  const int64_t all = (begin + count - first + elements - 1) / elements * elements;
  std::vector<float> values(static_cast<size_t>(all * kPanelRows));
  QuantKernelsInUse().unpack[PackedFormat(matrix.dtype)](values.data(), PanelData(matrix, row),
                                                         first, all);
  const int64_t o = row % kPanelRows;
  for (int64_t i = 0; i < count; ++i) {
    dst[i] = values[static_cast<size_t>((begin - first + i) * kPanelRows + o)];
  }
}

// The unsigned integers of 16 rows, and what stands at the head of a tile.
struct PanelIntegers {
  std::vector<uint8_t> u;       // [16, padded]
  std::vector<uint16_t> scale;  // [16, padded / 32], float16
  int64_t padded = 0;
};

// Puts the integers u [16, stride] of 64 elements into lines of `bits` bits.
void WriteLines(const uint8_t* u, int64_t stride, int bits, uint8_t* lines) {
  if (bits == 5 || bits == 6) std::memset(lines + 512, 0, bits == 5 ? 128 : 256);
  for (int o = 0; o < kPanelRows; ++o) {
    for (int j = 0; j < 8; ++j) {
      uint32_t a, b;
      std::memcpy(&a, u + o * stride + 4 * j, 4);
      std::memcpy(&b, u + o * stride + 32 + 4 * j, 4);
      if (bits == 8) {
        std::memcpy(lines + 64 * j + 4 * o, &a, 4);
        std::memcpy(lines + 64 * (8 + j) + 4 * o, &b, 4);
        continue;
      }
      const uint32_t low = (a & 0x0f0f0f0fu) | (b & 0x0f0f0f0fu) << 4;
      std::memcpy(lines + 64 * j + 4 * o, &low, 4);
      if (bits == 4) continue;
      const int line = bits == 5 ? j / 4 : j / 2;
      const int shift = bits == 5 ? j % 4 : 2 * (j % 2);
      const uint32_t mask = bits == 5 ? 0x01010101u : 0x03030303u;
      uint32_t high;
      std::memcpy(&high, lines + 512 + 64 * line + 4 * o, 4);
      high |= (a >> 4 & mask) << shift | (b >> 4 & mask) << (4 + shift);
      std::memcpy(lines + 512 + 64 * line + 4 * o, &high, 4);
    }
  }
}

void WriteSimpleTiles(const PanelIntegers& panel, int bits, size_t tile_bytes, uint8_t* dst) {
  for (int64_t at = 0; at < panel.padded; at += kTileElements) {
    for (int o = 0; o < kPanelRows; ++o) {
      for (int block = 0; block < 2; ++block) {
        const uint16_t scale =
            panel.scale[static_cast<size_t>(o * (panel.padded / kGroup) + at / kGroup + block)];
        std::memcpy(dst + 32 * block + 2 * o, &scale, 2);
      }
    }
    WriteLines(panel.u.data() + at, panel.padded, bits, dst + kTileScaleBytes);
    dst += tile_bytes;
  }
}

int BitsOf(DType dtype) {
  switch (dtype) {
    case DType::kInt4:
    case DType::kInt4K:
    case DType::kQ4_0: return 4;
    case DType::kInt5K: return 5;
    case DType::kInt6:
    case DType::kInt6K: return 6;
    default: return 8;
  }
}

// Repacks 16 rows of simple blocks (q4_0, q8_0); `rows` of them exist.
template <class Block>
void RepackSimple(const uint8_t* src, size_t row_bytes, int64_t rows, int64_t cols, DType dtype,
                  PanelIntegers& panel, uint8_t* dst) {
  const int64_t tile_bytes = static_cast<int64_t>(MatrixBytes(dtype, kPanelRows, kTileElements));
  for (int64_t o = 0; o < rows; ++o) {
    for (int64_t block = 0; block < cols / Block::kElements; ++block) {
      const auto stored = LoadBlock<Block>(src + static_cast<size_t>(o) * row_bytes, block);
      Integers(stored, panel.u.data() + o * panel.padded + block * Block::kElements);
      panel.scale[static_cast<size_t>(o * (panel.padded / kGroup) + block)] = stored.d;
    }
  }
  WriteSimpleTiles(panel, BitsOf(dtype), static_cast<size_t>(tile_bytes), dst);
}

// Repacks 16 rows of a K format; cols is a multiple of 256.
template <class Block>
void RepackSuper(const uint8_t* src, size_t row_bytes, int64_t rows, int64_t cols, DType dtype,
                 uint8_t* dst) {
  constexpr bool kHasMin = !std::is_same_v<Block, BlockQ6K>;
  const int bits = BitsOf(dtype);
  const size_t tile_bytes = MatrixBytes(dtype, kPanelRows, kSuperTileElements);
  std::vector<uint8_t> u(kPanelRows * kSuperTileElements, 0);
  for (int64_t index = 0; index < cols / kSuperTileElements; ++index) {
    std::memset(dst, 0, 320);
    for (int64_t o = 0; o < rows; ++o) {
      const auto block = LoadBlock<Block>(src + static_cast<size_t>(o) * row_bytes, index);
      Integers(block, u.data() + o * kSuperTileElements);
      std::memcpy(dst + 2 * o, &block.d, 2);
      if constexpr (kHasMin) {
        std::memcpy(dst + 32 + 2 * o, &block.dmin, 2);
        for (int g = 0; g < 8; ++g) {
          const ScaleMin factors = ScaleMinOf(block.scales, g);
          dst[64 + 16 * g + o] = factors.scale;
          dst[192 + 16 * g + o] = factors.min;
        }
      } else {
        for (int half = 0; half < 16; ++half) {
          dst[64 + 16 * half + o] = static_cast<uint8_t>(block.scales[half]);
        }
      }
    }
    const size_t part_bytes = bits == 4 ? 512 : (bits == 5 ? 640 : 768);
    for (int part = 0; part < 4; ++part) {
      WriteLines(u.data() + 64 * part, kSuperTileElements, bits,
                 dst + 320 + static_cast<size_t>(part) * part_bytes);
    }
    dst += tile_bytes;
  }
}

DType PackedTwin(DType blocked) {
  switch (blocked) {
    case DType::kQ4_0: return DType::kInt4;
    case DType::kQ8_0: return DType::kInt8;
    case DType::kQ4K: return DType::kInt4K;
    case DType::kQ5K: return DType::kInt5K;
    case DType::kQ6K: return DType::kInt6K;
    default: return DType::kFloat32;
  }
}

void RepackPanel(const TensorView& src, int64_t row, int64_t rows, DType dtype,
                 PanelIntegers& panel, uint8_t* dst) {
  const int64_t cols = src.shape[1];
  const size_t row_bytes = MatrixBytes(src.dtype, 1, cols);
  const uint8_t* first =
      static_cast<const uint8_t*>(src.data) + static_cast<size_t>(row) * row_bytes;
  switch (src.dtype) {
    case DType::kQ4_0:
      RepackSimple<BlockQ4_0>(first, row_bytes, rows, cols, dtype, panel, dst);
      return;
    case DType::kQ8_0:
      RepackSimple<BlockQ8_0>(first, row_bytes, rows, cols, dtype, panel, dst);
      return;
    case DType::kQ4K: RepackSuper<BlockQ4K>(first, row_bytes, rows, cols, dtype, dst); return;
    case DType::kQ5K: RepackSuper<BlockQ5K>(first, row_bytes, rows, cols, dtype, dst); return;
    case DType::kQ6K: RepackSuper<BlockQ6K>(first, row_bytes, rows, cols, dtype, dst); return;
    default: GL_CHECK(IsBlocked(src.dtype));
  }
}

// Quantises row `row` to unsigned integers [cols] and float16 scales; false for weights that are not finite.
bool QuantizeRow(const TensorView& src, int64_t row, int bits, std::vector<float>& values,
                 uint8_t* u, uint16_t* scale) {
  const int64_t cols = src.shape[1];
  values.assign(static_cast<size_t>((cols + kGroup - 1) / kGroup * kGroup), 0.0f);
  ReadRowPart(src, row, 0, cols, values.data());
  bool finite = true;
  for (int64_t group = 0; group * kGroup < cols; ++group) {
    finite &=
        QuantizeGroup(values.data() + group * kGroup, bits, u + group * kGroup, scale + group);
  }
  return finite;
}

void WriteBlocks(const uint8_t* u, const uint16_t* scale, int64_t cols, DType dtype, uint8_t* dst) {
  for (int64_t block = 0; block < cols / kGroup; ++block, u += kGroup, ++scale) {
    std::memcpy(dst, scale, 2);
    dst += 2;
    if (dtype == DType::kQ4_0) {
      for (int i = 0; i < 16; ++i) dst[i] = static_cast<uint8_t>(u[i] | u[16 + i] << 4);
      dst += 16;
    } else {
      for (int i = 0; i < 32; ++i) dst[i] = static_cast<uint8_t>(u[i] - kInt8Zero);
      dst += 32;
    }
  }
}

// Calls fn(part) for parts of the rows on the threads of the pass.
void ForParts(int64_t parts, FunctionRef<void(int64_t)> fn) {
  ThreadPool::Get().ParallelFor(parts, [&](int64_t part, int) { fn(part); });
}

Status NotFinite() {
  return absl::InvalidArgumentError(
      "weights that are infinite or NaN, or larger than float16 scales can hold, can't be "
      "quantised; "
      "load this checkpoint as float32 or bfloat16");
}

}  // namespace

int PackedFormat(DType dtype) {
  GL_CHECK(IsPacked(dtype));
  return static_cast<int>(dtype) - static_cast<int>(DType::kInt4);
}

const uint8_t* PanelData(const TensorView& matrix, int64_t row) {
  return static_cast<const uint8_t*>(matrix.data) +
         static_cast<size_t>(row / kPanelRows) *
             MatrixBytes(matrix.dtype, kPanelRows, matrix.shape[1]);
}

void ReadRowPart(const TensorView& matrix, int64_t row, int64_t begin, int64_t count, float* dst) {
  if (IsPacked(matrix.dtype)) {
    ReadPackedRow(matrix, row, begin, count, dst);
    return;
  }
  const uint8_t* data = static_cast<const uint8_t*>(matrix.data) +
                        static_cast<size_t>(row) * MatrixBytes(matrix.dtype, 1, matrix.shape[1]);
  if (IsBlocked(matrix.dtype)) {
    ReadBlockedRow(matrix.dtype, data, begin, count, dst);
  } else {
    WidenToFloat(dst, data + static_cast<size_t>(begin) * DTypeSize(matrix.dtype), matrix.dtype,
                 count);
  }
}

void ReadRows(const TensorView& matrix, int64_t begin, int64_t end, float* dst) {
  const int64_t cols = matrix.shape[1];
  for (int64_t row = begin; row < end; ++row) {
    ReadRowPart(matrix, row, 0, cols, dst + (row - begin) * cols);
  }
}

Status ConvertRows(const TensorView& src, int64_t begin, int64_t end, DType dtype, void* dst) {
  GL_CHECK(src.shape.size() == 2);
  const int64_t cols = src.shape[1];
  auto* out = static_cast<uint8_t*>(dst);
  std::atomic<bool> finite{true};
  if (IsPacked(src.dtype) && src.dtype != dtype) {
    return absl::UnimplementedError(absl::StrCat("weights stored as ", DTypeName(src.dtype),
                                                 " can't be converted to ", DTypeName(dtype),
                                                 "; convert the original checkpoint"));
  }
  if (!IsPacked(dtype)) {
    if (cols % BlockElements(dtype) != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("rows of ", cols, " elements can't be stored as ", DTypeName(dtype),
                       " (blocks of ", BlockElements(dtype), ")"));
    }
    if (dtype > DType::kQ8_0 && src.dtype != dtype) {
      return absl::UnimplementedError(
          absl::StrCat("quantising to ", DTypeName(dtype), " is not supported"));
    }
    const size_t row_bytes = MatrixBytes(dtype, 1, cols);
    constexpr int64_t kRows = 16;
    ForParts((end - begin + kRows - 1) / kRows, [&](int64_t part) {
      std::vector<float> values;
      std::vector<uint8_t> u(static_cast<size_t>(IsBlocked(dtype) ? cols : 0));
      std::vector<uint16_t> scale(static_cast<size_t>(cols / kGroup + 1));
      for (int64_t row = begin + part * kRows; row < std::min(end, begin + (part + 1) * kRows);
           ++row) {
        uint8_t* at = out + static_cast<size_t>(row - begin) * row_bytes;
        if (src.dtype == dtype) {
          std::memcpy(at,
                      static_cast<const uint8_t*>(src.data) + static_cast<size_t>(row) * row_bytes,
                      row_bytes);
        } else if (IsPlain(dtype)) {
          values.resize(static_cast<size_t>(cols));
          ReadRowPart(src, row, 0, cols, values.data());
          RoundFromFloat(at, values.data(), dtype, cols);
        } else {
          const int bits = dtype == DType::kQ4_0 ? 4 : 8;
          if (!QuantizeRow(src, row, bits, values, u.data(), scale.data())) finite = false;
          WriteBlocks(u.data(), scale.data(), cols, dtype, at);
        }
      }
    });
    return finite ? absl::OkStatus() : NotFinite();
  }
  GL_CHECK(begin % kPanelRows == 0);
  const size_t panel_bytes = MatrixBytes(dtype, kPanelRows, cols);
  const bool repacks = IsBlocked(src.dtype) && PackedTwin(src.dtype) == dtype;
  if (dtype >= DType::kInt4K && !repacks && src.dtype != dtype) {
    return absl::UnimplementedError(
        absl::StrCat("quantising to ", DTypeName(dtype), " is not supported"));
  }
  const int64_t elements = BlockElements(dtype);
  const int64_t padded = (cols + elements - 1) / elements * elements;
  ForParts((end - begin + kPanelRows - 1) / kPanelRows, [&](int64_t part) {
    const int64_t row = begin + part * kPanelRows;
    const int64_t rows = std::min<int64_t>(kPanelRows, end - row);
    uint8_t* at = out + static_cast<size_t>(part) * panel_bytes;
    if (src.dtype == dtype) {
      std::memcpy(at, PanelData(src, row), panel_bytes);
      return;
    }
    PanelIntegers panel;
    panel.padded = padded;
    panel.u.assign(static_cast<size_t>(kPanelRows * padded), 0);
    panel.scale.assign(static_cast<size_t>(kPanelRows * (padded / kGroup)), 0);
    if (repacks) {
      RepackPanel(src, row, rows, dtype, panel, at);
      return;
    }
    std::vector<float> values;
    for (int64_t o = 0; o < rows; ++o) {
      if (!QuantizeRow(src, row + o, BitsOf(dtype), values, panel.u.data() + o * padded,
                       panel.scale.data() + o * (padded / kGroup))) {
        finite = false;
      }
    }
    WriteSimpleTiles(panel, BitsOf(dtype), MatrixBytes(dtype, kPanelRows, elements), at);
  });
  return finite ? absl::OkStatus() : NotFinite();
}

}  // namespace gemloupe
