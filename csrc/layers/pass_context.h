#ifndef GEMLOUPE_LAYERS_PASS_CONTEXT_H_
#define GEMLOUPE_LAYERS_PASS_CONTEXT_H_

#include <vector>

#include "base/memory.h"
#include "inspect/captures.h"
#include "ops/linear.h"
#include "ops/rope.h"
#include "state/batch.h"

namespace gemloupe {

// What the layers of one pass share.
struct PassContext {
  const Batch* batch = nullptr;
  Arena* arena = nullptr;
  MatmulPath path;
  // Angles of the batch's positions, one entry for each RopeSpec of the model.
  std::vector<RopeAngles> angles;
  Captures* captures = nullptr;  // null: nothing is captured
  int layer = -1;                // the running layer; −1 outside the layers
  bool kv_stored = false;        // the running layer's keys and values are in the caches already

  int64_t rows() const { return batch->rows(); }

  // Shows an activation [T, …] to whoever asked for it.
  void Visit(HookPoint point, ConstMatrix x) const {
    if (captures != nullptr) captures->Visit(point, layer, x);
  }
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_PASS_CONTEXT_H_
