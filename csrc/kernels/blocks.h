#ifndef GEMLOUPE_KERNELS_BLOCKS_H_
#define GEMLOUPE_KERNELS_BLOCKS_H_

#include <cstddef>
#include <cstdint>

// The blocks of GGUF files (ggml's block_q4_0 … block_q6_K): a row is a run of these. Halves are bits.

namespace gemloupe {

// w = d · (u − 8); element i in the low half of u[i], element 16 + i in the high half.
struct BlockQ4_0 {
  static constexpr int kElements = 32;
  uint16_t d;
  uint8_t u[16];
};

// w = d · q.
struct BlockQ8_0 {
  static constexpr int kElements = 32;
  uint16_t d;
  int8_t q[32];
};

// w = d · scale · u − dmin · min, a pair of 6 bits each for 32 elements. Elements 64 c + i in the low and
// 64 c + 32 + i in the high half of u[32 c + i].
struct BlockQ4K {
  static constexpr int kElements = 256;
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t u[128];
};

// The same with a fifth bit: of element 32 g + i in bit g of high[i].
struct BlockQ5K {
  static constexpr int kElements = 256;
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t high[32];
  uint8_t u[128];
};

// w = d · scale · (u − 32), a scale for 16 elements. In each half of 128 elements c: the low four bits of
// elements i, 32 + i, 64 + i, 96 + i are the low halves of low[64 c + i], low[64 c + 32 + i], then their
// high halves; the high two bits are pairs 0 … 3 of high[32 c + i].
struct BlockQ6K {
  static constexpr int kElements = 256;
  uint8_t low[128];
  uint8_t high[64];
  int8_t scales[16];
  uint16_t d;
};

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4K) == 144 &&
              sizeof(BlockQ5K) == 176 && sizeof(BlockQ6K) == 210);

}  // namespace gemloupe

#endif  // GEMLOUPE_KERNELS_BLOCKS_H_
