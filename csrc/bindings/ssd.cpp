// What Python sees of the SSD room: disks, the store, and the reader of files that nobody serves from.
#include <memory>
#include <tuple>
#include <utility>

#include "bindings/bindings.hpp"
#include "memory/block_layout.hpp"
#include "ssd/disk.hpp"
#include "ssd/io_engine.hpp"
#include "ssd/ssd_format.hpp"
#include "ssd/ssd_reader.hpp"
#include "ssd/ssd_store.hpp"
#include "ssd/ssd_tier.hpp"

namespace flexkv {

void BindSsd(py::module_& m) {
  py::enum_<IoEngineKind>(m, "IoEngineKind")
      .value("AUTO", IoEngineKind::kAuto)
      .value("IO_URING", IoEngineKind::kIoUring)
      .value("THREADS", IoEngineKind::kThreads);

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

  py::class_<WriteLimit, std::shared_ptr<WriteLimit>>(m, "WriteLimit")
      .def(py::init<double>(), py::arg("bytes_per_s"));

  py::class_<SsdTier, LowerTier, std::shared_ptr<SsdTier>>(m, "SsdTier")
      .def(py::init([](std::shared_ptr<SsdStore> store, IoEngineKind io_engine, int io_depth,
                       std::shared_ptr<WriteLimit> write_limit) {
             return std::make_shared<SsdTier>(std::move(store),
                                              SsdIoOptions{io_engine, io_depth, std::move(write_limit)});
           }),
           py::arg("store"), py::arg("io_engine"), py::arg("io_depth"),
           py::arg("write_limit").none(false) = std::make_shared<WriteLimit>(0));

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
      .def_property_readonly("slot_bytes",
                             [](const SsdReader& r) { return r.image().superblock.slot_bytes(); })
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
}

}  // namespace flexkv
