#ifndef GEMLOUPE_INSPECT_CAPTURES_H_
#define GEMLOUPE_INSPECT_CAPTURES_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/tensor.h"
#include "inspect/hook_points.h"

namespace gemloupe {

// Copies of activations, taken while passes run. Rows of successive passes are appended.
class Captures {
 public:
  struct Entry {
    HookPoint point;
    int layer = -1;  // −1 for points outside the layers
    int64_t rows = 0;
    int64_t cols = 0;
    std::vector<float> values;  // [rows, cols]
  };

  // Asks for a point; layer −1 for those outside the layers.
  void Want(HookPoint point, int layer);

  // Copies x if this point was asked for.
  void Visit(HookPoint point, int layer, ConstMatrix x) {
    if (Entry* entry = Find(point, layer)) Append(*entry, x);
  }

  bool Wants(HookPoint point, int layer) const { return index_.contains(Key(point, layer)); }
  // The highest layer with a wanted point; −1 if there is none. The final norm and the logits count
  // as layer `num_layers`.
  int LastLayer(int num_layers) const;

  std::vector<Entry>& entries() { return entries_; }

 private:
  static int Key(HookPoint point, int layer) { return (layer + 1) * 256 + static_cast<int>(point); }
  Entry* Find(HookPoint point, int layer) {
    const auto it = index_.find(Key(point, layer));
    return it == index_.end() ? nullptr : &entries_[it->second];
  }
  static void Append(Entry& entry, ConstMatrix x);

  std::vector<Entry> entries_;
  absl::flat_hash_map<int, size_t> index_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_INSPECT_CAPTURES_H_
