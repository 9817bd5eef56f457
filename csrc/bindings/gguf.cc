#include "formats/gguf.h"

#include <memory>
#include <optional>
#include <string>

#include "base/mapped_file.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace gemloupe {
namespace {

struct GgufFile {
  std::shared_ptr<const MappedFile> file;
  GgufHeader header;
};

std::shared_ptr<GgufFile> Open(const std::string& path) {
  return ValueOrThrow(WithoutGil([&]() -> StatusOr<std::shared_ptr<GgufFile>> {
    auto gguf = std::make_shared<GgufFile>();
    GL_ASSIGN_OR_RETURN(gguf->file, MappedFile::Open(path));
    GL_ASSIGN_OR_RETURN(gguf->header, ReadGguf(path, gguf->file->data(), gguf->file->size()));
    return gguf;
  }));
}

py::object ToPython(const GgufFile& gguf, std::string_view key, const GgufValue& value) {
  switch (value.type) {
    case GgufType::kBool: return py::bool_(value.boolean());
    case GgufType::kFloat32:
    case GgufType::kFloat64: return py::float_(value.number());
    case GgufType::kUint64: return py::int_(static_cast<uint64_t>(value.integer()));
    case GgufType::kString: {
      const std::string_view text = value.string();
      PyObject* decoded =
          PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "strict");
      if (decoded != nullptr) return py::reinterpret_steal<py::object>(decoded);
      PyErr_Clear();
      throw py::value_error(gguf.file->path() + ": " + std::string(key) +
                            " holds a string that is not UTF-8; download the file again");
    }
    case GgufType::kArray: {
      py::list list(value.count);
      GgufElements elements(value);
      GgufValue element;
      for (size_t i = 0; elements.Next(&element); ++i) list[i] = ToPython(gguf, key, element);
      return list;
    }
    default: return py::int_(value.integer());
  }
}

const GgufValue& Find(const GgufFile& gguf, const std::string& key) {
  const GgufValue* value = gguf.header.Find(key);
  if (value == nullptr) throw py::key_error(key);
  return *value;
}

// The string at `index` of the array `key`, None beyond its end or where it holds others.
py::object Item(const GgufFile& gguf, const std::string& key, int64_t index) {
  const GgufValue& array = Find(gguf, key);
  if (array.type != GgufType::kArray || index < 0) return py::none();
  GgufElements elements(array);
  GgufValue element;
  for (int64_t i = 0; elements.Next(&element); ++i) {
    if (i == index) return ToPython(gguf, key, element);
  }
  return py::none();
}

// The first index of each text in the array `key`, None where it is not.
std::vector<std::optional<int64_t>> Indices(const GgufFile& gguf, const std::string& key,
                                            const std::vector<std::string>& texts) {
  std::vector<std::optional<int64_t>> found(texts.size());
  const GgufValue& array = Find(gguf, key);
  if (array.type != GgufType::kArray || array.element != GgufType::kString) return found;
  GgufElements elements(array);
  GgufValue element;
  for (int64_t i = 0; elements.Next(&element); ++i) {
    for (size_t j = 0; j < texts.size(); ++j) {
      if (!found[j] && element.string() == texts[j]) found[j] = i;
    }
  }
  return found;
}

}  // namespace

void BindGguf(py::module_& module) {
  py::class_<GgufFile, std::shared_ptr<GgufFile>>(
      module, "GgufFile", "The header of a GGUF file; the file stays mapped as long as this lives.")
      .def(py::init(&Open), py::arg("path"))
      .def_property_readonly("version", [](const GgufFile& gguf) { return gguf.header.version; })
      .def_property_readonly("alignment",
                             [](const GgufFile& gguf) { return gguf.header.alignment; })
      .def_property_readonly("tensors", [](const GgufFile& gguf) { return gguf.header.tensors; })
      .def_property_readonly("keys",
                             [](const GgufFile& gguf) {
                               py::list keys;
                               for (const GgufEntry& entry : gguf.header.metadata) {
                                 keys.append(py::str(entry.key.data(), entry.key.size()));
                               }
                               return keys;
                             })
      .def(
          "get",
          [](const GgufFile& gguf, const std::string& key) {
            return ToPython(gguf, key, Find(gguf, key));
          },
          py::arg("key"), "The value of `key` as bool, int, float, str or list; KeyError.")
      .def(
          "length",
          [](const GgufFile& gguf, const std::string& key) -> std::optional<uint64_t> {
            const GgufValue& value = Find(gguf, key);
            if (value.type != GgufType::kArray) return std::nullopt;
            return value.count;
          },
          py::arg("key"), "Elements of the array `key`, None for another value; KeyError.")
      .def("item", &Item, py::arg("key"), py::arg("index"),
           "One element of the array `key`, None beyond its end.")
      .def("indices", &Indices, py::arg("key"), py::arg("texts"),
           "Where each text first is in the array of strings `key`, None where it is not.");
}

}  // namespace gemloupe
