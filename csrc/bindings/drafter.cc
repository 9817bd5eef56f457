#include "models/drafter.h"

#include "bindings/bindings.h"
#include "bindings/weights.h"

namespace py = pybind11;

namespace gemloupe {
namespace {

std::shared_ptr<Drafter> Load(const DrafterConfig& config, const TextModel& target,
                              Weights& weights, const std::function<void(double)>& progress) {
  WeightStore store = ValueOrThrow(weights.Release());
  InterruptibleProgress report(progress);
  return ValueOrThrow(WithoutGil([&] {
    return Drafter::Load(config, target, std::move(store), [&](double x) { return report(x); });
  }));
}

}  // namespace

void BindDrafter(py::module_& module) {
  py::class_<DrafterConfig>(module, "DrafterConfig")
      .def(py::init<>())
      .def_readwrite("text", &DrafterConfig::text)
      .def_readwrite("backbone_hidden_size", &DrafterConfig::backbone_hidden_size)
      .def_readwrite("num_clusters", &DrafterConfig::num_clusters)
      .def_readwrite("centroid_top_k", &DrafterConfig::centroid_top_k)
      .def_readwrite("cluster_tokens", &DrafterConfig::cluster_tokens);

  py::class_<Drafter, std::shared_ptr<Drafter>>(module, "Drafter",
                                                "Guesses what a target model will say next.")
      .def(py::init(&Load), py::arg("config"), py::arg("target"), py::arg("weights"),
           py::arg("progress") = nullptr, "The weights are taken out of `weights`.")
      .def_property_readonly(
          "copied_bytes", [](const Drafter& drafter) { return drafter.weights().copied_bytes(); })
      .def_property_readonly(
          "mapped_bytes", [](const Drafter& drafter) { return drafter.weights().mapped_bytes(); })
      .def(
          "draft",
          [](Drafter& drafter, TextModel& target, const std::shared_ptr<KvCache>& cache,
             int32_t token, const Floats& hidden, int64_t count) {
            if (hidden.ndim() != 1 || hidden.size() != target.config().hidden_size || count < 1 ||
                drafter.target_id() != target.id()) {
              throw py::value_error("draft: expected this drafter's target and hidden [B]");
            }
            const KvLease lease = ValueOrThrow(KvLease::Take(cache));
            const Drafter::Row row = {lease.get(), token, hidden.data()};
            std::vector<int32_t> drafts;
            ThrowIfError(WithoutGil([&] {
              return drafter.Draft(target, {&row, 1}, count, drafts);
            }));
            return drafts;
          },
          py::arg("target"), py::arg("cache"), py::arg("token"), py::arg("hidden"),
          py::arg("count"),
          "The likely ids after `token`, which follows the cache; hidden [D]: the target's vector "
          "after the final norm that the token was chosen from.");
}

}  // namespace gemloupe
