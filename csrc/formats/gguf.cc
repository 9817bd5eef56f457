#include "formats/gguf.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

namespace gemloupe {
namespace {

// Gemma 4's vocabulary and merges take 17 MB; so does nothing else in a header.
constexpr uint64_t kMostHeaderBytes = 100'000'000;
constexpr uint64_t kMostKeys = 1 << 16;
constexpr uint64_t kMostTensors = 100'000;
constexpr uint64_t kMostKeyBytes = 65'535;  // the specification's limit
constexpr uint64_t kMostNameBytes = 255;    // ggml itself stops at 63
constexpr uint32_t kMostAxes = 4;           // ggml's
constexpr uint64_t kMostAlignment = 1 << 20;
constexpr int kMostNesting = 4;

constexpr char kAgain[] = "; the file is damaged: download it again";

// Bytes of a value of fixed size; 0 for strings, arrays and unknown types.
uint64_t FixedSize(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kInt8:
    case GgufType::kBool: return 1;
    case GgufType::kUint16:
    case GgufType::kInt16: return 2;
    case GgufType::kUint32:
    case GgufType::kInt32:
    case GgufType::kFloat32: return 4;
    case GgufType::kUint64:
    case GgufType::kInt64:
    case GgufType::kFloat64: return 8;
    case GgufType::kString:
    case GgufType::kArray: return 0;
  }
  return 0;
}

template <typename T>
T Load(const uint8_t* data) {  // unaligned; the machine is little-endian, as the file
  T value;
  std::memcpy(&value, data, sizeof(value));
  return value;
}

struct GgmlType {
  uint32_t id;
  const char* name;  // DTypeName where the engine reads it
  uint64_t elements;
  uint64_t bytes;  // of so many elements
};

// As ggml numbers them. Those the engine can't read are here to be named, and to be skipped where no
// part of the model needs them.
constexpr GgmlType kGgmlTypes[] = {
    {0, "float32", 1, 4},     {1, "float16", 1, 2},     {30, "bfloat16", 1, 2},
    {2, "q4_0", 32, 18},      {8, "q8_0", 32, 34},      {12, "q4_k", 256, 144},
    {13, "q5_k", 256, 176},   {14, "q6_k", 256, 210},   {3, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},      {10, "Q2_K", 256, 84},
    {11, "Q3_K", 256, 110},   {41, "Q1_0", 128, 18},    {16, "IQ2_XXS", 256, 66},
    {17, "IQ2_XS", 256, 74},  {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},
    {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110},  {22, "IQ2_S", 256, 82},
    {23, "IQ4_XS", 256, 136}, {24, "I8", 1, 1},         {25, "I16", 1, 2},
    {26, "I32", 1, 4},        {27, "I64", 1, 8},        {28, "F64", 1, 8},
    {29, "IQ1_M", 256, 56},   {34, "TQ1_0", 256, 54},   {35, "TQ2_0", 256, 66},
    {39, "MXFP4", 32, 17},    {40, "NVFP4", 64, 36},
};

const GgmlType* FindGgmlType(uint32_t id) {
  for (const GgmlType& type : kGgmlTypes) {
    if (type.id == id) return &type;
  }
  return nullptr;
}

bool IsName(std::string_view text) {
  return !text.empty() &&
         std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c <= '~'; });
}

// Older Abseils do not take std::string_view.
absl::string_view Text(std::string_view text) { return {text.data(), text.size()}; }
template <typename T>
const T& Text(const T& part) {
  return part;
}

class Reader {
 public:
  Reader(std::string_view path, const uint8_t* data, size_t size)
      : path_(path), begin_(data), at_(data), size_(size) {
    end_ = data + std::min<uint64_t>(size, kMostHeaderBytes);
  }

  StatusOr<GgufHeader> Read();

 private:
  template <typename... Parts>
  Status Fail(const Parts&... parts) const {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": ", Text(parts)...));
  }
  uint64_t offset() const { return static_cast<uint64_t>(at_ - begin_); }
  uint64_t left() const { return static_cast<uint64_t>(end_ - at_); }

  // Of `bytes` bytes for `what`.
  Status Need(uint64_t bytes, std::string_view what) const;
  template <typename T>
  Status Number(T* value, std::string_view what);
  Status Name(std::string_view* text, uint64_t most, std::string_view what);
  Status Value(GgufType type, GgufValue* value, std::string_view key, int depth);
  Status Array(GgufValue* value, std::string_view key, int depth);
  Status Metadata(uint64_t count, GgufHeader* header);
  Status Tensors(uint64_t count, GgufHeader* header);
  Status Tensor(TensorEntry* entry, uint64_t* offset);

  std::string path_;
  const uint8_t* begin_;
  const uint8_t* at_;
  const uint8_t* end_;
  uint64_t size_;
};

Status Reader::Need(uint64_t bytes, std::string_view what) const {
  if (bytes <= left()) return absl::OkStatus();
  if (size_ > kMostHeaderBytes && offset() + bytes > kMostHeaderBytes) {
    return Fail("metadata and tensor table take more than ", kMostHeaderBytes, " bytes at ", what,
                kAgain);
  }
  return Fail("the file ends within ", what, ", which begins at byte ", offset(), " and needs ",
              bytes, " bytes; the file has ", size_, " bytes: download it again");
}

template <typename T>
Status Reader::Number(T* value, std::string_view what) {
  GL_RETURN_IF_ERROR(Need(sizeof(T), what));
  *value = Load<T>(at_);
  at_ += sizeof(T);
  return absl::OkStatus();
}

Status Reader::Name(std::string_view* text, uint64_t most, std::string_view what) {
  const uint64_t where = offset();
  uint64_t length = 0;
  GL_RETURN_IF_ERROR(Number(&length, what));
  if (length > most) {
    return Fail(what, " at byte ", where, " has ", length, " bytes, expected at most ", most,
                kAgain);
  }
  GL_RETURN_IF_ERROR(Need(length, what));
  *text = {reinterpret_cast<const char*>(at_), length};
  at_ += length;
  if (IsName(*text)) return absl::OkStatus();
  return Fail(what, " at byte ", where, " is empty or holds other characters than printable ASCII",
              kAgain);
}

// Reads the value of `key`; its type has been read.
Status Reader::Value(GgufType type, GgufValue* value, std::string_view key, int depth) {
  value->type = type;
  if (type == GgufType::kArray) return Array(value, key, depth);
  if (type == GgufType::kString) {
    GL_RETURN_IF_ERROR(Number(&value->bytes, key));
    GL_RETURN_IF_ERROR(Need(value->bytes, key));
  } else {
    value->bytes = FixedSize(type);
    if (value->bytes == 0) {
      return Fail(key, " has the value type ", static_cast<uint32_t>(type), ", expected 0 to 12",
                  kAgain);
    }
    GL_RETURN_IF_ERROR(Need(value->bytes, key));
    if (type == GgufType::kBool && *at_ > 1) {
      return Fail(key, " holds the byte ", static_cast<int>(*at_), ", expected 0 or 1", kAgain);
    }
  }
  value->data = at_;
  at_ += value->bytes;
  return absl::OkStatus();
}

Status Reader::Array(GgufValue* value, std::string_view key, int depth) {
  if (depth == kMostNesting) {
    return Fail(key, " has arrays nested deeper than ", kMostNesting, " levels", kAgain);
  }
  uint32_t element = 0;
  GL_RETURN_IF_ERROR(Number(&element, key));
  GL_RETURN_IF_ERROR(Number(&value->count, key));
  value->element = static_cast<GgufType>(element);
  const uint64_t fixed = FixedSize(value->element);
  if (fixed == 0 && value->element != GgufType::kString && value->element != GgufType::kArray) {
    return Fail(key, " is an array of the value type ", element, ", expected 0 to 12", kAgain);
  }
  // A string takes 8 bytes at least, an array 12.
  const uint64_t least = fixed > 0 ? fixed : value->element == GgufType::kString ? 8 : 12;
  if (value->count > left() / least) {
    return Fail(key, " is said to have ", value->count, " elements, but ", left(),
                " bytes follow; the file is truncated or damaged: download it again");
  }
  value->data = at_;
  if (fixed > 0 && value->element != GgufType::kBool) {
    at_ += value->count * fixed;
  } else {
    GgufValue unused;
    for (uint64_t i = 0; i < value->count; ++i) {
      GL_RETURN_IF_ERROR(Value(value->element, &unused, key, depth + 1));
    }
  }
  value->bytes = static_cast<uint64_t>(at_ - value->data);
  return absl::OkStatus();
}

Status Reader::Metadata(uint64_t count, GgufHeader* header) {
  if (count > kMostKeys) {
    return Fail("has ", count, " metadata keys, expected at most ", kMostKeys, kAgain);
  }
  absl::flat_hash_set<std::string_view> keys;
  for (uint64_t i = 0; i < count; ++i) {
    GgufEntry entry;
    GL_RETURN_IF_ERROR(Name(&entry.key, kMostKeyBytes, "a metadata key"));
    if (!keys.insert(entry.key).second) {
      return Fail("the metadata key ", entry.key, " occurs twice, expected it once", kAgain);
    }
    uint32_t type = 0;
    GL_RETURN_IF_ERROR(Number(&type, entry.key));
    GL_RETURN_IF_ERROR(Value(static_cast<GgufType>(type), &entry.value, entry.key, 0));
    header->metadata.push_back(entry);
  }
  return absl::OkStatus();
}

// One row of the tensor table: all but begin, and in `end` the bytes.
Status Reader::Tensor(TensorEntry* entry, uint64_t* offset) {
  std::string_view name;
  GL_RETURN_IF_ERROR(Name(&name, kMostNameBytes, "a tensor's name"));
  entry->name = std::string(name);
  uint32_t axes = 0;
  GL_RETURN_IF_ERROR(Number(&axes, name));
  if (axes < 1 || axes > kMostAxes) {
    return Fail("tensor ", name, " has ", axes, " axes, expected 1 to ", kMostAxes, kAgain);
  }
  // The file counts elements of a row first: the other way round than the engine.
  entry->shape.resize(axes);
  for (uint32_t i = 0; i < axes; ++i) {
    GL_RETURN_IF_ERROR(Number(&entry->shape[axes - 1 - i], name));
  }
  uint32_t id = 0;
  GL_RETURN_IF_ERROR(Number(&id, name));
  GL_RETURN_IF_ERROR(Number(offset, name));
  const GgmlType* type = FindGgmlType(id);
  if (type == nullptr) {
    return Fail("tensor ", name, " has the unknown ggml type ", id,
                "; load a file in Q4_0, Q8_0, Q4_K, Q5_K, Q6_K, F16, BF16 or F32");
  }
  entry->dtype = type->name;
  constexpr int64_t kMostElements = int64_t{1} << 48;  // no product below can overflow
  int64_t elements = 1;
  for (const int64_t extent : entry->shape) {
    if (extent < 1 || extent > kMostElements / elements) {
      return Fail("tensor ", name, " has the impossible shape ", ShapeString(entry->shape), kAgain);
    }
    elements *= extent;
  }
  if (entry->shape.back() % static_cast<int64_t>(type->elements) != 0) {
    return Fail("tensor ", name, " ", ShapeString(entry->shape),
                ": rows are no whole blocks; expected a multiple of ", type->elements, " for ",
                type->name, kAgain);
  }
  entry->end = static_cast<uint64_t>(elements) / type->elements * type->bytes;
  return absl::OkStatus();
}

Status Reader::Tensors(uint64_t count, GgufHeader* header) {
  if (count > kMostTensors) {
    return Fail("has ", count, " tensors, expected at most ", kMostTensors, kAgain);
  }
  std::vector<uint64_t> offsets;
  for (uint64_t i = 0; i < count; ++i) {
    TensorEntry entry;
    uint64_t offset = 0;
    GL_RETURN_IF_ERROR(Tensor(&entry, &offset));
    header->tensors.push_back(std::move(entry));
    offsets.push_back(offset);
  }
  absl::flat_hash_set<std::string_view> names;
  // Where the data begins; a file without tensors may end before.
  const uint64_t data = (offset() + header->alignment - 1) / header->alignment * header->alignment;
  for (size_t i = 0; i < header->tensors.size(); ++i) {
    TensorEntry& entry = header->tensors[i];
    if (!names.insert(entry.name).second) {
      return Fail("tensor ", entry.name, " occurs twice, expected it once", kAgain);
    }
    if (offsets[i] % header->alignment != 0) {
      return Fail("tensor ", entry.name, " lies at offset ", offsets[i],
                  ", expected a multiple of the alignment, ", header->alignment, kAgain);
    }
    if (data > size_ || offsets[i] > size_ - data || entry.end > size_ - data - offsets[i]) {
      return Fail("tensor ", entry.name, " ", entry.dtype, " ", ShapeString(entry.shape),
                  " takes bytes ", data, " + ", offsets[i], " to ", data, " + ", offsets[i], " + ",
                  entry.end, ", but the file has ", size_,
                  " bytes; it is truncated or damaged: download it again");
    }
    entry.begin = data + offsets[i];
    entry.end += entry.begin;
  }
  return CheckNoOverlap(path_, header->tensors);
}

StatusOr<GgufHeader> Reader::Read() {
  GgufHeader header;
  if (size_ < 4 || std::memcmp(begin_, "GGUF", 4) != 0) {
    return Fail("does not begin with \"GGUF\"; expected a GGUF file");
  }
  at_ += 4;
  GL_RETURN_IF_ERROR(Number(&header.version, "the header"));
  if ((header.version & 0xffff) == 0 && header.version != 0) {
    return Fail("is a big-endian file; expected a little-endian one: gguf-convert-endian converts");
  }
  if (header.version != 2 && header.version != 3) {
    return Fail("has the format version ", header.version,
                ", expected 2 or 3; convert the checkpoint again");
  }
  uint64_t tensors = 0;
  uint64_t keys = 0;
  GL_RETURN_IF_ERROR(Number(&tensors, "the header"));
  GL_RETURN_IF_ERROR(Number(&keys, "the header"));
  GL_RETURN_IF_ERROR(Metadata(keys, &header));
  header.alignment = 32;
  if (const GgufValue* value = header.Find("general.alignment")) {
    if (value->type != GgufType::kUint32) {
      return Fail("general.alignment is no uint32 number", kAgain);
    }
    header.alignment = static_cast<uint64_t>(value->integer());
    const uint64_t a = header.alignment;
    if (a < 8 || a > kMostAlignment || (a & (a - 1)) != 0) {
      return Fail("general.alignment is ", a, ", expected a power of two from 8 to ",
                  kMostAlignment, kAgain);
    }
  }
  GL_RETURN_IF_ERROR(Tensors(tensors, &header));
  return header;
}

}  // namespace

double GgufValue::number() const {
  switch (type) {
    case GgufType::kFloat32: return Load<float>(data);
    case GgufType::kFloat64: return Load<double>(data);
    default: return static_cast<double>(integer());
  }
}

int64_t GgufValue::integer() const {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kBool: return *data;
    case GgufType::kInt8: return Load<int8_t>(data);
    case GgufType::kUint16: return Load<uint16_t>(data);
    case GgufType::kInt16: return Load<int16_t>(data);
    case GgufType::kUint32: return Load<uint32_t>(data);
    case GgufType::kInt32: return Load<int32_t>(data);
    case GgufType::kUint64:
    case GgufType::kInt64: return Load<int64_t>(data);
    default: return 0;
  }
}

bool GgufElements::Next(GgufValue* element) {
  if (left_ == 0) return false;
  --left_;
  *element = GgufValue{};
  element->type = type_;
  element->bytes = FixedSize(type_);
  if (type_ == GgufType::kString) {
    element->bytes = Load<uint64_t>(at_);
    at_ += sizeof(uint64_t);
  } else if (type_ == GgufType::kArray) {
    element->element = static_cast<GgufType>(Load<uint32_t>(at_));
    element->count = Load<uint64_t>(at_ + 4);
    at_ += 12;
    element->data = at_;
    element->bytes = FixedSize(element->element) * element->count;
    if (FixedSize(element->element) == 0) {
      GgufElements inner(*element);
      for (GgufValue unused; inner.Next(&unused);) {
      }
      element->bytes = static_cast<uint64_t>(inner.at_ - at_);
    }
  }
  element->data = at_;
  at_ += element->bytes;
  return true;
}

const GgufValue* GgufHeader::Find(std::string_view key) const {
  for (const GgufEntry& entry : metadata) {
    if (entry.key == key) return &entry.value;
  }
  return nullptr;
}

StatusOr<GgufHeader> ReadGguf(std::string_view path, const uint8_t* data, size_t size) {
  return Reader(path, data, size).Read();
}

}  // namespace gemloupe
