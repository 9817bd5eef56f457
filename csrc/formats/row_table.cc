#include "formats/row_table.h"

#include <mutex>
#include <vector>

#include "ops/convert.h"
#include "ops/dispatch.h"
#include "ops/rows.h"

namespace gemloupe {

Status RowTable::Gather(const int32_t* ids, int64_t column, float factor, Matrix dst) const {
  // Panels interleave rows: a packed table is read in memory.
  if (file_ == nullptr || IsPacked(table_.dtype)) {
    GatherRows(table_, ids, column, factor, dst);
    return absl::OkStatus();
  }
  // Whole blocks around the columns that are wanted.
  const int64_t block = BlockElements(table_.dtype);
  const int64_t first = column / block * block;
  const int64_t last = (column + dst.cols + block - 1) / block * block;
  const size_t row_bytes = MatrixBytes(table_.dtype, 1, table_.shape[1]);
  const size_t offset = MatrixBytes(table_.dtype, 1, first);
  const size_t bytes = MatrixBytes(table_.dtype, 1, last) - offset;
  std::mutex mutex;
  Status status;
  ForRows(
      dst.rows, dst.cols * static_cast<int64_t>(sizeof(float)), [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> stored(bytes);
        const TensorView part = {stored.data(), table_.dtype, {1, last - first}};
        for (int64_t row = begin; row < end; ++row) {
          GL_CHECK(ids[row] >= 0 && ids[row] < table_.shape[0]);
          const Status read = file_->Read(static_cast<const uint8_t*>(table_.data) +
                                              static_cast<size_t>(ids[row]) * row_bytes + offset,
                                          bytes, stored.data());
          if (!read.ok()) {
            const std::lock_guard<std::mutex> lock(mutex);
            status.Update(read);
            return;
          }
          ReadRowPart(part, 0, column - first, dst.cols, dst.row(row));
          Kernels().scale(dst.row(row), dst.row(row), factor, dst.cols);
        }
      });
  return status;
}

}  // namespace gemloupe
