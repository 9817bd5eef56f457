#include "base/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <utility>

#include "base/cgroup.h"

namespace gemloupe {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallestBlock = size_t{1} << 20;

size_t RoundUp(size_t bytes, size_t unit) {
  if (bytes > std::numeric_limits<size_t>::max() - unit) throw std::bad_alloc();
  return (bytes + unit - 1) / unit * unit;
}

// Fresh pages at a 2 MiB-aligned address; `bytes` is a multiple of 2 MiB.
uint8_t* MapHugePages(size_t bytes) {
  const size_t reserved = RoundUp(bytes + 1, kHugePage);
  void* mapped =
      mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<uint8_t*>(mapped);
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (head > 0) munmap(begin, head);
  if (reserved - head > bytes) munmap(begin + head + bytes, reserved - head - bytes);
  madvise(begin + head, bytes, MADV_HUGEPAGE);  // a wish: 4 KiB pages work too
  return begin + head;
}

}  // namespace

AlignedBuffer::AlignedBuffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  if (bytes >= kHugePage) {
    mapped_ = RoundUp(bytes, kHugePage);
    data_ = MapHugePages(mapped_);
    return;
  }
  const size_t allocated = RoundUp(bytes, kCacheLine);
  data_ = static_cast<uint8_t*>(std::aligned_alloc(kCacheLine, allocated));
  if (data_ == nullptr) throw std::bad_alloc();
  std::memset(data_, 0, allocated);
}

AlignedBuffer::~AlignedBuffer() {
  if (mapped_ > 0) {
    munmap(data_, mapped_);
  } else {
    std::free(data_);
  }
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

void* Arena::Bytes(size_t bytes) {
  bytes = RoundUp(std::max<size_t>(bytes, 1), kCacheLine);
  if (block_ == 0 && used_ == 0 && blocks_.size() > 1) {
    // Nothing is in use: replace the blocks by one, so that later passes find their memory in it.
    const size_t total = capacity();
    blocks_.clear();
    blocks_.emplace_back(total);
  }
  for (; block_ < blocks_.size(); ++block_, used_ = 0) {
    if (bytes <= blocks_[block_].size() - used_) break;
  }
  if (block_ == blocks_.size()) {
    size_t block_bytes = std::max({bytes, kSmallestBlock, capacity() / 2});
    if (block_bytes > kSmallestBlock) block_bytes = RoundUp(block_bytes, kHugePage);
    blocks_.emplace_back(block_bytes);
    used_ = 0;
  }
  uint8_t* taken = blocks_[block_].data() + used_;
  used_ += bytes;
  return taken;
}

Matrix Arena::NewMatrix(int64_t rows, int64_t cols) {
  return Matrix(New<float>(rows * cols), rows, cols);
}

size_t Arena::capacity() const {
  size_t total = 0;
  for (const AlignedBuffer& block : blocks_) total += block.size();
  return total;
}

void Arena::ShrinkTo(size_t bytes) {
  if (block_ != 0 || used_ != 0) return;
  while (capacity() > bytes) blocks_.pop_back();
}

uint64_t AvailableMemory() {
  uint64_t available = std::numeric_limits<uint64_t>::max();
  std::ifstream meminfo("/proc/meminfo");
  // Lines are "MemAvailable:   12345 kB".
  for (std::string line; std::getline(meminfo, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) {
      available = std::strtoull(line.c_str() + std::strlen("MemAvailable:"), nullptr, 10) << 10;
    }
  }
  return std::min(available, CgroupAvailableMemory("").value_or(available));
}

}  // namespace gemloupe
