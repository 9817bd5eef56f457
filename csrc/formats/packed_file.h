#ifndef GEMLOUPE_FORMATS_PACKED_FILE_H_
#define GEMLOUPE_FORMATS_PACKED_FILE_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/function_ref.h"
#include "base/status.h"

// The weights of a packed checkpoint, model.gemloupe:
//
//   header   64 bytes: "GEMLOUPE", u32 version, u32 layout, u64 bytes of the table, u64 begin of the
//            data, u64 bytes of the file, u32 CRC of the table, zeros, u32 CRC of the bytes before
//   table    u32 length + metadata (JSON, which only Python reads), u32 count, then for each tensor
//            u16 length + name, u8 length + dtype, u8 rank, u64 extents, u64 begin, u64 end, u32 CRC
//   data     from a multiple of 2 MiB; tensors in the table's order, at multiples of 4 KiB (64 bytes
//            where smaller than that); those of which only rows are read come last, from a multiple
//            of 2 MiB
//
// Numbers are little endian; CRCs are CRC-32.
namespace gemloupe {

// Raised when the bytes above mean something else.
inline constexpr uint32_t kPackedVersion = 1;
// Raised when kernels/packed_layout.h or kernels/blocks.h lay out any dtype differently.
inline constexpr uint32_t kPackedLayout = 1;

inline constexpr uint64_t kPackedHeaderBytes = 64;
inline constexpr uint64_t kPackedSection = uint64_t{2} << 20;

struct PackedTensor {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // in the file
  uint64_t end = 0;
  uint32_t crc = 0;
  bool rows_only = false;  // place it in the last section; not stored
};

struct PackedIndex {
  std::string metadata;
  std::vector<PackedTensor> tensors;
  uint64_t data_begin = 0;
  uint64_t file_bytes = 0;
};

// Gives every tensor its place, and the index its sizes; reorders nothing but rows_only tensors.
// InvalidArgument for a shape that can't be stored.
Status PlacePackedTensors(PackedIndex& index);

// Header and table, padded with zeros up to data_begin.
std::vector<uint8_t> SerializePackedIndex(const PackedIndex& index);

// Reads the index from the first bytes of a file of file_bytes; `head` holds as many of them as there
// are, up to the end of the table at least. Trusts nothing: InvalidArgument, naming `path`, for
// another version or layout, a wrong CRC, tensors outside the file, overlapping ones, doubled names,
// or lengths that do not fit the shapes.
StatusOr<PackedIndex> ParsePackedIndex(std::span<const uint8_t> head, uint64_t file_bytes,
                                       std::string_view path);
// Maps the file for as long as that takes.
StatusOr<PackedIndex> ReadPackedIndex(std::string_view path);

// The names of the tensors whose bytes do not have their CRC. `progress` is told the fraction done;
// false from it gives Cancelled.
StatusOr<std::vector<std::string>> DamagedPackedTensors(std::string_view path,
                                                        FunctionRef<bool(double)> progress);

}  // namespace gemloupe

#endif  // GEMLOUPE_FORMATS_PACKED_FILE_H_
