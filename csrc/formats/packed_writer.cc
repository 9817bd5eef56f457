#include "formats/packed_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "formats/crc32.h"

namespace gemloupe {
namespace {

constexpr size_t kBufferBytes = size_t{16} << 20;

Status WriteError(const std::string& path, const char* what, int error) {
  return absl::DataLossError(absl::StrCat(path, ": ", what, ": ", std::strerror(error)));
}

// Writes everything at `offset`.
Status WriteAll(int fd, const std::string& path, const uint8_t* data, size_t bytes,
                uint64_t offset) {
  while (bytes > 0) {
    const ssize_t count = pwrite(fd, data, bytes, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return WriteError(path, "can't be written", count < 0 ? errno : ENOSPC);
    data += count;
    bytes -= static_cast<size_t>(count);
    offset += static_cast<uint64_t>(count);
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<PackedWriter>> PackedWriter::Create(std::string_view path,
                                                             PackedIndex index) {
  std::unique_ptr<PackedWriter> writer(new PackedWriter());
  writer->path_ = std::string(path);
  writer->index_ = std::move(index);
  writer->fd_ = open(writer->path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (writer->fd_ < 0) return WriteError(writer->path_, "can't be made", errno);
  writer->buffer_ = AlignedBuffer(kBufferBytes);
  // Room for header and table, which Finish writes.
  GL_RETURN_IF_ERROR(writer->PutZeros(writer->index_.data_begin));
  return writer;
}

PackedWriter::~PackedWriter() {
  if (fd_ >= 0) close(fd_);
}

Status PackedWriter::Begin(size_t tensor) {
  tensor_ = tensor;
  index_.tensors[tensor].crc = 0;
  return PutZeros(index_.tensors[tensor].begin);
}

Status PackedWriter::Append(const uint8_t* data, size_t bytes) {
  uint32_t& crc = index_.tensors[tensor_].crc;
  crc = Crc32(crc, data, bytes);
  return Put(data, bytes);
}

Status PackedWriter::Finish() {
  GL_RETURN_IF_ERROR(Flush(true));
  GL_CHECK(written_ == index_.file_bytes);
  if (fsync(fd_) != 0) return WriteError(path_, "can't be written", errno);
  const std::vector<uint8_t> head = SerializePackedIndex(index_);
  GL_RETURN_IF_ERROR(WriteAll(fd_, path_, head.data(), head.size(), 0));
  if (fsync(fd_) != 0) return WriteError(path_, "can't be written", errno);
  const int fd = std::exchange(fd_, -1);
  if (close(fd) != 0) return WriteError(path_, "can't be written", errno);
  return absl::OkStatus();
}

Status PackedWriter::Put(const uint8_t* data, size_t bytes) {
  while (bytes > 0) {
    const size_t count = std::min(bytes, buffer_.size() - buffered_);
    std::memcpy(buffer_.data() + buffered_, data, count);
    buffered_ += count;
    data += count;
    bytes -= count;
    if (buffered_ == buffer_.size()) GL_RETURN_IF_ERROR(Flush(false));
  }
  return absl::OkStatus();
}

Status PackedWriter::PutZeros(uint64_t end) {
  static constexpr uint8_t kZeros[4096] = {};
  GL_CHECK(end >= written_ + buffered_);
  while (written_ + buffered_ < end) {
    GL_RETURN_IF_ERROR(Put(kZeros, std::min<uint64_t>(sizeof(kZeros), end - written_ - buffered_)));
  }
  return absl::OkStatus();
}

Status PackedWriter::Flush(bool all) {
  GL_CHECK(all || buffered_ == buffer_.size());
  GL_RETURN_IF_ERROR(WriteAll(fd_, path_, buffer_.data(), buffered_, written_));
  written_ += buffered_;
  buffered_ = 0;
  return absl::OkStatus();
}

Status WritePackedFile(WeightStore& weights, PackedIndex index, std::string_view path) {
  for (PackedTensor& tensor : index.tensors) {
    GL_ASSIGN_OR_RETURN(tensor.dtype, weights.ResolvedDType(tensor.name));
    GL_ASSIGN_OR_RETURN(tensor.shape, weights.ShapeOf(tensor.name));
  }
  GL_RETURN_IF_ERROR(PlacePackedTensors(index));
  const std::vector<PackedTensor> tensors = index.tensors;
  GL_ASSIGN_OR_RETURN(const std::unique_ptr<PackedWriter> writer,
                      PackedWriter::Create(path, std::move(index)));
  for (size_t i = 0; i < tensors.size(); ++i) {
    GL_RETURN_IF_ERROR(writer->Begin(i));
    GL_RETURN_IF_ERROR(weights.Stream(tensors[i].name, [&](const uint8_t* data, size_t bytes) {
      return writer->Append(data, bytes);
    }));
  }
  return writer->Finish();
}

}  // namespace gemloupe
