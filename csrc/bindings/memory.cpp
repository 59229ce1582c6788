// What Python sees of the memory room: layouts of device pools, and the host pool.
#include <memory>

#include "bindings/bindings.hpp"
#include "memory/block_layout.hpp"
#include "memory/host_pool.hpp"

namespace flexkv {

void BindMemory(py::module_& m) {
  py::class_<DeviceBuffer>(m, "DeviceBuffer")
      .def(py::init([](uint64_t base, int64_t num_rows, int64_t row_bytes, int64_t row_stride,
                       int64_t tokens_per_row) {
             return DeviceBuffer{base, num_rows, row_bytes, row_stride, tokens_per_row};
           }),
           py::arg("base"), py::arg("num_rows"), py::arg("row_bytes"), py::arg("row_stride"),
           py::arg("tokens_per_row") = 1);

  py::class_<BlockLayout>(m, "BlockLayout")
      .def(py::init<std::vector<std::vector<DeviceBuffer>>, int64_t>(), py::arg("layers"),
           py::arg("tokens_per_block"))
      .def_property_readonly("num_layers", &BlockLayout::num_layers)
      .def_property_readonly("tokens_per_block", &BlockLayout::tokens_per_block)
      .def_property_readonly("block_bytes", &BlockLayout::block_bytes);

  py::class_<HostPool, std::shared_ptr<HostPool>>(m, "HostPool")
      .def(py::init<size_t, size_t, int>(), py::arg("num_slots"), py::arg("slot_bytes"),
           py::arg("file") = HostPool::kOwnMemory)
      .def_static("make_file", &HostPool::MakeFile)
      .def_property_readonly("num_slots", &HostPool::num_slots)
      .def_property_readonly("slot_bytes", &HostPool::slot_bytes)
      .def_property_readonly("total_bytes", &HostPool::total_bytes)
      .def_property_readonly("pinned_bytes", &HostPool::pinned_bytes)
      .def_property_readonly("populated_bytes", &HostPool::populated_bytes)
      .def(
          "slot_view",
          [](std::shared_ptr<HostPool> pool, int64_t slot) {
            Require(slot >= 0 && static_cast<size_t>(slot) < pool->num_slots(), "no such host slot");
            return py::array_t<uint8_t>(static_cast<py::ssize_t>(pool->slot_bytes()),
                                        reinterpret_cast<uint8_t*>(pool->Slot(slot)), py::cast(pool));
          },
          py::arg("slot"));
}

}  // namespace flexkv
