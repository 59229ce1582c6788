// One index for all tiers: which block lives in which slot of which tier, who needs it, and what
// may go. It moves no byte.
//
// Why entries per block and not a tree of runs: keys are chained hashes, so a key already says
// where in the tree it is, and SGLang hands us fragments (the part of a prompt that is not on the
// device) whose ancestors we may not hold. What a tree of runs is fast at is kept all the same: the
// blocks of one prompt get consecutive entries, so the next block of a walk is tried in the next
// entry, which is in the cache already, before the table of keys is asked. Parent links are kept
// for one purpose: eviction is leaf first in every tier, so a prefix never loses a block in its
// middle.
//
// Two-phase slots: Reserve hands out slots that nobody can see, Commit makes them readable, Abort
// gives them back. A lease pins what its reader was promised until it is released.
//
// Locking: one mutex, held only inside a call. No call waits for anything while holding it, calls nobody who
// could call back, and takes no other lock; so it can be called under any lock of a caller, and a call takes
// microseconds.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/types.hpp"
#include "index/eviction.hpp"
#include "index/growing_array.hpp"
#include "index/key_table.hpp"
#include "index/mempool.hpp"
#include "index/token_hash.hpp"

namespace flexkv {

struct TierStats {
  uint32_t slots = 0;       // capacity
  uint32_t free = 0;        // never written or given back
  uint32_t ready = 0;       // readable blocks
  uint32_t writing = 0;     // reserved, not committed yet
  uint32_t pinned = 0;      // blocks with at least one pin
  uint64_t evicted = 0;     // blocks that left this tier to make room, since start
};

struct TierSetup {
  uint32_t slots = 0;
  EvictionPolicyKind policy = EvictionPolicyKind::kLru;
};

// Blocks of a caller: their keys and, where the index keeps tokens, what they must hold. Keys are
// chained: a key is followed by one that no other key precedes, and none comes twice. One that did
// would be taken for two when room is made.
struct BlockRun {
  const BlockKey* keys = nullptr;
  size_t count = 0;
  const TokenView* tokens = nullptr;  // of the same blocks; may be null
};

// A sequence of a caller, from its start: named and found by its tokens.
struct TokenRun {
  BlockKey name_space;  // who may share its blocks
  TokenView tokens;
  size_t count = 0;     // blocks
};

// What blocks are stored for.
struct Purpose {
  uint8_t importance = 0;  // of the request, 0 to kImportanceMax: the less important are evicted first
  bool staging = false;    // they come from another tier, for a reader who is going to use them
  bool required = false;   // no policy may refuse them
};

class PrefixIndex {
 public:
  // `keep_tokens`: the tokens of blocks are kept and compared, for callers whose keys may collide.
  PrefixIndex(const TierSetup& cpu, const TierSetup& ssd, uint32_t tokens_per_block, bool keep_tokens);

  // For each of the leading blocks that is readable somewhere, a bit mask of the tiers that hold it
  // (bit 0 CPU, bit 1 SSD) goes to `masks`. Stops at the first block that no tier holds, and returns
  // how many there were. Marks them as looked at.
  size_t Match(const BlockRun& blocks, uint8_t* masks);

  // Hash and match in one: `keys` gets the keys of all blocks of a sequence. What is held is
  // recognised by its tokens and not hashed again.
  size_t MatchTokens(const TokenRun& run, BlockKey* keys, uint8_t* masks);

  // Pins the leading readable blocks, each in its nearest tier, and returns the lease. `tier`
  // restricts the search to one tier; without it a block that is on its way from SSD to the CPU tier
  // ends the search (see Writer). `use`: they are going to be read, which is what eviction
  // policies count; otherwise they are only looked at. Of each of the first `found` blocks `tiers`
  // and `slots` say where it is. Zero blocks: no lease (id 0).
  uint64_t Acquire(const BlockRun& blocks, std::optional<Tier> tier, bool use, uint8_t* tiers,
                   SlotId* slots, size_t* found);

  // Hash and acquire in one, in all tiers.
  uint64_t AcquireTokens(const TokenRun& run, bool use, BlockKey* keys, uint8_t* tiers, SlotId* slots,
                         size_t* found);

  // Gives a lease back. False if it is not known (released or reset before): nothing changes.
  bool Release(uint64_t lease);

  // The transaction that is writing a block into `tier`; 0: none is. Goes by the key alone.
  uint64_t Writer(Tier tier, const BlockKey& key);

  // Reserves slots in `tier` for the blocks it does not hold yet, evicting where needed what the
  // tier's policy says. `parent` is the key before the first, if any. On success `positions` says
  // which of the blocks are new, `slots` where to write them, and the transaction id is returned; if
  // every block is there already it is 0. nullopt: pins leave no room; nothing was reserved. A
  // policy may find the last of the new blocks worth less than what would have to go for them: then
  // they get no slots.
  std::optional<uint64_t> Reserve(Tier tier, const BlockKey* parent, const BlockRun& blocks,
                                  const Purpose& purpose, std::vector<uint32_t>* positions,
                                  std::vector<SlotId>* slots);

  // Ends a transaction. Blocks whose `ok` byte is zero are given back instead of published; a null
  // `ok` publishes all. Returns how many were published.
  size_t Commit(uint64_t txn, const uint8_t* ok, size_t count);
  bool Abort(uint64_t txn);

  // Makes room for that many blocks more, as far as pins let it. Returns how many blocks went.
  size_t Evict(Tier tier, size_t count);

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

  // All readable blocks of a tier, in no order; an all-zero parent means none. Returns how many.
  size_t Blocks(Tier tier, std::vector<BlockKey>* keys, std::vector<BlockKey>* parents,
                std::vector<SlotId>* slots);

  TierStats Stats(Tier tier) const;
  size_t num_leases() const;
  size_t num_transactions() const;
  size_t num_entries() const;  // blocks that some tier holds, and places kept for parents
  size_t memory_bytes() const;
  // Tokens kept per block; 0: none are.
  uint32_t tokens_kept() const { return tokens_kept_; }

  // Checks every invariant of the structure against a fresh walk; returns "" or what is broken.
  std::string CheckIntegrity() const;

 private:
  static constexpr uint32_t kNil = UINT32_MAX;
  static constexpr uint32_t kFreed = UINT32_MAX - 1;  // as a parent: the entry is not in use
  enum class State : uint32_t { kAbsent, kWriting, kReady, kDying };

  // Plain words and no bit-fields: a new entry is written with a few stores that way, and with
  // bit-fields through the stack, which takes the processor ten times as long.
  struct Residency {
    SlotId slot;        // unless absent
    uint32_t children;  // children that occupy a slot in this tier
    uint32_t word;      // pins, whether its policy may evict it, and state

    static constexpr uint32_t kStateMask = 3, kEvictable = 4, kOnePin = 8;
    static constexpr uint32_t kWritten = static_cast<uint32_t>(State::kWriting) | kOnePin;
    static constexpr uint32_t kPublished = static_cast<uint32_t>(State::kReady);
    State state() const { return static_cast<State>(word & kStateMask); }
    void set_state(State state) { word = (word & ~kStateMask) | static_cast<uint32_t>(state); }
    bool evictable() const { return word & kEvictable; }
    uint32_t pins() const { return word / kOnePin; }
  };

  // An entry without any residency is a placeholder: it keeps the place of a block that only its
  // children refer to, so that leaf-first order survives children that arrive before their parent.
  // Entries that are not in use are kept as runs: see FreeRun.
  struct Node {
    uint32_t parent;
    uint32_t num_children;  // entries whose parent this is
    Residency tier[kNumTiers];
  };
  static_assert(sizeof(Node) == 32, "two entries share a cache line");

  // Free entries of consecutive ids; written into the first of them.
  struct FreeRun {
    uint32_t next;  // run
    uint32_t count;
  };
  FreeRun ReadFreeRun(uint32_t first) const {
    return {nodes_[first].num_children, nodes_[first].tier[0].children};
  }
  void WriteFreeRun(uint32_t first, const FreeRun& run) {
    nodes_[first].parent = kFreed;
    nodes_[first].num_children = run.next;
    nodes_[first].tier[0].children = run.count;
  }

  // Entries of consecutive ids.
  struct Run {
    uint32_t first;
    uint32_t count;
    Tier tier;
  };
  struct Transaction {
    Tier tier;
    std::vector<Run> runs;
    size_t count;
  };
  // Blocks of a call that follow each other and have entries of consecutive ids.
  struct Found {
    uint32_t entry;
    uint32_t count;
    bool created;  // just now: of these only the keys are set
  };
  class Toucher;
  class Walk;
  class TokenWalk;

  struct TierState {
    explicit TierState(uint32_t slots) : pool(slots) {}
    Mempool pool;
    std::unique_ptr<EvictionPolicy> policy;
    uint32_t count[4] = {};  // blocks by State; kAbsent is not counted
    uint32_t pinned = 0;
    uint64_t evicted = 0;
  };

  Residency& At(uint32_t entry, Tier tier) { return nodes_[entry].tier[static_cast<int>(tier)]; }
  const Residency& At(uint32_t entry, Tier tier) const {
    return nodes_[entry].tier[static_cast<int>(tier)];
  }
  State StateOf(uint32_t entry, Tier tier) const { return At(entry, tier).state(); }
  TierState& Of(Tier tier) { return tiers_[static_cast<int>(tier)]; }
  const TierState& Of(Tier tier) const { return tiers_[static_cast<int>(tier)]; }
  bool IsFreed(uint32_t entry) const { return nodes_[entry].parent == kFreed; }
  uint8_t ReadableTiers(uint32_t entry) const;
  int32_t* Tokens(uint32_t entry) { return &tokens_[static_cast<size_t>(entry) * tokens_kept_]; }
  bool HoldsTokens(uint32_t entry, const TokenView& tokens, size_t block);
  void KeepTokens(uint32_t entry, const TokenView& tokens, size_t block, size_t count);
  void WriteNew(const Run& run, const SlotId* slots, uint32_t word, uint8_t importance, uint32_t previous,
                bool linked, bool goes_on);

  void Tick();
  uint32_t Find(const BlockKey& key) const { return table_.Find(key, keys_.data()); }
  uint32_t FindOrCreate(const BlockKey& key);
  // Entries of the leading blocks that have one go to `found_`; returns how many blocks these are.
  size_t FindLeading(const BlockRun& blocks);
  // Adds to `found_` the entries of all blocks from the `first` on, new ones for those that have none. Returns
  // how many got one.
  size_t FindOrNameRest(const BlockRun& blocks, size_t first);
  void AddFound(uint32_t entry);
  Run TakeEntries(size_t count_max);
  void GiveBack(const Run& run);
  void AddFreeRun(const Run& run);
  void EnsureRoom(size_t count);
  uint32_t InsertNew(const Run& run, const BlockKey* keys, uint32_t* found);
  uint16_t DepthUnder(uint32_t parent) const;
  template <typename AnyWalk>
  size_t MatchAlong(AnyWalk& walk, size_t count, uint8_t* masks);
  template <typename AnyWalk>
  uint64_t AcquireAlong(AnyWalk& walk, size_t count, std::optional<Tier> tier, bool use, uint8_t* tiers,
                        SlotId* slots, size_t* found);
  void PrefetchKey(Tier tier, const BlockKey& key) const;
  size_t EvictLocked(Tier tier, size_t count, const std::function<bool(size_t, uint32_t)>& admits);
  std::optional<size_t> MakeRoom(Tier tier, const BlockKey* parent, uint32_t anchor,
                                 const BlockRun& blocks, const std::vector<uint32_t>& missing,
                                 const Purpose& purpose);
  void ReserveEntries(size_t count, bool populate);
  void Link(uint32_t child, uint32_t parent);
  void UpdateEvictable(uint32_t entry, Tier tier, bool laid_bare = false);
  void Occupy(uint32_t entry, Tier tier, SlotId slot);
  void Vacate(uint32_t entry, Tier tier);
  void SetState(uint32_t entry, Tier tier, State state);
  void RaiseImportance(uint32_t entry, uint8_t importance);
  void AddPin(uint32_t entry, Tier tier);
  void Unpin(uint32_t entry, Tier tier);
  void FreeIfUnused(uint32_t entry);
  void Free(uint32_t entry);
  bool Drop(uint32_t entry, Tier tier);

  const uint32_t tokens_kept_;
  mutable std::mutex mutex_;
  KeyTable table_;
  GrowingArray<BlockKey> keys_;
  GrowingArray<Node> nodes_;
  GrowingArray<int32_t> tokens_;
  GrowingArray<uint8_t> has_tokens_;
  BlockTraits traits_;
  uint32_t end_ = 0;             // entries were given out below it
  uint32_t reserved_ = 0;        // arrays have room up to it
  uint32_t num_entries_ = 0;     // in use
  uint32_t first_free_ = kNil;   // run of entries that were given back
  TierState tiers_[kNumTiers];
  std::unordered_map<uint64_t, std::vector<Run>> leases_;
  std::unordered_map<uint64_t, Transaction> transactions_;
  uint64_t next_id_ = 1;
  // Within Reserve: entries of its blocks, and slots for those that are new.
  std::vector<Found> found_;
  std::vector<SlotId> fresh_slots_;
};

}  // namespace flexkv
