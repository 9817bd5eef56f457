#ifndef GEMLOUPE_BASE_MAPPED_FILE_H_
#define GEMLOUPE_BASE_MAPPED_FILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

namespace gemloupe {

// A file mapped read-only and shared, at an address that is a multiple of 2 MiB so that a page cache of
// 2 MiB pages can be mapped as such; unmapped when the last owner goes.
class MappedFile {
 public:
  // NotFound, PermissionDenied, or InvalidArgument for what is not a regular file.
  static StatusOr<std::shared_ptr<const MappedFile>> Open(std::string_view path);

  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }

  // Copies bytes of the mapping by reading the file: pages that are read so do not count as this
  // process's memory. DataLoss if the file has become shorter.
  Status Read(const void* begin, size_t bytes, void* dst) const;

  // Advice on bytes of the mapping, for whole pages; other bytes and null are left alone.
  // They will be read in full, again and again: 2 MiB pages where the file has them.
  void ExpectWhole(const void* begin, size_t bytes) const;
  // They will be read soon.
  void Prefetch(const void* begin, size_t bytes) const;
  // They are no longer in use: they stop counting as this process's memory. Reading them again works.
  void Drop(const void* begin, size_t bytes) const;

 private:
  void Advise(const void* begin, size_t bytes, int advice) const;

  MappedFile() = default;
  std::string path_;
  int fd_ = -1;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_BASE_MAPPED_FILE_H_
