// One index for all tiers: which block lives in which slot of which tier, who needs it, and what
// may go. It moves no byte.
//
// Why a hash table of blocks and not a tree of runs: keys are chained hashes, so a key already says
// where in the tree it is, and SGLang hands us fragments (the part of a prompt that is not on the
// device) whose ancestors we may not hold. Parent links are kept for one purpose: eviction is
// leaf first in every tier, so a prefix never loses a block in its middle.
//
// Two-phase slots: Reserve hands out slots that nobody can see, Commit makes them readable, Abort
// gives them back. A lease pins what its reader was promised until it is released.
//
// Locking: one mutex, held only inside a call; no call waits for anything while holding it.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "types.hpp"

namespace flexkv {

struct TierStats {
  uint32_t slots = 0;       // capacity
  uint32_t free = 0;        // never written or given back
  uint32_t ready = 0;       // readable blocks
  uint32_t writing = 0;     // reserved, not committed yet
  uint32_t pinned = 0;      // blocks with at least one pin
  uint64_t evicted = 0;     // blocks that left this tier to make room, since start
};

struct Located {
  std::vector<uint8_t> tiers;   // per block: Tier it will be read from
  std::vector<SlotId> slots;    // per block: slot in that tier
};

class PrefixIndex {
 public:
  PrefixIndex(uint32_t cpu_slots, uint32_t ssd_slots);

  // For each of the leading blocks that is readable somewhere, a bit mask of the tiers that hold it
  // (bit 0 CPU, bit 1 SSD). Stops at the first block that no tier holds. Marks them as used.
  std::vector<uint8_t> Match(const BlockKey* keys, size_t count);

  // Pins the leading readable blocks, each in its nearest tier, and returns the lease and where they
  // are. `tier` restricts the search to one tier. Zero blocks: no lease (id 0).
  uint64_t Acquire(const BlockKey* keys, size_t count, std::optional<Tier> tier, Located* out);

  // Gives a lease back. False if it is not known (released or reset before): nothing changes.
  bool Release(uint64_t lease);

  // Reserves slots in `tier` for the blocks it does not hold yet, evicting least recently used
  // leaves where needed. `parent` is the key before keys[0], if any. On success `positions` says
  // which of the keys are new, `slots` where to write them, and the transaction id is returned; if
  // every block is there already it is 0. nullopt: pins leave no room; nothing was reserved.
  std::optional<uint64_t> Reserve(Tier tier, const BlockKey* parent, const BlockKey* keys,
                                  size_t count, std::vector<uint32_t>* positions,
                                  std::vector<SlotId>* slots);

  // Ends a transaction. Blocks whose `ok` byte is zero are given back instead of published; a null
  // `ok` publishes all. Returns how many were published.
  size_t Commit(uint64_t txn, const uint8_t* ok, size_t count);
  bool Abort(uint64_t txn);

  // Forgets blocks of one tier, for instance because they could not be read back. A pinned block
  // stops being readable at once and gives its slot back when its last pin goes. Returns how many
  // were dropped.
  size_t Invalidate(Tier tier, const BlockKey* keys, size_t count);

  // Forgets everything in a tier (same rules as Invalidate).
  size_t InvalidateTier(Tier tier);

  // Publishes blocks that survived a restart, each in the slot it occupies in a persistent tier.
  // Ordered from least to most recently written; an all-zero parent means none. Where records
  // contradict each other the later one is believed: of two with one key or one slot only the last
  // is taken, and none whose slot does not exist. `taken` gets a 1 for each that was published.
  // The tier must be empty. Returns how many were published.
  size_t Restore(Tier tier, const BlockKey* keys, const BlockKey* parents, const SlotId* slots,
                 size_t count, std::vector<uint8_t>* taken);

  TierStats Stats(Tier tier) const;
  size_t num_leases() const;
  size_t num_transactions() const;
  size_t memory_bytes() const;

  // Checks every invariant of the structure against a fresh walk; returns "" or what is broken.
  std::string CheckIntegrity() const;

 private:
  static constexpr uint32_t kNil = UINT32_MAX;
  enum class State : uint8_t { kAbsent, kWriting, kReady, kDying };

  struct Residency {
    SlotId slot = kNoSlot;
    uint32_t pins = 0;
    uint32_t children = 0;      // children that occupy a slot in this tier
    uint32_t heap_pos = kNil;   // place in the tier's heap of evictable leaves
    State state = State::kAbsent;
  };

  // An entry without any residency is a placeholder: it keeps the place of a block that only its
  // children refer to, so that leaf-first order survives children that arrive before their parent.
  struct Entry {
    BlockKey key;
    uint64_t last_use = 0;
    uint32_t parent = kNil;
    uint32_t num_children = 0;  // entries whose parent this is
    Residency tier[kNumTiers];
  };

  struct Pin {
    uint32_t entry;
    Tier tier;
  };
  struct Transaction {
    Tier tier;
    std::vector<uint32_t> entries;
  };

  Residency& At(uint32_t entry, Tier tier) { return entries_[entry].tier[static_cast<int>(tier)]; }
  const Residency& At(uint32_t entry, Tier tier) const {
    return entries_[entry].tier[static_cast<int>(tier)];
  }
  uint32_t Find(const BlockKey& key) const;
  uint32_t FindOrCreate(const BlockKey& key);
  void Link(uint32_t child, uint32_t parent);
  void Touch(uint32_t entry);
  // Puts the entry into, or takes it out of, the heap of what may be evicted from `tier`.
  void UpdateEvictable(uint32_t entry, Tier tier);
  void Occupy(uint32_t entry, Tier tier, SlotId slot);
  void Vacate(uint32_t entry, Tier tier);
  void SetState(uint32_t entry, Tier tier, State state);
  void AddPin(uint32_t entry, Tier tier);
  void Unpin(uint32_t entry, Tier tier);
  void FreeIfUnused(uint32_t entry);
  bool Drop(uint32_t entry, Tier tier);

  void HeapPush(Tier tier, uint32_t entry);
  void HeapErase(Tier tier, uint32_t entry);
  void HeapSift(Tier tier, uint32_t pos);

  struct TierState {
    uint32_t capacity = 0;
    std::vector<SlotId> free_slots;
    std::vector<uint32_t> evictable;  // binary heap by last_use, oldest on top
    uint32_t count[4] = {};           // blocks by State; kAbsent is not counted
    uint32_t pinned = 0;
    uint64_t evicted = 0;
  };

  mutable std::mutex mutex_;
  std::vector<Entry> entries_;
  std::vector<uint32_t> free_entries_;
  std::unordered_map<BlockKey, uint32_t, BlockKeyHash> by_key_;
  TierState tiers_[kNumTiers];
  std::unordered_map<uint64_t, std::vector<Pin>> leases_;
  std::unordered_map<uint64_t, Transaction> transactions_;
  uint64_t clock_ = 0;
  uint64_t next_id_ = 1;
};

}  // namespace flexkv
