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

// A file of the input alone, or with a header before it that only its counts can spoil.
std::vector<uint8_t> MakeFile(const uint8_t* data, size_t size) {
  if (size < 3 || data[0] % 4 == 0) return std::vector<uint8_t>(data, data + size);
  std::vector<uint8_t> file(24);
  std::memcpy(file.data(), "GGUF", 4);
  file[4] = 3;
  file[8] = data[1] % 8;   // tensors
  file[16] = data[2] % 8;  // keys
  file.insert(file.end(), data + 3, data + size);
  file.resize(file.size() + data[0] * 16u);  // room for tensors
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
