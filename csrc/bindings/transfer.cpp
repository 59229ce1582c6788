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

py::dict StatsDict(const std::vector<TransferStats>& routes) {
  py::dict out;
  for (const TransferStats& stats : routes) {
    py::dict one;
    one["ops_done"] = stats.ops_done;
    one["ops_failed"] = stats.ops_failed;
    one["ops_cancelled"] = stats.ops_cancelled;
    one["bytes"] = stats.bytes;
    one["busy_s"] = stats.busy_s;
    one["queued_bytes"] = stats.queued_bytes;
    one["refused_graphs"] = stats.refused_graphs;
    one["queue_s"] = stats.queue_s;
    one["corrupt_blocks"] = stats.corrupt_blocks;
    one["missing_blocks"] = stats.missing_blocks;
    one["layers_per_read"] = stats.layers_per_read;
    out[stats.name.c_str()] = one;
  }
  return out;
}

}  // namespace

void BindTransfer(py::module_& m) {
  py::enum_<TransferType>(m, "TransferType")
      .value("H2D", TransferType::kH2D)
      .value("D2H", TransferType::kD2H)
      .value("LOWER2H", TransferType::kLower2H)
      .value("H2LOWER", TransferType::kH2Lower);
  py::enum_<OpStatus>(m, "OpStatus")
      .value("PENDING", OpStatus::kPending)
      .value("DONE", OpStatus::kDone)
      .value("FAILED", OpStatus::kFailed)
      .value("CANCELLED", OpStatus::kCancelled);

  py::class_<AwaitedSlots, std::shared_ptr<AwaitedSlots>>(m, "AwaitedSlots")
      .def("__len__", &AwaitedSlots::size);

  py::class_<OpSpec>(m, "OpSpec")
      .def(py::init([](TransferType type, const Int64s& src, const Int64s& dst, int layer_begin,
                       int layer_end, const std::optional<Keys>& keys, int after_layers,
                       std::shared_ptr<AwaitedSlots> awaited, std::optional<Tier> tier, uint32_t group) {
             std::vector<BlockKey> copied;
             if (keys) {
               const KeyView view = View(*keys);
               copied.assign(view.data, view.data + view.size);
             }
             const bool device = type == TransferType::kH2D || type == TransferType::kD2H;
             return OpSpec{type,
                           tier.value_or(device ? Tier::kCpu : Tier{1}),
                           group,
                           ToVector(src),
                           ToVector(dst),
                           std::move(awaited),
                           layer_begin,
                           layer_end,
                           std::move(copied),
                           after_layers};
           }),
           py::arg("type"), py::arg("src"), py::arg("dst"), py::arg("layer_begin") = 0,
           py::arg("layer_end") = 0, py::arg("keys") = std::nullopt, py::arg("after_layers") = -1,
           py::arg("awaited") = nullptr, py::arg("tier") = std::nullopt, py::arg("group") = 0);

  py::class_<OpResult>(m, "OpResult")
      .def_readonly("status", &OpResult::status)
      .def_property_readonly("ok", [](const OpResult& r) { return ToArray(r.ok); })
      .def_readonly("corrupt", &OpResult::corrupt)
      .def_readonly("missing", &OpResult::missing)
      .def_readonly("start_s", &OpResult::start_s)
      .def_readonly("end_s", &OpResult::end_s);

  py::class_<GraphResult>(m, "GraphResult")
      .def_readonly("graph", &GraphResult::graph)
      .def_readonly("done", &GraphResult::done)
      .def_readonly("error", &GraphResult::error)
      .def_readonly("ops", &GraphResult::ops);

  py::class_<TransferEngine>(m, "TransferEngine")
      .def(py::init([](const BlockLayout& layout, std::shared_ptr<HostPool> host, int copy_threads,
                       int cuda_device, size_t queue_bytes, const std::vector<std::string>& lower_tiers,
                       const std::string& cuda_library) {
             py::gil_scoped_release nogil;
             return std::make_unique<TransferEngine>(layout, std::move(host), copy_threads, cuda_device,
                                                     queue_bytes, lower_tiers, cuda_library);
           }),
           py::arg("layout"), py::arg("host"), py::arg("copy_threads"), py::arg("cuda_device"),
           py::arg("queue_bytes") = 0, py::arg("lower_tiers") = std::vector<std::string>{},
           py::arg("cuda_library") = CudaDriver::kLibrary)
      .def("make_gate", &TransferEngine::MakeGate, py::arg("num_layers"), NoGil())
      .def("add_group", &TransferEngine::AddGroup, py::arg("layout"), py::arg("host"), py::arg("gate_layers"),
           NoGil())
      .def("set_gate_layers", &TransferEngine::SetGateLayers, py::arg("gate_layers"))
      .def("attach", &TransferEngine::Attach, py::arg("number"), py::arg("tier"),
           py::arg("slices_per_read") = 0, py::arg("group") = 0, NoGil())
      .def("detach", &TransferEngine::Detach, py::arg("number"), py::arg("group") = 0, NoGil())
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
      .def_property_readonly("cuda_note", &TransferEngine::cuda_note);

  py::class_<CostFit>(m, "CostFit")
      .def(py::init<double, double>(), py::arg("assumed_x_s"), py::arg("assumed_y_s"))
      .def("observe", &CostFit::Observe, py::arg("x"), py::arg("y"), py::arg("seconds"))
      .def("seconds", &CostFit::Seconds, py::arg("x"), py::arg("y"))
      .def_property_readonly("num_observed", &CostFit::num_observed);
  m.def("steps_of_read", &StepsOfRead, py::arg("slices"), py::arg("per_read"));
  m.def("slices_per_read", &SlicesPerRead, py::arg("cost"), py::arg("blocks"), py::arg("slice_bytes"));
}

}  // namespace flexkv
