// Python bindings: they convert types and release the GIL; the logic is elsewhere.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "copy/cpu_copy.hpp"
#include "cuda/cuda_driver.hpp"
#include "cuda/cuda_slots.hpp"
#include "index/admission_filter.hpp"
#include "index/prefix_index.hpp"
#include "memory/block_layout.hpp"
#include "memory/host_pool.hpp"
#include "ssd/io_engine.hpp"
#include "ssd/ssd_reader.hpp"
#include "ssd/ssd_store.hpp"
#include "testing/fault_disk.hpp"
#include "transfer/transfer_engine.hpp"

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

const BlockKey* SingleKey(const Keys& key) {
  if (key.size() != 2) throw UsageError("a key is an array of two uint64");
  return reinterpret_cast<const BlockKey*>(key.data());
}

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

py::array_t<uint64_t> KeysToArray(const std::vector<BlockKey>& keys) {
  py::array_t<uint64_t> out({static_cast<py::ssize_t>(keys.size()), py::ssize_t{2}});
  if (!keys.empty()) std::memcpy(out.mutable_data(), keys.data(), keys.size() * sizeof(BlockKey));
  return out;
}

BlockKey ToId(const std::string& bytes) {
  if (bytes.size() != sizeof(BlockKey)) throw UsageError("a namespace has 16 bytes");
  BlockKey id;
  std::memcpy(&id, bytes.data(), sizeof id);
  return id;
}

// Token ids where they lie, int32 or int64; the array must outlive it.
TokenView ViewTokens(const py::array& tokens, uint32_t per_block) {
  const bool narrow = py::isinstance<py::array_t<int32_t>>(tokens);
  const bool wide = py::isinstance<py::array_t<int64_t>>(tokens);
  if (tokens.ndim() != 1 || !(narrow || wide) || !(tokens.flags() & py::array::c_style)) {
    throw UsageError("tokens must be a C-contiguous int32 or int64 array with one dimension");
  }
  Require(per_block > 0, "this index keeps no tokens: look up by keys");
  return {tokens.data(), wide, per_block};
}

// A whole sequence; an incomplete block at its end is left out.
TokenRun ViewSequence(const py::array& tokens, uint32_t per_block, const std::string& name_space) {
  const TokenView view = ViewTokens(tokens, per_block);
  return {ToId(name_space), view, static_cast<size_t>(tokens.size()) / per_block};
}

// Keys of some blocks and, if given, their tokens.
struct RunView {
  RunView(const Keys& keys, const std::optional<py::array>& token_ids, uint32_t per_block) {
    const KeyView view = View(keys);
    blocks = {view.data, view.size, nullptr};
    if (!token_ids) return;
    tokens = ViewTokens(*token_ids, per_block);
    Require(static_cast<size_t>(token_ids->size()) / per_block >= view.size, "a block lacks its tokens");
    blocks.tokens = &tokens;
  }
  RunView(const RunView&) = delete;
  TokenView tokens;
  BlockRun blocks;
};

// Slots and positions as transfers take them.
template <typename T>
py::array_t<int64_t> ToInt64(const T* values, size_t count) {
  py::array_t<int64_t> out(static_cast<py::ssize_t>(count));
  std::copy_n(values, count, out.mutable_data());
  return out;
}

template <typename T>
py::array_t<T> Leading(py::array_t<T>& values, size_t count) {
  if (count < static_cast<size_t>(values.size())) values.resize({static_cast<py::ssize_t>(count)}, false);
  return values;
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

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of sglang-flexkv: prefix index, host pool, transfer engine.";
  py::register_exception<UsageError>(m, "CoreUsageError", PyExc_ValueError);
  auto& system_error = py::register_exception<SystemError>(m, "CoreSystemError", PyExc_OSError);
  py::register_exception<MismatchError>(m, "CoreMismatchError", system_error.ptr());
  static py::handle disk_error;
  disk_error = py::exception<DiskError>(m, "CoreDiskError", system_error.ptr()).release();
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const DiskError& error) {
      // What every OSError has: errno, strerror and filename.
      PyErr_SetObject(disk_error.ptr(), py::make_tuple(error.error(), error.what(), error.path()).ptr());
    }
  });
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

  py::enum_<EvictionPolicyKind>(m, "EvictionPolicy")
      .value("ADAPTIVE", EvictionPolicyKind::kAdaptive)
      .value("COST", EvictionPolicyKind::kCost)
      .value("LRU", EvictionPolicyKind::kLru)
      .value("LFU", EvictionPolicyKind::kLfu)
      .value("SLRU", EvictionPolicyKind::kSlru)
      .value("S3FIFO", EvictionPolicyKind::kS3Fifo)
      .value("FIFO", EvictionPolicyKind::kFifo);
  m.attr("IMPORTANCE_MAX") = kImportanceMax;
  m.def(
      "hash_tokens",
      [](const py::array& tokens, uint32_t tokens_per_block, const std::string& name_space) {
        const TokenRun run = ViewSequence(tokens, tokens_per_block, name_space);
        Keys keys({run.count, size_t{2}});
        BlockKey* out = reinterpret_cast<BlockKey*>(keys.mutable_data());
        {
          py::gil_scoped_release nogil;
          run.tokens.RequireFit(run.count);
          for (size_t i = 0; i < run.count; ++i) {
            out[i] = HashBlock(i == 0 ? run.name_space : out[i - 1], run.tokens, i);
          }
        }
        return keys;
      },
      py::arg("tokens"), py::arg("tokens_per_block"), py::arg("namespace"));
  m.def(
      "keys_of_page_hashes",
      [](const py::sequence& page_hashes, const std::string& name_space) {
        const BlockKey id = ToId(name_space);
        Keys keys({page_hashes.size(), size_t{2}});
        BlockKey* out = reinterpret_cast<BlockKey*>(keys.mutable_data());
        for (const py::handle page_hash : page_hashes) {
          *out++ = KeyOfPageHash(page_hash.cast<std::string_view>(), id);
        }
        return keys;
      },
      py::arg("page_hashes"), py::arg("namespace"));

  py::class_<PrefixIndex>(m, "PrefixIndex")
      .def(py::init([](uint32_t cpu_slots, uint32_t ssd_slots, EvictionPolicyKind cpu_policy,
                       EvictionPolicyKind ssd_policy, uint32_t tokens_per_block, bool keep_tokens) {
             return std::make_unique<PrefixIndex>(TierSetup{cpu_slots, cpu_policy},
                                                  TierSetup{ssd_slots, ssd_policy}, tokens_per_block,
                                                  keep_tokens);
           }),
           py::arg("cpu_slots"), py::arg("ssd_slots"), py::arg("cpu_policy") = EvictionPolicyKind::kLru,
           py::arg("ssd_policy") = EvictionPolicyKind::kLru, py::arg("tokens_per_block") = 16,
           py::arg("keep_tokens") = false)
      .def(
          "match",
          [](PrefixIndex& index, const Keys& keys, const std::optional<py::array>& tokens) {
            const RunView run(keys, tokens, index.tokens_kept());
            py::array_t<uint8_t> masks(static_cast<py::ssize_t>(run.blocks.count));
            uint8_t* out = masks.mutable_data();
            size_t found;
            {
              py::gil_scoped_release nogil;
              found = index.Match(run.blocks, out);
            }
            return Leading(masks, found);
          },
          py::arg("keys"), py::arg("tokens") = std::nullopt)
      .def(
          "match_tokens",
          [](PrefixIndex& index, const py::array& tokens, const std::string& name_space) {
            const TokenRun run = ViewSequence(tokens, index.tokens_kept(), name_space);
            Keys keys({run.count, size_t{2}});
            py::array_t<uint8_t> masks(static_cast<py::ssize_t>(run.count));
            BlockKey* key_out = reinterpret_cast<BlockKey*>(keys.mutable_data());
            uint8_t* mask_out = masks.mutable_data();
            size_t found;
            {
              py::gil_scoped_release nogil;
              found = index.MatchTokens(run, key_out, mask_out);
            }
            return py::make_tuple(keys, Leading(masks, found));
          },
          py::arg("tokens"), py::arg("namespace"))
      .def(
          "acquire",
          [](PrefixIndex& index, const Keys& keys, std::optional<Tier> tier, bool use,
             const std::optional<py::array>& tokens) {
            const RunView run(keys, tokens, index.tokens_kept());
            py::array_t<uint8_t> tiers(static_cast<py::ssize_t>(run.blocks.count));
            thread_local std::vector<SlotId> slots;  // kept: new memory each time costs more than the walk
            uint8_t* tier_out = tiers.mutable_data();
            size_t found;
            uint64_t lease;
            {
              py::gil_scoped_release nogil;
              slots.resize(run.blocks.count);
              lease = index.Acquire(run.blocks, tier, use, tier_out, slots.data(), &found);
            }
            return py::make_tuple(lease, Leading(tiers, found), ToInt64(slots.data(), found));
          },
          py::arg("keys"), py::arg("tier") = std::nullopt, py::arg("use") = false,
          py::arg("tokens") = std::nullopt)
      .def(
          "acquire_tokens",
          [](PrefixIndex& index, const py::array& tokens, const std::string& name_space, bool use) {
            const TokenRun run = ViewSequence(tokens, index.tokens_kept(), name_space);
            Keys keys({run.count, size_t{2}});
            py::array_t<uint8_t> tiers(static_cast<py::ssize_t>(run.count));
            thread_local std::vector<SlotId> slots;
            BlockKey* key_out = reinterpret_cast<BlockKey*>(keys.mutable_data());
            uint8_t* tier_out = tiers.mutable_data();
            size_t found;
            uint64_t lease;
            {
              py::gil_scoped_release nogil;
              slots.resize(run.count);
              lease = index.AcquireTokens(run, use, key_out, tier_out, slots.data(), &found);
            }
            return py::make_tuple(lease, keys, Leading(tiers, found), ToInt64(slots.data(), found));
          },
          py::arg("tokens"), py::arg("namespace"), py::arg("use") = false)
      .def("release", &PrefixIndex::Release, py::arg("lease"), NoGil())
      .def(
          "writer",
          [](PrefixIndex& index, Tier tier, const Keys& key) {
            const BlockKey* single = SingleKey(key);
            py::gil_scoped_release nogil;
            return index.Writer(tier, *single);
          },
          py::arg("tier"), py::arg("key"))
      .def(
          "reserve",
          [](PrefixIndex& index, Tier tier, const std::optional<Keys>& parent, const Keys& keys,
             const std::optional<py::array>& tokens, uint8_t importance,
             bool staging, bool required) -> py::object {
            const RunView run(keys, tokens, index.tokens_kept());
            const BlockKey* parent_key = parent ? SingleKey(*parent) : nullptr;
            // Kept between calls: memory that is new each time costs more than what is done here.
            thread_local std::vector<uint32_t> positions;
            thread_local std::vector<SlotId> slots;
            std::optional<uint64_t> txn;
            {
              py::gil_scoped_release nogil;
              positions.clear();
              slots.clear();
              txn = index.Reserve(tier, parent_key, run.blocks, {importance, staging, required}, &positions, &slots);
            }
            if (!txn) return py::none();
            return py::make_tuple(*txn, ToInt64(positions.data(), positions.size()),
                                  ToInt64(slots.data(), slots.size()));
          },
          py::arg("tier"), py::arg("parent"), py::arg("keys"), py::arg("tokens") = std::nullopt,
          py::arg("importance") = 0, py::arg("staging") = false, py::arg("required") = false)
      .def(
          "commit",
          [](PrefixIndex& index, uint64_t txn,
             const std::optional<py::array_t<uint8_t, py::array::c_style>>& ok) {
            return index.Commit(txn, ok ? ok->data() : nullptr,
                                ok ? static_cast<size_t>(ok->size()) : 0);
          },
          py::arg("txn"), py::arg("ok") = std::nullopt)
      .def("abort", &PrefixIndex::Abort, py::arg("txn"), NoGil())
      .def("evict", &PrefixIndex::Evict, py::arg("tier"), py::arg("count"), NoGil())
      .def(
          "blocks",
          [](PrefixIndex& index, Tier tier) {
            std::vector<BlockKey> keys, parents;
            std::vector<SlotId> slots;
            {
              py::gil_scoped_release nogil;
              index.Blocks(tier, &keys, &parents, &slots);
            }
            return py::make_tuple(KeysToArray(keys), KeysToArray(parents), ToArray(slots));
          },
          py::arg("tier"))
      .def(
          "invalidate",
          [](PrefixIndex& index, Tier tier, const Keys& keys) {
            const KeyView view = View(keys);
            return index.Invalidate(tier, view.data, view.size);
          },
          py::arg("tier"), py::arg("keys"))
      .def("invalidate_tier", &PrefixIndex::InvalidateTier, py::arg("tier"), NoGil())
      .def(
          "restore",
          [](PrefixIndex& index, Tier tier, const Keys& keys, const Keys& parents,
             const py::array_t<SlotId, py::array::c_style>& slots) {
            const KeyView view = View(keys);
            const KeyView parent_view = View(parents);
            if (parent_view.size != view.size || slots.ndim() != 1 ||
                static_cast<size_t>(slots.size()) != view.size) {
              throw UsageError("restore: one parent and one slot per key");
            }
            const SlotId* slot_data = slots.data();
            std::vector<uint8_t> taken;
            {
              py::gil_scoped_release nogil;
              index.Restore(tier, view.data, parent_view.data, slot_data, view.size, &taken);
            }
            return ToArray(taken);
          },
          py::arg("tier"), py::arg("keys"), py::arg("parents"), py::arg("slots"))
      .def("stats", &PrefixIndex::Stats, py::arg("tier"), NoGil())
      .def_property_readonly("num_leases", &PrefixIndex::num_leases)
      .def_property_readonly("num_transactions", &PrefixIndex::num_transactions)
      .def_property_readonly("num_entries", &PrefixIndex::num_entries)
      .def_property_readonly("memory_bytes", &PrefixIndex::memory_bytes)
      .def_property_readonly("tokens_kept", &PrefixIndex::tokens_kept)
      .def("check_integrity", &PrefixIndex::CheckIntegrity, NoGil());

  // The GIL stays held: it makes the one owner of a filter any thread of Python.
  py::class_<AdmissionFilter>(m, "AdmissionFilter")
      .def(py::init<size_t>(), py::arg("capacity"))
      .def(
          "seen",
          [](AdmissionFilter& filter, const Keys& keys) {
            const KeyView view = View(keys);
            return ToArray(filter.Seen(view.data, view.size));
          },
          py::arg("keys"))
      .def("clear", &AdmissionFilter::Clear);

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
             return OpSpec{type,        ToVector(src), ToVector(dst),     std::move(awaited),
                           layer_begin, layer_end,     std::move(copied), std::move(after),
                           after_layers};
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
          py::arg("ops"), py::arg("gate") = nullptr,
          py::arg("wait_events") = std::vector<uint64_t>{}, py::arg("timeout_s") = 0.0,
          py::arg("background") = false)
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

  m.def(
      "slice_bytes",
      [](const BlockLayout& layout, size_t slot_bytes) {
        std::vector<size_t> bytes;
        for (const Slice& slice : SlicesOf(layout, slot_bytes, kSlicesMax)) bytes.push_back(slice.bytes);
        return bytes;
      },
      py::arg("layout"), py::arg("slot_bytes"));
  m.def(
      "probe_io_engine",
      [] {
        Disk disk;
        std::string note;
        const std::string name = disk.MakeEngine(IoEngineKind::kAuto, 1, &note)->name();
        return std::make_pair(name, note);
      },
      NoGil());
  m.attr("SSD_FORMAT_VERSION") = kSsdFormatVersion;
  m.attr("SSD_SLOTS_OFFSET") = kSlotsOffset;

  py::class_<Disk, std::shared_ptr<Disk>>(m, "Disk").def(py::init<>());
  // For tests.
  py::class_<FaultyDisk, Disk, std::shared_ptr<FaultyDisk>>(m, "FaultyDisk")
      .def(py::init<uint64_t>(), py::arg("seed"))
      .def("set_fault", &FaultyDisk::SetFault, py::arg("operation"), py::arg("probability"),
           py::arg("error") = 0, py::arg("delay_s") = 0.0)
      .def("clear_faults", &FaultyDisk::ClearFaults)
      .def("injected", &FaultyDisk::Injected);
  py::class_<PowerLossDisk, Disk, std::shared_ptr<PowerLossDisk>>(m, "PowerLossDisk")
      .def(py::init<>())
      .def("power_fail", &PowerLossDisk::PowerFail, py::arg("seed"), NoGil());

  py::class_<SsdStore, std::shared_ptr<SsdStore>>(m, "SsdStore")
      .def(py::init([](const std::vector<std::tuple<std::string, std::string, std::string>>& shards,
                       const std::string& name_space, uint64_t num_slots, std::vector<uint32_t> slice_bytes,
                       std::string label, bool fresh_on_mismatch, double commit_interval_s,
                       std::shared_ptr<Disk> disk) {
             SsdStoreOptions options;
             for (const auto& [directory, slots, journal] : shards) {
               options.shards.push_back({directory, slots, journal});
             }
             options.name_space = ToId(name_space);
             options.num_slots = num_slots;
             options.slice_bytes = std::move(slice_bytes);
             options.label = std::move(label);
             options.fresh_on_mismatch = fresh_on_mismatch;
             options.commit_interval_s = commit_interval_s;
             py::gil_scoped_release nogil;
             return std::make_shared<SsdStore>(std::move(options), std::move(disk));
           }),
           py::arg("shards"), py::arg("namespace"), py::arg("num_slots"), py::arg("slice_bytes"),
           py::arg("label"), py::arg("fresh_on_mismatch"), py::arg("commit_interval_s"), py::arg("disk"))
      .def("take_recovered",
           [](SsdStore& store) {
             const Recovered found = store.TakeRecovered();
             return py::make_tuple(KeysToArray(found.keys), KeysToArray(found.parents), ToArray(found.slots));
           })
      .def(
          "publish",
          [](SsdStore& store, const Keys& keys, const Keys& parents, const Int64s& slots) {
            const KeyView k = View(keys), p = View(parents);
            if (k.size != p.size || k.size != static_cast<size_t>(slots.size())) {
              throw UsageError("publish: one key, one parent and one slot for each block");
            }
            py::gil_scoped_release nogil;
            store.Publish(k.data, p.data, slots.data(), k.size);
          },
          py::arg("keys"), py::arg("parents"), py::arg("slots"))
      .def(
          "drop",
          [](SsdStore& store, const Int64s& slots) {
            py::gil_scoped_release nogil;
            store.Drop(slots.data(), static_cast<size_t>(slots.size()));
          },
          py::arg("slots"))
      .def("sync", &SsdStore::Sync, py::arg("timeout_s"), NoGil())
      .def("clear", &SsdStore::Clear, py::arg("keep"), NoGil())
      .def_property_readonly("error", &SsdStore::error)
      .def_property_readonly("notes", &SsdStore::notes)
      .def_property_readonly("num_slots", &SsdStore::num_slots)
      .def("stats", [](const SsdStore& store) {
        const SsdStoreStats stats = store.Stats();
        py::dict out;
        out["commits"] = stats.commits;
        out["compactions"] = stats.compactions;
        out["journal_bytes"] = stats.journal_bytes;
        out["published"] = stats.published;
        out["durable"] = stats.durable;
        return out;
      });

  py::class_<SsdReader>(m, "SsdReader")
      .def(py::init<const std::string&, const std::string&>(), py::arg("slots"), py::arg("journal"), NoGil())
      .def_property_readonly("label", [](const SsdReader& r) { return r.image().superblock.label; })
      .def_property_readonly("namespace",
                             [](const SsdReader& r) {
                               const BlockKey& id = r.image().superblock.name_space;
                               return py::bytes(reinterpret_cast<const char*>(&id), sizeof id);
                             })
      .def_property_readonly("keep", [](const SsdReader& r) { return r.image().superblock.keep; })
      .def_property_readonly("num_slots", [](const SsdReader& r) { return r.image().superblock.num_slots; })
      .def_property_readonly("slot_bytes", [](const SsdReader& r) { return r.image().superblock.slot_bytes(); })
      .def_property_readonly("num_slices",
                             [](const SsdReader& r) { return r.image().superblock.slice_bytes.size(); })
      .def_property_readonly("has_journal", [](const SsdReader& r) { return !r.image().entries.empty(); })
      .def_property_readonly("journal_bytes", [](const SsdReader& r) { return r.image().journal_end; })
      .def_property_readonly("journal_records", [](const SsdReader& r) { return r.image().records; })
      .def_property_readonly("damaged_bytes", [](const SsdReader& r) { return r.image().damaged_bytes; })
      .def_property_readonly("live_slots",
                             [](const SsdReader& r) {
                               std::vector<uint32_t> slots;
                               const auto& entries = r.image().entries;
                               for (uint32_t i = 0; i < entries.size(); ++i) {
                                 if (entries[i].sequence != 0) slots.push_back(i);
                               }
                               return ToArray(slots);
                             })
      .def(
          "verify",
          [](SsdReader& reader, const std::vector<uint32_t>& slots) {
            std::vector<uint32_t> bad;
            {
              py::gil_scoped_release nogil;
              bad = reader.Verify(slots);
            }
            return ToArray(bad);
          },
          py::arg("slots"));

  py::class_<CostFit>(m, "CostFit")
      .def(py::init<double, double>(), py::arg("assumed_x_s"), py::arg("assumed_y_s"))
      .def("observe", &CostFit::Observe, py::arg("x"), py::arg("y"), py::arg("seconds"))
      .def("seconds", &CostFit::Seconds, py::arg("x"), py::arg("y"))
      .def_property_readonly("num_observed", &CostFit::num_observed);
  m.def("steps_of_read", &StepsOfRead, py::arg("slices"), py::arg("per_read"));
  m.def("slices_per_read", &SlicesPerRead, py::arg("cost"), py::arg("blocks"), py::arg("slice_bytes"));

  // For benchmarks and tests: the copy primitive by itself.
  m.def(
      "stream_copy",
      [](py::array_t<uint8_t, py::array::c_style>& dst,
         const py::array_t<uint8_t, py::array::c_style>& src, size_t way) {
        if (dst.size() != src.size()) throw UsageError("stream_copy: sizes differ");
        char* to = reinterpret_cast<char*>(dst.mutable_data());
        const char* from = reinterpret_cast<const char*>(src.data());
        py::gil_scoped_release nogil;
        StreamCopy(to, from, static_cast<size_t>(src.size()), way);
      },
      py::arg("dst"), py::arg("src"), py::arg("way") = 0);
  m.def("stream_ways", &StreamWays);
}
