#include "ops/kv_block.h"

#include <algorithm>
#include <vector>

#include "ops/dispatch.h"

namespace gemloupe {
namespace {

// One row of a head, kept by each thread.
float* RowScratch(int64_t head_dim) {
  thread_local std::vector<float> row;
  if (static_cast<int64_t>(row.size()) < head_dim) row.resize(static_cast<size_t>(head_dim));
  return row.data();
}

void RoundRow(DType dtype, uint8_t* dst, float* scale, const float* src, int64_t n) {
  if (dtype == DType::kInt8) {
    *scale = Kernels().f32_to_i8(reinterpret_cast<int8_t*>(dst), src, n);
  } else {
    RoundFromFloat(dst, src, dtype, n);
  }
}

void WidenRow(DType dtype, float* dst, const uint8_t* src, const float* scale, int64_t n) {
  WidenKv(dst, src, dtype, n);
  if (dtype == DType::kInt8) Kernels().scale(dst, dst, *scale, n);
}

const float* Scales(const uint8_t* block, int64_t offset) {
  return reinterpret_cast<const float*>(block + offset);
}

}  // namespace

void WidenKv(float* dst, const void* src, DType dtype, int64_t n) {
  if (dtype == DType::kInt8) {
    Kernels().i8_to_f32(dst, src, n);
  } else {
    WidenToFloat(dst, src, dtype, n);
  }
}

void WriteKv(const KvBlockLayout& layout, uint8_t* block, int64_t at, const float* keys,
             const float* values) {
  const int64_t half = layout.head_dim / 2;
  float* row = RowScratch(layout.head_dim);
  for (int64_t head = 0; head < layout.num_heads; ++head) {
    const float* key = keys + head * layout.head_dim;
    const float* value = values + head * layout.head_dim;
    auto* key_scale = reinterpret_cast<float*>(block + layout.key_scales(head)) + at;
    auto* value_scale = reinterpret_cast<float*>(block + layout.value_scales(head)) + at;
    uint8_t* stored_key = block + layout.keys(head) + at * layout.key_bytes();
    uint8_t* stored_value = block + layout.values(head) + at * layout.value_bytes();
    if (layout.derived) {
      std::copy_n(key, layout.pairs, row);
      std::copy_n(key + half, layout.pairs, row + layout.pairs);
      RoundRow(layout.dtype, stored_key, key_scale, row, layout.key_dims());
      ForStoredDims(layout, [&](int64_t dim, int64_t stored, int64_t count) {
        std::copy_n(value + dim, count, row + stored);
      });
      RoundRow(layout.dtype, stored_value, value_scale, row, layout.head_dim);
    } else {
      RoundRow(layout.dtype, stored_key, key_scale, key, layout.head_dim);
      RoundRow(layout.dtype, stored_value, value_scale, value, layout.head_dim);
    }
  }
}

void ReadKv(const KvBlockLayout& layout, const float* key_weight, const uint8_t* block, int64_t at,
            float* keys, float* values) {
  const int64_t half = layout.head_dim / 2;
  float* row = RowScratch(layout.head_dim);
  for (int64_t head = 0; head < layout.num_heads; ++head) {
    float* key = keys + head * layout.head_dim;
    float* value = values + head * layout.head_dim;
    WidenRow(layout.dtype, row, block + layout.values(head) + at * layout.value_bytes(),
             Scales(block, layout.value_scales(head)) + at, layout.head_dim);
    ForStoredDims(layout, [&](int64_t dim, int64_t stored, int64_t count) {
      std::copy_n(row + stored, count, value + dim);
    });
    WidenRow(layout.dtype, row, block + layout.keys(head) + at * layout.key_bytes(),
             Scales(block, layout.key_scales(head)) + at, layout.key_dims());
    if (layout.derived) {
      Kernels().mul(key, value, key_weight, layout.head_dim);
      std::copy_n(row, layout.pairs, key);
      std::copy_n(row + layout.pairs, layout.pairs, key + half);
    } else {
      std::copy_n(row, layout.head_dim, key);
    }
  }
}

}  // namespace gemloupe
