#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace gemloupe {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// Maps the file at a multiple of 2 MiB: into the middle of a larger reservation, whose rest goes back.
void* MapAligned(int fd, size_t size) {
  const size_t reserved = size + kHugePage;
  if (reserved < size) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  void* reservation =
      mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reservation == MAP_FAILED) return MAP_FAILED;
  auto* begin = static_cast<uint8_t*>(reservation);
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  void* data = mmap(begin + head, size, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    munmap(reservation, reserved);
    errno = error;
    return MAP_FAILED;
  }
  if (head > 0) munmap(begin, head);
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t mapped = (size + page - 1) / page * page;
  if (head + mapped < reserved) munmap(begin + head + mapped, reserved - head - mapped);
  return data;
}

Status ErrnoStatus(int error, const std::string& path) {
  const std::string message = absl::StrCat(path, ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR: return absl::NotFoundError(message);
    case EACCES:
    case EPERM: return absl::PermissionDeniedError(message);
    case ENOMEM: return absl::ResourceExhaustedError(message);
    default: return absl::InvalidArgumentError(message);
  }
}

}  // namespace

StatusOr<std::shared_ptr<const MappedFile>> MappedFile::Open(std::string_view path) {
  std::shared_ptr<MappedFile> file(new MappedFile());
  file->path_ = std::string(path);
  // O_NONBLOCK: opening a FIFO would wait for its writer before fstat could refuse it.
  file->fd_ = open(file->path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file->fd_ < 0) return ErrnoStatus(errno, file->path_);
  struct stat info;
  if (fstat(file->fd_, &info) != 0) return ErrnoStatus(errno, file->path_);
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat(file->path_, S_ISDIR(info.st_mode) ? " is a folder" : " is not a regular file",
                     "; expected a file"));
  }
  const size_t size = static_cast<size_t>(info.st_size);
  if (size == 0) return std::shared_ptr<const MappedFile>(std::move(file));  // mmap refuses it
  void* data = MapAligned(file->fd_, size);
  if (data == MAP_FAILED) return ErrnoStatus(errno, file->path_);
  file->data_ = static_cast<const uint8_t*>(data);
  file->size_ = size;
  return std::shared_ptr<const MappedFile>(std::move(file));
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
  if (fd_ >= 0) close(fd_);
}

Status MappedFile::Read(const void* begin, size_t bytes, void* dst) const {
  auto offset = static_cast<off_t>(static_cast<const uint8_t*>(begin) - data_);
  auto* at = static_cast<uint8_t*>(dst);
  while (bytes > 0) {
    const ssize_t got = pread(fd_, at, bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, path_);
    if (got == 0) {
      return absl::DataLossError(
          absl::StrCat(path_, ": the file ends at byte ", offset,
                       "; it was cut short while in use: restore it and load the model again"));
    }
    at += got;
    offset += got;
    bytes -= static_cast<size_t>(got);
  }
  return absl::OkStatus();
}

void MappedFile::ExpectWhole(const void* begin, size_t bytes) const {
  Advise(begin, bytes, MADV_HUGEPAGE);
}

void MappedFile::Prefetch(const void* begin, size_t bytes) const {
  Advise(begin, bytes, MADV_WILLNEED);
}

void MappedFile::Drop(const void* begin, size_t bytes) const {
  Advise(begin, bytes, MADV_DONTNEED);
}

void MappedFile::Advise(const void* begin, size_t bytes, int advice) const {
  if (data_ == nullptr || begin < data_ || begin >= data_ + size_) return;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto offset = static_cast<size_t>(static_cast<const uint8_t*>(begin) - data_);
  const size_t first = offset / page * page;
  const size_t end = std::min(size_, offset + std::min(bytes, size_ - offset));
  // A wish: the kernel may lack it.
  madvise(const_cast<uint8_t*>(data_) + first, end - first, advice);
}

}  // namespace gemloupe
