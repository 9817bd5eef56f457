#ifndef GEMLOUPE_OPS_KV_BLOCK_H_
#define GEMLOUPE_OPS_KV_BLOCK_H_

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace gemloupe {

// Positions of one block of cached keys or values. Blocks lie at absolute positions
// [64 b, 64 b + 64), so that how a sequence is cut into passes changes no sum.
inline constexpr int64_t kKvBlock = 64;

// How one block of one layer is stored: keys [K, 64, key_dims], values [K, 64, H], and for int8 the
// float32 scales of the keys [K, 64] and of the values [K, 64].
//
// Where values are keys (K = RoPE(w ⊙ V)) and the storage is derived, only the rotated dims of K are
// kept, [0, pairs) and [H/2, H/2 + pairs); the other dims are w ⊙ V. The rows of V then begin with
// these unrotated dims, so that one matrix product reads them: [pairs, H/2), [H/2 + pairs, H),
// [0, pairs), [H/2, H/2 + pairs).
struct KvBlockLayout {
  DType dtype = DType::kFloat16;  // plain, or kInt8
  int64_t num_heads = 0;          // K
  int64_t head_dim = 0;           // H
  int64_t pairs = 0;              // rotated pairs
  bool derived = false;

  int64_t element_bytes() const {
    return dtype == DType::kInt8 ? 1 : static_cast<int64_t>(DTypeSize(dtype));
  }
  bool scaled() const { return dtype == DType::kInt8; }
  int64_t key_dims() const { return derived ? 2 * pairs : head_dim; }
  int64_t key_bytes() const { return key_dims() * element_bytes(); }  // of one key row
  int64_t value_bytes() const { return head_dim * element_bytes(); }  // of one value row
  // Offsets of what belongs to one head.
  int64_t keys(int64_t head) const { return head * kKvBlock * key_bytes(); }
  int64_t values(int64_t head) const {
    return num_heads * kKvBlock * key_bytes() + head * kKvBlock * value_bytes();
  }
  int64_t key_scales(int64_t head) const {
    return values(num_heads) + head * kKvBlock * static_cast<int64_t>(sizeof(float));
  }
  int64_t value_scales(int64_t head) const { return key_scales(num_heads + head); }
  int64_t bytes() const { return scaled() ? key_scales(2 * num_heads) : values(num_heads); }
};

// Calls fn(dim, at, count) for the runs of dims of a head, in the order in which they are stored: dims
// [dim, dim + count) stand at [at, at + count) of a row of V.
template <typename Fn>
void ForStoredDims(const KvBlockLayout& layout, Fn fn) {
  const int64_t half = layout.head_dim / 2;
  const int64_t pairs = layout.pairs;
  if (!layout.derived) {
    fn(int64_t{0}, int64_t{0}, layout.head_dim);
    return;
  }
  fn(pairs, int64_t{0}, half - pairs);
  fn(half + pairs, half - pairs, half - pairs);
  fn(int64_t{0}, 2 * (half - pairs), pairs);
  fn(half, 2 * half - pairs, pairs);
}

// Stores the row keys [K · H] (after norm and RoPE), or values [K · H], at position `at` of a block.
// Rounds to nearest even; int8: one scale for each head's row.
void WriteKeys(const KvBlockLayout& layout, uint8_t* block, int64_t at, const float* keys);
void WriteValues(const KvBlockLayout& layout, uint8_t* block, int64_t at, const float* values);

// Reads position `at` back as float32. key_weight [H] is w where the storage is derived.
void ReadKv(const KvBlockLayout& layout, const float* key_weight, const uint8_t* block, int64_t at,
            float* keys, float* values);

// The stored bits of one position with dims in their own order: keys [K, key_dims] or values [K, H], and
// their scales [K] where the layout is scaled (else unused). They are what a file holds.
void ReadKeyBits(const KvBlockLayout& layout, const uint8_t* block, int64_t at, uint8_t* bits,
                 float* scales);
void ReadValueBits(const KvBlockLayout& layout, const uint8_t* block, int64_t at, uint8_t* bits,
                   float* scales);
void WriteKeyBits(const KvBlockLayout& layout, uint8_t* block, int64_t at, const uint8_t* bits,
                  const float* scales);
void WriteValueBits(const KvBlockLayout& layout, uint8_t* block, int64_t at, const uint8_t* bits,
                    const float* scales);

// dst[i] = src[i] as float32; int8 elements without their scale.
void WidenKv(float* dst, const void* src, DType dtype, int64_t n);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_KV_BLOCK_H_
