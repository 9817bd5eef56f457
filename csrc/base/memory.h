#ifndef GEMLOUPE_BASE_MEMORY_H_
#define GEMLOUPE_BASE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/tensor.h"

namespace gemloupe {

// Zeroed memory aligned to a cache line (64 bytes); from 2 MiB up, aligned to 2 MiB with
// MADV_HUGEPAGE. Fresh pages come zeroed from the kernel, so untouched ones cost nothing.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes);
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_ = 0;  // bytes to unmap; 0 when the buffer came from the allocator
};

// Hands out scratch of one pass and takes all of it back at once. It keeps its memory between
// passes, so that decoding allocates nothing. Not thread safe: the driving thread allocates.
class Arena {
 public:
  // Uninitialised; valid until the scope in which it was taken ends.
  void* Bytes(size_t bytes);
  Matrix NewMatrix(int64_t rows, int64_t cols);
  template <typename T>
  T* New(int64_t count) {
    return static_cast<T*>(Bytes(static_cast<size_t>(count) * sizeof(T)));
  }

  // Gives back, when it ends, everything taken since it began.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), block_(arena.block_), used_(arena.used_) {}
    ~Scope() {
      arena_.block_ = block_;
      arena_.used_ = used_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    size_t block_;
    size_t used_;
  };

  // Bytes that the arena holds.
  size_t capacity() const;
  // Frees blocks beyond `bytes` while nothing is in use, so that one long prefill does not pin memory.
  void ShrinkTo(size_t bytes);

 private:
  std::vector<AlignedBuffer> blocks_;
  size_t block_ = 0;  // block in use
  size_t used_ = 0;   // bytes used in it
};

// Bytes of physical memory that this process could still use (MemAvailable, limited by the cgroup).
uint64_t AvailableMemory();

}  // namespace gemloupe

#endif  // GEMLOUPE_BASE_MEMORY_H_
