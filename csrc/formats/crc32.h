#ifndef GEMLOUPE_FORMATS_CRC32_H_
#define GEMLOUPE_FORMATS_CRC32_H_

#include <cstddef>
#include <cstdint>

namespace gemloupe {

// The CRC-32 of zlib and PNG, continued from `crc` (0 to begin with).
uint32_t Crc32(uint32_t crc, const void* data, size_t bytes);

}  // namespace gemloupe

#endif  // GEMLOUPE_FORMATS_CRC32_H_
