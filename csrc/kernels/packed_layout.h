#ifndef GEMLOUPE_KERNELS_PACKED_LAYOUT_H_
#define GEMLOUPE_KERNELS_PACKED_LAYOUT_H_

#include <cstddef>
#include <cstdint>

// The packed weight formats. A matrix [n, k] is stored as panels of 16 rows (outputs of the product);
// a panel is a run of tiles along k, each a whole number of 64-byte cache lines. Missing rows and
// elements of the last panel and tile have scale 0. Elements are unsigned integers u.
//
//   int4, int6, int8       tile 16 × 64:  w = scale · (u − zero), one float16 scale for 32 elements
//   int6_k (GGUF Q6_K)     tile 16 × 256: w = d · scale · (u − 32), an int8 scale for 16 elements
//   int4_k, int5_k (Q4_K, Q5_K)  16 × 256: w = d · scale · u − dmin · min, uint8 pairs for 32
//
// The integers of 16 rows × 64 elements, in lines of 64 bytes; byte 4 o + i of a line belongs to row o:
//   low 4 bits, 8 lines:   line j holds element 4 j + i in its low, element 32 + 4 j + i in its high
//                          half byte;
//   high 2 bits, 4 lines:  line h holds four pairs of bits, from the lowest up, of elements
//                          4 (2 h) + i, 4 (2 h + 1) + i, 32 + 4 (2 h) + i, 32 + 4 (2 h + 1) + i;
//   high bit, 2 lines:     bit 4 b + j of line h belongs to element 32 b + 4 (4 h + j) + i;
//   8 bits, 16 lines:      line j holds elements 4 j + i.

namespace gemloupe {

inline constexpr int kPanelRows = 16;
inline constexpr int kGroup = 32;  // elements of an activation scale, and of a weight scale

// int4, int6, int8: float16 scale[2][16] (block of 32, row), then the lines.
inline constexpr int kTileElements = 64;
inline constexpr size_t kTileScaleBytes = 64;
inline constexpr size_t kInt4TileBytes = kTileScaleBytes + 512;
inline constexpr size_t kInt6TileBytes = kTileScaleBytes + 512 + 256;
inline constexpr size_t kInt8TileBytes = kTileScaleBytes + 1024;
inline constexpr int kInt4Zero = 8;
inline constexpr int kInt6Zero = 32;
inline constexpr int kInt8Zero = 128;

// int4_k, int5_k: float16 d[16], dmin[16]; uint8 scale[8][16], min[8][16]; then four times the lines.
// int6_k: float16 d[16], 32 bytes of padding, int8 scale[16][16]; then four times the lines.
inline constexpr int kSuperTileElements = 256;
inline constexpr size_t kInt4KTileBytes = 64 + 128 + 128 + 4 * 512;
inline constexpr size_t kInt5KTileBytes = 64 + 128 + 128 + 4 * (512 + 128);
inline constexpr size_t kInt6KTileBytes = 64 + 256 + 4 * (512 + 256);

}  // namespace gemloupe

#endif  // GEMLOUPE_KERNELS_PACKED_LAYOUT_H_
