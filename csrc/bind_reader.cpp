#include <pybind11/stl.h>

#include <memory>

#include "bindings.hpp"
#include "file.hpp"

using namespace mscan;

namespace {

struct MappedReader {
  std::string path;
  MappedFile file;
  Reader reader;

  MappedReader(const std::string& name, Recovery recovery, Decompress decompress)
      : path(name), file(name), reader(file.bytes(), recovery, std::move(decompress)) {}
};

void lock_writes(py::array& array) { py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_; }

// An array over mapped bytes; `owner` keeps them mapped. Planes are 64-aligned in the file and the mapping starts at a page.
template <typename T>
py::array view_of(const uint8_t* data, std::vector<py::ssize_t> shape, const py::handle& owner) {
  py::array array(py::dtype::of<T>(), std::move(shape), data, owner);
  lock_writes(array);
  return array;
}

py::str text_of(const MappedReader& self, const char* data, uint64_t size, const char* what) {
  PyObject* text = PyUnicode_DecodeUTF8(data, static_cast<py::ssize_t>(size), "strict");
  if (text == nullptr) {
    PyErr_Clear();
    const auto offset = static_cast<uint64_t>(reinterpret_cast<const uint8_t*>(data) - self.file.bytes().data);
    throw FileFault(self.path, Fault(std::string(what) + " must be UTF-8.", offset));
  }
  return py::reinterpret_steal<py::str>(text);
}

uint64_t checked(const MappedReader& self, int64_t ordinal) {
  if (ordinal < 0 || static_cast<uint64_t>(ordinal) >= self.reader.size()) {
    throw py::index_error("sequence " + std::to_string(ordinal) + " of " + std::to_string(self.reader.size()));
  }
  return static_cast<uint64_t>(ordinal);
}

py::tuple sequence(MappedReader& self, int64_t ordinal) {
  const uint64_t index = checked(self, ordinal);
  const SequenceView view = without_gil(self.path, [&] { return self.reader.sequence(index); });
  const auto tokens = static_cast<py::ssize_t>(view.tokens);
  py::array_t<int64_t> ids(tokens);
  py::array_t<float> loss(tokens);
  py::array_t<uint8_t> mask(tokens);
  int64_t* id = ids.mutable_data();
  for (py::ssize_t i = 0; i < tokens; ++i) id[i] = load<uint32_t>(view.token_ids + 4 * i);
  std::memcpy(loss.mutable_data(), view.loss, view.tokens * 4);
  if (view.mask != nullptr) {
    std::memcpy(mask.mutable_data(), view.mask, view.tokens);
  } else {
    std::memset(mask.mutable_data(), 1, view.tokens);
  }
  py::object text = py::none();
  if (view.text != nullptr) text = text_of(self, view.text, view.text_length, "a sequence's text");
  return py::make_tuple(text_of(self, view.id, view.id_length, "a sequence's id"), ids, loss, mask, text, view.has_planes,
                        view.lost_tokens, view.lost_integral);
}

py::tuple planes(MappedReader& self, int64_t ordinal) {
  const uint64_t index = checked(self, ordinal);
  const SequenceView view = without_gil(self.path, [&] { return self.reader.sequence(index); });
  if (view.data_chunks == 0) throw FileFault(self.path, Fault("sequence " + std::to_string(ordinal) + " must hold planes; only its integral was stored."));
  const std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(view.tokens), static_cast<py::ssize_t>(self.reader.blocks())};
  py::array_t<float> activation(shape), grad_norm(shape);
  float *a = activation.mutable_data(), *g = grad_norm.mutable_data();
  without_gil(self.path, [&] { self.reader.decode(index, a, g); });
  return py::make_tuple(activation, grad_norm);
}

py::tuple codes_of(const py::object& owner, PlanesView view) {
  const Chunk& chunk = view.chunk;
  py::object keeper = owner;
  const uint8_t* base = view.base;
  if (chunk.compressed()) {
    auto raw = std::make_unique<std::vector<uint8_t>>(std::move(view.raw));
    base = raw->data();
    keeper = py::capsule(raw.release(), [](void* p) { delete static_cast<std::vector<uint8_t>*>(p); });
  }
  const auto tokens = static_cast<py::ssize_t>(chunk.header.token_count);
  const auto values = static_cast<py::ssize_t>(view.head.values);
  const std::vector<py::ssize_t> shape =
      chunk.sparse() ? std::vector<py::ssize_t>{values} : std::vector<py::ssize_t>{tokens, static_cast<py::ssize_t>(view.head.columns)};
  const auto plane = [&](int p) {
    const uint8_t* data = base + view.map.plane[p];
    return view.map.width == 4 ? view_of<float>(data, shape, keeper) : view_of<uint16_t>(data, shape, keeper);
  };
  py::object rows = py::none(), columns = py::none();
  if (chunk.sparse()) {
    rows = view_of<uint64_t>(base + view.map.rows, {tokens + 1}, keeper);
    columns = view_of<uint32_t>(base + view.map.columns, {values}, keeper);
  }
  const auto range = [&](int p) { return py::make_tuple(double{view.head.range[p].lo}, double{view.head.range[p].hi}); };
  return py::make_tuple(uint64_t{chunk.header.first_token}, plane(0), plane(1), range(0), range(1), rows, columns);
}

py::list codes(const py::object& owner, int64_t ordinal) {
  auto& self = owner.cast<MappedReader&>();
  const uint64_t index = checked(self, ordinal);
  std::vector<PlanesView> views;
  without_gil(self.path, [&] {
    for (const Chunk& chunk : self.reader.data_chunks(index)) views.push_back(self.reader.planes(chunk));
  });
  py::list out;
  for (PlanesView& view : views) out.append(codes_of(owner, std::move(view)));
  return out;
}

py::array_t<double> new_integral(const MappedReader& self) {
  py::array_t<double> planes(std::vector<py::ssize_t>{6, static_cast<py::ssize_t>(self.reader.blocks())});
  std::memset(planes.mutable_data(), 0, static_cast<size_t>(planes.nbytes()));
  return planes;
}

// (6, blocks), or None where nothing was stored.
py::object integral(MappedReader& self, const py::object& ordinal) {
  const uint64_t index = ordinal.is_none() ? kWholeFile : checked(self, ordinal.cast<int64_t>());
  Chunk chunk;
  if (!without_gil(self.path, [&] { return self.reader.integral(index, chunk); })) return py::none();
  py::array_t<double> out = new_integral(self);
  uint64_t blocks = 0;
  const uint8_t* in[6];
  integral_planes(chunk, blocks, in);
  for (int i = 0; i < 6; ++i) std::memcpy(out.mutable_data(i, 0), in[i], blocks * 8);
  return out;
}

py::array_t<double> sum_integrals(MappedReader& self) {
  py::array_t<double> out = new_integral(self);
  double* planes[6];
  for (int i = 0; i < 6; ++i) planes[i] = out.mutable_data() + static_cast<uint64_t>(i) * self.reader.blocks();
  without_gil(self.path, [&] { self.reader.sum_integrals(planes); });
  return out;
}

// Integers (entries, 2, 4): count, zeros, missing, nonfinite; floats (entries, 2, 2): mean, m2.
py::tuple stats(MappedReader& self) {
  const std::vector<Moments> totals = without_gil(self.path, [&] { return self.reader.stats(); });
  const auto entries = static_cast<py::ssize_t>(totals.size() / 2);
  py::array_t<uint64_t> counts(std::vector<py::ssize_t>{entries, 2, 4});
  py::array_t<double> moments(std::vector<py::ssize_t>{entries, 2, 2});
  for (size_t i = 0; i < totals.size(); ++i) {
    const Moments& t = totals[i];
    const uint64_t integers[4] = {t.count, t.zeros, t.missing, t.nonfinite};
    const double reals[2] = {t.mean, t.m2};
    std::memcpy(counts.mutable_data() + 4 * i, integers, sizeof integers);
    std::memcpy(moments.mutable_data() + 2 * i, reals, sizeof reals);
  }
  return py::make_tuple(counts, moments);
}

}  // namespace

Decompress decompress_from(const py::object& callback) {
  if (callback.is_none()) return nullptr;
  auto held = std::shared_ptr<py::object>(new py::object(callback), [](py::object* p) {
    py::gil_scoped_acquire acquire;
    delete p;
  });
  return [held](const uint8_t* frame, size_t size, size_t raw_length) {
    py::gil_scoped_acquire acquire;
    const auto bytes = (*held)(py::memoryview::from_memory(frame, static_cast<py::ssize_t>(size)), raw_length).cast<py::bytes>();
    const std::string_view view = bytes;
    return std::vector<uint8_t>(view.begin(), view.end());
  };
}

py::list items_of(const Layout& layout) {
  py::list out;
  for (const LayoutItem& item : layout.items) out.append(py::make_tuple(item.name, item.out_features, item.blocks, item.base));
  return out;
}

py::list gaps_of(const std::vector<Gap>& gaps) {
  py::list out;
  for (const Gap& gap : gaps) out.append(py::make_tuple(gap.begin, gap.end, gap.rule));
  return out;
}

void bind_reader(py::module_& m) {
  py::class_<MappedReader>(m, "Reader")
      .def(py::init([](const std::string& path, const std::string& recovery, const py::object& decompress) {
             const Recovery mode = recovery_of(recovery);
             Decompress unpack = decompress_from(decompress);
             return without_gil(path, [&] { return std::make_unique<MappedReader>(path, mode, std::move(unpack)); });
           }),
           py::arg("path"), py::arg("recovery"), py::arg("decompress"))
      .def("__len__", [](const MappedReader& self) { return self.reader.size(); })
      .def_property_readonly("metadata", [](const MappedReader& self) { return py::bytes(self.reader.metadata()); })
      .def_property_readonly("layout",
                             [](const MappedReader& self) {
                               return self.reader.layouts().empty() ? py::list() : items_of(self.reader.layouts().back());
                             })
      .def_property_readonly("blocks", [](const MappedReader& self) { return self.reader.blocks(); })
      .def_property_readonly("closed", [](const MappedReader& self) { return self.reader.closed(); })
      .def_property_readonly("gaps", [](const MappedReader& self) { return gaps_of(self.reader.gaps()); })
      .def_property_readonly("index_chunks", [](const MappedReader& self) { return self.reader.runs().size(); })
      .def("sequence", &sequence, py::arg("ordinal"))
      .def("find",
           [](MappedReader& self, const std::string& id) { return without_gil(self.path, [&] { return self.reader.find(id); }); },
           py::arg("sequence_id"))
      .def("planes", &planes, py::arg("ordinal"))
      .def("codes", &codes, py::arg("ordinal"))
      .def("integral", &integral, py::arg("ordinal"))
      .def("sum_integrals", &sum_integrals)
      .def("stats", &stats)
      .def("verify", [](MappedReader& self) { without_gil(self.path, [&] { self.reader.verify(); }); });
}
