#include "formats/packed_file.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "base/tensor.h"
#include "formats/crc32.h"
#include "formats/safetensors.h"

namespace gemloupe {
namespace {

constexpr char kMagic[] = {'G', 'E', 'M', 'L', 'O', 'U', 'P', 'E'};
constexpr uint64_t kPage = 4096;
constexpr uint64_t kCacheLine = 64;
constexpr uint64_t kMostTableBytes = uint64_t{100} << 20;
constexpr uint32_t kMostTensors = 100'000;  // the largest released model has 2130
constexpr size_t kMostNameBytes = 1024;
constexpr size_t kMostRank = 8;
constexpr char kConvertAgain[] = "; convert the original checkpoint again";

uint64_t RoundUp(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

// The table's bytes, or the header's, from the first to the last.
class Writer {
 public:
  void Bytes(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    out_.insert(out_.end(), bytes, bytes + size);
  }
  template <typename T>
  void Number(T value) {
    for (size_t i = 0; i < sizeof(T); ++i) {
      out_.push_back(static_cast<uint8_t>(static_cast<uint64_t>(value) >> (8 * i)));
    }
  }
  template <typename Length>
  void Text(std::string_view text) {
    Number(static_cast<Length>(text.size()));
    Bytes(text.data(), text.size());
  }
  void PadTo(size_t size) { out_.resize(std::max(out_.size(), size)); }
  std::vector<uint8_t>& out() { return out_; }

 private:
  std::vector<uint8_t> out_;
};

// Reads what Writer wrote. Beyond the end everything is 0 and ok() is false.
class Reader {
 public:
  explicit Reader(std::span<const uint8_t> bytes) : bytes_(bytes) {}
  bool ok() const { return ok_; }
  size_t left() const { return bytes_.size(); }
  template <typename T>
  T Number() {
    uint64_t value = 0;
    const std::span<const uint8_t> bytes = Take(sizeof(T));
    for (size_t i = 0; i < bytes.size(); ++i) value |= static_cast<uint64_t>(bytes[i]) << (8 * i);
    return static_cast<T>(value);
  }
  template <typename Length>
  std::string Text() {
    const std::span<const uint8_t> bytes = Take(Number<Length>());
    return std::string(bytes.begin(), bytes.end());
  }

 private:
  std::span<const uint8_t> Take(size_t size) {
    if (size > bytes_.size()) {
      ok_ = false;
      bytes_ = {};
      return {};
    }
    const std::span<const uint8_t> taken = bytes_.first(size);
    bytes_ = bytes_.subspan(size);
    return taken;
  }

  std::span<const uint8_t> bytes_;
  bool ok_ = true;
};

std::vector<uint8_t> SerializeTable(const PackedIndex& index) {
  Writer writer;
  writer.Text<uint32_t>(index.metadata);
  writer.Number(static_cast<uint32_t>(index.tensors.size()));
  for (const PackedTensor& tensor : index.tensors) {
    writer.Text<uint16_t>(tensor.name);
    writer.Text<uint8_t>(DTypeName(tensor.dtype));
    writer.Number(static_cast<uint8_t>(tensor.shape.size()));
    for (const int64_t extent : tensor.shape) writer.Number(extent);
    writer.Number(tensor.begin);
    writer.Number(tensor.end);
    writer.Number(tensor.crc);
  }
  return std::move(writer.out());
}

struct Header {
  uint64_t table_bytes = 0;
  uint64_t data_begin = 0;
  uint64_t file_bytes = 0;
  uint32_t table_crc = 0;
};

StatusOr<Header> ParseHeader(std::span<const uint8_t> head, uint64_t file_bytes) {
  if (head.size() < kPackedHeaderBytes || std::memcmp(head.data(), kMagic, sizeof(kMagic)) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("does not begin as a packed checkpoint does; it is another file, or its "
                     "conversion did not end",
                     kConvertAgain));
  }
  Reader reader(head.first(kPackedHeaderBytes).subspan(sizeof(kMagic)));
  const auto version = reader.Number<uint32_t>();
  const auto layout = reader.Number<uint32_t>();
  // Before the CRC: another version may keep it elsewhere.
  if (version != kPackedVersion || layout != kPackedLayout) {
    return absl::InvalidArgumentError(absl::StrCat(
        "was packed in version ", version, ", layout ", layout, "; this gemloupe reads version ",
        kPackedVersion, ", layout ", kPackedLayout, kConvertAgain));
  }
  Header header;
  header.table_bytes = reader.Number<uint64_t>();
  header.data_begin = reader.Number<uint64_t>();
  header.file_bytes = reader.Number<uint64_t>();
  header.table_crc = reader.Number<uint32_t>();
  Reader last(head.subspan(kPackedHeaderBytes - sizeof(uint32_t)));
  if (Crc32(0, head.data(), kPackedHeaderBytes - sizeof(uint32_t)) != last.Number<uint32_t>()) {
    return absl::InvalidArgumentError(
        absl::StrCat("its header is damaged (wrong CRC)", kConvertAgain));
  }
  if (header.file_bytes != file_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("has ", file_bytes, " bytes, expected ",
                                                   header.file_bytes,
                                                   "; it is truncated or damaged", kConvertAgain));
  }
  if (header.table_bytes > kMostTableBytes || header.data_begin > file_bytes ||
      header.data_begin % kPackedSection != 0 ||
      header.table_bytes + kPackedHeaderBytes > header.data_begin ||
      header.table_bytes + kPackedHeaderBytes > head.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "its header gives the table ", header.table_bytes, " bytes and lets the data begin at ",
        header.data_begin, " of ", file_bytes, ", which can't be", kConvertAgain));
  }
  return header;
}

StatusOr<PackedTensor> ParseTensor(Reader& reader) {
  PackedTensor tensor;
  tensor.name = reader.Text<uint16_t>();
  const std::string dtype = reader.Text<uint8_t>();
  const auto rank = reader.Number<uint8_t>();
  if (!reader.ok() || tensor.name.empty() || tensor.name.size() > kMostNameBytes ||
      rank > kMostRank) {
    return absl::InvalidArgumentError("its table of tensors is damaged");
  }
  for (int i = 0; i < rank; ++i) tensor.shape.push_back(reader.Number<int64_t>());
  tensor.begin = reader.Number<uint64_t>();
  tensor.end = reader.Number<uint64_t>();
  tensor.crc = reader.Number<uint32_t>();
  if (!reader.ok()) return absl::InvalidArgumentError("its table of tensors is damaged");
  const StatusOr<DType> parsed = ParseDType(dtype);
  if (!parsed.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", tensor.name, ": ", parsed.status().message()));
  }
  tensor.dtype = *parsed;
  return tensor;
}

// `free_from` is where the tensor before it ends.
Status CheckPlace(const PackedTensor& tensor, uint64_t free_from, uint64_t file_bytes) {
  const StatusOr<uint64_t> bytes = CheckedTensorBytes(tensor.dtype, tensor.shape);
  if (!bytes.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", tensor.name, " ", bytes.status().message()));
  }
  if (tensor.begin > tensor.end || tensor.end > file_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", tensor.name, " lies at bytes ", tensor.begin, " to ", tensor.end,
                     ", outside the data of this file of ", file_bytes));
  }
  if (tensor.begin < free_from) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor.name, " begins at byte ",
                                                   tensor.begin, ", in what is before it (up to ",
                                                   free_from, ")"));
  }
  if (tensor.begin % kCacheLine != 0) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor.name, " begins at byte ",
                                                   tensor.begin, ", expected a multiple of ",
                                                   kCacheLine));
  }
  if (tensor.end - tensor.begin != *bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", tensor.name, " ", DTypeName(tensor.dtype), " ", ShapeString(tensor.shape),
        " needs ", *bytes, " bytes, the table gives it ", tensor.end - tensor.begin));
  }
  return absl::OkStatus();
}

StatusOr<PackedIndex> Parse(std::span<const uint8_t> head, uint64_t file_bytes) {
  GL_ASSIGN_OR_RETURN(const Header header, ParseHeader(head, file_bytes));
  const std::span<const uint8_t> table = head.subspan(kPackedHeaderBytes, header.table_bytes);
  if (Crc32(0, table.data(), table.size()) != header.table_crc) {
    return absl::InvalidArgumentError("its table of tensors is damaged (wrong CRC)");
  }
  Reader reader(table);
  PackedIndex index;
  index.data_begin = header.data_begin;
  index.file_bytes = file_bytes;
  index.metadata = reader.Text<uint32_t>();
  const auto count = reader.Number<uint32_t>();
  if (count > kMostTensors) {
    return absl::InvalidArgumentError(
        absl::StrCat("its table lists ", count, " tensors, expected at most ", kMostTensors));
  }
  absl::flat_hash_set<std::string> names;
  uint64_t free_from = index.data_begin;
  for (uint32_t i = 0; i < count; ++i) {
    GL_ASSIGN_OR_RETURN(PackedTensor tensor, ParseTensor(reader));
    GL_RETURN_IF_ERROR(CheckPlace(tensor, free_from, file_bytes));
    if (!names.insert(tensor.name).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", tensor.name, " is listed twice, expected it once"));
    }
    free_from = tensor.end;
    index.tensors.push_back(std::move(tensor));
  }
  if (!reader.ok() || reader.left() > 0) {
    return absl::InvalidArgumentError("its table of tensors has another length than it needs");
  }
  return index;
}

}  // namespace

Status PlacePackedTensors(PackedIndex& index) {
  std::stable_partition(index.tensors.begin(), index.tensors.end(),
                        [](const PackedTensor& tensor) { return !tensor.rows_only; });
  // Offsets and CRCs take the same bytes whatever they are.
  index.data_begin = RoundUp(kPackedHeaderBytes + SerializeTable(index).size(), kPackedSection);
  uint64_t at = index.data_begin;
  bool in_rows = false;
  for (PackedTensor& tensor : index.tensors) {
    const StatusOr<uint64_t> bytes = CheckedTensorBytes(tensor.dtype, tensor.shape);
    if (!bytes.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", tensor.name, " ", bytes.status().message()));
    }
    if (tensor.name.empty() || tensor.name.size() > kMostNameBytes) {
      return absl::InvalidArgumentError(absl::StrCat("a tensor's name has ", tensor.name.size(),
                                                     " bytes, expected 1 to ", kMostNameBytes));
    }
    const bool starts_rows = tensor.rows_only && !in_rows;
    in_rows = tensor.rows_only;
    at = RoundUp(at, starts_rows ? kPackedSection : *bytes < kPage ? kCacheLine : kPage);
    tensor.begin = at;
    tensor.end = at += *bytes;
  }
  index.file_bytes = at;
  return absl::OkStatus();
}

std::vector<uint8_t> SerializePackedIndex(const PackedIndex& index) {
  const std::vector<uint8_t> table = SerializeTable(index);
  Writer writer;
  writer.Bytes(kMagic, sizeof(kMagic));
  writer.Number(kPackedVersion);
  writer.Number(kPackedLayout);
  writer.Number(static_cast<uint64_t>(table.size()));
  writer.Number(index.data_begin);
  writer.Number(index.file_bytes);
  writer.Number(Crc32(0, table.data(), table.size()));
  writer.PadTo(kPackedHeaderBytes - sizeof(uint32_t));
  writer.Number(Crc32(0, writer.out().data(), writer.out().size()));
  writer.Bytes(table.data(), table.size());
  writer.PadTo(index.data_begin);
  return std::move(writer.out());
}

StatusOr<PackedIndex> ParsePackedIndex(std::span<const uint8_t> head, uint64_t file_bytes,
                                       std::string_view path) {
  StatusOr<PackedIndex> index = Parse(head, file_bytes);
  if (index.ok()) return index;
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(path), ": ", index.status().message()));
}

StatusOr<PackedIndex> ReadPackedIndex(std::string_view path) {
  GL_ASSIGN_OR_RETURN(const std::shared_ptr<const MappedFile> file, MappedFile::Open(path));
  return ParsePackedIndex({file->data(), file->size()}, file->size(), path);
}

StatusOr<std::vector<std::string>> DamagedPackedTensors(std::string_view path,
                                                        FunctionRef<bool(double)> progress) {
  constexpr uint64_t kStep = uint64_t{16} << 20;
  GL_ASSIGN_OR_RETURN(const std::shared_ptr<const MappedFile> file, MappedFile::Open(path));
  GL_ASSIGN_OR_RETURN(const PackedIndex index,
                      ParsePackedIndex({file->data(), file->size()}, file->size(), path));
  std::vector<std::string> damaged;
  for (const PackedTensor& tensor : index.tensors) {
    uint32_t crc = 0;
    for (uint64_t at = tensor.begin; at < tensor.end; at += kStep) {
      const uint64_t bytes = std::min(kStep, tensor.end - at);
      file->Prefetch(file->data() + at, bytes + kStep);
      crc = Crc32(crc, file->data() + at, bytes);
      file->Drop(file->data() + at, bytes);
      const uint64_t done = at + bytes;
      if (!progress(static_cast<double>(done) / static_cast<double>(index.file_bytes))) {
        return absl::CancelledError("verifying was interrupted");
      }
    }
    if (crc != tensor.crc) damaged.push_back(tensor.name);
  }
  return damaged;
}

}  // namespace gemloupe
