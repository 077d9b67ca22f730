#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "bindings.hpp"
#include "writer.hpp"

using namespace mscan;

namespace {

constexpr int kExact = py::array::c_style | py::array::forcecast;

struct PathWriter {
  std::string path;
  Writer writer;
};

template <typename T>
py::array_t<T, kExact> array_of(const py::object& value, const char* name) {
  if (py::isinstance<py::array_t<T, kExact>>(value)) return py::reinterpret_borrow<py::array_t<T, kExact>>(value);
  const py::array any = py::array::ensure(value);
  if (!any) PyErr_Clear();
  auto array = any && any.dtype().kind() != 'c' ? py::array_t<T, kExact>::ensure(any) : py::array_t<T, kExact>();
  if (!any || any.dtype().kind() == 'c' || !array) {
    PyErr_Clear();
    throw InputFault(std::string(name) + " must be an array of real numbers.");
  }
  return array;
}

std::string shape_of(const py::array& array) {
  std::string text = "(";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(array.shape(i));
  return text + ")";
}

void require_shape(const py::array& array, const char* name, std::initializer_list<uint64_t> shape) {
  const auto same = [](uint64_t wanted, py::ssize_t got) { return wanted == static_cast<uint64_t>(got); };
  if (std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim(), same)) return;
  std::string wanted;
  for (const uint64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  throw InputFault(std::string(name) + " must have shape (" + wanted + "), got " + shape_of(array) + ".");
}

py::array_t<int64_t, kExact> token_ids_of(const py::object& value) {
  if (py::isinstance<py::array_t<int64_t, kExact>>(value)) return py::reinterpret_borrow<py::array_t<int64_t, kExact>>(value);
  const py::array any = py::array::ensure(value);
  if (!any) PyErr_Clear();
  const char kind = any ? any.dtype().kind() : '?';
  if (!any || any.ndim() != 1 || (any.size() > 0 && kind != 'i' && kind != 'u')) throw InputFault("token_ids must be a vector of integers.");
  return array_of<int64_t>(any, "token_ids");
}

// Six float64 rows; keeps the arrays alive in `held`.
void integral_rows(const py::tuple& planes, uint64_t blocks, std::vector<py::array_t<double, kExact>>& held, const double* rows[6]) {
  static const char* const names[6] = {"integral.sps",     "integral.count",   "integral.activation_mean", "integral.activation_m2",
                                       "integral.grad_mean", "integral.grad_m2"};
  if (planes.size() != 6) throw InputFault("an integral must have six planes.");
  for (size_t i = 0; i < 6; ++i) {
    held.push_back(array_of<double>(planes[i], names[i]));
    require_shape(held.back(), names[i], {blocks});
    rows[i] = held.back().data();
  }
}

uint64_t append(PathWriter& self, const std::string& id, const py::object& token_ids, const py::object& loss, const py::object& activation,
                const py::object& grad_norm, const py::object& mask, const py::object& text, const py::object& integral) {
  RecordView record;
  record.id = id;
  const auto ids = token_ids_of(token_ids);
  require_shape(ids, "token_ids", {static_cast<uint64_t>(ids.size())});
  record.tokens = static_cast<uint64_t>(ids.size());
  record.token_ids = ids.data();
  const auto losses = array_of<float>(loss, "loss");
  require_shape(losses, "loss", {record.tokens});
  record.loss = losses.data();

  const uint64_t blocks = self.writer.blocks();
  record.columns = blocks;
  if (activation.is_none() != grad_norm.is_none()) throw InputFault("activation and grad_norm must be given both or neither.");
  py::array_t<float, kExact> planes[2];
  if (!activation.is_none()) {
    planes[0] = array_of<float>(activation, "activation");
    planes[1] = array_of<float>(grad_norm, "grad_norm");
    require_shape(planes[0], "activation", {record.tokens, blocks});
    require_shape(planes[1], "grad_norm", {record.tokens, blocks});
    record.activation = planes[0].data();
    record.grad_norm = planes[1].data();
  }
  py::array_t<uint8_t, kExact> marks;
  if (!mask.is_none()) {
    marks = array_of<uint8_t>(mask, "mask");
    require_shape(marks, "mask", {record.tokens});
    record.mask = marks.data();
  }
  std::string text_bytes;
  if (!text.is_none()) {
    text_bytes = text.cast<std::string>();
    record.text = &text_bytes;
  }
  std::vector<py::array_t<double, kExact>> held;
  if (!integral.is_none()) integral_rows(integral.cast<py::tuple>(), blocks, held, record.integral);
  return without_gil(self.path, [&] { return self.writer.append(record); });
}

std::vector<LayoutItem> items_from(const py::list& rows) {
  std::vector<LayoutItem> items;
  for (const py::handle& row : rows) {
    const auto fields = row.cast<py::tuple>();
    items.push_back({fields[0].cast<std::string>(), fields[1].cast<uint64_t>(), fields[2].cast<uint64_t>(), fields[3].cast<uint64_t>()});
  }
  return items;
}

template <typename T>
T choice(const std::string& value, const char* name, std::initializer_list<std::pair<const char*, T>> choices) {
  std::string names;
  for (const auto& [key, result] : choices) {
    if (value == key) return result;
    names += (names.empty() ? "'" : ", '") + std::string(key) + "'";
  }
  throw InputFault(std::string(name) + " must be one of " + names + ", got '" + value + "'.");
}

Compress compress_from(const py::object& callback) {
  if (callback.is_none()) return nullptr;
  auto held = std::shared_ptr<py::object>(new py::object(callback), [](py::object* p) {
    py::gil_scoped_acquire acquire;
    delete p;
  });
  return [held](const uint8_t* raw, size_t size) {
    py::gil_scoped_acquire acquire;
    const auto bytes = (*held)(py::memoryview::from_memory(raw, static_cast<py::ssize_t>(size))).cast<py::bytes>();
    const std::string_view view = bytes;
    return std::vector<uint8_t>(view.begin(), view.end());
  };
}

std::unique_ptr<PathWriter> open_writer(const std::string& path, const std::string& mode, const std::string& metadata,
                                        const py::list& layout, const std::string& codec, const std::string& sync,
                                        const py::object& compress, const py::object& decompress) {
  const auto open = choice<OpenMode>(mode, "mode", {{"x", OpenMode::create}, {"w", OpenMode::replace}, {"a", OpenMode::append}});
  const auto as = choice<Codec>(codec, "codec", {{"log2u16", Codec::log2u16}, {"f32", Codec::f32}});
  const auto when = choice<Sync>(sync, "sync", {{"none", Sync::none}, {"chunk", Sync::chunk}, {"close", Sync::close}});
  std::vector<LayoutItem> items = items_from(layout);
  Compress pack = compress_from(compress);
  Decompress unpack = decompress_from(decompress);
  return without_gil(path, [&] {
    return std::unique_ptr<PathWriter>(new PathWriter{path, {path, open, metadata, std::move(items), as, when, std::move(pack), std::move(unpack)}});
  });
}

}  // namespace

void bind_writer(py::module_& m) {
  py::class_<PathWriter>(m, "Writer")
      .def(py::init(&open_writer), py::arg("path"), py::arg("mode"), py::arg("metadata"), py::arg("layout"), py::arg("codec"),
           py::arg("sync"), py::arg("compress"), py::arg("decompress"))
      .def("append", &append, py::arg("sequence_id"), py::arg("token_ids"), py::arg("loss"), py::arg("activation"), py::arg("grad_norm"),
           py::arg("mask"), py::arg("text"), py::arg("integral"))
      .def("append_integral",
           [](PathWriter& self, const py::tuple& planes) {
             std::vector<py::array_t<double, kExact>> held;
             const double* rows[6];
             const uint64_t blocks = self.writer.blocks();
             integral_rows(planes, blocks, held, rows);
             without_gil(self.path, [&] { self.writer.append_integral(rows, blocks); });
           },
           py::arg("planes"))
      .def("extend_layout",
           [](PathWriter& self, const py::list& layout) {
             std::vector<LayoutItem> items = items_from(layout);
             without_gil(self.path, [&] { self.writer.extend_layout(std::move(items)); });
           },
           py::arg("layout"))
      .def("close", [](PathWriter& self) { without_gil(self.path, [&] { self.writer.close(); }); })
      .def("abandon", [](PathWriter& self) { without_gil(self.path, [&] { self.writer.abandon(); }); })
      .def("__len__", [](const PathWriter& self) { return self.writer.size(); })
      .def_property_readonly("metadata", [](const PathWriter& self) { return py::bytes(self.writer.metadata()); })
      .def_property_readonly("layout", [](const PathWriter& self) { return items_of(self.writer.layout()); })
      .def_property_readonly("gaps", [](const PathWriter& self) { return gaps_of(self.writer.gaps()); })
      .def_property_readonly("seconds", [](const PathWriter& self) {
        return py::make_tuple(self.writer.encode_seconds(), self.writer.write_seconds());
      });
}
