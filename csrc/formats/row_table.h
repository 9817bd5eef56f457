#ifndef GEMLOUPE_FORMATS_ROW_TABLE_H_
#define GEMLOUPE_FORMATS_ROW_TABLE_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "base/mapped_file.h"
#include "base/status.h"
#include "base/tensor.h"

namespace gemloupe {

// A large table of which each pass reads a few rows: the per-layer embeddings. Rows that lie in a file
// are read from it, not through its map, whose pages would count as this process's memory.
class RowTable {
 public:
  RowTable() = default;
  // `file` maps table.data, or is null for a table in memory.
  RowTable(TensorView table, std::shared_ptr<const MappedFile> file)
      : table_(std::move(table)), file_(std::move(file)) {}

  // dst [T, cols] = float(table[ids[t], column : column + cols]) · factor.
  Status Gather(const int32_t* ids, int64_t column, float factor, Matrix dst) const;

 private:
  TensorView table_;
  std::shared_ptr<const MappedFile> file_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_FORMATS_ROW_TABLE_H_
