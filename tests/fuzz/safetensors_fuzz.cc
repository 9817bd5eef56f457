// Tables of tensors as a damaged or hostile safetensors header gives them: no entry that is accepted
// may reach outside its file, and accepted entries may not overlap.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "base/mapped_file.h"
#include "formats/safetensors.h"

namespace {

constexpr size_t kFileBytes = 4096;

// A file that every input's table refers to.
const gemloupe::MappedFile& File() {
  static const std::shared_ptr<const gemloupe::MappedFile> file = [] {
    char path[] = "/tmp/gemloupe-fuzz-XXXXXX";
    const int fd = mkstemp(path);
    GL_CHECK(fd >= 0 && ftruncate(fd, kFileBytes) == 0);
    auto opened = gemloupe::MappedFile::Open(path);
    GL_CHECK(opened.ok());
    close(fd);
    unlink(path);
    return *opened;
  }();
  return *file;
}

// Takes numbers from the input; 0 when it is used up.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
  bool empty() const { return data_ == end_; }
  uint8_t Byte() { return empty() ? 0 : *data_++; }
  // Small values and values near the limits of 64 bits, both within reach of the fuzzer.
  uint64_t Number() {
    uint64_t value = 0;
    for (int bytes = Byte() % 9; bytes > 0; --bytes) value = (value << 8) | Byte();
    return value;
  }

 private:
  const uint8_t* data_;
  const uint8_t* end_;
};

gemloupe::TensorEntry ReadEntry(Reader& reader, size_t index) {
  static const char* const kDTypes[] = {"F32", "BF16", "F16", "I64", ""};
  gemloupe::TensorEntry entry;
  entry.name = "tensor" + std::to_string(index);
  entry.dtype = kDTypes[reader.Byte() % 5];
  for (int rank = reader.Byte() % 5; rank > 0; --rank) {
    entry.shape.push_back(static_cast<int64_t>(reader.Number()));
  }
  entry.begin = reader.Number();
  entry.end = reader.Number();
  return entry;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Reader reader(data, size);
  std::vector<gemloupe::TensorEntry> entries;
  while (!reader.empty() && entries.size() < 64) {
    entries.push_back(ReadEntry(reader, entries.size()));
  }

  uint64_t bytes_in_views = 0;
  std::vector<gemloupe::TensorEntry> accepted;
  for (const gemloupe::TensorEntry& entry : entries) {
    const auto view = gemloupe::ViewTensor(File(), entry);
    if (!view.ok()) continue;
    const auto* begin = static_cast<const uint8_t*>(view->data);
    const size_t bytes = view->byte_size();
    GL_CHECK(begin >= File().data() && bytes <= kFileBytes);
    GL_CHECK(static_cast<size_t>(begin - File().data()) <= kFileBytes - bytes);
    // Reading every byte lets AddressSanitizer object.
    GL_CHECK(std::all_of(begin, begin + bytes, [](uint8_t byte) { return byte == 0; }));
    bytes_in_views += bytes;
    accepted.push_back(entry);
  }
  if (gemloupe::CheckNoOverlap("fuzz", accepted).ok()) GL_CHECK(bytes_in_views <= kFileBytes);
  return 0;
}
