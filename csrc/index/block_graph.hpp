// Which blocks there are, how they hang together, and where each of them is: an entry per block with its key,
// its parent, its tokens, and per tier its slot, its state and its pins. It keeps the counts and the eviction
// queues right and knows no caller; PrefixIndex has the lock, the leases and the transactions.
//
// Why entries per block and not a tree of runs: keys are chained hashes, so a key already says
// where in the tree it is, and SGLang hands us fragments (the part of a prompt that is not on the
// device) whose ancestors we may not hold. What a tree of runs is fast at is kept all the same: the
// blocks of one prompt get consecutive entries, so the next block of a walk is tried in the next
// entry, which is in the cache already, before the table of keys is asked. Parent links are kept
// for one purpose: eviction is leaf first in every tier, so a prefix never loses a block in its
// middle.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/types.hpp"
#include "index/eviction.hpp"
#include "index/growing_array.hpp"
#include "index/key_table.hpp"
#include "index/mempool.hpp"
#include "index/token_hash.hpp"

namespace flexkv {

struct TierSetup {
  uint32_t slots = 0;
  EvictionPolicyKind policy = EvictionPolicyKind::kLru;
};

// What became of a block that somebody watches.
enum class Sight : uint8_t { kCame, kWent, kForgotten };
struct Sighting {
  uint64_t number;  // of the block, by who watches it
  Tier tier;        // that it came to (readable from now on) or went from; none if it is forgotten
  Sight what;
};

class BlockGraph {
 public:
  static constexpr uint32_t kNil = UINT32_MAX;
  enum class State : uint32_t { kAbsent, kWriting, kReady, kDying };

  // Entries of consecutive ids.
  struct Run {
    uint32_t first;
    uint32_t count;
    Tier tier;
  };

  struct TierState {
    explicit TierState(uint32_t slots) : pool(slots) {}
    Mempool pool;
    std::unique_ptr<EvictionPolicy> policy;
    uint32_t count[4] = {};  // blocks by State; kAbsent is not counted
    uint32_t pinned = 0;
    uint64_t evicted = 0;
  };

  BlockGraph(const std::vector<TierSetup>& tiers, uint32_t tokens_per_block, bool keep_tokens, bool watched);

  // ---- what is there ----

  size_t num_tiers() const { return tiers_.size(); }
  TierState& Of(Tier tier) { return tiers_[static_cast<size_t>(tier)]; }
  const TierState& Of(Tier tier) const { return tiers_[static_cast<size_t>(tier)]; }
  uint32_t tokens_kept() const { return tokens_kept_; }
  uint32_t num_entries() const { return num_entries_; }
  uint32_t end() const { return end_; }  // all entries are below it
  size_t memory_bytes() const;

  uint32_t Find(const BlockKey& key) const { return table_.Find(key, keys_.data()); }
  void Prefetch(const BlockKey& key) const { table_.Prefetch(key); }
  bool InUse(uint32_t entry) const { return NodeOf(entry).parent != kFreed; }
  // Whether there is such an entry, with this key.
  bool Is(uint32_t entry, const BlockKey& key) const {
    return entry < end_ && keys_[entry] == key && InUse(entry);
  }
  const BlockKey& KeyOf(uint32_t entry) const { return keys_[entry]; }
  const BlockKey* KeysFrom(uint32_t entry) const { return &keys_[entry]; }
  uint32_t ParentOf(uint32_t entry) const { return NodeOf(entry).parent; }
  uint8_t ImportanceOf(uint32_t entry) const { return traits_.importance[entry]; }
  State StateOf(uint32_t entry, Tier tier) const { return At(entry, tier).state(); }
  SlotId SlotOf(uint32_t entry, Tier tier) const { return At(entry, tier).slot; }
  // A bit per tier.
  uint8_t ReadableTiers(uint32_t entry) const {
    const Residency* tiers = TiersOf(entry);
    uint8_t mask = 0;
    for (size_t t = 0; t < tiers_.size(); ++t) {
      mask |= static_cast<uint8_t>((tiers[t].state() == State::kReady) << t);
    }
    return mask;
  }

  // Whether there is such an entry, behind `parent`, whose tokens are known and these.
  bool Continues(uint32_t entry, uint32_t parent, const TokenView& tokens, size_t block) const {
    return parent != kNil && entry < end_ && NodeOf(entry).parent == parent && has_tokens_[entry] &&
           tokens.Equal(block, Tokens(entry));
  }
  // Compares the tokens. Of an entry whose tokens are not known they are kept.
  bool HoldsTokens(uint32_t entry, const TokenView& tokens, size_t block);
  bool HasTokens(uint32_t entry) const { return has_tokens_[entry]; }
  void KeepTokens(uint32_t entry, const TokenView& tokens, size_t block, size_t count);

  // ---- new entries ----

  // So many entries more can be taken, and inserted, without anything that can fail.
  void EnsureRoom(size_t count);
  // Takes free entries of consecutive ids: one at least, `count_max` at most. There must be room.
  Run TakeEntries(size_t count_max);
  // Gives entries that were just taken to keys, as long as these have none: returns how many have got one,
  // and gives back the others. If there are others, `found` is the entry of the first key that has one.
  uint32_t InsertNew(const Run& run, const BlockKey* keys, uint32_t* found);
  // Writes entries that were just inserted in one go, chained to each other, being written and pinned in
  // run.tier, and with the children that are about to follow. `linked`: the one before counts the first as
  // its child.
  void WriteNew(const Run& run, const SlotId* slots, uint8_t importance, uint32_t previous, bool linked,
                bool goes_on);
  // An entry that is in no tier yet, where the key has none. FreeIfUnused follows, unless it gets a use.
  uint32_t FindOrCreate(const BlockKey& key);
  // Frees an entry that nothing refers to, and with it the places that were kept for its parents.
  void FreeIfUnused(uint32_t entry);
  // Tells a block its parent, if it has none.
  void Link(uint32_t child, uint32_t parent);
  void RaiseImportance(uint32_t entry, uint8_t importance);

  // ---- a block in a tier ----

  // It is being written to this slot.
  void Occupy(uint32_t entry, Tier tier, SlotId slot);
  void SetState(uint32_t entry, Tier tier, State state);
  void AddPin(uint32_t entry, Tier tier) {
    Residency& r = At(entry, tier);
    Of(tier).pinned += r.pins() == 0;
    r.word += Residency::kOnePin;
    if (r.evictable()) UpdateEvictable(entry, tier);
  }
  // What is dying goes with its last pin.
  void Unpin(uint32_t entry, Tier tier) {
    Residency& r = At(entry, tier);
    r.word -= Residency::kOnePin;
    if (r.pins() != 0) return;
    Of(tier).pinned--;
    if (r.state() == State::kDying) {
      Vacate(entry, tier);
    } else if (r.children == 0) {
      UpdateEvictable(entry, tier);
    }
  }
  // Whether it may go, after its state changed.
  void UpdateEvictable(uint32_t entry, Tier tier, bool laid_bare = false);
  // It is not readable any more, and gone when nobody holds it. False if it was not readable.
  bool Drop(uint32_t entry, Tier tier);

  // ---- who watches ----

  bool watched() const { return watched_; }
  // Gives an entry a number, and notes in which tiers it is. False if it has one.
  bool Watch(uint32_t entry, uint64_t number);
  // What has become of the watched entries since the last call, in order.
  std::vector<Sighting> TakeSightings() { return std::exchange(sightings_, {}); }

  // ---- policies ----

  // A call begins.
  void Tick();
  // Entries of consecutive ids were looked at.
  void Touch(uint32_t first, uint32_t count, bool use) {
    for (TierState& tier : tiers_) {
      if (tier.pool.num_slots() > 0) tier.policy->Touch(first, count, use);
    }
  }
  // Drops what the policy says, up to so many. `admits`, if any, is asked whether the n-th of those who need
  // the room is worth its victim. Returns how many went.
  size_t Evict(Tier tier, size_t count, const std::function<bool(size_t, uint32_t)>& admits);

  // Checks every invariant against a fresh walk; returns "" or what is broken. `pins`: how many there should
  // be, per tier and entry.
  std::string Check(const std::vector<std::vector<uint32_t>>& pins) const;

 private:
  static constexpr uint32_t kFreed = UINT32_MAX - 1;  // as a parent: the entry is not in use

  // Plain words and no bit-fields: a new entry is written with a few stores that way, and with
  // bit-fields through the stack, which takes the processor ten times as long.
  struct Residency {
    SlotId slot;        // unless absent
    uint32_t children;  // children that occupy a slot in this tier
    uint32_t word;      // pins, whether its policy may evict it, and state

    static constexpr uint32_t kStateMask = 3, kEvictable = 4, kOnePin = 8;
    static constexpr uint32_t kWritten = static_cast<uint32_t>(State::kWriting) | kOnePin;
    State state() const { return static_cast<State>(word & kStateMask); }
    void set_state(State state) { word = (word & ~kStateMask) | static_cast<uint32_t>(state); }
    bool evictable() const { return word & kEvictable; }
    uint32_t pins() const { return word / kOnePin; }
  };

  // An entry without any residency is a placeholder: it keeps the place of a block that only its children
  // refer to, so that leaf-first order survives children that arrive before their parent. Entries that are
  // not in use are kept as runs: see FreeRun. Behind a node in memory come its residencies, one per tier: a
  // tier costs what it takes and no more, and with two of them two entries share a cache line.
  struct Node {
    uint32_t parent;
    uint32_t num_children;  // entries whose parent this is
  };
  static_assert(sizeof(Node) + 2 * sizeof(Residency) == 32, "two entries share a cache line");
  Node& NodeOf(uint32_t entry) { return *reinterpret_cast<Node*>(&nodes_[entry * node_bytes_]); }
  const Node& NodeOf(uint32_t entry) const {
    return *reinterpret_cast<const Node*>(&nodes_[entry * node_bytes_]);
  }
  Residency* TiersOf(uint32_t entry) { return reinterpret_cast<Residency*>(&NodeOf(entry) + 1); }
  const Residency* TiersOf(uint32_t entry) const {
    return reinterpret_cast<const Residency*>(&NodeOf(entry) + 1);
  }

  // Free entries of consecutive ids; written into the first of them.
  struct FreeRun {
    uint32_t next;  // run
    uint32_t count;
  };
  FreeRun ReadFreeRun(uint32_t first) const { return {NodeOf(first).num_children, TiersOf(first)->children}; }
  void WriteFreeRun(uint32_t first, const FreeRun& run) {
    NodeOf(first) = {kFreed, run.next};
    TiersOf(first)->children = run.count;
  }

  Residency& At(uint32_t entry, Tier tier) { return TiersOf(entry)[static_cast<size_t>(tier)]; }
  const Residency& At(uint32_t entry, Tier tier) const { return TiersOf(entry)[static_cast<size_t>(tier)]; }
  uint16_t DepthUnder(uint32_t parent) const;
  int32_t* Tokens(uint32_t entry) { return &tokens_[static_cast<size_t>(entry) * tokens_kept_]; }
  const int32_t* Tokens(uint32_t entry) const { return &tokens_[static_cast<size_t>(entry) * tokens_kept_]; }
  void ReserveEntries(size_t count, bool populate);
  void GiveBack(const Run& run);
  void AddFreeRun(const Run& run);
  void Vacate(uint32_t entry, Tier tier);
  void Free(uint32_t entry);
  void PrefetchKey(Tier tier, const BlockKey& key) const;

  const uint32_t tokens_kept_;
  const bool watched_;
  const size_t node_bytes_;  // of a node and its residencies
  KeyTable table_;
  GrowingArray<BlockKey> keys_;
  GrowingArray<char> nodes_;
  GrowingArray<int32_t> tokens_;
  GrowingArray<uint8_t> has_tokens_;
  GrowingArray<uint64_t> numbers_;  // of watched entries; 0: nobody watches it
  std::vector<Sighting> sightings_;
  BlockTraits traits_;
  uint32_t end_ = 0;            // entries were given out below it
  uint32_t reserved_ = 0;       // arrays have room up to it
  uint32_t num_entries_ = 0;    // in use
  uint32_t first_free_ = kNil;  // run of entries that were given back
  std::vector<TierState> tiers_;
};

}  // namespace flexkv
