// GGUF headers as a damaged or hostile file gives them: what is accepted lies inside the file, and
// every value can be read to its last element.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "formats/gguf.h"

namespace {

// Reads every byte of a value, so that AddressSanitizer may object; returns the elements seen.
uint64_t ReadAll(const gemloupe::GgufValue& value, int depth) {
  GL_CHECK(depth <= 4);
  if (value.type == gemloupe::GgufType::kArray) {
    uint64_t seen = 1;
    uint64_t count = 0;
    gemloupe::GgufElements elements(value);
    for (gemloupe::GgufValue element; elements.Next(&element); ++count) {
      seen += ReadAll(element, depth + 1);
    }
    GL_CHECK(count == value.count);
    return seen;
  }
  if (value.type == gemloupe::GgufType::kString) {
    const std::string copy(value.string());
    GL_CHECK(copy.size() == value.bytes);
  } else if (value.type == gemloupe::GgufType::kBool) {
    GL_CHECK(value.integer() == (value.boolean() ? 1 : 0));
  } else {
    const double number = value.number();
    GL_CHECK(number == number || value.integer() == 0);
  }
  return 1;
}

// Takes numbers from the input; 0 when it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
  uint8_t Byte() { return data_ == end_ ? 0 : *data_++; }
  // Mostly small, sometimes anything up to 64 bits.
  uint64_t Number() {
    uint64_t value = Byte();
    if (value < 240) return value;
    for (uint64_t bytes = value - 239; bytes > 0; --bytes) value = (value << 8) | Byte();
    return value;
  }
  std::vector<uint8_t> Rest() { return {data_, end_}; }

 private:
  const uint8_t* data_;
  const uint8_t* end_;
};

void Append(std::vector<uint8_t>& file, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) file.push_back(static_cast<uint8_t>(value >> (8 * i)));
}

// A row of the tensor table that may be right.
void AppendTensor(std::vector<uint8_t>& file, Input& input) {
  constexpr uint8_t kTypes[] = {0, 1, 2, 8, 12, 14, 30};
  Append(file, 1, 8);
  file.push_back(static_cast<uint8_t>('a' + input.Byte() % 16));
  const int axes = input.Byte() % 6;
  Append(file, static_cast<uint64_t>(axes), 4);
  for (int i = 0; i < axes; ++i) Append(file, input.Number() * (i == 0 ? 32 : 1), 8);
  Append(file, kTypes[input.Byte() % sizeof(kTypes)], 4);
  Append(file, input.Number() * 32, 8);
}

// A file of the input alone, or the input behind a header, with tensors before it or not.
std::vector<uint8_t> MakeFile(const uint8_t* data, size_t size) {
  if (size < 3 || data[0] % 4 == 0) return std::vector<uint8_t>(data, data + size);
  Input input(data + 1, size - 1);
  const bool has_tensors = data[0] % 4 == 1;
  const int tensors = input.Byte() % 8;
  std::vector<uint8_t> file = {'G', 'G', 'U', 'F', 3, 0, 0, 0};
  Append(file, static_cast<uint64_t>(tensors), 8);
  Append(file, has_tensors ? 0 : input.Byte() % 8, 8);
  for (int i = 0; has_tensors && i < tensors; ++i) AppendTensor(file, input);
  const std::vector<uint8_t> rest = input.Rest();
  file.insert(file.end(), rest.begin(), rest.end());
  file.resize(file.size() + data[0] * 64u);  // room for the data
  return file;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::vector<uint8_t> made = MakeFile(data, size);
  // Of exactly this size, so that one byte too far is seen.
  const std::unique_ptr<uint8_t[]> file(new uint8_t[made.size()]);
  std::copy(made.begin(), made.end(), file.get());
  const auto header = gemloupe::ReadGguf("fuzz", file.get(), made.size());
  if (!header.ok()) {
    GL_CHECK(absl::IsInvalidArgument(header.status()));
    return 0;
  }
  GL_CHECK(header->version == 2 || header->version == 3);
  for (const gemloupe::GgufEntry& entry : header->metadata) {
    GL_CHECK(ReadAll(entry.value, 0) <= made.size());
    GL_CHECK(header->Find(entry.key) == &entry.value);
  }
  uint64_t bytes = 0;
  for (const gemloupe::TensorEntry& tensor : header->tensors) {
    GL_CHECK(tensor.begin < tensor.end && tensor.end <= made.size());
    GL_CHECK(tensor.begin % header->alignment == 0);
    bytes += tensor.end - tensor.begin;
  }
  GL_CHECK(bytes <= made.size());
  return 0;
}
