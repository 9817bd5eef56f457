#ifndef GEMLOUPE_LAYERS_EXPERTS_H_
#define GEMLOUPE_LAYERS_EXPERTS_H_

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/status.h"
#include "formats/expert_cache.h"
#include "layers/pass_context.h"
#include "layers/router.h"

namespace gemloupe {

struct ExpertsWeights {
  TensorView gate_up_proj;  // [E, 2 F, D]: F rows of gate, then F rows of up
  TensorView down_proj;     // [E, D, F]
  // Experts that are read on demand: the cache and the layer's number in it. Null: all are in memory.
  std::shared_ptr<ExpertCache> cache;
  int cache_layer = 0;
};

// The experts of a mixture-of-experts block.
class Experts {
 public:
  explicit Experts(ExpertsWeights weights) : weights_(std::move(weights)) {}

  // out [T, D] = Σ over the chosen experts, in ascending index, of weight · down(gelu_tanh(gate x) ·
  // up x), for x [T, D].
  Status Forward(ConstMatrix x, const Routing& routing, const PassContext& ctx, Matrix out) const;

 private:
  struct Slots;
  struct Part;
  struct Buffers;
  StatusOr<std::vector<ExpertView>> Views(std::span<const int32_t> experts,
                                          const PassContext& ctx) const;
  Status Hidden(const LinearInput& input, const Slots& slots, const Part& part,
                const PassContext& ctx, Matrix hidden) const;
  Status Products(ConstMatrix hidden, const Slots& slots, const Part& part, const PassContext& ctx,
                  const Buffers& to) const;
  Status ForwardShown(const LinearInput& input, const Slots& slots, const Routing& routing,
                      const PassContext& ctx, Matrix out) const;
  template <typename T>
  static std::span<const T> PartOf(const std::vector<T>& all, const Part& part);
  static ExpertDeltas::Slots DeltaSlots(const Slots& slots, const Part& part,
                                        std::span<const int64_t> sources);
  // Calls fn(part) for as many groups at once as can be held.
  template <typename Fn>
  Status ForParts(const Slots& slots, const PassContext& ctx, Fn fn) const;

  ExpertsWeights weights_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_EXPERTS_H_
