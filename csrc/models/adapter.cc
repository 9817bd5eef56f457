#include "models/adapter.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/weight_names.h"
#include "ops/dispatch.h"

namespace gemloupe {
namespace {

Status Mismatch(AdaptedModule module, int layer, const char* what, const std::vector<int64_t>& got,
                const std::vector<int64_t>& expected) {
  return absl::InvalidArgumentError(absl::StrCat("adapter: ", AdaptedModuleName(module, layer),
                                                 ": ", what, " has shape ", ShapeString(got),
                                                 ", expected ", ShapeString(expected)));
}

bool IsEmbedding(AdaptedModule module) {
  return module == AdaptedModule::kEmbedTokens || module == AdaptedModule::kEmbedTokensPerLayer;
}

// What A reads and B makes. An embedding is stored [V, cols]: A picks by token, B makes the columns.
struct Sizes {
  int64_t outputs;
  int64_t inputs;
};
Sizes MatrixSizes(AdaptedModule module, const std::vector<int64_t>& shape) {
  if (IsEmbedding(module)) return {shape.back(), shape.front()};
  return {shape[shape.size() - 2], shape.back()};
}

const char* LayerTensor(AdaptedModule module) {
  switch (module) {
    case AdaptedModule::kQProj: return names::kQProj;
    case AdaptedModule::kKProj: return names::kKProj;
    case AdaptedModule::kVProj: return names::kVProj;
    case AdaptedModule::kOProj: return names::kOProj;
    case AdaptedModule::kGateProj: return names::kGateProj;
    case AdaptedModule::kUpProj: return names::kUpProj;
    case AdaptedModule::kDownProj: return names::kDownProj;
    case AdaptedModule::kPerLayerGate: return names::kPerLayerInputGate;
    case AdaptedModule::kPerLayerProjection: return names::kPerLayerProjection;
    case AdaptedModule::kRouterProj: return names::kRouterProj;
    case AdaptedModule::kExpertsGateUpProj: return names::kExpertsGateUpProj;
    case AdaptedModule::kExpertsDownProj: return names::kExpertsDownProj;
    default: break;
  }
  return "";
}

// [out, in], or empty where the layer has no such module.
std::vector<int64_t> LayerShape(const TextConfig& config, AdaptedModule module, int layer) {
  const LayerConfig& spec = config.layers[static_cast<size_t>(layer)];
  const int64_t hidden = config.hidden_size;
  const int64_t q_rows = config.num_attention_heads * spec.head_dim;
  const int64_t kv_rows = spec.num_kv_heads * spec.head_dim;
  const int64_t width = config.hidden_size_per_layer_input;
  const bool stores = spec.kv_source == layer;
  switch (module) {
    case AdaptedModule::kQProj: return {q_rows, hidden};
    case AdaptedModule::kOProj: return {hidden, q_rows};
    case AdaptedModule::kKProj:
      if (stores) return {kv_rows, hidden};
      break;
    case AdaptedModule::kVProj:
      if (stores && !spec.values_are_keys) return {kv_rows, hidden};
      break;
    case AdaptedModule::kGateProj:
    case AdaptedModule::kUpProj: return {spec.intermediate_size, hidden};
    case AdaptedModule::kDownProj: return {hidden, spec.intermediate_size};
    case AdaptedModule::kPerLayerGate:
      if (width > 0) return {width, hidden};
      break;
    case AdaptedModule::kPerLayerProjection:
      if (width > 0) return {hidden, width};
      break;
    case AdaptedModule::kRouterProj:
      if (spec.has_experts) return {config.num_experts, hidden};
      break;
    case AdaptedModule::kExpertsGateUpProj:
      if (spec.has_experts) return {config.num_experts, 2 * config.moe_intermediate_size, hidden};
      break;
    case AdaptedModule::kExpertsDownProj:
      if (spec.has_experts) return {config.num_experts, hidden, config.moe_intermediate_size};
      break;
    default: break;
  }
  return {};
}

}  // namespace

StatusOr<std::vector<int64_t>> AdaptedModuleShape(const TextConfig& config, AdaptedModule module,
                                                  int layer) {
  const int64_t hidden = config.hidden_size;
  const int64_t all = config.num_hidden_layers * config.hidden_size_per_layer_input;
  std::vector<int64_t> shape;
  if (IsOfLayer(module)) {
    if (layer >= 0 && layer < config.num_hidden_layers) shape = LayerShape(config, module, layer);
  } else if (layer != -1 || IsOfTower(module)) {
    shape = {};
  } else if (module == AdaptedModule::kEmbedTokens || module == AdaptedModule::kHead) {
    shape = {config.vocab_size, hidden};
  } else if (all > 0 && module == AdaptedModule::kEmbedTokensPerLayer) {
    shape = {config.vocab_size_per_layer_input, all};
  } else if (all > 0) {
    shape = {all, hidden};
  }
  if (!shape.empty()) return shape;
  return absl::NotFoundError(
      absl::StrCat("adapter: this model has no ", AdaptedModuleName(module, layer)));
}

std::string AdaptedModuleTensor(AdaptedModule module, int layer) {
  switch (module) {
    case AdaptedModule::kEmbedTokens:
    case AdaptedModule::kHead: return names::kEmbedTokens;
    case AdaptedModule::kEmbedTokensPerLayer: return names::kEmbedTokensPerLayer;
    case AdaptedModule::kPerLayerModelProjection: return names::kPerLayerModelProjection;
    default: return names::OfLayer(layer, LayerTensor(module));
  }
}

TensorView AdapterBuilder::Hold(const AdapterValues& values, Adapter& adapter) const {
  TensorView view = {nullptr, dtype_, values.shape};
  uint8_t* memory = adapter.NewMemory(view.byte_size());
  view.data = memory;
  RoundFromFloat(memory, values.data, dtype_, view.size());
  return view;
}

StatusOr<std::vector<int64_t>> AdapterBuilder::ShapeFor(AdaptedModule module, int layer,
                                                        std::vector<int64_t> own) const {
  if (!IsOfTower(module)) return AdaptedModuleShape(config_, module, layer);
  if ((layer >= 0) == IsOfLayer(module)) return own;
  return absl::InvalidArgumentError(absl::StrCat("adapter: layer of ", AdaptedModuleName(module),
                                                 " is ", layer, ", expected ",
                                                 IsOfLayer(module) ? "0 or more" : "-1"));
}

Status AdapterBuilder::AddLowRank(AdaptedModule module, int layer, const LowRank& values,
                                  Adapter& adapter) const {
  const auto size = [](const AdapterValues& of, size_t axis) {
    return of.shape.size() == 2 ? of.shape[axis] : 0;
  };
  GL_ASSIGN_OR_RETURN(const std::vector<int64_t> shape,
                      ShapeFor(module, layer, {size(values.b, 0), size(values.a, 1)}));
  const int64_t rank = values.b.shape.empty() ? 0 : values.b.shape.back();
  const auto [outputs, inputs] = MatrixSizes(module, shape);
  std::vector<int64_t> a_shape = {rank, inputs};
  std::vector<int64_t> b_shape = {outputs, rank};
  if (IsOfExperts(module)) {
    a_shape.insert(a_shape.begin(), shape.front());
    b_shape.insert(b_shape.begin(), shape.front());
  }
  if (rank < 1 || values.b.shape != b_shape) {
    b_shape.back() = std::max<int64_t>(rank, 1);
    return Mismatch(module, layer, "B", values.b.shape, b_shape);
  }
  if (values.a.shape != a_shape) return Mismatch(module, layer, "A", values.a.shape, a_shape);
  const auto gains = static_cast<int64_t>(values.gain.size());
  if (gains > 0 && (IsOfExperts(module) || gains != outputs)) {
    return Mismatch(module, layer, "DoRA's magnitude", {gains},
                    {IsOfExperts(module) ? 0 : outputs});
  }
  LoraDelta delta;
  delta.a = Hold(values.a, adapter);
  delta.b = Hold(values.b, adapter);
  delta.scale = values.scale;
  delta.gain = values.gain;
  return adapter.Add(module, layer, std::move(delta));
}

Status AdapterBuilder::Replace(AdaptedModule module, int layer, const AdapterValues& weight,
                               Adapter& adapter) const {
  GL_ASSIGN_OR_RETURN(const std::vector<int64_t> shape, ShapeFor(module, layer, weight.shape));
  if (IsOfExperts(module)) {
    return absl::UnimplementedError(absl::StrCat("adapter: ", AdaptedModuleName(module, layer),
                                                 ": experts are not replaced as a whole"));
  }
  if (weight.shape != shape || shape.size() != 2) {
    return Mismatch(module, layer, "the weight", weight.shape, shape);
  }
  LoraDelta delta;
  delta.replacement = Hold(weight, adapter);
  return adapter.Add(module, layer, std::move(delta));
}

Status AdapterBuilder::Shift(AdaptedModule module, int layer, std::vector<float> shift,
                             Adapter& adapter) const {
  const auto size = static_cast<int64_t>(shift.size());
  GL_ASSIGN_OR_RETURN(const std::vector<int64_t> shape, ShapeFor(module, layer, {size, 0}));
  if (IsEmbedding(module) || IsOfExperts(module) || size < 1 || size != shape[0]) {
    return Mismatch(module, layer, "the bias", {size}, {IsOfExperts(module) ? 0 : shape[0]});
  }
  adapter.AddShift(module, layer, std::move(shift));
  return absl::OkStatus();
}

Status AdapterBuilder::ReplaceRows(AdaptedModule module, const std::vector<int32_t>& ids,
                                   const AdapterValues& rows, Adapter& adapter) const {
  if (!IsEmbedding(module) && module != AdaptedModule::kHead) {
    return absl::InvalidArgumentError(
        absl::StrCat("adapter: ", AdaptedModuleName(module), " has no rows of tokens"));
  }
  GL_ASSIGN_OR_RETURN(const std::vector<int64_t> shape, AdaptedModuleShape(config_, module, -1));
  const auto count = static_cast<int64_t>(ids.size());
  if (count == 0 || rows.shape != std::vector<int64_t>{count, shape[1]}) {
    return Mismatch(module, -1, "the tokens' rows", rows.shape, {count, shape[1]});
  }
  if (ids.front() < 0 || ids.back() >= shape[0] ||
      std::adjacent_find(ids.begin(), ids.end(), std::greater_equal<>()) != ids.end()) {
    return absl::InvalidArgumentError(absl::StrCat("adapter: ", AdaptedModuleName(module),
                                                   ": expected ascending token ids from 0 to ",
                                                   shape[0] - 1));
  }
  LoraDelta delta;
  delta.ids = ids;
  delta.rows = Hold(rows, adapter);
  return adapter.Add(module, -1, std::move(delta));
}

Status CheckAdapter(const TextConfig& config, const Adapter& adapter) {
  for (const auto& [key, delta] : adapter.deltas()) {
    const auto& [layer, module] = key;
    if (IsOfTower(module)) continue;
    GL_ASSIGN_OR_RETURN(const std::vector<int64_t> shape,
                        AdaptedModuleShape(config, module, layer));
    if (delta.b.data != nullptr) {
      const auto [outputs, inputs] = MatrixSizes(module, shape);
      const int64_t b_outputs = delta.b.shape[delta.b.shape.size() - 2];
      if (b_outputs != outputs || delta.a.shape.back() != inputs ||
          (IsOfExperts(module) && delta.b.shape[0] != shape[0])) {
        return Mismatch(module, layer, "the adapter's change", {b_outputs, delta.a.shape.back()},
                        {outputs, inputs});
      }
    } else if (delta.replacement.data != nullptr && delta.replacement.shape != shape) {
      return Mismatch(module, layer, "the adapter's weight", delta.replacement.shape, shape);
    } else if (delta.rows.data != nullptr &&
               (delta.ids.back() >= shape[0] || delta.rows.shape[1] != shape[1])) {
      return Mismatch(module, layer, "the adapter's rows", delta.rows.shape, shape);
    }
  }
  return absl::OkStatus();
}

}  // namespace gemloupe
