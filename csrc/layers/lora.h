#ifndef GEMLOUPE_LAYERS_LORA_H_
#define GEMLOUPE_LAYERS_LORA_H_

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "base/tensor.h"
#include "ops/linear.h"

namespace gemloupe {

struct PassContext;

// The modules that an adapter can change: of the text decoder, then of the towers.
enum class AdaptedModule : uint8_t {
  // Of every layer:
  kQProj,
  kKProj,
  kVProj,
  kOProj,
  kGateProj,
  kUpProj,
  kDownProj,
  kPerLayerGate,
  kPerLayerProjection,
  kRouterProj,
  kExpertsGateUpProj,
  kExpertsDownProj,
  // Outside the layers:
  kEmbedTokens,
  kEmbedTokensPerLayer,
  kPerLayerModelProjection,
  kHead,
  // Of every layer of the vision encoder:
  kVisionQProj,
  kVisionKProj,
  kVisionVProj,
  kVisionOProj,
  kVisionGateProj,
  kVisionUpProj,
  kVisionDownProj,
  // Outside them:
  kVisionInputProj,
  kVisionPatchDense,  // of the encoder-free embedder
  kVisionProjection,  // to the text model's width
  // Of every layer of the audio encoder:
  kAudioFfn1Up,
  kAudioFfn1Down,
  kAudioQProj,
  kAudioKProj,
  kAudioVProj,
  kAudioRelativeKProj,
  kAudioAttnPost,
  kAudioConvStart,
  kAudioConvEnd,
  kAudioFfn2Up,
  kAudioFfn2Down,
  // Outside them:
  kAudioInputProj,
  kAudioOutputProj,
  kAudioProjection,  // to the text model's width
};

inline constexpr int kNumAdaptedModules = static_cast<int>(AdaptedModule::kAudioProjection) + 1;
inline constexpr bool IsOfTower(AdaptedModule module) { return module > AdaptedModule::kHead; }
inline constexpr bool IsOfLayer(AdaptedModule module) {
  return module < AdaptedModule::kEmbedTokens ||
         (module >= AdaptedModule::kVisionQProj && module < AdaptedModule::kVisionInputProj) ||
         (module >= AdaptedModule::kAudioFfn1Up && module < AdaptedModule::kAudioInputProj);
}
inline constexpr bool IsOfExperts(AdaptedModule module) {
  return module == AdaptedModule::kExpertsGateUpProj || module == AdaptedModule::kExpertsDownProj;
}

// "attn.q_proj", "experts.down_proj", "lm_head", "vision.attn.q_proj", …
const char* AdaptedModuleName(AdaptedModule module);
// "layers.3.attn.q_proj", "lm_head" or "vision.layers.3.attn.q_proj".
std::string AdaptedModuleName(AdaptedModule module, int layer);
// Accepts the names without a layer; InvalidArgument otherwise.
StatusOr<AdaptedModule> ParseAdaptedModule(std::string_view name);

// What an adapter does to the matrix W [out, in] of one module. Low-rank (Hu et al. 2021,
// arXiv:2106.09685): y = W x + scale · B (A x) + shift; with DoRA's gain g = m / ‖W + scale · B A‖ of
// each output (Liu et al. 2024, arXiv:2402.09353): g times the products. A shift may stand alone.
struct LoraDelta {
  TensorView a;              // [r, in]; of experts [E, r, in]; of embeddings [r, V]
  TensorView b;              // [out, r]; of experts [E, out, r]; of embeddings [cols, r]
  float scale = 1.0f;        // of embeddings: times the embedding's own factor
  std::vector<float> gain;   // [out], or empty
  std::vector<float> shift;  // [out], or empty
  // Instead of A and B, a matrix in place of W:
  TensorView replacement;  // [out, in]
  // Or, of embeddings and the head, new rows in place of those of some tokens:
  std::vector<int32_t> ids;  // ascending
  TensorView rows;           // [ids, cols]

  // Whether it gives rows that stand in place of W's, not A and B.
  bool replaces_rows() const { return rows.data != nullptr || replacement.data != nullptr; }
  // Reads columns [column, column + count) of the row in place of W's row `id`; false where that stays.
  bool ReadNewRow(int64_t id, int64_t column, int64_t count, float* dst) const;
};

// A set of changes of a model's weights, kept apart from them. Filled by one thread, then only read,
// by any number of models of the same sizes.
class Adapter {
 public:
  // AlreadyExists if the module has a change. Its views must be of memory that NewMemory gave.
  Status Add(AdaptedModule module, int layer, LoraDelta delta);
  // Adds `shift` to the outputs of a module, beside another change of it or alone.
  void AddShift(AdaptedModule module, int layer, std::vector<float> shift);
  uint8_t* NewMemory(size_t bytes);

  // Null where the adapter changes nothing. layer: −1 outside the layers.
  const LoraDelta* Find(AdaptedModule module, int layer) const;
  const std::map<std::pair<int, AdaptedModule>, LoraDelta>& deltas() const { return deltas_; }
  uint64_t nbytes() const { return nbytes_; }
  // The model that last found the sizes to fit.
  std::atomic<uint64_t>& fits() const { return fits_; }

 private:
  std::map<std::pair<int, AdaptedModule>, LoraDelta> deltas_;  // in model order
  std::vector<AlignedBuffer> memory_;
  uint64_t nbytes_ = 0;
  mutable std::atomic<uint64_t> fits_ = 0;
};

struct WeightedAdapter {
  std::shared_ptr<const Adapter> adapter;
  float weight = 1.0f;  // of all its changes

  friend bool operator==(const WeightedAdapter&, const WeightedAdapter&) = default;
};

// The adapters of one sequence: their changes add up.
using AdapterMix = std::vector<WeightedAdapter>;

// Matrices that stand in for a model's own: adapters that were merged into them.
class MergedWeights {
 public:
  // The matrix to use for a module whose own is `weight`.
  const TensorView& Of(AdaptedModule module, int layer, const TensorView& weight) const {
    const auto it = views_.find({layer, module});
    return it == views_.end() ? weight : it->second;
  }
  bool empty() const { return views_.empty(); }
  uint64_t nbytes() const;
  // Room for a matrix or a stack of them, to be filled by the caller.
  uint8_t* Add(AdaptedModule module, int layer, DType dtype, const std::vector<int64_t>& shape);

 private:
  std::map<std::pair<int, AdaptedModule>, TensorView> views_;
  std::vector<AlignedBuffer> memory_;
};

// One product of a group that shares its left side, of a module that adapters may change:
// dst [T, n] = x [T, k] · W[first : first + n]ᵀ, and what the adapters of each row add.
struct AdaptedJob {
  AdaptedModule module;
  const TensorView* weight;
  Matrix dst;
  int64_t first = 0;
};

// Linear with the adapters of the pass. The rows of x are those of the pass; where it has one sequence
// only they may be others, all of which then have its adapters. Products with A share the fork of the
// main ones; B takes a second one. InvalidArgument for a change of another size than the weight.
Status AdaptedLinear(ConstMatrix x, std::span<const AdaptedJob> jobs, const MatmulPath& path,
                     const PassContext& ctx);
Status AdaptedLinear(ConstMatrix x, std::initializer_list<AdaptedJob> jobs, const PassContext& ctx);

// Changes dst [T, cols], columns [column, column + cols) of the rows that `module`, an embedding, has
// for the tokens of the pass, times `factor`.
void AdaptEmbedding(AdaptedModule module, int64_t column, float factor, const PassContext& ctx,
                    Matrix dst);

// What adapters add to the experts' products. A slot is a row of the pass with one of its experts.
class ExpertDeltas {
 public:
  // Of one module: slot i is row slot_rows[i] of the pass, chose expert slot_experts[i], and has row
  // source_rows[i] of x on its left side.
  struct Slots {
    std::span<const int64_t> rows;
    std::span<const int32_t> experts;
    std::span<const int64_t> sources;
  };
  // Computes A x of all slots, on all threads; memory is the arena's.
  ExpertDeltas(AdaptedModule module, ConstMatrix x, const Slots& slots, const PassContext& ctx);
  bool empty() const { return sides_.empty(); }
  // Adds outputs [begin, end) of slots [first, first + dst.rows) to dst, on the calling thread.
  void Add(int64_t first, int64_t begin, int64_t end, Matrix dst) const;

 private:
  struct Side {
    const Adapter* adapter;
    const LoraDelta* delta;
    Matrix low;  // [slots, r], of slots whose row has the adapter
  };
  std::vector<Side> sides_;
  std::vector<const AdapterMix*> mixes_;  // [slots]
  std::span<const int32_t> experts_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_LORA_H_
