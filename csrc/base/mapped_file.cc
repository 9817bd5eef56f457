#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace gemloupe {
namespace {

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

struct FileDescriptor {
  int fd;
  ~FileDescriptor() {
    if (fd >= 0) close(fd);
  }
};

}  // namespace

StatusOr<std::shared_ptr<const MappedFile>> MappedFile::Open(std::string_view path) {
  std::shared_ptr<MappedFile> file(new MappedFile());
  file->path_ = std::string(path);
  // O_NONBLOCK: opening a FIFO would wait for its writer before fstat could refuse it.
  const FileDescriptor opened{open(file->path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (opened.fd < 0) return ErrnoStatus(errno, file->path_);
  struct stat info;
  if (fstat(opened.fd, &info) != 0) return ErrnoStatus(errno, file->path_);
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat(file->path_, S_ISDIR(info.st_mode) ? " is a folder" : " is not a regular file",
                     "; expected a file"));
  }
  const size_t size = static_cast<size_t>(info.st_size);
  if (size == 0) return std::shared_ptr<const MappedFile>(std::move(file));  // mmap refuses it
  void* data = mmap(nullptr, size, PROT_READ, MAP_SHARED, opened.fd, 0);
  if (data == MAP_FAILED) return ErrnoStatus(errno, file->path_);
  file->data_ = static_cast<const uint8_t*>(data);
  file->size_ = size;
  return std::shared_ptr<const MappedFile>(std::move(file));
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
}

}  // namespace gemloupe
