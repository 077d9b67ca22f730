// Shared by the binding files.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "reader.hpp"

namespace py = pybind11;

// A Fault with the path of its file; becomes tinyonn.errors.MscanError.
struct FileFault : mscan::Fault {
  std::string path;
  FileFault(std::string file, const mscan::Fault& fault) : mscan::Fault(fault), path(std::move(file)) {}
};

// Runs `work` without the GIL and adds the path to a Fault.
template <typename Work>
auto without_gil(const std::string& path, Work&& work) {
  try {
    py::gil_scoped_release release;
    return work();
  } catch (const mscan::Fault& fault) {
    throw FileFault(path, fault);
  }
}

inline mscan::Recovery recovery_of(const std::string& name) {
  if (name == "strict") return mscan::Recovery::strict;
  if (name == "tail") return mscan::Recovery::tail;
  if (name == "salvage") return mscan::Recovery::salvage;
  throw mscan::InputFault("recovery must be 'strict', 'tail' or 'salvage', got '" + name + "'.");
}

mscan::Decompress decompress_from(const py::object& callback);
py::list items_of(const mscan::Layout& layout);
py::list gaps_of(const std::vector<mscan::Gap>& gaps);

void bind_reader(py::module_& m);
void bind_writer(py::module_& m);
