// One index for all tiers: which block lives in which slot of which tier, who needs it, and what may go. It
// moves no byte. This is the room's door: the lock, leases, transactions; BlockGraph keeps the blocks.
//
// Two-phase slots: Reserve hands out slots that nobody can see, Commit makes them readable, Abort
// gives them back. A lease pins what its reader was promised until it is released.
//
// Locking: one mutex, held only inside a call. No call waits for anything while holding it, calls nobody who
// could call back, and takes no other lock; so it can be called under any lock of a caller, and a call takes
// microseconds.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/types.hpp"
#include "index/block_graph.hpp"
#include "index/walk.hpp"

namespace flexkv {

struct TierStats {
  uint32_t slots = 0;    // capacity
  uint32_t free = 0;     // never written or given back
  uint32_t ready = 0;    // readable blocks
  uint32_t writing = 0;  // reserved, not committed yet
  uint32_t pinned = 0;   // blocks with at least one pin
  uint64_t evicted = 0;  // blocks that left this tier to make room, since start
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
  // `watched`: blocks can be watched, see Watch.
  PrefixIndex(const std::vector<TierSetup>& tiers, uint32_t tokens_per_block, bool keep_tokens, bool watched);

  // For each of the leading blocks that is readable somewhere, a bit mask of the tiers that hold it
  // (bit 0 the CPU tier, and so on) goes to `masks`. Stops at the first block that no tier holds, and returns
  // how many there were. Marks them as looked at.
  size_t Match(const BlockRun& blocks, uint8_t* masks);

  // Hash and match in one: `keys` gets the keys of all blocks of a sequence. What is held is
  // recognised by its tokens and not hashed again.
  size_t MatchTokens(const TokenRun& run, BlockKey* keys, uint8_t* masks);

  // Pins the leading readable blocks, each in its nearest tier, and returns the lease. `tier`
  // restricts the search to one tier; without it a block that is on its way from a lower tier to the CPU tier
  // ends the search (see Writer), and so does one whose slot there is still to be given back. `use`: they are
  // going to be read, which is what eviction policies count; otherwise they are only looked at. Of each of
  // the first `found` blocks `tiers` and `slots` say where it is. Zero blocks: no lease (id 0).
  uint64_t Acquire(const BlockRun& blocks, std::optional<Tier> tier, bool use, uint8_t* tiers, SlotId* slots,
                   size_t* found);

  // Hash and acquire in one, in all tiers.
  uint64_t AcquireTokens(const TokenRun& run, bool use, BlockKey* keys, uint8_t* tiers, SlotId* slots,
                         size_t* found);

  // Of each block, whether Acquire would find it if the blocks before it were found: a bit mask of the tiers
  // that hold it, or 0. Unlike Match it goes on behind what nobody holds, and marks nothing as looked at.
  void Held(const BlockKey* keys, size_t count, uint8_t* masks) const;

  // Gives a lease back. False if it is not known (released or reset before): nothing changes.
  bool Release(uint64_t lease);

  // The transaction that is writing a block into `tier`; 0: none is. Goes by the key alone.
  uint64_t Writer(Tier tier, const BlockKey& key);

  // Reserves slots in `tier` for the blocks it does not hold yet, evicting where needed what the
  // tier's policy says. `parent` is the key before the first, if any. On success `positions` says
  // which of the blocks are new, `slots` where to write them, and the transaction id is returned; if
  // every block is there already it is 0. nullopt: pins leave no room; nothing was reserved. A
  // selective policy may find the last of the new blocks worth less than what would have to go for
  // them: then they get no slots. Nor do those for which no room can be made under such a policy,
  // unless they are required; under the others and for those that are it is all or nothing.
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
  size_t Restore(Tier tier, const BlockKey* keys, const BlockKey* parents, const SlotId* slots, size_t count,
                 std::vector<uint8_t>* taken);

  // All readable blocks of a tier, in no order; an all-zero parent means none. Returns how many.
  size_t Blocks(Tier tier, std::vector<BlockKey>* keys, std::vector<BlockKey>* parents,
                std::vector<SlotId>* slots);

  // From now on TakeSightings tells when one of these blocks comes to a tier or goes from one, until it is
  // forgotten, that is in no tier any more. The first has the number `first`, which is not 0, the next one
  // more, and so on. Left out are blocks without an entry, and those that are watched already. Where a block
  // is now is a sighting, too. Returns how many blocks were not left out.
  size_t Watch(const BlockKey* keys, size_t count, uint64_t first);

  // What has become of watched blocks since the last call, in order.
  std::vector<Sighting> TakeSightings();

  TierStats Stats(Tier tier) const;
  size_t num_leases() const;
  size_t num_transactions() const;
  size_t num_entries() const;  // blocks that some tier holds, and places kept for parents
  size_t memory_bytes() const;
  // Tokens kept per block; 0: none are.
  uint32_t tokens_kept() const { return graph_.tokens_kept(); }

  // Checks every invariant of the structure against a fresh walk; returns "" or what is broken.
  std::string CheckIntegrity() const;

 private:
  static constexpr uint32_t kNil = BlockGraph::kNil;
  using State = BlockGraph::State;
  using Run = BlockGraph::Run;
  using TierState = BlockGraph::TierState;

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

  void RequireTier(Tier tier) const;
  template <typename AnyWalk>
  size_t MatchAlong(AnyWalk& walk, size_t count, uint8_t* masks);
  template <typename AnyWalk>
  uint64_t AcquireAlong(AnyWalk& walk, size_t count, std::optional<Tier> tier, bool use, uint8_t* tiers,
                        SlotId* slots, size_t* found);
  // Entries of the leading blocks that have one go to `found_`; returns how many blocks these are.
  size_t FindLeading(const BlockRun& blocks);
  // Adds to `found_` the entries of all blocks from the `first` on, new ones for those that have none.
  // Returns how many got one.
  size_t FindOrNameRest(const BlockRun& blocks, size_t first);
  void AddFound(uint32_t entry);
  std::optional<size_t> MakeRoom(Tier tier, const BlockKey* parent, uint32_t anchor, const BlockRun& blocks,
                                 const std::vector<uint32_t>& missing, const Purpose& purpose);

  mutable std::mutex mutex_;
  BlockGraph graph_;
  std::unordered_map<uint64_t, std::vector<Run>> leases_;
  std::unordered_map<uint64_t, Transaction> transactions_;
  uint64_t next_id_ = 1;
  // Within Reserve: entries of its blocks, and slots for those that are new.
  std::vector<Found> found_;
  std::vector<SlotId> fresh_slots_;
};

}  // namespace flexkv
