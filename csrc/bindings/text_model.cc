#include "models/text_model.h"

#include "bindings/bindings.h"
#include "bindings/weights.h"
#include "runtime/run.h"

namespace py = pybind11;

namespace gemloupe {
namespace {

// Takes the weights out of `weights`.
std::shared_ptr<TextModel> Load(const TextConfig& config, Weights& weights,
                                const TextModelOptions& options,
                                const std::function<void(double)>& progress) {
  WeightStore store = ValueOrThrow(weights.Release());
  InterruptibleProgress report(progress);
  return ValueOrThrow(WithoutGil([&] {
    return TextModel::Load(config, std::move(store), options, [&](double x) { return report(x); });
  }));
}

std::shared_ptr<TextModel> Override(std::shared_ptr<TextModel> base,
                                    const std::vector<std::pair<std::string, Floats>>& weights,
                                    const std::string& dtype) {
  const DType held = ValueOrThrow(ParseDType(dtype));
  if (!IsPlain(held)) throw py::value_error("override: dtype is '" + dtype + "'");
  TextModel::NewWeights views;
  for (const auto& [name, values] : weights) {
    views.emplace_back(name, TensorView{values.data(),
                                        DType::kFloat32,
                                        {values.shape(), values.shape() + values.ndim()}});
  }
  return ValueOrThrow(
      WithoutGil([&] { return TextModel::Override(std::move(base), views, held); }));
}

py::array_t<float> ReadWeightRows(const TextModel& model, const std::string& name,
                                  const std::vector<int64_t>& ids) {
  std::vector<float> values =
      ValueOrThrow(WithoutGil([&] { return model.weights().ReadRows(name, ids); }));
  const auto rows = static_cast<py::ssize_t>(ids.size());
  const auto cols = rows == 0 ? 0 : static_cast<py::ssize_t>(values.size()) / rows;
  return ToArray(std::move(values), {rows, cols});
}

// What softmax of the logits says of one id a row; filled by `run`.
struct TokenScores {
  std::vector<int32_t> targets;
  py::array_t<float> logprobs;
  py::array_t<float> entropy;
};

// logits [rows, V or vocab], or None without rows.
py::object RunModel(TextModel& model, std::vector<int32_t> ids, std::shared_ptr<KvCache> cache,
                    int64_t logits_begin, int64_t logits_end, const std::shared_ptr<Hooks>& hooks,
                    std::optional<float> softcap, int64_t chunk, int first_layer,
                    const std::optional<Floats>& resid_pre, const PyAdapterMix& adapters,
                    const std::shared_ptr<MediaInput>& media, std::vector<int32_t> vocab,
                    TokenScores* scores) {
  SignalCheck stopped;
  RunRequest request;
  if (resid_pre.has_value()) {
    const auto rows = static_cast<py::ssize_t>(ids.size());
    if (resid_pre->ndim() != 2 || resid_pre->shape(0) != rows ||
        resid_pre->shape(1) != model.config().hidden_size || first_layer < 0 ||
        first_layer >= model.config().num_hidden_layers) {
      throw py::value_error("run: resid_pre is not [ids, hidden_size] of one of the layers");
    }
    request.first_layer = first_layer;
    request.resid_pre = ConstMatrix(resid_pre->data(), rows, resid_pre->shape(1));
  }
  request.ids = std::move(ids);
  request.cache = std::move(cache);
  request.logits_begin = logits_begin;
  request.logits_end = logits_end;
  request.hooks = hooks.get();
  request.adapters = UseAdapters(adapters);
  request.media = media;
  request.softcap = softcap;
  request.chunk = chunk;
  request.stopped = [&] { return stopped(); };
  request.vocab = std::move(vocab);
  if (scores != nullptr) request.targets = scores->targets;
  RunResult result;
  ThrowIfError(WithoutGil([&] { return Run(model, request, result); }));
  if (scores != nullptr) {
    const auto rows = static_cast<py::ssize_t>(result.scores.size());
    std::vector<float> logprobs, entropy;
    for (const TokenScore& score : result.scores) {
      logprobs.push_back(score.logprob);
      entropy.push_back(score.entropy);
    }
    scores->logprobs = ToArray(std::move(logprobs), {rows});
    scores->entropy = ToArray(std::move(entropy), {rows});
  }
  if (logits_end <= logits_begin) return py::none();
  const auto cols = request.vocab.empty() ? static_cast<py::ssize_t>(model.config().vocab_size)
                                          : static_cast<py::ssize_t>(request.vocab.size());
  return ToArray(std::move(result.logits), {logits_end - logits_begin, cols});
}

py::array_t<float> Unembed(TextModel& model, const Floats& x, bool norm,
                           std::optional<float> softcap, std::vector<int32_t> vocab) {
  if (x.ndim() != 2 || x.shape(1) != model.config().hidden_size) {
    throw py::value_error("unembed: x has " + std::to_string(x.ndim()) +
                          " axes, expected [T, hidden_size " +
                          std::to_string(model.config().hidden_size) + "]");
  }
  const int64_t cols =
      vocab.empty() ? model.config().vocab_size : static_cast<int64_t>(vocab.size());
  const ConstMatrix rows(x.data(), x.shape(0), x.shape(1));
  const TextModel::UnembedOptions options = {norm, softcap, std::move(vocab)};
  std::vector<float> logits;
  ThrowIfError(WithoutGil([&] { return model.Unembed(rows, options, logits); }));
  return ToArray(std::move(logits), {rows.rows, cols});
}

}  // namespace

void BindTextModel(py::module_& module) {
  py::class_<TextModelOptions>(module, "TextModelOptions")
      .def(py::init<>())
      .def_readwrite("bfloat16_matmul", &TextModelOptions::bfloat16_matmul)
      .def_readwrite("float32_activations", &TextModelOptions::float32_activations)
      .def_readwrite("round_embed_scale", &TextModelOptions::round_embed_scale)
      .def_readwrite("invariant", &TextModelOptions::invariant)
      .def_readwrite("expert_memory", &TextModelOptions::expert_memory)
      .def_readwrite("threads", &TextModelOptions::threads)
      .def_property(
          "kv_dtype", [](const TextModelOptions& options) { return DTypeName(options.kv_dtype); },
          [](TextModelOptions& options, const std::string& name) {
            options.kv_dtype = ValueOrThrow(ParseDType(name));
            if (!IsPlain(options.kv_dtype) && options.kv_dtype != DType::kInt8) {
              throw py::value_error("kv_dtype is '" + name +
                                    "', expected float32, float16, bfloat16 or int8");
            }
          });

  py::class_<MediaInput, std::shared_ptr<MediaInput>>(module, "MediaInput",
                                                      "Soft tokens in a sequence of ids.")
      .def(py::init([](std::vector<int64_t> rows, const Floats& soft_tokens, int32_t padding_id,
                       std::vector<std::pair<int64_t, int64_t>> blocks) {
             auto media = std::make_shared<MediaInput>();
             media->rows = std::move(rows);
             media->soft_tokens.assign(soft_tokens.data(), soft_tokens.data() + soft_tokens.size());
             media->padding_id = padding_id;
             media->blocks = std::move(blocks);
             return media;
           }),
           py::arg("rows"), py::arg("soft_tokens"), py::arg("padding_id"), py::arg("blocks"),
           "soft_tokens [rows, D] for these indices of the ids; blocks [begin, end) see themselves "
           "whole.");

  py::class_<TokenScores>(module, "TokenScores",
                          "Log-probability of one target a row, and entropy, in nats.")
      .def(py::init([](std::vector<int32_t> targets) {
             TokenScores scores;
             scores.targets = std::move(targets);
             return scores;
           }),
           py::arg("targets"), "One id for each id of the run, -1 for none.")
      .def_readonly("logprobs", &TokenScores::logprobs)
      .def_readonly("entropy", &TokenScores::entropy);

  py::class_<TextModel, std::shared_ptr<TextModel>>(module, "TextModel",
                                                    "The text decoder with its weights.")
      .def(py::init(&Load), py::arg("config"), py::arg("weights"), py::arg("options"),
           py::arg("progress") = nullptr,
           "Builds the model on the weights, in their targets; they are taken out of `weights`.")
      .def(
          "weight_dtype",
          [](const TextModel& model, const std::string& name) {
            return DTypeName(ValueOrThrow(model.weights().Find(name)).dtype);
          },
          py::arg("name"), "The dtype in which the model holds a tensor.")
      .def("override", &Override, py::arg("weights"), py::arg("dtype"),
           "The same model with [(name, float32 values)] in place of its own.")
      .def("weight_rows", &ReadWeightRows, py::arg("name"), py::arg("ids"),
           "Rows of a tensor as float32 [ids, cols]; those of experts are counted through.")
      .def_property_readonly("threads", &TextModel::threads)
      .def_property_readonly(
          "expert_cache",
          [](const TextModel& model) -> py::object {
            if (model.experts() == nullptr) return py::none();
            const ExpertCache::Counts counts = model.experts()->counts();
            return py::dict(py::arg("capacity") = counts.capacity, py::arg("found") = counts.found,
                            py::arg("read") = counts.read,
                            py::arg("bytes_read") = counts.bytes_read);
          },
          "Counts of experts held, found and read since loading; None where none are on disk.")
      .def_property_readonly("copied_bytes",
                             [](const TextModel& model) { return model.weights().copied_bytes(); })
      .def_property_readonly("mapped_bytes",
                             [](const TextModel& model) { return model.weights().mapped_bytes(); })
      .def("run", &RunModel, py::arg("ids"), py::arg("cache"), py::arg("logits_begin"),
           py::arg("logits_end"), py::arg("hooks"), py::arg("softcap"), py::arg("chunk"),
           py::arg("first_layer") = 0, py::arg("resid_pre") = py::none(),
           py::arg("adapters") = PyAdapterMix(), py::arg("media") = nullptr,
           py::arg("vocab") = std::vector<int32_t>(), py::arg("scores") = nullptr,
           "One sequence through the model; its tokens are appended to the cache.")
      .def("unembed", &Unembed, py::arg("x"), py::arg("norm"), py::arg("softcap"), py::arg("vocab"),
           "Logits [T, V or vocab] of residual streams x [T, D].");

  module.attr("DEFAULT_CHUNK") = kDefaultChunk;
}

}  // namespace gemloupe
