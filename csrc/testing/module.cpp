// The module sglang_flexkv_testing: disks that fail, and a tier in memory, as subclasses of the core's own
// classes, so that tests put them under the core that users get. Both modules come from one build: they share
// the classes' layout.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "testing/fault_disk.hpp"
#include "testing/memory_tier.hpp"

namespace py = pybind11;
using namespace flexkv;

PYBIND11_MODULE(sglang_flexkv_testing, m) {
  m.doc() = "Disks and tiers that fail, for the tests of sglang-flexkv.";
  py::module_::import("sglang_flexkv._core");  // knows Disk and LowerTier

  py::class_<FaultyDisk, Disk, std::shared_ptr<FaultyDisk>>(m, "FaultyDisk")
      .def(py::init<uint64_t>(), py::arg("seed"))
      .def("set_fault", &FaultyDisk::SetFault, py::arg("operation"), py::arg("probability"),
           py::arg("error") = 0, py::arg("delay_s") = 0.0, py::arg("after") = 0)
      .def("clear_faults", &FaultyDisk::ClearFaults)
      .def("injected", &FaultyDisk::Injected);
  py::class_<PowerLossDisk, Disk, std::shared_ptr<PowerLossDisk>>(m, "PowerLossDisk")
      .def(py::init<>())
      .def("power_fail", &PowerLossDisk::PowerFail, py::arg("seed"),
           py::call_guard<py::gil_scoped_release>());
  py::class_<MemoryTier, LowerTier, std::shared_ptr<MemoryTier>>(m, "MemoryTier")
      .def(py::init<uint64_t>(), py::arg("num_slots"))
      .def("set_failing", &MemoryTier::set_failing, py::arg("loads"), py::arg("stores"))
      .def("set_stalled", &MemoryTier::set_stalled, py::arg("stalled"))
      .def("damage", &MemoryTier::Damage, py::arg("slot"));
}
