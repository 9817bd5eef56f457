#ifndef GEMLOUPE_LAYERS_PASS_CONTEXT_H_
#define GEMLOUPE_LAYERS_PASS_CONTEXT_H_

#include <cstdint>
#include <span>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "inspect/hooks.h"
#include "layers/lora.h"
#include "ops/linear.h"
#include "ops/rope.h"
#include "state/batch.h"

namespace gemloupe {

// Where a pass shows its activations: the hooks of each segment (null: none).
struct PassHooks {
  std::vector<Hooks*> of_segment;
  Status status;  // the first error; nothing is shown after it
};

// What the layers of one pass share.
struct PassContext {
  const Batch* batch = nullptr;
  Arena* arena = nullptr;
  MatmulPath path;
  // Angles of the batch's positions, one entry for each RopeSpec of the model.
  std::vector<RopeAngles> angles;
  PassHooks* hooks = nullptr;                         // null: nobody looks
  const std::vector<AdapterMix>* adapters = nullptr;  // of each segment; null: no row has any
  const MergedWeights* merged = nullptr;              // null: nothing is merged
  int layer = -1;                                     // the running layer; −1 outside the layers
  bool kv_stored = false;  // the running layer's keys and values are in the caches already
  bool kv_apart = false;   // they are a product of their own, as where a pass only stores them

  int64_t rows() const { return batch->rows(); }

  // Shows an activation [T, …] to whoever asked for it, to be edited and captured.
  void Visit(HookPoint point, Matrix x) const {
    if (hooks != nullptr) VisitSegments(point, x, {}, nullptr);
  }
  // At points of chosen experts [T, k].
  void Visit(HookPoint point, Matrix x, std::span<const int32_t> experts) const {
    if (hooks != nullptr) VisitSegments(point, x, experts, nullptr);
  }
  // Sets changed[i] where an edit changed rows of segment i.
  void Visit(HookPoint point, Matrix x, std::vector<uint8_t>& changed) const {
    if (hooks != nullptr) VisitSegments(point, x, {}, &changed);
  }
  // Shows one segment's activation at a site whose positions and heads the caller has set; returns
  // whether an edit changed it.
  bool VisitSegment(size_t segment, Site site, Matrix x) const;

  // What an adapter adds to a module [T, out], and whether anyone asked for it.
  void VisitDelta(AdaptedModule module, const Adapter& adapter, Matrix change) const;
  bool WantsDelta(AdaptedModule module, const Adapter& adapter) const;
  int LayerOf(AdaptedModule module) const { return IsOfLayer(module) ? layer : -1; }
  // Whether an adapter of the pass changes this module, in the running layer.
  bool Adapts(AdaptedModule module) const;

  // Whether anyone captures or edits this point of the running layer.
  bool Wants(HookPoint point) const;
  bool Wants(HookPoint point, size_t segment) const;

 private:
  void VisitSegments(HookPoint point, Matrix x, std::span<const int32_t> experts,
                     std::vector<uint8_t>* changed) const;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_PASS_CONTEXT_H_
