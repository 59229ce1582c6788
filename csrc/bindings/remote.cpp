// What Python sees of the remote room: a tier whose calls the threads of a store's client make.
#include <sys/stat.h>

#include <cerrno>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"
#include "remote/compression.hpp"
#include "remote/remote_tier.hpp"
#include "remote/remote_value.hpp"

namespace flexkv {

void BindRemote(py::module_& m) {
  m.attr("VALUE_VERSION") = kValueVersion;
  m.attr("VALUE_HEADER_BYTES") = kValueHeaderBytes;

  // Of each path 0, or the errno that looking for it gave; as far as the first one that is not 0 if nobody
  // asks for more. Here, because a system call of Python's lets go of the GIL, and each may wait for it then.
  m.def(
      "find_files",
      [](const std::vector<std::string>& paths, bool leading) {
        std::vector<int> errors;
        for (const std::string& path : paths) {
          struct stat found;
          errors.push_back(stat(path.c_str(), &found) == 0 ? 0 : errno);
          if (leading && errors.back() != 0) break;
        }
        return errors;
      },
      py::arg("paths"), py::arg("leading"), NoGil());

  py::class_<CompressionTrial>(m, "CompressionTrial")
      .def_readonly("stored_bytes", &CompressionTrial::stored_bytes)
      .def_readonly("compress_s", &CompressionTrial::compress_s)
      .def_readonly("expand_s", &CompressionTrial::expand_s);
  m.def(
      "try_compression",
      [](const py::buffer& block, size_t number_bytes) {
        const py::buffer_info bytes = block.request();
        const py::gil_scoped_release no_gil;
        return TryCompression(CompressionOf(number_bytes), static_cast<const char*>(bytes.ptr),
                              static_cast<size_t>(bytes.size * bytes.itemsize));
      },
      py::arg("block"), py::arg("number_bytes"));

  using Call = RemoteTier::Call;
  py::class_<Call, std::shared_ptr<Call>>(m, "RemoteCall")
      .def_property_readonly("store", &Call::store)
      .def_property_readonly("namespace",
                             [](const Call& call) {
                               const BlockKey id = call.name_space();
                               return py::bytes(reinterpret_cast<const char*>(&id), sizeof id);
                             })
      // All of the memory that its blocks are in.
      .def_property_readonly("pool",
                             [](const Call& call) {
                               return py::memoryview::from_memory(
                                   call.host().base(), static_cast<py::ssize_t>(call.host().total_bytes()));
                             })
      .def_property_readonly("keys", [](const Call& call) { return KeysToArray(call.keys()); })
      // Of each block its header and its body, writable: memory of the call, which must outlive them.
      .def("values",
           [](const Call& call) {
             py::list values;
             for (size_t i = 0; i < call.size(); ++i) {
               values.append(py::make_tuple(
                   py::memoryview::from_memory(call.header(i), static_cast<py::ssize_t>(kValueHeaderBytes)),
                   py::memoryview::from_memory(call.body(i), static_cast<py::ssize_t>(call.body_bytes(i)))));
             }
             return values;
           })
      // Those at these positions, whose values are others afterwards.
      .def(
          "compress",
          [](Call& call, const std::vector<size_t>& positions, size_t number_bytes) {
            for (const size_t i : positions) call.Compress(i, CompressionOf(number_bytes));
          },
          py::arg("positions"), py::arg("number_bytes"), NoGil());

  py::class_<RemoteTier, LowerTier, std::shared_ptr<RemoteTier>>(m, "RemoteTier")
      .def(py::init([](const std::string& name_space, const std::string& refold, uint64_t num_slots,
                       size_t call_bytes, std::string engine_name) {
             return std::make_shared<RemoteTier>(ToId(name_space), ToId(refold), num_slots, call_bytes,
                                                 std::move(engine_name));
           }),
           py::arg("namespace"), py::arg("refold"), py::arg("num_slots"), py::arg("call_bytes"),
           py::arg("engine_name"))
      .def("take", &RemoteTier::Take, py::arg("store"), py::arg("timeout_s"), NoGil())
      .def("verify", &RemoteTier::Verify, py::arg("call"), py::arg("outcomes"), py::arg("sizes"), NoGil())
      .def("settle", &RemoteTier::Settle, py::arg("call"), py::arg("outcomes"), py::arg("why") = "", NoGil())
      .def(
          "set_namespace",
          [](RemoteTier& tier, const std::string& name_space) { tier.set_name_space(ToId(name_space)); },
          py::arg("namespace"));
}

}  // namespace flexkv
