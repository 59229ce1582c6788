// What Python sees of the copy room: the gate that a forward waits at, and the copy primitive by itself.
#include <memory>

#include "bindings/bindings.hpp"
#include "copy/cpu_copy.hpp"
#include "copy/layer_gate.hpp"

namespace flexkv {

void BindCopy(py::module_& m) {
  py::class_<LayerGate, std::shared_ptr<LayerGate>>(m, "LayerGate")
      .def(py::init([](int num_layers) { return std::make_shared<LayerGate>(num_layers); }),
           py::arg("num_layers"))
      .def("expect", &LayerGate::Expect, py::arg("loads"))
      .def(
          "wait",
          [](LayerGate& gate, int layer, double timeout_s) {
            // Who need not wait keeps the GIL: a forward asks between two layers, and others would take it.
            if (gate.open_layers() > layer) return gate.Wait(layer, 0);
            py::gil_scoped_release nogil;
            return gate.Wait(layer, timeout_s);
          },
          py::arg("layer"), py::arg("timeout_s"))
      .def("stream_wait", &LayerGate::StreamWait, py::arg("layer"), py::arg("stream"), py::arg("timeout_s"),
           NoGil())
      .def_property_readonly("num_layers", &LayerGate::num_layers)
      .def_property_readonly("open_layers", &LayerGate::open_layers);

  // For benchmarks and tests: the copy primitive by itself.
  m.def(
      "stream_copy",
      [](py::array_t<uint8_t, py::array::c_style>& dst, const py::array_t<uint8_t, py::array::c_style>& src,
         size_t way) {
        if (dst.size() != src.size()) throw UsageError("stream_copy: sizes differ");
        char* to = reinterpret_cast<char*>(dst.mutable_data());
        const char* from = reinterpret_cast<const char*>(src.data());
        py::gil_scoped_release nogil;
        StreamCopy(to, from, static_cast<size_t>(src.size()), way);
      },
      py::arg("dst"), py::arg("src"), py::arg("way") = 0);
  m.def("stream_ways", &StreamWays);
}

}  // namespace flexkv
