#ifndef GEMLOUPE_FORMATS_GGUF_H_
#define GEMLOUPE_FORMATS_GGUF_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "formats/safetensors.h"

// GGUF files, versions 2 and 3, little-endian: a header, key-value metadata, a table of tensors, and
// from the next multiple of the alignment on their data. Specification: docs/gguf.md of ggml.
namespace gemloupe {

// Types of metadata values, as files number them.
enum class GgufType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
};

// A value where it lies in the file: nothing is copied, because a vocabulary has a million strings
// and most users of a model never look at it. Checked to its last byte when the header was read.
struct GgufValue {
  GgufType type = GgufType::kUint8;
  GgufType element = GgufType::kUint8;  // of an array
  uint64_t count = 0;                   // of an array
  const uint8_t* data = nullptr;        // a string's bytes, an array's first element, or the number
  uint64_t bytes = 0;

  bool boolean() const { return *data != 0; }
  std::string_view string() const { return {reinterpret_cast<const char*>(data), bytes}; }
  // A number of any type but uint64, int64; exact.
  double number() const;
  // An integer; uint64 as its bits.
  int64_t integer() const;
};

// Visits the elements of an array in order.
class GgufElements {
 public:
  explicit GgufElements(const GgufValue& array)
      : type_(array.element), left_(array.count), at_(array.data) {}
  bool Next(GgufValue* element);

 private:
  GgufType type_;
  uint64_t left_;
  const uint8_t* at_;
};

struct GgufEntry {
  std::string_view key;
  GgufValue value;
};

// Everything before the data. Views point into the file.
struct GgufHeader {
  uint32_t version = 0;
  uint64_t alignment = 0;
  std::vector<GgufEntry> metadata;   // in the file's order; no key twice
  std::vector<TensorEntry> tensors;  // the same; shapes row-major, dtypes as DTypeName or ggml name

  const GgufValue* Find(std::string_view key) const;  // nullptr if there is none
};

// Reads the header of the file of `size` bytes at `data`; `path` begins every message. Trusts
// nothing: InvalidArgument, having allocated no more than a small multiple of the header's bytes.
StatusOr<GgufHeader> ReadGguf(std::string_view path, const uint8_t* data, size_t size);

}  // namespace gemloupe

#endif  // GEMLOUPE_FORMATS_GGUF_H_
