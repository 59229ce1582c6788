// What Python sees of the transfer room: graphs of copies, the engine that runs them, and what reads cost.
#include <memory>
#include <optional>

#include "bindings/bindings.hpp"
#include "cuda/cuda_driver.hpp"
#include "cuda/cuda_slots.hpp"
#include "transfer/cost_fit.hpp"
#include "transfer/transfer_engine.hpp"

namespace flexkv {

namespace {

std::vector<int64_t> ToVector(const Int64s& values) { return {values.data(), values.data() + values.size()}; }

py::dict StatsDict(const TransferStats& stats) {
  static const char* const kNames[kNumTransferTypes] = {"H2D", "D2H", "DISK2H", "H2DISK"};
  py::dict out;
  for (int t = 0; t < kNumTransferTypes; ++t) {
    py::dict one;
    one["ops_done"] = stats.ops_done[t];
    one["ops_failed"] = stats.ops_failed[t];
    one["ops_cancelled"] = stats.ops_cancelled[t];
    one["bytes"] = stats.bytes[t];
    one["busy_s"] = stats.busy_s[t];
    one["queued_blocks"] = stats.queued_blocks[t];
    one["refused_graphs"] = stats.refused_graphs[t];
    one["queue_s"] = stats.queue_s[t];
    out[kNames[t]] = one;
  }
  // What was read and was not what had been written: never used, read again by computing it.
  out["DISK2H"]["corrupt_blocks"] = stats.corrupt_blocks;
  out["DISK2H"]["layers_per_read"] = stats.layers_per_read;
  return out;
}

}  // namespace

void BindTransfer(py::module_& m) {
  py::enum_<TransferType>(m, "TransferType")
      .value("H2D", TransferType::kH2D)
      .value("D2H", TransferType::kD2H)
      .value("DISK2H", TransferType::kDisk2H)
      .value("H2DISK", TransferType::kH2Disk);
  py::enum_<OpStatus>(m, "OpStatus")
      .value("PENDING", OpStatus::kPending)
      .value("DONE", OpStatus::kDone)
      .value("FAILED", OpStatus::kFailed)
      .value("CANCELLED", OpStatus::kCancelled);

  py::class_<AwaitedSlots, std::shared_ptr<AwaitedSlots>>(m, "AwaitedSlots")
      .def("__len__", &AwaitedSlots::size);

  py::class_<OpSpec>(m, "OpSpec")
      .def(py::init([](TransferType type, const Int64s& src, const Int64s& dst, int layer_begin,
                       int layer_end, std::vector<uint32_t> after, const std::optional<Keys>& keys,
                       int after_layers, std::shared_ptr<AwaitedSlots> awaited) {
             std::vector<BlockKey> copied;
             if (keys) {
               const KeyView view = View(*keys);
               copied.assign(view.data, view.data + view.size);
             }
             return OpSpec{type,      ToVector(src),     ToVector(dst),    std::move(awaited), layer_begin,
                           layer_end, std::move(copied), std::move(after), after_layers};
           }),
           py::arg("type"), py::arg("src"), py::arg("dst"), py::arg("layer_begin") = 0,
           py::arg("layer_end") = 0, py::arg("after") = std::vector<uint32_t>{},
           py::arg("keys") = std::nullopt, py::arg("after_layers") = -1, py::arg("awaited") = nullptr);

  py::class_<OpResult>(m, "OpResult")
      .def_readonly("status", &OpResult::status)
      .def_property_readonly("ok", [](const OpResult& r) { return ToArray(r.ok); })
      .def_readonly("corrupt", &OpResult::corrupt)
      .def_readonly("start_s", &OpResult::start_s)
      .def_readonly("end_s", &OpResult::end_s);

  py::class_<GraphResult>(m, "GraphResult")
      .def_readonly("graph", &GraphResult::graph)
      .def_readonly("done", &GraphResult::done)
      .def_readonly("error", &GraphResult::error)
      .def_readonly("ops", &GraphResult::ops);

  py::class_<TransferEngine>(m, "TransferEngine")
      .def(py::init([](const BlockLayout& layout, std::shared_ptr<HostPool> host, int copy_threads,
                       int cuda_device, size_t queue_bytes, const std::string& cuda_library) {
             py::gil_scoped_release nogil;
             return std::make_unique<TransferEngine>(layout, std::move(host), copy_threads, cuda_device,
                                                     queue_bytes, cuda_library);
           }),
           py::arg("layout"), py::arg("host"), py::arg("copy_threads"), py::arg("cuda_device"),
           py::arg("queue_bytes") = 0, py::arg("cuda_library") = CudaDriver::kLibrary)
      .def("make_gate", &TransferEngine::MakeGate, py::arg("num_layers"), NoGil())
      .def(
          "attach_ssd",
          [](TransferEngine& engine, std::shared_ptr<SsdStore> store, IoEngineKind io_engine, int io_depth,
             double write_bytes_per_s, uint32_t slices_per_read) {
            py::gil_scoped_release nogil;
            engine.AttachSsd(std::move(store), {io_engine, io_depth, write_bytes_per_s, slices_per_read});
          },
          py::arg("store"), py::arg("io_engine"), py::arg("io_depth"), py::arg("write_bytes_per_s") = 0.0,
          py::arg("slices_per_read") = 0)
      .def("detach_ssd", &TransferEngine::DetachSsd, NoGil())
      .def_property_readonly("ssd_oldest_io_s", &TransferEngine::ssd_oldest_io_s)
      .def("read_slots", &TransferEngine::ReadSlots, py::arg("address"), py::arg("count"), py::arg("stream"),
           NoGil())
      .def(
          "submit",
          [](TransferEngine& engine, std::vector<OpSpec> ops, std::shared_ptr<LayerGate> gate,
             std::vector<uint64_t> wait_events, double timeout_s, bool background) {
            py::gil_scoped_release nogil;
            return engine.Submit(
                GraphSpec{std::move(ops), std::move(gate), std::move(wait_events), timeout_s, background});
          },
          py::arg("ops"), py::arg("gate") = nullptr, py::arg("wait_events") = std::vector<uint64_t>{},
          py::arg("timeout_s") = 0.0, py::arg("background") = false)
      .def("cancel", &TransferEngine::Cancel, py::arg("graph"), NoGil())
      .def("poll", &TransferEngine::Poll, NoGil())
      .def("wait", &TransferEngine::Wait, py::arg("graph"), py::arg("timeout_s"), NoGil())
      .def("drain", &TransferEngine::Drain, py::arg("timeout_s"), NoGil())
      .def("drain_device", &TransferEngine::DrainDevice, py::arg("timeout_s"), NoGil())
      .def("stats", [](const TransferEngine& engine) { return StatsDict(engine.Stats()); })
      .def_property_readonly("event_fd", &TransferEngine::event_fd)
      .def_property_readonly("num_pending", &TransferEngine::num_pending)
      .def_property_readonly("cuda_note", &TransferEngine::cuda_note)
      .def_property_readonly("io_engine_name", &TransferEngine::io_engine_name)
      .def_property_readonly("io_engine_note", &TransferEngine::io_engine_note)
      .def_property_readonly("now_s", &TransferEngine::Now);

  py::class_<CostFit>(m, "CostFit")
      .def(py::init<double, double>(), py::arg("assumed_x_s"), py::arg("assumed_y_s"))
      .def("observe", &CostFit::Observe, py::arg("x"), py::arg("y"), py::arg("seconds"))
      .def("seconds", &CostFit::Seconds, py::arg("x"), py::arg("y"))
      .def_property_readonly("num_observed", &CostFit::num_observed);
  m.def("steps_of_read", &StepsOfRead, py::arg("slices"), py::arg("per_read"));
  m.def("slices_per_read", &SlicesPerRead, py::arg("cost"), py::arg("blocks"), py::arg("slice_bytes"));
}

}  // namespace flexkv
