// What Python sees of the index room: PrefixIndex, its policies and statistics, AdmissionFilter, keys from
// tokens.
#include <memory>
#include <optional>
#include <string_view>

#include "bindings/bindings.hpp"
#include "index/admission_filter.hpp"
#include "index/prefix_index.hpp"

namespace flexkv {

namespace {

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

}  // namespace

void BindIndex(py::module_& m) {
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
  m.attr("CAME") = static_cast<uint8_t>(Sight::kCame);
  m.attr("WENT") = static_cast<uint8_t>(Sight::kWent);
  m.attr("FORGOTTEN") = static_cast<uint8_t>(Sight::kForgotten);
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
      .def(py::init([](const std::vector<uint32_t>& slots,
                       const std::optional<std::vector<EvictionPolicyKind>>& policies,
                       uint32_t tokens_per_block, bool keep_tokens, bool watched) {
             Require(!policies || policies->size() == slots.size(), "an index needs a policy for each tier");
             std::vector<TierSetup> tiers;
             for (size_t t = 0; t < slots.size(); ++t) {
               tiers.push_back({slots[t], policies ? (*policies)[t] : EvictionPolicyKind::kLru});
             }
             return std::make_unique<PrefixIndex>(tiers, tokens_per_block, keep_tokens, watched);
           }),
           py::arg("slots"), py::arg("policies") = std::nullopt, py::arg("tokens_per_block") = 16,
           py::arg("keep_tokens") = false, py::arg("watched") = false)
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
      .def(
          "held",
          [](const PrefixIndex& index, const Keys& keys) {
            const KeyView view = View(keys);
            py::array_t<uint8_t> masks(static_cast<py::ssize_t>(view.size));
            uint8_t* out = masks.mutable_data();
            {
              py::gil_scoped_release nogil;
              index.Held(view.data, view.size, out);
            }
            return masks;
          },
          py::arg("keys"))
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
             const std::optional<py::array>& tokens, uint8_t importance, bool staging,
             bool required) -> py::object {
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
              txn = index.Reserve(tier, parent_key, run.blocks, {importance, staging, required}, &positions,
                                  &slots);
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
            return index.Commit(txn, ok ? ok->data() : nullptr, ok ? static_cast<size_t>(ok->size()) : 0);
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
      .def(
          "watch",
          [](PrefixIndex& index, const Keys& keys, uint64_t first) {
            const KeyView view = View(keys);
            py::gil_scoped_release nogil;
            return index.Watch(view.data, view.size, first);
          },
          py::arg("keys"), py::arg("first"))
      .def("take_sightings",
           [](PrefixIndex& index) {
             const std::vector<Sighting> sightings = index.TakeSightings();
             const py::ssize_t count = static_cast<py::ssize_t>(sightings.size());
             py::array_t<uint64_t> numbers(count);
             py::array_t<uint8_t> tiers(count), what(count);
             for (py::ssize_t i = 0; i < count; ++i) {
               const Sighting& seen = sightings[static_cast<size_t>(i)];
               numbers.mutable_at(i) = seen.number;
               tiers.mutable_at(i) = static_cast<uint8_t>(seen.tier);
               what.mutable_at(i) = static_cast<uint8_t>(seen.what);
             }
             return py::make_tuple(numbers, tiers, what);
           })
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
}

}  // namespace flexkv
