#ifndef GEMLOUPE_STATE_KV_CACHE_H_
#define GEMLOUPE_STATE_KV_CACHE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "base/tensor.h"
#include "ops/attention.h"
#include "ops/rope.h"

namespace gemloupe {

// What one layer keeps.
struct KvLayerSpec {
  int64_t window = 0;  // positions that a query may see; 0: all of them
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int source = 0;  // the layer that is read: its own index unless it shares another's entries
  bool values_are_keys = false;  // K = RoPE(w ⊙ V): see KvStorage
  RopeSpec rope;                 // how K rotates
  // w [H], the weight of the key norm; needed where keys are derived.
  std::shared_ptr<const std::vector<float>> key_weight;
};

// What a layer stores. Where values are keys, derived is the default: V and the rotated dims of K
// (640 of 1024 values at H 512 with 64 pairs). V alone would need cosines and sines of every position,
// 512 bytes of float32 for each layer pass against 256 bytes of rotated dims for each head in float16,
// and rotating 64 pairs for each key: more bytes with one key-value head and more work with any number.
enum class KvStorage { kSeparate, kDerived };

struct KvCacheOptions {
  DType dtype = DType::kFloat16;  // plain, or kInt8: a scale for each head and position
  int64_t max_tokens = 0;         // most tokens to be held; positions stay below start + max_tokens
  int64_t start = 0;              // position of the first token
  bool full_sliding = false;      // sliding layers keep every position, not only their window
  bool separate_keys = false;     // store K whole even where it could be derived
  uint64_t model_id = 0;          // the model whose keys and values these are
};

class KvCache;

// Positions [begin, end) of a cache, the stuff of KvCache::Splice.
struct KvPiece {
  const KvCache* cache = nullptr;
  int64_t begin = 0;
  int64_t end = 0;
};

// The stored bits of S positions of one layer, dims in their own order: what a file holds. Rows of
// keys are key_dims wide: where keys are derived, the rotated dims only.
struct KvLayerBits {
  std::vector<uint8_t> keys;        // [S, K, key_dims]
  std::vector<uint8_t> values;      // [S, K, H]
  std::vector<float> key_scales;    // [S, K] for int8, else empty
  std::vector<float> value_scales;  // [S, K] for int8, else empty
};

// Keys (after norm and RoPE) and values of one sequence, by layer. Storage is a run of blocks of
// kKvBlock positions: full layers append blocks, sliding layers also give back blocks that have left
// the window (a ring, reused in place), sharing layers have none. Forks share blocks until one writes.
class KvCache {
 public:
  KvCache(std::vector<KvLayerSpec> layers, const KvCacheOptions& options);

  // Bytes that `tokens` tokens need, a pass of up to `chunk` tokens included.
  static uint64_t BytesNeeded(const std::vector<KvLayerSpec>& layers, const KvCacheOptions& options,
                              int64_t tokens, int64_t chunk);

  int64_t start() const { return options_.start; }
  // Position of the next token: start plus the tokens held.
  int64_t length() const { return options_.start + static_cast<int64_t>(tokens_.size()); }
  const std::vector<int32_t>& tokens() const { return tokens_; }
  const KvCacheOptions& options() const { return options_; }
  const std::vector<KvLayerSpec>& layers() const { return layers_; }
  uint64_t nbytes() const;
  uint64_t layer_nbytes(int layer) const;
  // Of nbytes, what a fork holds too.
  uint64_t shared_nbytes() const;
  // Bytes of several caches; blocks that they share count once.
  static uint64_t TotalBytes(const std::vector<const KvCache*>& caches);
  // How the entries that `layer` reads are stored.
  KvStorage storage(int layer) const;

  // Makes room, in every layer, for positions [length, length + count).
  void Reserve(int64_t count);
  // Writes float32 rows [T, K · H] of `layer` at positions [position, position + T), rounded to the
  // cache's dtype. The room was reserved.
  void Write(int layer, int64_t position, ConstMatrix keys, ConstMatrix values);
  // What `layer` reads (its source's blocks), the positions of the running pass included.
  KvView View(int layer) const;
  // Ends a pass: `ids` are now part of the sequence; blocks out of every window are given back.
  void Advance(const int32_t* ids, int64_t count);

  // Appends `ids` with normally distributed keys and values that no model has computed, the same for
  // the same seed. A benchmark's long context within seconds.
  void AppendRandom(const std::vector<int32_t>& ids, uint32_t seed);

  // The smallest length that Truncate and Rewind can give: where nothing has left a window, start.
  int64_t ShortestLength() const;
  // Drops positions ≥ length. OutOfRange, naming the smallest length possible, where a sliding layer
  // no longer holds the window before it.
  Status Truncate(int64_t length);
  // Makes positions ≥ length writable again and keeps every block and entry: the next pass replaces
  // entries layer by layer, and a layer that it doesn't write keeps its own. OutOfRange as Truncate.
  Status Rewind(int64_t length);
  // Stores the keys of `layer`, a source, whole from now on: as Read gives them, rounded to the cache's
  // dtype. Values keep their bits, forks their layout. Also within a pass.
  void SeparateKeys(int layer);
  // An independent cache with the same content. Cheap: blocks are copied when one of the two writes.
  std::shared_ptr<KvCache> Fork() const;
  // Takes over the content of `other`, a fork of this cache.
  void Restore(const KvCache& other);

  // Edits, seen by the next pass; forks see nothing of them. InvalidArgument and OutOfRange name what
  // can't be done and leave the cache as it was. (kv_cache_edit.cc)

  // Replaces keys and values [n, K · H] of `layer`, a source, at `positions`, which it holds; a matrix
  // without data leaves its part, bit for bit (derived keys are separated first).
  Status Set(int layer, const std::vector<int64_t>& positions, ConstMatrix keys,
             ConstMatrix values);
  // Copies the entries of `layer`, a source, at `positions`, which both hold, from a cache of the same
  // model: bit for bit where both store alike.
  Status CopyFrom(const KvCache& other, int layer, const std::vector<int64_t>& positions);
  // Becomes the sequence of `pieces`, of this cache or others of the same model: keys that change their
  // position are rotated to the new one, with the float32 angles of both; tokens follow. OutOfRange
  // where a sliding layer would need positions that are no longer held.
  Status Splice(const std::vector<KvPiece>& pieces);

  // Files. (kv_cache_bits.cc)

  // The bits of the positions that `layer`, a source, holds.
  KvLayerBits ReadBits(int layer) const;
  // Makes an empty cache hold `tokens`, layer i (a source) from position first[i] on, with zeros.
  Status Adopt(std::vector<int32_t> tokens, const std::vector<int64_t>& first);
  Status WriteBits(int layer, const KvLayerBits& bits);

  // Positions that `layer` holds: [first, length).
  int64_t FirstPosition(int layer) const;
  // Copies positions [begin, end) of `layer` to float32 [end − begin, K, H]; derived keys are rebuilt.
  void Read(int layer, int64_t begin, int64_t end, float* keys, float* values) const;

  // Marks the cache as taken by a pass or an edit; false if it is taken already.
  bool TryAcquire() { return !busy_.exchange(true); }
  void Release() { busy_.store(false); }

 private:
  struct Layer {
    int64_t first_block = 0;     // absolute number of blocks[0]
    int64_t first_position = 0;  // in blocks[0], where a splice left it incomplete
    std::vector<std::shared_ptr<AlignedBuffer>> blocks;
    std::vector<std::shared_ptr<AlignedBuffer>> spare;  // given back, reused before allocating
  };

  size_t BlockBytes(int layer) const {
    return static_cast<size_t>(layouts_[static_cast<size_t>(layer)].bytes());
  }
  struct Splicing;  // the new sequence of a Splice
  Layer SpliceLayer(int layer, Splicing& splicing);
  // Block number `block` (absolute) of a source, made this cache's own.
  uint8_t* WritableBlock(int layer, int64_t block);
  Status CheckPositions(int layer, const std::vector<int64_t>& positions) const;
  // The new position from which on `layer` has the entries of `pieces`; OutOfRange where that is not
  // all that it needs.
  StatusOr<int64_t> FirstSpliced(int layer, const std::vector<KvPiece>& pieces) const;
  // OutOfRange where a query at `length` would see positions that are not held.
  Status CheckHeld(const char* operation, int64_t length) const;
  bool KeepsAll(int layer) const {
    return layers_[static_cast<size_t>(layer)].window == 0 || options_.full_sliding;
  }
  bool IsSource(int layer) const { return layers_[static_cast<size_t>(layer)].source == layer; }

  std::vector<KvLayerSpec> layers_;
  KvCacheOptions options_;
  std::vector<KvBlockLayout> layouts_;  // by layer
  std::vector<Layer> storage_;
  std::vector<int32_t> tokens_;
  std::atomic<bool> busy_{false};
};

// Holds a cache for the length of a pass.
class KvLease {
 public:
  static StatusOr<KvLease> Take(std::shared_ptr<KvCache> cache);
  KvLease(KvLease&&) = default;
  KvLease& operator=(KvLease&&) = delete;
  ~KvLease() {
    if (cache_ != nullptr) cache_->Release();
  }
  KvCache* get() const { return cache_.get(); }

 private:
  explicit KvLease(std::shared_ptr<KvCache> cache) : cache_(std::move(cache)) {}
  std::shared_ptr<KvCache> cache_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_STATE_KV_CACHE_H_
