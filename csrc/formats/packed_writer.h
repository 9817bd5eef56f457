#ifndef GEMLOUPE_FORMATS_PACKED_WRITER_H_
#define GEMLOUPE_FORMATS_PACKED_WRITER_H_

#include <memory>
#include <string>
#include <string_view>

#include "base/memory.h"
#include "base/status.h"
#include "formats/packed_file.h"
#include "formats/weight_store.h"

namespace gemloupe {

// Writes a packed file from its first byte to its last, in blocks of whole 2 MiB at multiples of
// 2 MiB: the page cache then holds it in 2 MiB pages. The header comes last, so that a file whose
// writing was cut short is no packed file.
class PackedWriter {
 public:
  // `index` has been placed. DataLoss (an OSError) if the file can't be made.
  static StatusOr<std::unique_ptr<PackedWriter>> Create(std::string_view path, PackedIndex index);
  ~PackedWriter();
  PackedWriter(const PackedWriter&) = delete;
  PackedWriter& operator=(const PackedWriter&) = delete;

  // The tensors come in the order of the index; bytes of one may come in several calls.
  // DataLoss, naming the file, if they can't be written (the disk is full, ...).
  Status Begin(size_t tensor);
  Status Append(const uint8_t* data, size_t bytes);
  // Writes header and table, and waits until the disk has everything.
  Status Finish();

 private:
  PackedWriter() = default;
  Status Put(const uint8_t* data, size_t bytes);
  Status PutZeros(uint64_t end);
  Status Flush(bool all);

  std::string path_;
  PackedIndex index_;
  int fd_ = -1;
  AlignedBuffer buffer_;
  size_t buffered_ = 0;
  uint64_t written_ = 0;  // bytes of the file before the buffer
  size_t tensor_ = 0;
};

// Writes the tensors of `index` (names, and which are rows_only; the rest is filled in) from the
// store, in its target dtypes. On the threads of the current pass.
Status WritePackedFile(WeightStore& weights, PackedIndex index, std::string_view path);

}  // namespace gemloupe

#endif  // GEMLOUPE_FORMATS_PACKED_WRITER_H_
