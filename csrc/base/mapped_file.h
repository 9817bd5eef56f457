#ifndef GEMLOUPE_BASE_MAPPED_FILE_H_
#define GEMLOUPE_BASE_MAPPED_FILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

namespace gemloupe {

// A file mapped read-only and shared; unmapped when the last owner goes.
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

 private:
  MappedFile() = default;
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_BASE_MAPPED_FILE_H_
