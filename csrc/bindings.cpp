// Python bindings: they convert types and release the GIL; the logic is elsewhere.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "block_layout.hpp"
#include "cuda_driver.hpp"
#include "host_pool.hpp"
#include "io_engine.hpp"
#include "prefix_index.hpp"
#include "transfer_engine.hpp"

namespace py = pybind11;
using namespace flexkv;

namespace {

using Keys = py::array_t<uint64_t, py::array::c_style>;
using Int64s = py::array_t<int64_t, py::array::c_style>;
using NoGil = py::call_guard<py::gil_scoped_release>;

// A view of a numpy array of keys; the array must outlive it.
struct KeyView {
  const BlockKey* data;
  size_t size;
};

KeyView View(const Keys& keys) {
  if (keys.ndim() != 2 || keys.shape(1) != 2) {
    throw UsageError("keys must be a C-contiguous uint64 array of shape [blocks, 2]");
  }
  return {reinterpret_cast<const BlockKey*>(keys.data()), static_cast<size_t>(keys.shape(0))};
}

template <typename T>
py::array_t<T> ToArray(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::vector<int64_t> ToVector(const Int64s& values) {
  return {values.data(), values.data() + values.size()};
}

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
    out[kNames[t]] = one;
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of sglang-flexkv: prefix index, host pool, transfer engine.";
  py::register_exception<UsageError>(m, "CoreUsageError", PyExc_ValueError);
  py::register_exception<SystemError>(m, "CoreSystemError", PyExc_OSError);
  m.attr("IO_ALIGNMENT") = kIoAlignment;

  py::enum_<Tier>(m, "Tier").value("CPU", Tier::kCpu).value("SSD", Tier::kSsd);
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
  py::enum_<IoEngineKind>(m, "IoEngineKind")
      .value("AUTO", IoEngineKind::kAuto)
      .value("IO_URING", IoEngineKind::kIoUring)
      .value("THREADS", IoEngineKind::kThreads);

  py::class_<TierStats>(m, "TierStats")
      .def_readonly("slots", &TierStats::slots)
      .def_readonly("free", &TierStats::free)
      .def_readonly("ready", &TierStats::ready)
      .def_readonly("writing", &TierStats::writing)
      .def_readonly("pinned", &TierStats::pinned)
      .def_readonly("evicted", &TierStats::evicted);

  py::class_<PrefixIndex>(m, "PrefixIndex")
      .def(py::init<uint32_t, uint32_t>(), py::arg("cpu_slots"), py::arg("ssd_slots"))
      .def(
          "match",
          [](PrefixIndex& index, const Keys& keys) {
            const KeyView view = View(keys);
            std::vector<uint8_t> tiers;
            {
              py::gil_scoped_release nogil;
              tiers = index.Match(view.data, view.size);
            }
            return ToArray(tiers);
          },
          py::arg("keys"))
      .def(
          "acquire",
          [](PrefixIndex& index, const Keys& keys, std::optional<Tier> tier) {
            const KeyView view = View(keys);
            Located located;
            uint64_t lease;
            {
              py::gil_scoped_release nogil;
              lease = index.Acquire(view.data, view.size, tier, &located);
            }
            return py::make_tuple(lease, ToArray(located.tiers), ToArray(located.slots));
          },
          py::arg("keys"), py::arg("tier") = std::nullopt)
      .def("release", &PrefixIndex::Release, py::arg("lease"), NoGil())
      .def(
          "reserve",
          [](PrefixIndex& index, Tier tier, const std::optional<Keys>& parent,
             const Keys& keys) -> py::object {
            const KeyView view = View(keys);
            const BlockKey* parent_key = nullptr;
            if (parent) {
              if (parent->size() != 2) throw UsageError("parent must be one key of two uint64");
              parent_key = reinterpret_cast<const BlockKey*>(parent->data());
            }
            std::vector<uint32_t> positions;
            std::vector<SlotId> slots;
            std::optional<uint64_t> txn;
            {
              py::gil_scoped_release nogil;
              txn = index.Reserve(tier, parent_key, view.data, view.size, &positions, &slots);
            }
            if (!txn) return py::none();
            return py::make_tuple(*txn, ToArray(positions), ToArray(slots));
          },
          py::arg("tier"), py::arg("parent"), py::arg("keys"))
      .def(
          "commit",
          [](PrefixIndex& index, uint64_t txn,
             const std::optional<py::array_t<uint8_t, py::array::c_style>>& ok) {
            return index.Commit(txn, ok ? ok->data() : nullptr,
                                ok ? static_cast<size_t>(ok->size()) : 0);
          },
          py::arg("txn"), py::arg("ok") = std::nullopt)
      .def("abort", &PrefixIndex::Abort, py::arg("txn"), NoGil())
      .def(
          "invalidate",
          [](PrefixIndex& index, Tier tier, const Keys& keys) {
            const KeyView view = View(keys);
            return index.Invalidate(tier, view.data, view.size);
          },
          py::arg("tier"), py::arg("keys"))
      .def("invalidate_tier", &PrefixIndex::InvalidateTier, py::arg("tier"), NoGil())
      .def("stats", &PrefixIndex::Stats, py::arg("tier"), NoGil())
      .def_property_readonly("num_leases", &PrefixIndex::num_leases)
      .def_property_readonly("num_transactions", &PrefixIndex::num_transactions)
      .def_property_readonly("memory_bytes", &PrefixIndex::memory_bytes)
      .def("check_integrity", &PrefixIndex::CheckIntegrity, NoGil());

  py::class_<DeviceBuffer>(m, "DeviceBuffer")
      .def(py::init([](uint64_t base, int64_t num_rows, int64_t row_bytes, int64_t row_stride) {
             return DeviceBuffer{base, num_rows, row_bytes, row_stride};
           }),
           py::arg("base"), py::arg("num_rows"), py::arg("row_bytes"), py::arg("row_stride"));

  py::class_<BlockLayout>(m, "BlockLayout")
      .def(py::init<std::vector<std::vector<DeviceBuffer>>, int64_t, int64_t>(), py::arg("layers"),
           py::arg("tokens_per_block"), py::arg("tokens_per_row") = 1)
      .def_property_readonly("num_layers", &BlockLayout::num_layers)
      .def_property_readonly("tokens_per_block", &BlockLayout::tokens_per_block)
      .def_property_readonly("block_bytes", &BlockLayout::block_bytes)
      .def("layer_offset", &BlockLayout::layer_offset, py::arg("layer"))
      .def("layer_bytes", &BlockLayout::layer_bytes, py::arg("layer"));

  py::class_<HostPool, std::shared_ptr<HostPool>>(m, "HostPool")
      .def(py::init<size_t, size_t>(), py::arg("num_slots"), py::arg("slot_bytes"))
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
                                        reinterpret_cast<uint8_t*>(pool->Slot(slot)),
                                        py::cast(pool));
          },
          py::arg("slot"));

  py::class_<LayerGate, std::shared_ptr<LayerGate>>(m, "LayerGate")
      .def(py::init<int>(), py::arg("num_layers"))
      .def("expect", &LayerGate::Expect, py::arg("loads"))
      .def("wait", &LayerGate::Wait, py::arg("layer"), py::arg("timeout_s"), NoGil())
      .def_property_readonly("num_layers", &LayerGate::num_layers)
      .def_property_readonly("open_layers", &LayerGate::open_layers)
      .def_property_readonly("failed", &LayerGate::failed);

  py::class_<OpSpec>(m, "OpSpec")
      .def(py::init([](TransferType type, const Int64s& src, const Int64s& dst, int layer_begin,
                       int layer_end, std::vector<uint32_t> after) {
             return OpSpec{type, ToVector(src), ToVector(dst), layer_begin, layer_end, std::move(after)};
           }),
           py::arg("type"), py::arg("src"), py::arg("dst"), py::arg("layer_begin") = 0,
           py::arg("layer_end") = 0, py::arg("after") = std::vector<uint32_t>{});

  py::class_<OpResult>(m, "OpResult")
      .def_readonly("status", &OpResult::status)
      .def_property_readonly("ok", [](const OpResult& r) { return ToArray(r.ok); })
      .def_readonly("start_s", &OpResult::start_s)
      .def_readonly("end_s", &OpResult::end_s);

  py::class_<GraphResult>(m, "GraphResult")
      .def_readonly("graph", &GraphResult::graph)
      .def_readonly("done", &GraphResult::done)
      .def_readonly("error", &GraphResult::error)
      .def_readonly("ops", &GraphResult::ops);

  py::class_<TransferEngine>(m, "TransferEngine")
      .def(py::init([](const BlockLayout& layout, std::shared_ptr<HostPool> host,
                       std::vector<int> ssd_fds, size_t ssd_slots, int copy_threads, int cuda_device,
                       IoEngineKind io_engine, int io_depth) {
             py::gil_scoped_release nogil;
             return std::make_unique<TransferEngine>(layout, std::move(host),
                                                     SsdFiles{std::move(ssd_fds), ssd_slots},
                                                     copy_threads, cuda_device, io_engine, io_depth);
           }),
           py::arg("layout"), py::arg("host"), py::arg("ssd_fds"), py::arg("ssd_slots"),
           py::arg("copy_threads"), py::arg("cuda_device"), py::arg("io_engine"), py::arg("io_depth"))
      .def(
          "submit",
          [](TransferEngine& engine, std::vector<OpSpec> ops, std::shared_ptr<LayerGate> gate,
             std::vector<uint64_t> wait_events, double timeout_s) {
            py::gil_scoped_release nogil;
            return engine.Submit(
                GraphSpec{std::move(ops), std::move(gate), std::move(wait_events), timeout_s});
          },
          py::arg("ops"), py::arg("gate") = nullptr,
          py::arg("wait_events") = std::vector<uint64_t>{}, py::arg("timeout_s") = 0.0)
      .def("cancel", &TransferEngine::Cancel, py::arg("graph"), NoGil())
      .def("poll", &TransferEngine::Poll, NoGil())
      .def("wait", &TransferEngine::Wait, py::arg("graph"), py::arg("timeout_s"), NoGil())
      .def("drain", &TransferEngine::Drain, py::arg("timeout_s"), NoGil())
      .def("stats", [](const TransferEngine& engine) { return StatsDict(engine.Stats()); })
      .def_property_readonly("event_fd", &TransferEngine::event_fd)
      .def_property_readonly("num_pending", &TransferEngine::num_pending)
      .def_property_readonly("io_engine_name", &TransferEngine::io_engine_name)
      .def_property_readonly("io_engine_note", &TransferEngine::io_engine_note)
      .def_property_readonly("now_s", &TransferEngine::Now);

  // For benchmarks and tests: the copy primitive by itself.
  m.def(
      "stream_copy",
      [](py::array_t<uint8_t, py::array::c_style>& dst,
         const py::array_t<uint8_t, py::array::c_style>& src) {
        if (dst.size() != src.size()) throw UsageError("stream_copy: sizes differ");
        char* to = reinterpret_cast<char*>(dst.mutable_data());
        const char* from = reinterpret_cast<const char*>(src.data());
        py::gil_scoped_release nogil;
        StreamCopy(to, from, static_cast<size_t>(src.size()));
      },
      py::arg("dst"), py::arg("src"));
}
