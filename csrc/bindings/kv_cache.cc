#include "state/kv_cache.h"

#include "bindings/bindings.h"
#include "models/config.h"
#include "models/text_model.h"
#include "runtime/run.h"

namespace py = pybind11;

namespace gemloupe {
namespace {

using CachePtr = std::shared_ptr<KvCache>;

// Keeps other threads' passes away from the cache while it is read or changed.
template <typename Fn>
auto WithLease(const CachePtr& cache, Fn fn) {
  const KvLease lease = ValueOrThrow(KvLease::Take(cache));
  return fn();
}

void CheckLayer(const KvCache& cache, int layer) {
  if (layer < 0 || layer >= static_cast<int>(cache.layers().size())) {
    throw py::index_error("layer " + std::to_string(layer) + ", expected 0 to " +
                          std::to_string(cache.layers().size() - 1));
  }
}

StatusOr<DType> ParseKvDType(const std::string& name) {
  const StatusOr<DType> dtype = ParseDType(name);
  if (dtype.ok() && (IsPlain(*dtype) || *dtype == DType::kInt8)) return dtype;
  return absl::InvalidArgumentError("KV cache: dtype is '" + name +
                                    "', expected float32, float16, bfloat16 or int8");
}

// keys and values [S, K, H] of the positions that the layer holds.
py::tuple ReadLayer(const CachePtr& cache, int layer) {
  CheckLayer(*cache, layer);
  const auto source = static_cast<size_t>(cache->layers()[static_cast<size_t>(layer)].source);
  const KvLayerSpec& spec = cache->layers()[source];
  std::vector<float> keys;
  std::vector<float> values;
  int64_t count = 0;
  WithLease(cache, [&] {
    const int64_t begin = cache->FirstPosition(layer);
    count = std::max<int64_t>(0, cache->length() - begin);
    const auto size = static_cast<size_t>(count * spec.num_heads * spec.head_dim);
    keys.resize(size);
    values.resize(size);
    cache->Read(layer, begin, begin + count, keys.data(), values.data());
  });
  const std::vector<py::ssize_t> shape = {count, spec.num_heads, spec.head_dim};
  return py::make_tuple(ToArray(std::move(keys), shape), ToArray(std::move(values), shape));
}

}  // namespace

void BindKvCache(py::module_& module) {
  py::class_<KvCache, std::shared_ptr<KvCache>>(module, "KvCache",
                                                "Keys and values of one sequence, by layer.")
      .def_property_readonly(
          "length",
          [](const CachePtr& cache) { return WithLease(cache, [&] { return cache->length(); }); },
          "Position of the next token.")
      .def_property_readonly("start", &KvCache::start, "Position of the first token.")
      .def_property_readonly("tokens",
                             [](const CachePtr& cache) {
                               return WithLease(
                                   cache, [&] { return std::vector<int32_t>(cache->tokens()); });
                             })
      .def_property_readonly(
          "nbytes",
          [](const CachePtr& cache) { return WithLease(cache, [&] { return cache->nbytes(); }); },
          "Bytes of all layers.")
      .def_property_readonly("max_tokens",
                             [](const KvCache& cache) { return cache.options().max_tokens; })
      .def_property_readonly("dtype",
                             [](const KvCache& cache) { return DTypeName(cache.options().dtype); })
      .def_property_readonly("num_layers",
                             [](const KvCache& cache) { return cache.layers().size(); })
      .def(
          "layer_nbytes",
          [](const CachePtr& cache, int layer) {
            CheckLayer(*cache, layer);
            return WithLease(cache, [&] { return cache->layer_nbytes(layer); });
          },
          py::arg("layer"))
      .def(
          "layer_window",
          [](const KvCache& cache, int layer) {
            CheckLayer(cache, layer);
            return cache.layers()[static_cast<size_t>(layer)].window;
          },
          py::arg("layer"), "Positions that a query sees; 0 for all.")
      .def(
          "layer_source",
          [](const KvCache& cache, int layer) {
            CheckLayer(cache, layer);
            return cache.layers()[static_cast<size_t>(layer)].source;
          },
          py::arg("layer"), "The layer whose entries are read.")
      .def(
          "layer_storage",
          [](const KvCache& cache, int layer) {
            CheckLayer(cache, layer);
            return cache.storage(layer) == KvStorage::kDerived ? "derived" : "separate";
          },
          py::arg("layer"), "How keys are stored: whole, or derived from the values.")
      .def(
          "first_position",
          [](const CachePtr& cache, int layer) {
            CheckLayer(*cache, layer);
            return WithLease(cache, [&] { return cache->FirstPosition(layer); });
          },
          py::arg("layer"), "The oldest position held.")
      .def("read", &ReadLayer, py::arg("layer"),
           "(keys, values), float32 [S, K, H] each, of the positions held.")
      .def(
          "truncate",
          [](const CachePtr& cache, int64_t length) {
            ThrowIfError(WithLease(cache, [&] { return cache->Truncate(length); }));
          },
          py::arg("length"), "Drops positions from `length` on.")
      .def(
          "append_random",
          [](const CachePtr& cache, const std::vector<int32_t>& ids, uint32_t seed) {
            WithLease(cache, [&] {
              const int64_t held = cache->length() - cache->start();
              const int64_t most = cache->options().max_tokens;
              if (held + static_cast<int64_t>(ids.size()) > most) {
                throw py::value_error("append_random: " + std::to_string(ids.size()) +
                                      " ids after " + std::to_string(held) +
                                      " tokens, expected at most " + std::to_string(most) +
                                      " tokens in this cache");
              }
              cache->AppendRandom(ids, seed);
              return true;
            });
          },
          py::arg("ids"), py::arg("seed"),
          "Appends ids with random keys and values that no model has computed, for benchmarks.")
      .def(
          "restore",
          [](const CachePtr& cache, const CachePtr& fork) {
            WithLease(cache, [&] {
              cache->Restore(*fork);
              return true;
            });
          },
          py::arg("fork"), "Takes over the content of a fork of this cache.")
      .def(
          "fork",
          [](const CachePtr& cache) { return WithLease(cache, [&] { return cache->Fork(); }); },
          "An independent cache with the same content; blocks are shared until one writes.");

  module.def(
      "new_cache",
      [](const TextModel& model, int64_t max_tokens, const std::string& dtype, int64_t start,
         bool full_sliding, int64_t chunk, bool separate_keys) {
        KvCacheOptions options;
        options.dtype = ValueOrThrow(ParseKvDType(dtype));
        options.max_tokens = max_tokens;
        options.start = start;
        options.full_sliding = full_sliding;
        options.separate_keys = separate_keys;
        return ValueOrThrow(NewCache(model, options, chunk));
      },
      py::arg("model"), py::arg("max_tokens"), py::arg("dtype"), py::arg("start"),
      py::arg("full_sliding"), py::arg("chunk"), py::arg("separate_keys") = false,
      "A new cache; max_tokens 0: the model's maximum.");

  module.def(
      "kv_bytes_needed",
      [](const TextConfig& config, const std::string& dtype, int64_t tokens, int64_t chunk,
         bool full_sliding, bool separate_keys) {
        KvCacheOptions options;
        options.dtype = ValueOrThrow(ParseKvDType(dtype));
        options.full_sliding = full_sliding;
        options.separate_keys = separate_keys;
        return KvCache::BytesNeeded(MakeKvLayerSpecs(config), options, tokens, chunk);
      },
      py::arg("config"), py::arg("dtype"), py::arg("tokens"), py::arg("chunk"),
      py::arg("full_sliding") = false, py::arg("separate_keys") = false,
      "Bytes that a cache of `tokens` tokens needs, a pass of `chunk` included.");
}

}  // namespace gemloupe
