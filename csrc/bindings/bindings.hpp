// What the bindings of all rooms share: a function per room that adds it to the module, and arrays of numpy
// as the core takes them, and back.
//
// Bindings convert types and release the GIL; the logic is elsewhere.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "base/types.hpp"

namespace py = pybind11;

// Tiers are numbers in Python.
template <>
struct pybind11::detail::type_caster<flexkv::Tier> {
  PYBIND11_TYPE_CASTER(flexkv::Tier, const_name("int"));
  bool load(handle source, bool convert) {
    make_caster<uint8_t> number;
    if (!number.load(source, convert)) return false;
    value = flexkv::Tier{cast_op<uint8_t>(number)};
    return true;
  }
  static handle cast(flexkv::Tier tier, return_value_policy, handle) {
    return PyLong_FromLong(static_cast<long>(tier));
  }
};

namespace flexkv {

// From the bottom: a room's signatures name types of those before it.
void BindIndex(py::module_& m);
void BindMemory(py::module_& m);
void BindCopy(py::module_& m);
void BindTier(py::module_& m);
void BindSsd(py::module_& m);
void BindRemote(py::module_& m);
void BindTransfer(py::module_& m);

using Keys = py::array_t<uint64_t, py::array::c_style>;
using Int64s = py::array_t<int64_t, py::array::c_style>;
using NoGil = py::call_guard<py::gil_scoped_release>;

// A view of a numpy array of keys; the array must outlive it.
struct KeyView {
  const BlockKey* data;
  size_t size;
};

inline const BlockKey* SingleKey(const Keys& key) {
  if (key.size() != 2) throw UsageError("a key is an array of two uint64");
  return reinterpret_cast<const BlockKey*>(key.data());
}

inline KeyView View(const Keys& keys) {
  if (keys.ndim() != 2 || keys.shape(1) != 2) {
    throw UsageError("keys must be a C-contiguous uint64 array of shape [blocks, 2]");
  }
  return {reinterpret_cast<const BlockKey*>(keys.data()), static_cast<size_t>(keys.shape(0))};
}

template <typename T>
py::array_t<T> ToArray(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

inline py::array_t<uint64_t> KeysToArray(const std::vector<BlockKey>& keys) {
  py::array_t<uint64_t> out({static_cast<py::ssize_t>(keys.size()), py::ssize_t{2}});
  if (!keys.empty()) std::memcpy(out.mutable_data(), keys.data(), keys.size() * sizeof(BlockKey));
  return out;
}

inline BlockKey ToId(const std::string& bytes) {
  if (bytes.size() != sizeof(BlockKey)) throw UsageError("a namespace has 16 bytes");
  BlockKey id;
  std::memcpy(&id, bytes.data(), sizeof id);
  return id;
}

}  // namespace flexkv
