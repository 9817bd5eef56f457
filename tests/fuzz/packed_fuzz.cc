// Packed files as a stranger may write them: what is accepted lies inside the file, in order, at
// aligned places, and is written again as the same bytes. The input is header and table; the file's
// length is a number in front of it. With a first bit set, the CRCs are made right before parsing,
// or nothing behind them would be reached.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "formats/crc32.h"
#include "formats/packed_file.h"

namespace {

constexpr size_t kLastField = gemloupe::kPackedHeaderBytes - 4;  // the header's own CRC
constexpr size_t kTableCrcField = 40;
constexpr size_t kTableBytesField = 16;

void Put(std::vector<uint8_t>& bytes, size_t at, uint32_t value) {
  for (size_t i = 0; i < 4; ++i) bytes[at + i] = static_cast<uint8_t>(value >> (8 * i));
}

// Makes magic, version, layout and CRCs right; the rest stays the fuzzer's.
void Seal(std::vector<uint8_t>& bytes, uint64_t file_bytes) {
  if (bytes.size() < gemloupe::kPackedHeaderBytes) return;
  std::memcpy(bytes.data(), "GEMLOUPE", 8);
  Put(bytes, 8, gemloupe::kPackedVersion);
  Put(bytes, 12, gemloupe::kPackedLayout);
  // The table takes what there is: the fuzzer need not find out its length.
  const size_t table = bytes.size() - gemloupe::kPackedHeaderBytes;
  Put(bytes, kTableBytesField, static_cast<uint32_t>(table));
  Put(bytes, kTableBytesField + 4, 0);
  for (size_t i = 0; i < 8; ++i) bytes[32 + i] = static_cast<uint8_t>(file_bytes >> (8 * i));
  Put(bytes, kTableCrcField,
      gemloupe::Crc32(0, bytes.data() + gemloupe::kPackedHeaderBytes, table));
  Put(bytes, kLastField, gemloupe::Crc32(0, bytes.data(), kLastField));
}

void CheckAccepted(const gemloupe::PackedIndex& index, uint64_t file_bytes) {
  uint64_t free_from = index.data_begin;
  for (const gemloupe::PackedTensor& tensor : index.tensors) {
    GL_CHECK(tensor.begin >= free_from && tensor.begin % 64 == 0);
    GL_CHECK(tensor.end >= tensor.begin && tensor.end <= file_bytes);
    GL_CHECK(tensor.end - tensor.begin == gemloupe::TensorBytes(tensor.dtype, tensor.shape));
    GL_CHECK(!tensor.name.empty());
    free_from = tensor.end;
  }
  if (index.data_begin > (uint64_t{8} << 20)) return;
  // What is written for it reads as the same.
  const std::vector<uint8_t> written = gemloupe::SerializePackedIndex(index);
  const auto again = gemloupe::ParsePackedIndex(written, file_bytes, "again");
  GL_CHECK(again.ok());
  GL_CHECK(gemloupe::SerializePackedIndex(*again) == written);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 9) return 0;
  uint64_t file_bytes = 0;
  std::memcpy(&file_bytes, data + 1, 8);
  std::vector<uint8_t> head(data + 9, data + size);
  if (data[0] & 1) {
    file_bytes %= uint64_t{1} << 40;
    Seal(head, file_bytes);
  }
  const auto index = gemloupe::ParsePackedIndex(head, file_bytes, "fuzz");
  if (index.ok()) {
    CheckAccepted(*index, file_bytes);
  } else {
    GL_CHECK(index.status().code() == absl::StatusCode::kInvalidArgument);
  }
  return 0;
}
