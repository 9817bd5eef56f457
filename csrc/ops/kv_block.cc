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

float* Scales(uint8_t* block, int64_t offset) { return reinterpret_cast<float*>(block + offset); }

}  // namespace

void WidenKv(float* dst, const void* src, DType dtype, int64_t n) {
  if (dtype == DType::kInt8) {
    Kernels().i8_to_f32(dst, src, n);
  } else {
    WidenToFloat(dst, src, dtype, n);
  }
}

void WriteKeys(const KvBlockLayout& layout, uint8_t* block, int64_t at, const float* keys) {
  const int64_t half = layout.head_dim / 2;
  float* row = RowScratch(layout.head_dim);
  for (int64_t head = 0; head < layout.num_heads; ++head) {
    const float* key = keys + head * layout.head_dim;
    if (layout.derived) {
      std::copy_n(key, layout.pairs, row);
      std::copy_n(key + half, layout.pairs, row + layout.pairs);
      key = row;
    }
    RoundRow(layout.dtype, block + layout.keys(head) + at * layout.key_bytes(),
             Scales(block, layout.key_scales(head)) + at, key, layout.key_dims());
  }
}

void WriteValues(const KvBlockLayout& layout, uint8_t* block, int64_t at, const float* values) {
  float* row = RowScratch(layout.head_dim);
  for (int64_t head = 0; head < layout.num_heads; ++head) {
    const float* value = values + head * layout.head_dim;
    ForStoredDims(layout, [&](int64_t dim, int64_t stored, int64_t count) {
      std::copy_n(value + dim, count, row + stored);
    });
    RoundRow(layout.dtype, block + layout.values(head) + at * layout.value_bytes(),
             Scales(block, layout.value_scales(head)) + at, row, layout.head_dim);
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

void ReadKeyBits(const KvBlockLayout& layout, const uint8_t* block, int64_t at, uint8_t* bits,
                 float* scales) {
  for (int64_t head = 0; head < layout.num_heads; ++head) {
    std::copy_n(block + layout.keys(head) + at * layout.key_bytes(), layout.key_bytes(),
                bits + head * layout.key_bytes());
    if (layout.scaled()) scales[head] = Scales(block, layout.key_scales(head))[at];
  }
}

void WriteKeyBits(const KvBlockLayout& layout, uint8_t* block, int64_t at, const uint8_t* bits,
                  const float* scales) {
  for (int64_t head = 0; head < layout.num_heads; ++head) {
    std::copy_n(bits + head * layout.key_bytes(), layout.key_bytes(),
                block + layout.keys(head) + at * layout.key_bytes());
    if (layout.scaled()) Scales(block, layout.key_scales(head))[at] = scales[head];
  }
}

void ReadValueBits(const KvBlockLayout& layout, const uint8_t* block, int64_t at, uint8_t* bits,
                   float* scales) {
  const int64_t element = layout.element_bytes();
  for (int64_t head = 0; head < layout.num_heads; ++head) {
    const uint8_t* row = block + layout.values(head) + at * layout.value_bytes();
    uint8_t* out = bits + head * layout.value_bytes();
    ForStoredDims(layout, [&](int64_t dim, int64_t stored, int64_t count) {
      std::copy_n(row + stored * element, count * element, out + dim * element);
    });
    if (layout.scaled()) scales[head] = Scales(block, layout.value_scales(head))[at];
  }
}

void WriteValueBits(const KvBlockLayout& layout, uint8_t* block, int64_t at, const uint8_t* bits,
                    const float* scales) {
  const int64_t element = layout.element_bytes();
  for (int64_t head = 0; head < layout.num_heads; ++head) {
    uint8_t* row = block + layout.values(head) + at * layout.value_bytes();
    const uint8_t* in = bits + head * layout.value_bytes();
    ForStoredDims(layout, [&](int64_t dim, int64_t stored, int64_t count) {
      std::copy_n(in + dim * element, count * element, row + stored * element);
    });
    if (layout.scaled()) Scales(block, layout.value_scales(head))[at] = scales[head];
  }
}

}  // namespace gemloupe
