#include "inspect/hooks.h"

#include "bindings/bindings.h"
#include "layers/lora.h"

namespace py = pybind11;

namespace gemloupe {
namespace {

// An edit by a Python function: fn(x, site) gets a copy of the rows and returns the array to be used,
// of the same shape. Exceptions end the pass and reach the caller (ThrowIfError).
class FunctionEdit : public Edit {
 public:
  // tail: the shape of x without its first axis, where −1 stands for the columns.
  FunctionEdit(py::function function, std::vector<int64_t> tail)
      : function_(std::move(function)), tail_(std::move(tail)) {}
  ~FunctionEdit() override {
    const py::gil_scoped_acquire gil;
    function_ = py::function();
  }

  Status Apply(const Site& site, Matrix x) override {
    const py::gil_scoped_acquire gil;
    try {
      py::array_t<float> copy(Shape(site, x));
      float* data = copy.mutable_data();
      for (int64_t row = 0; row < x.rows; ++row) {
        std::copy_n(x.row(row), x.cols, data + row * x.cols);
      }
      py::array_t<int64_t> positions(static_cast<py::ssize_t>(site.positions.size()),
                                     site.positions.data());
      const Floats edited = function_(copy, positions, site.decoding, site.step);
      // The function may have resized its own array.
      if (edited.size() != x.rows * x.cols) {
        return absl::InternalError("an edit function's array changed its size");
      }
      for (int64_t row = 0; row < x.rows; ++row) {
        std::copy_n(edited.data() + row * x.cols, x.cols, x.row(row));
      }
    } catch (py::error_already_set& error) {
      error.restore();
      return absl::CancelledError("an edit function raised");
    }
    return absl::OkStatus();
  }

 private:
  std::vector<py::ssize_t> Shape(const Site& site, ConstMatrix x) const {
    if (site.heads > 0) return {site.heads, x.rows / site.heads, x.cols};
    std::vector<py::ssize_t> shape = {x.rows};
    for (const int64_t size : tail_) shape.push_back(size < 0 ? x.cols : size);
    return shape;
  }

  py::function function_;
  std::vector<int64_t> tail_;
};

HookPoint PointAt(int index) { return HookPoints().at(static_cast<size_t>(index)).point; }

std::vector<float> ToVector(const Floats& array) {
  return std::vector<float>(array.data(), array.data() + array.size());
}

ValueOp ParseOp(const std::string& name) {
  if (name == "set") return ValueOp::kSet;
  if (name == "add") return ValueOp::kAdd;
  if (name == "scale") return ValueOp::kScale;
  if (name == "project_out") return ValueOp::kProjectOut;
  throw py::value_error("op is '" + name + "', expected set, add, scale or project_out");
}

Reduce ParseReduce(const std::string& name) {
  if (name.empty()) return Reduce::kNone;
  if (name == "mean") return Reduce::kMean;
  if (name == "norm") return Reduce::kNorm;
  if (name == "last") return Reduce::kLast;
  throw py::value_error("reduce is '" + name + "', expected mean, norm or last");
}

EditPtr ValueEdit(const std::string& op, const Floats& values, std::vector<int64_t> positions,
                  std::vector<std::pair<int64_t, int64_t>> columns, std::vector<int64_t> heads) {
  ValueEditOptions options;
  options.op = ParseOp(op);
  options.target = {std::move(columns), std::move(heads)};
  options.values = ToVector(values);
  options.width = values.ndim() == 0 ? 1 : values.shape(values.ndim() - 1);
  options.positions = std::move(positions);
  return ValueOrThrow(MakeValueEdit(std::move(options)));
}

EditPtr SetFeatures(const Floats& encoder, const Floats& decoder, const std::vector<float>& bias,
                    const std::vector<float>& threshold, const std::vector<float>& target) {
  std::vector<SaeFeature> features;
  const py::ssize_t width = encoder.shape(1);
  for (size_t i = 0; i < target.size(); ++i) {
    const auto offset = static_cast<py::ssize_t>(i) * width;
    const float* in = encoder.data() + offset;
    const float* out = decoder.data() + offset;
    features.push_back({std::vector<float>(in, in + width), std::vector<float>(out, out + width),
                        bias.at(i), threshold.at(i), target.at(i)});
  }
  return MakeSetFeatures(std::move(features));
}

// (values [rows, cols], positions [rows], [(heads, rows, cols)] of points whose shape changes).
py::tuple TakeCapture(Hooks& hooks, size_t index) {
  Capture& capture = hooks.captures().at(index);
  py::list parts;
  for (const Capture::Part& part : capture.parts) {
    parts.append(py::make_tuple(part.heads, part.rows, part.cols));
  }
  const auto positions = py::array_t<int64_t>(static_cast<py::ssize_t>(capture.positions.size()),
                                              capture.positions.data());
  const auto size = static_cast<py::ssize_t>(capture.values.size());
  const auto cols = capture.parts.empty() ? std::max<py::ssize_t>(1, capture.cols) : size;
  const py::ssize_t rows = cols == 0 ? 0 : size / cols;
  return py::make_tuple(ToArray(std::move(capture.values), {rows, cols}), positions, parts);
}

}  // namespace

void BindHooks(py::module_& module) {
  py::class_<PositionFilter>(module, "PositionFilter",
                             "Positions that are listed, and all from `begin` on.")
      .def(py::init([](std::vector<int64_t> listed, std::optional<int64_t> begin) {
             std::sort(listed.begin(), listed.end());
             return PositionFilter{std::move(listed),
                                   begin.value_or(std::numeric_limits<int64_t>::max())};
           }),
           py::arg("listed"), py::arg("begin"), "begin None: only the listed ones.");

  py::class_<Edit, EditPtr>(module, "Edit", "A change of an activation; of one call.");
  module.def(
      "function_edit",
      [](py::function function, std::vector<int64_t> tail) -> EditPtr {
        return std::make_shared<FunctionEdit>(std::move(function), std::move(tail));
      },
      py::arg("function"), py::arg("tail"),
      "function(x, positions, decoding, step) returns the new x; tail: x's shape after its rows.");
  module.def("value_edit", &ValueEdit, py::arg("op"), py::arg("values"), py::arg("positions"),
             py::arg("columns"), py::arg("heads"));
  module.def("mask_edges", &MakeMaskEdges, py::arg("keys"), py::arg("heads"));
  module.def(
      "replace_experts",
      [](std::vector<int32_t> ids, const Floats& values) {
        return MakeReplaceExperts(std::move(ids), ToVector(values));
      },
      py::arg("ids"), py::arg("values"));
  module.def("set_features", &SetFeatures, py::arg("encoder"), py::arg("decoder"), py::arg("bias"),
             py::arg("threshold"), py::arg("target"));

  py::class_<Hooks, std::shared_ptr<Hooks>>(module, "Hooks", "Captures and edits of one sequence.")
      .def(py::init<>())
      .def_property("check_finite", nullptr, &Hooks::set_check_finite)
      .def_property("expected_rows", nullptr, &Hooks::set_expected_rows)
      .def(
          "add_capture",
          [](Hooks& hooks, int point, int layer, const PositionFilter& filter, bool before,
             const std::string& reduce, int64_t group) {
            Capture capture;
            capture.point = PointAt(point);
            capture.layer = layer;
            capture.before = before;
            capture.filter = filter;
            capture.reduce = ParseReduce(reduce);
            capture.group = group;
            return hooks.AddCapture(std::move(capture));
          },
          py::arg("point"), py::arg("layer"), py::arg("filter"), py::arg("before"),
          py::arg("reduce"), py::arg("group"), "Returns its number.")
      .def(
          "add_delta_capture",
          [](Hooks& hooks, const py::object& adapter, const std::string& module, int layer,
             const PositionFilter& filter, const std::string& reduce) {
            const AdaptedModule of = ValueOrThrow(ParseAdaptedModule(module));
            Capture capture;
            // Computed with the layer's last point, or with the logits.
            capture.point =
                of == AdaptedModule::kHead ? HookPoint::kLogitsRaw : HookPoint::kResidPost;
            capture.layer = layer;
            capture.delta_module = static_cast<int>(of);
            capture.adapter = AdapterIdentity(adapter);
            capture.filter = filter;
            capture.reduce = ParseReduce(reduce);
            return hooks.AddCapture(std::move(capture));
          },
          py::arg("adapter"), py::arg("module"), py::arg("layer"), py::arg("filter"),
          py::arg("reduce"), "Of what an adapter adds to a module [T, out]; returns its number.")
      .def(
          "add_edit",
          [](Hooks& hooks, int point, int layer, const PositionFilter& filter, EditPtr edit) {
            hooks.AddEdit(PointAt(point), layer, filter, std::move(edit));
          },
          py::arg("point"), py::arg("layer"), py::arg("filter"), py::arg("edit"))
      .def("take", &TakeCapture, py::arg("index"),
           "(values [rows, cols], positions, [(heads, rows, cols)]) of a capture, moved out.");

  module.def(
      "hook_points",
      [](const std::string& tower) {
        py::list points;
        for (const HookPointInfo& info : HookPoints()) {
          if (info.tower != tower || IsVisionOnly(info.point)) continue;
          points.append(py::make_tuple(info.name, info.per_layer, info.shape, info.editable,
                                       info.transformers, info.transformer_lens));
        }
        return points;
      },
      py::arg("tower") = "",
      "(name, of every layer?, shape, editable?, transformers path, TransformerLens name) of each "
      "hook point of the text model or the audio tower, in model order.");
  module.def(
      "first_hook_point",
      [](const std::string& tower) {
        const auto& points = HookPoints();
        const auto of_tower = [&](const HookPointInfo& info) { return info.tower == tower; };
        return std::find_if(points.begin(), points.end(), of_tower) - points.begin();
      },
      py::arg("tower"), "The index of a tower's first point in the engine's table.");
  module.def(
      "vision_hook_points",
      [] {
        py::list points;
        for (const HookPointInfo& info : HookPoints()) {
          if (!info.in_vision) continue;
          points.append(py::make_tuple(static_cast<int>(info.point), info.name, info.per_layer,
                                       info.shape, info.editable, info.transformers));
        }
        return points;
      },
      "(number, name, of every layer?, shape, editable?, transformers path) of each hook point of "
      "the vision tower, in the order of the table.");
}

}  // namespace gemloupe
