#include "state/kv_cache.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

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

// A sharing layer has no entries of its own to change or to save.
void CheckSource(const KvCache& cache, int layer) {
  CheckLayer(cache, layer);
  const int source = cache.layers()[static_cast<size_t>(layer)].source;
  if (source != layer) {
    throw py::value_error("layer " + std::to_string(layer) + " reads the entries of layer " +
                          std::to_string(source) + ": change those");
  }
}

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

// [n, K, H] as rows [n, K · H]; None as a matrix without data.
ConstMatrix Rows(const std::optional<FloatArray>& array, const KvCache& cache, int layer,
                 size_t count) {
  if (!array) return {};
  const KvLayerSpec& spec = cache.layers()[static_cast<size_t>(layer)];
  if (array->ndim() != 3 || array->shape(0) != static_cast<py::ssize_t>(count) ||
      array->shape(1) != spec.num_heads || array->shape(2) != spec.head_dim) {
    throw py::value_error("expected rows of shape [" + std::to_string(count) + ", " +
                          std::to_string(spec.num_heads) + ", " + std::to_string(spec.head_dim) +
                          "]");
  }
  return ConstMatrix(array->data(), static_cast<int64_t>(count), spec.num_heads * spec.head_dim);
}

void SetEntries(const CachePtr& cache, int layer, const std::vector<int64_t>& positions,
                const std::optional<FloatArray>& keys, const std::optional<FloatArray>& values) {
  CheckSource(*cache, layer);
  const ConstMatrix key_rows = Rows(keys, *cache, layer, positions.size());
  const ConstMatrix value_rows = Rows(values, *cache, layer, positions.size());
  ThrowIfError(WithLease(cache, [&] {
    return WithoutGil([&] { return cache->Set(layer, positions, key_rows, value_rows); });
  }));
}

void CopyEntries(const CachePtr& cache, const CachePtr& other, int layer,
                 const std::vector<int64_t>& positions) {
  CheckSource(*cache, layer);
  if (cache == other) return;
  ThrowIfError(WithLease(cache, [&] {
    return WithLease(other, [&] {
      return WithoutGil([&] { return cache->CopyFrom(*other, layer, positions); });
    });
  }));
}

// Keeps positions [begin, end) of each piece; with `other`, inserts all of it before position `at`.
void Splice(const CachePtr& cache, const std::vector<std::pair<int64_t, int64_t>>& kept,
            const CachePtr& other, size_t at) {
  const KvLease lease = ValueOrThrow(KvLease::Take(cache));
  // A cache inserted into itself is read while it changes.
  const CachePtr inserted = other == cache ? cache->Fork() : other;
  std::optional<KvLease> other_lease;
  std::vector<KvPiece> pieces;
  for (const auto& [begin, end] : kept) {
    if (begin < cache->start() || begin > end || end > cache->length()) {
      throw py::value_error("positions " + std::to_string(begin) + " to " + std::to_string(end) +
                            " are not in this cache");
    }
    pieces.push_back({cache.get(), begin, end});
  }
  if (inserted != nullptr) {
    other_lease.emplace(ValueOrThrow(KvLease::Take(inserted)));
    const auto where = pieces.begin() + static_cast<std::ptrdiff_t>(std::min(at, pieces.size()));
    pieces.insert(where, {inserted.get(), inserted->start(), inserted->length()});
  }
  ThrowIfError(WithoutGil([&] { return cache->Splice(pieces); }));
}

template <typename T>
std::vector<T> CopyOf(const py::array_t<T, py::array::c_style | py::array::forcecast>& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

template <typename T>
py::array_t<T> ArrayOf(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// keys and values [S, K, H] of the positions in [begin, end) that the layer holds.
py::tuple ReadLayer(const CachePtr& cache, int layer, int64_t begin, std::optional<int64_t> end) {
  CheckLayer(*cache, layer);
  const auto source = static_cast<size_t>(cache->layers()[static_cast<size_t>(layer)].source);
  const KvLayerSpec& spec = cache->layers()[source];
  std::vector<float> keys;
  std::vector<float> values;
  int64_t count = 0;
  WithLease(cache, [&] {
    begin = std::max(begin, cache->FirstPosition(layer));
    count = std::max<int64_t>(0, std::min(end.value_or(cache->length()), cache->length()) - begin);
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
          "layer_key_weight",
          [](const KvCache& cache, int layer) {
            CheckSource(cache, layer);
            const auto& weight = cache.layers()[static_cast<size_t>(layer)].key_weight;
            return weight == nullptr ? ArrayOf(std::vector<float>()) : ArrayOf(*weight);
          },
          py::arg("layer"), "w [H] where keys can be derived from the values, else empty.")
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
      .def("read", &ReadLayer, py::arg("layer"), py::arg("begin") = 0, py::arg("end") = py::none(),
           "(keys, values), float32 [S, K, H] each, of the positions held within [begin, end).")
      .def("set", &SetEntries, py::arg("layer"), py::arg("positions"), py::arg("keys"),
           py::arg("values"), "Replaces keys and values [n, K, H]; None keeps them.")
      .def("copy_from", &CopyEntries, py::arg("other"), py::arg("layer"), py::arg("positions"),
           "Takes over entries of another cache of the same model at the same positions.")
      .def("splice", &Splice, py::arg("kept"), py::arg("other") = nullptr, py::arg("at") = 0,
           "Keeps positions [begin, end) of each piece, `other` inserted before piece `at`; "
           "keys that change their position are rotated to it.")
      .def(
          "read_bits",
          [](const CachePtr& cache, int layer) {
            CheckSource(*cache, layer);
            const KvLayerBits bits = WithLease(cache, [&] { return cache->ReadBits(layer); });
            return py::make_tuple(ArrayOf(bits.keys), ArrayOf(bits.values),
                                  ArrayOf(bits.key_scales), ArrayOf(bits.value_scales));
          },
          py::arg("layer"), "(keys, values, key_scales, value_scales) as stored, for files.")
      .def(
          "write_bits",
          [](const CachePtr& cache, int layer, const py::array_t<uint8_t>& keys,
             const py::array_t<uint8_t>& values, const py::array_t<float>& key_scales,
             const py::array_t<float>& value_scales) {
            CheckSource(*cache, layer);
            const KvLayerBits bits{CopyOf<uint8_t>(keys), CopyOf<uint8_t>(values),
                                   CopyOf<float>(key_scales), CopyOf<float>(value_scales)};
            ThrowIfError(WithLease(cache, [&] { return cache->WriteBits(layer, bits); }));
          },
          py::arg("layer"), py::arg("keys"), py::arg("values"), py::arg("key_scales"),
          py::arg("value_scales"), "What read_bits gave, into a cache of the same layout.")
      .def(
          "adopt",
          [](const CachePtr& cache, std::vector<int32_t> tokens,
             const std::vector<int64_t>& first) {
            ThrowIfError(WithLease(cache, [&] { return cache->Adopt(std::move(tokens), first); }));
          },
          py::arg("tokens"), py::arg("first"),
          "Makes an empty cache hold tokens; layer i from position first[i] on, with zeros.")
      .def(
          "separate_keys",
          [](const CachePtr& cache, int layer) {
            CheckSource(*cache, layer);
            WithLease(cache, [&] {
              cache->SeparateKeys(layer);
              return true;
            });
          },
          py::arg("layer"), "Stores derived keys whole from now on.")
      .def_property_readonly(
          "shared_nbytes",
          [](const CachePtr& cache) {
            return WithLease(cache, [&] { return cache->shared_nbytes(); });
          },
          "Of nbytes, what a fork holds too.")
      .def_property_readonly(
          "shortest_length",
          [](const CachePtr& cache) {
            return WithLease(cache, [&] { return cache->ShortestLength(); });
          },
          "The smallest length that truncate takes.")
      .def_property_readonly("full_sliding",
                             [](const KvCache& cache) { return cache.options().full_sliding; })
      .def_property_readonly("model_id",
                             [](const KvCache& cache) { return cache.options().model_id; })
      .def(
          "layer_shape",
          [](const KvCache& cache, int layer) {
            CheckLayer(cache, layer);
            const KvLayerSpec& spec = cache.layers()[static_cast<size_t>(layer)];
            return py::make_tuple(spec.num_heads, spec.head_dim, spec.rope.pairs);
          },
          py::arg("layer"), "(key-value heads, head_dim, rotated pairs of dims).")
      .def(
          "truncate",
          [](const CachePtr& cache, int64_t length) {
            ThrowIfError(WithLease(cache, [&] { return cache->Truncate(length); }));
          },
          py::arg("length"), "Drops positions from `length` on.")
      .def(
          "rewind",
          [](const CachePtr& cache, int64_t length) {
            ThrowIfError(WithLease(cache, [&] { return cache->Rewind(length); }));
          },
          py::arg("length"), "Makes positions from `length` on writable again, keeping entries.")
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
      "kv_total_bytes",
      [](const std::vector<CachePtr>& caches) {
        std::vector<KvLease> leases;
        std::vector<const KvCache*> held;
        for (const CachePtr& cache : caches) {
          leases.push_back(ValueOrThrow(KvLease::Take(cache)));
          held.push_back(cache.get());
        }
        return KvCache::TotalBytes(held);
      },
      py::arg("caches"), "Bytes of several caches; blocks that they share count once.");

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
