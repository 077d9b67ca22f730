// Python's view of the codec: argument conversion, error translation and the GIL. The work is done elsewhere.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <system_error>

#include "bindings.hpp"
#include "check.hpp"
#include "crc32c.hpp"

namespace {

using namespace mscan;

py::array_t<uint16_t> encode(const py::array_t<float, py::array::c_style | py::array::forcecast>& values, double& lo, double& hi) {
  const std::vector<Span> spans{{0, 1}};
  ColumnSums sums;
  Moments stats;
  const auto count = static_cast<size_t>(values.size());
  py::array_t<uint16_t> codes(values.size());
  uint16_t* out = codes.mutable_data();
  py::gil_scoped_release release;
  const PlaneScan scan = scan_spans(values.data(), count, 1, spans, sums, &stats, 1);
  if (scan.negative) throw InputFault("values must not be negative: they are norms.");
  const PlaneRange range = plane_range(scan);
  encode_log2u16(values.data(), count, range, out);
  lo = range.lo;
  hi = range.hi;
  return codes;
}

void set_mscan_error(const std::string& path, const Fault& fault) {
  const py::object type = py::module_::import("tinyonn.errors").attr("MscanError");
  const py::object offset = fault.has_offset ? py::object(py::int_(fault.offset)) : py::object(py::none());
  py::set_error(type, type(path, fault.what(), offset));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The .mscan codec, version 2: writer, reader, planes and checksums.";

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const FileFault& fault) {
      set_mscan_error(fault.path, fault);
    } catch (const Fault& fault) {
      set_mscan_error("<memory>", fault);
    } catch (const InputFault& fault) {
      py::set_error(py::module_::import("tinyonn.errors").attr("InputError"), fault.what());
    } catch (const std::system_error& error) {
      errno = error.code().value();
      const std::string text = error.what();
      PyErr_SetFromErrnoWithFilename(PyExc_OSError, text.substr(0, text.rfind(": ")).c_str());
    }
  });

  m.def(
      "crc32c",
      [](const py::buffer& data, bool force_table) {
        const py::buffer_info info = data.request();
        const auto size = static_cast<size_t>(info.size * info.itemsize);
        py::gil_scoped_release release;
        return force_table ? crc32c_table(info.ptr, size) : crc32c(info.ptr, size);
      },
      py::arg("data"), py::arg("force_table") = false);
  m.def("crc32c_is_hardware", &crc32c_is_hardware);
  m.def("codec_is_vectorised", &codec_is_vectorised);
  m.def("force_plain_codec", &force_plain_codec, py::arg("force"));
  m.def(
      "encode_log2u16",
      [](const py::array_t<float, py::array::c_style | py::array::forcecast>& values) {
        double lo = 0, hi = 0;
        py::array codes = encode(values, lo, hi);
        return py::make_tuple(codes, lo, hi);
      },
      py::arg("values"));
  m.def(
      "decode_log2u16",
      [](const py::array_t<uint16_t, py::array::c_style>& codes, double lo, double hi) {
        py::array_t<float> values(codes.size());
        float* out = values.mutable_data();
        const uint16_t* in = codes.data();
        const auto count = static_cast<size_t>(codes.size());
        {
          py::gil_scoped_release release;
          Log2Decoder({lo, hi}).decode(in, count, out);
        }
        return values;
      },
      py::arg("codes"), py::arg("lo"), py::arg("hi"));
  m.def(
      "validate_buffer",
      [](const py::bytes& data, const std::string& recovery) {
        const std::string_view view = data;
        const Recovery mode = recovery_of(recovery);
        py::gil_scoped_release release;
        validate_buffer(reinterpret_cast<const uint8_t*>(view.data()), view.size(), mode);
      },
      py::arg("data"), py::arg("recovery") = "tail");

  bind_reader(m);
  bind_writer(m);
}
