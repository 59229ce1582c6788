#include "index/prefix_index.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <unordered_set>

namespace flexkv {
namespace {

constexpr uint32_t kEntriesMin = 1024;
// Entries whose memory is there from the start, at most (about 100 bytes each).
constexpr uint32_t kEntriesPopulated = 1u << 21;
constexpr size_t kAhead = KeyTable::kAhead;
constexpr uint32_t kEntriesMax = 1u << 31;

template <typename Run>
void AppendRun(std::vector<Run>* runs, const Run& run) {
  if (!runs->empty() && runs->back().tier == run.tier &&
      runs->back().first + runs->back().count == run.first) {
    runs->back().count += run.count;
  } else {
    runs->push_back(run);
  }
}

}  // namespace

// Tells the policies of entries that were looked at, run by run.
class PrefixIndex::Toucher {
 public:
  Toucher(PrefixIndex& index, bool use) : index_(index), use_(use) {}
  ~Toucher() { Flush(); }
  void Add(uint32_t entry, uint32_t count = 1) {
    if (entry != first_ + count_) {
      Flush();
      first_ = entry;
    }
    count_ += count;
  }

 private:
  void Flush() {
    for (TierState& tier : index_.tiers_) {
      if (count_ > 0 && tier.pool.num_slots() > 0) tier.policy->Touch(first_, count_, use_);
    }
    count_ = 0;
  }
  PrefixIndex& index_;
  bool use_;
  uint32_t first_ = 0;
  uint32_t count_ = 0;
};

// Finds the entries of a run of blocks, one after the other.
class PrefixIndex::Walk {
 public:
  Walk(PrefixIndex& index, const BlockRun& blocks) : index_(index), blocks_(blocks) {}

  void RequireFit() const {
    if (blocks_.tokens != nullptr) blocks_.tokens->RequireFit(blocks_.count);
  }

  uint32_t Next(size_t block) {
    const BlockKey& key = blocks_.keys[block];
    uint32_t entry = previous_ + 1;
    if (entry < index_.end_ && index_.keys_[entry] == key && !index_.IsFreed(entry)) {
      ahead_ = block;
    } else {
      // One miss is likely to be followed by more: their buckets are fetched while we wait for this.
      for (ahead_ = std::max(ahead_, block); ahead_ < std::min(block + kAhead, blocks_.count); ++ahead_) {
        index_.table_.Prefetch(blocks_.keys[ahead_]);
      }
      entry = index_.Find(key);
    }
    if (entry != kNil && blocks_.tokens != nullptr &&
        !index_.HoldsTokens(entry, *blocks_.tokens, block)) {
      entry = kNil;
    }
    previous_ = entry;
    return entry;
  }

 private:
  PrefixIndex& index_;
  const BlockRun blocks_;
  uint32_t previous_ = kNil;
  size_t ahead_ = 0;
};

// Names the blocks of a whole sequence while it finds them. What is held is recognised by its tokens,
// and only what is not is hashed.
class PrefixIndex::TokenWalk {
 public:
  TokenWalk(PrefixIndex& index, const TokenRun& run, BlockKey* keys)
      : index_(index), run_(run), keys_(keys) {
    Require(run.tokens.per_block == index.tokens_kept_, "this index keeps no tokens, or of other blocks");
  }

  void RequireFit() const { run_.tokens.RequireFit(run_.count); }

  uint32_t Next(size_t block) {
    uint32_t entry = previous_ + 1;
    if (previous_ != kNil && entry < index_.end_ && index_.nodes_[entry].parent == previous_ &&
        index_.has_tokens_[entry] && run_.tokens.Equal(block, index_.Tokens(entry))) {
      keys_[block] = index_.keys_[entry];
    } else {
      Name(block);
      entry = index_.Find(keys_[block]);
      if (entry != kNil && !index_.HoldsTokens(entry, run_.tokens, block)) entry = kNil;
    }
    named_ = block + 1;
    previous_ = entry;
    return entry;
  }

  // Names the blocks that were not looked for. Needs no lock.
  void NameRest() {
    for (; named_ < run_.count; ++named_) Name(named_);
  }

 private:
  void Name(size_t block) {
    keys_[block] = HashBlock(block == 0 ? run_.name_space : keys_[block - 1], run_.tokens, block);
  }

  PrefixIndex& index_;
  const TokenRun run_;
  BlockKey* keys_;
  size_t named_ = 0;
  uint32_t previous_ = kNil;
};

PrefixIndex::PrefixIndex(const TierSetup& cpu, const TierSetup& ssd, uint32_t tokens_per_block, bool keep_tokens)
    : tokens_kept_(keep_tokens ? tokens_per_block : 0),
      table_(std::max(cpu.slots, ssd.slots)),
      tiers_{TierState(cpu.slots), TierState(ssd.slots)} {
  const TierSetup setup[kNumTiers] = {cpu, ssd};
  for (int t = 0; t < kNumTiers; ++t) {
    Require(setup[t].slots <= kEntriesMax / kNumTiers, "a tier holds at most 2^30 slots");
    tiers_[t].policy = MakeEvictionPolicy({setup[t].policy, setup[t].slots, tokens_per_block}, traits_);
  }
  ReserveEntries(std::clamp(std::max(cpu.slots, ssd.slots), kEntriesMin, kEntriesPopulated), true);
}

void PrefixIndex::ReserveEntries(size_t count, bool populate) {
  Require(count <= kEntriesMax, "the index is full");
  keys_.Reserve(count, populate);
  nodes_.Reserve(count, populate);
  if (tokens_kept_ > 0) {
    tokens_.Reserve(count * tokens_kept_, populate);
    has_tokens_.Reserve(count, populate);
  }
  traits_.depth.Reserve(count, populate);
  traits_.importance.Reserve(count, populate);
  for (TierState& tier : tiers_) {
    if (tier.pool.num_slots() > 0) tier.policy->Reserve(count, populate);
  }
  reserved_ = static_cast<uint32_t>(count);
}

void PrefixIndex::Tick() {
  for (TierState& tier : tiers_) tier.policy->Tick();
}

uint32_t PrefixIndex::FindOrCreate(const BlockKey& key) {
  EnsureRoom(1);
  uint32_t found;
  const Run run = TakeEntries(1);
  if (InsertNew(run, &key, &found) == 0) return found;
  const uint32_t entry = run.first;
  nodes_[entry] = {kNil, 0, {}};
  traits_.depth[entry] = 0;
  traits_.importance[entry] = 0;
  return entry;
}

// So many entries more can be taken, and inserted, without anything that can fail.
void PrefixIndex::EnsureRoom(size_t count) {
  const size_t end = end_ + count;
  if (end > reserved_) ReserveEntries(std::max({size_t{kEntriesMin}, end, end_ + end_ / size_t{2}}), false);
  table_.Reserve(num_entries_ + count);
}

// Takes free entries of consecutive ids: one at least, `count_max` at most. There must be room.
PrefixIndex::Run PrefixIndex::TakeEntries(size_t count_max) {
  Run run{first_free_, static_cast<uint32_t>(count_max), {}};
  if (first_free_ != kNil) {
    const FreeRun free = ReadFreeRun(first_free_);
    run.count = std::min(run.count, free.count);
    first_free_ = free.next;
    if (run.count < free.count) AddFreeRun({run.first + run.count, free.count - run.count, {}});
  } else {
    run.first = end_;
    end_ += run.count;
  }
  num_entries_ += run.count;
  return run;
}

// Undoes TakeEntries for the last of what it gave.
void PrefixIndex::GiveBack(const Run& run) {
  num_entries_ -= run.count;
  if (run.first + run.count == end_) {
    end_ = run.first;
  } else {
    AddFreeRun(run);
  }
}

void PrefixIndex::AddFreeRun(const Run& run) {
  // A prompt goes from its end, so what went before it is mostly the next entry.
  FreeRun free{first_free_, run.count};
  if (first_free_ != kNil && first_free_ == run.first + run.count) {
    free = ReadFreeRun(first_free_);
    free.count += run.count;
  }
  first_free_ = run.first;
  WriteFreeRun(first_free_, free);
}

// Gives entries that were just taken to keys, as long as these have none: returns how many have got one, and gives
// back the others. If there are others, `found` is the entry of the first key that has one.
uint32_t PrefixIndex::InsertNew(const Run& run, const BlockKey* keys, uint32_t* found) {
  const uint32_t num_new =
      static_cast<uint32_t>(table_.InsertNew(keys, run.count, run.first, keys_.data(), found));
  if (tokens_kept_ > 0) std::fill_n(&has_tokens_[run.first], num_new, uint8_t{0});
  if (num_new < run.count) GiveBack({run.first + num_new, run.count - num_new, {}});
  return num_new;
}

void PrefixIndex::AddFound(uint32_t entry) {
  if (!found_.empty() && !found_.back().created && found_.back().entry + found_.back().count == entry) {
    ++found_.back().count;
  } else {
    found_.push_back({entry, 1, false});
  }
}

size_t PrefixIndex::FindLeading(const BlockRun& blocks) {
  found_.clear();
  Walk walk(*this, {blocks.keys, blocks.count, nullptr});
  size_t held = 0;
  for (; held < blocks.count; ++held) {
    const uint32_t entry = walk.Next(held);
    if (entry == kNil) break;
    AddFound(entry);
  }
  return held;
}

size_t PrefixIndex::FindOrNameRest(const BlockRun& blocks, size_t first) {
  size_t created = 0;
  for (size_t i = first; i < blocks.count;) {
    const Run run = TakeEntries(blocks.count - i);  // mostly they are all new
    uint32_t found;
    const uint32_t num_new = InsertNew(run, blocks.keys + i, &found);
    if (num_new > 0) found_.push_back({run.first, num_new, true});
    if (num_new < run.count) AddFound(found);
    created += num_new;
    i += num_new + (num_new < run.count);
  }
  return created;
}

uint16_t PrefixIndex::DepthUnder(uint32_t parent) const {
  if (parent == kNil) return 0;
  return std::min(traits_.depth[parent], static_cast<uint16_t>(kDepthMax - 1)) + 1;
}

bool PrefixIndex::HoldsTokens(uint32_t entry, const TokenView& tokens, size_t block) {
  if (has_tokens_[entry]) return tokens.Equal(block, Tokens(entry));
  // It came back from a disk, whose records have keys only; or it is a place kept for a parent.
  KeepTokens(entry, tokens, block, 1);
  return true;
}

void PrefixIndex::KeepTokens(uint32_t entry, const TokenView& tokens, size_t block, size_t count) {
  tokens.Copy(block, count, Tokens(entry));
  std::memset(&has_tokens_[entry], 1, count);
}

// Writes new entries of consecutive ids in one go, chained to each other: with pins and state as in
// `word`, and with the children that are about to follow. `linked`: the one before counts the first as
// its child.
void PrefixIndex::WriteNew(const Run& run, const SlotId* slots, uint32_t word, uint8_t importance,
                           uint32_t previous, bool linked, bool goes_on) {
  const int t = static_cast<int>(run.tier);
  uint32_t depth = DepthUnder(previous);
  for (uint32_t i = 0; i < run.count; ++i) {
    const uint32_t has_child = i + 1 < run.count || goes_on;
    Node& node = nodes_[run.first + i];
    node.parent = i == 0 ? previous : run.first + i - 1;
    node.num_children = has_child;
    for (int other = 0; other < kNumTiers; ++other) {
      Residency& r = node.tier[other];
      r.slot = other == t ? slots[i] : 0;
      r.children = other == t ? has_child : 0;
      r.word = other == t ? word : 0;
    }
    traits_.depth[run.first + i] = static_cast<uint16_t>(std::min<uint32_t>(depth++, kDepthMax));
  }
  std::memset(&traits_.importance[run.first], importance, run.count);
  if (!linked && previous != kNil) {
    nodes_[previous].num_children++;
    Residency& above = nodes_[previous].tier[t];
    above.children++;
    if (above.evictable()) UpdateEvictable(previous, run.tier);
  }
}

uint8_t PrefixIndex::ReadableTiers(uint32_t entry) const {
  uint8_t mask = 0;
  for (int t = 0; t < kNumTiers; ++t) {
    const bool ready = nodes_[entry].tier[t].state() == State::kReady;
    mask |= static_cast<uint8_t>(ready << t);
  }
  return mask;
}

void PrefixIndex::Link(uint32_t child, uint32_t parent) {
  // A key is a chained hash: a block has one parent for ever. A parent that is given later than the
  // child (write_back spills leaves first) is linked then.
  if (parent == kNil || parent == child || nodes_[child].parent != kNil) return;
  // Chained keys know no circle, but a disk's records may claim one. Only what has children of its
  // own can be its parent's ancestor.
  if (nodes_[child].num_children > 0) {
    for (uint32_t above = parent; above != kNil; above = nodes_[above].parent) {
      if (above == child) return;
    }
  }
  nodes_[child].parent = parent;
  nodes_[parent].num_children++;
  traits_.depth[child] = DepthUnder(parent);
  for (int t = 0; t < kNumTiers; ++t) {
    const Tier tier = static_cast<Tier>(t);
    if (StateOf(child, tier) == State::kAbsent) continue;
    At(parent, tier).children++;
    UpdateEvictable(parent, tier);
  }
}

void PrefixIndex::UpdateEvictable(uint32_t entry, Tier tier, bool laid_bare) {
  Residency& r = At(entry, tier);
  const bool evictable = r.state() == State::kReady && r.pins() == 0 && r.children == 0;
  if (evictable == r.evictable()) return;
  r.word ^= Residency::kEvictable;
  Of(tier).policy->SetEvictable(entry, evictable, laid_bare);
}

void PrefixIndex::Occupy(uint32_t entry, Tier tier, SlotId slot) {
  At(entry, tier).slot = slot;
  SetState(entry, tier, State::kWriting);
  const uint32_t parent = nodes_[entry].parent;
  if (parent != kNil) {
    At(parent, tier).children++;
    UpdateEvictable(parent, tier);
  }
}

void PrefixIndex::Vacate(uint32_t entry, Tier tier) {
  Of(tier).pool.Free(At(entry, tier).slot);
  SetState(entry, tier, State::kAbsent);
  UpdateEvictable(entry, tier);
  Of(tier).policy->Remove(entry, keys_[entry]);
  const uint32_t parent = nodes_[entry].parent;
  if (parent != kNil) {
    At(parent, tier).children--;
    UpdateEvictable(parent, tier, true);
  }
  FreeIfUnused(entry);
}

void PrefixIndex::FreeIfUnused(uint32_t entry) {
  while (entry != kNil) {
    Node& node = nodes_[entry];
    if (node.num_children != 0) return;
    for (const Residency& r : node.tier) {
      if (r.state() != State::kAbsent || r.pins() != 0) return;
    }
    const uint32_t parent = node.parent;
    Free(entry);
    if (parent != kNil) nodes_[parent].num_children--;
    entry = parent;  // a placeholder goes with its last child
  }
}

void PrefixIndex::Free(uint32_t entry) {
  table_.Erase(keys_[entry], entry);
  --num_entries_;
  AddFreeRun({entry, 1, {}});
}

void PrefixIndex::SetState(uint32_t entry, Tier tier, State state) {
  Residency& r = At(entry, tier);
  uint32_t* count = Of(tier).count;
  if (r.state() != State::kAbsent) count[static_cast<int>(r.state())]--;
  r.set_state(state);
  if (state != State::kAbsent) count[static_cast<int>(state)]++;
}

void PrefixIndex::RaiseImportance(uint32_t entry, uint8_t importance) {
  // A policy knows where a block is queued by what the block is.
  for (int t = 0; t < kNumTiers; ++t) {
    if (nodes_[entry].tier[t].evictable()) tiers_[t].policy->SetEvictable(entry, false, false);
  }
  traits_.importance[entry] = importance;
  for (int t = 0; t < kNumTiers; ++t) {
    if (nodes_[entry].tier[t].evictable()) tiers_[t].policy->SetEvictable(entry, true, false);
  }
}

inline void PrefixIndex::AddPin(uint32_t entry, Tier tier) {
  Residency& r = At(entry, tier);
  Of(tier).pinned += r.pins() == 0;
  r.word += Residency::kOnePin;
  if (r.evictable()) UpdateEvictable(entry, tier);
}

inline void PrefixIndex::Unpin(uint32_t entry, Tier tier) {
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

bool PrefixIndex::Drop(uint32_t entry, Tier tier) {
  if (StateOf(entry, tier) != State::kReady) return false;  // a writer still owns it, or it is going
  SetState(entry, tier, State::kDying);
  UpdateEvictable(entry, tier);
  if (At(entry, tier).pins() == 0) Vacate(entry, tier);
  return true;
}

template <typename AnyWalk>
size_t PrefixIndex::MatchAlong(AnyWalk& walk, size_t count, uint8_t* masks) {
  walk.RequireFit();
  Tick();
  Toucher touched(*this, false);
  size_t found = 0;
  for (; found < count; ++found) {
    const uint32_t entry = walk.Next(found);
    if (entry == kNil) break;
    masks[found] = ReadableTiers(entry);
    if (masks[found] == 0) break;
    touched.Add(entry);
  }
  return found;
}

template <typename AnyWalk>
uint64_t PrefixIndex::AcquireAlong(AnyWalk& walk, size_t count, std::optional<Tier> tier, bool use,
                                   uint8_t* tiers, SlotId* slots, size_t* found) {
  walk.RequireFit();
  Tick();
  std::vector<Run> pins;
  const uint8_t wanted = tier ? static_cast<uint8_t>(1u << static_cast<int>(*tier)) : uint8_t{0xFF};
  Toucher touched(*this, use);
  size_t i = 0;
  for (; i < count; ++i) {
    const uint32_t entry = walk.Next(i);
    if (entry == kNil) break;
    const uint8_t mask = ReadableTiers(entry) & wanted;
    if (mask == 0) break;
    const Tier chosen = static_cast<Tier>(std::countr_zero(mask));
    // Somebody else is bringing it to the CPU tier right now, where it can be read when he is done.
    if (!tier && chosen == Tier::kSsd && StateOf(entry, Tier::kCpu) == State::kWriting) break;
    AddPin(entry, chosen);
    touched.Add(entry);
    AppendRun(&pins, {entry, 1, chosen});
    tiers[i] = static_cast<uint8_t>(chosen);
    slots[i] = At(entry, chosen).slot;
  }
  *found = i;
  if (i == 0) return 0;
  const uint64_t id = next_id_++;
  leases_.emplace(id, std::move(pins));
  return id;
}

size_t PrefixIndex::Match(const BlockRun& blocks, uint8_t* masks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Walk walk(*this, blocks);
  return MatchAlong(walk, blocks.count, masks);
}

size_t PrefixIndex::MatchTokens(const TokenRun& run, BlockKey* keys, uint8_t* masks) {
  TokenWalk walk(*this, run, keys);
  size_t found;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    found = MatchAlong(walk, run.count, masks);
  }
  walk.NameRest();
  return found;
}

uint64_t PrefixIndex::Acquire(const BlockRun& blocks, std::optional<Tier> tier, bool use,
                              uint8_t* tiers, SlotId* slots, size_t* found) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Walk walk(*this, blocks);
  return AcquireAlong(walk, blocks.count, tier, use, tiers, slots, found);
}

uint64_t PrefixIndex::AcquireTokens(const TokenRun& run, bool use, BlockKey* keys, uint8_t* tiers,
                                    SlotId* slots, size_t* found) {
  TokenWalk walk(*this, run, keys);
  uint64_t lease;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    lease = AcquireAlong(walk, run.count, std::nullopt, use, tiers, slots, found);
  }
  walk.NameRest();
  return lease;
}

bool PrefixIndex::Release(uint64_t lease) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto it = leases_.find(lease);
  if (it == leases_.end()) return false;
  for (const Run& run : it->second) {
    for (uint32_t i = 0; i < run.count; ++i) Unpin(run.first + i, run.tier);
  }
  leases_.erase(it);
  return true;
}

uint64_t PrefixIndex::Writer(Tier tier, const BlockKey& key) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const uint32_t entry = Find(key);
  if (entry == kNil || StateOf(entry, tier) != State::kWriting) return 0;
  for (const auto& [id, txn] : transactions_) {
    if (txn.tier != tier) continue;
    for (const Run& run : txn.runs) {
      if (entry >= run.first && entry - run.first < run.count) return id;
    }
  }
  return 0;
}

void PrefixIndex::PrefetchKey(Tier tier, const BlockKey& key) const {
  table_.Prefetch(key);
  Of(tier).policy->PrefetchPast(key);
}

size_t PrefixIndex::Evict(Tier tier, size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Tick();
  return EvictLocked(tier, count, nullptr);
}

// `admits`, if any, is asked whether the n-th of those who need the room is worth its victim.
size_t PrefixIndex::EvictLocked(Tier tier, size_t count,
                                const std::function<bool(size_t, uint32_t)>& admits) {
  TierState& state = Of(tier);
  // Victims lie anywhere in memory. Those that come next are fetched while the first ones go: first
  // their entries, and when those are there the bucket that their key points to.
  constexpr size_t kLookahead = 8;
  uint32_t ahead[kLookahead];
  size_t num_ahead = 0, num_seen = 0;  // ahead[i % kLookahead] for i in [num_ahead, num_seen)
  size_t evicted = 0;
  for (; evicted < count; ++evicted) {
    const uint32_t victim = state.policy->Victim();
    if (victim == EvictionPolicy::kNone || (admits && !admits(evicted, victim))) break;
    if (num_ahead < num_seen && ahead[num_ahead % kLookahead] == victim) {
      ++num_ahead;
    } else {
      num_ahead = num_seen = 0;  // it goes on elsewhere, with a parent that was laid bare perhaps
    }
    uint32_t last = num_ahead < num_seen ? ahead[(num_seen - 1) % kLookahead] : victim;
    for (int step = 0; step < 2 && num_seen - num_ahead < kLookahead; ++step) {
      last = state.policy->After(last);
      if (last == EvictionPolicy::kNone) break;
      state.policy->Prefetch(last);
      __builtin_prefetch(&nodes_[last], 1);
      __builtin_prefetch(&keys_[last]);
      ahead[num_seen++ % kLookahead] = last;
    }
    if (num_seen - num_ahead > kLookahead / 2) {
      PrefetchKey(tier, keys_[ahead[(num_ahead + kLookahead / 2 - 1) % kLookahead]]);
    }
    // Where a prompt goes from its end, its parents follow, which mostly lie before it.
    if (victim >= kLookahead && nodes_[victim].parent == victim - 1) {
      PrefetchKey(tier, keys_[victim - kLookahead / 2]);
    }
    Drop(victim, tier);
  }
  state.evicted += evicted;
  return evicted;
}

// Evicts what it takes to store the blocks that are not there, for as many of them as the policy
// admits. `anchor` is the parent's entry, if it has one. Returns how many of the leading blocks
// (there already or not) can be stored; nullopt if pins leave no room.
std::optional<size_t> PrefixIndex::MakeRoom(Tier tier, const BlockKey* parent, uint32_t anchor,
                                            const BlockRun& blocks, const std::vector<uint32_t>& missing,
                                            const Purpose& purpose) {
  TierState& state = Of(tier);
  const size_t room = state.pool.num_free();
  if (missing.size() <= room) return blocks.count;
  // Whatever is not pinned can go, unless a pinned block sits below it. Checking the bound first
  // keeps a request that cannot fit from emptying the tier for nothing.
  if (missing.size() > state.pool.num_slots() - state.pinned) return std::nullopt;
  const uint32_t first = anchor != kNil || blocks.count == 0 ? kNil : Find(blocks.keys[0]);
  const uint32_t depth = anchor != kNil ? DepthUnder(anchor) : first != kNil ? traits_.depth[first] : 0;

  auto newcomer = [&](size_t i) {
    return EvictionPolicy::Newcomer{blocks.keys[missing[i]], depth + missing[i], purpose.importance};
  };
  size_t stored = 0;
  bool refused = false;
  if (purpose.required) {
    stored = room + EvictLocked(tier, missing.size() - room, nullptr);
  } else if (parent != nullptr && (anchor == kNil || StateOf(anchor, tier) == State::kAbsent) &&
             state.policy->Remembers(*parent)) {
    refused = true;  // its prompt was cut off before it: nobody would find it
  } else {
    stored = room + EvictLocked(tier, missing.size() - room, [&](size_t n, uint32_t victim) {
      const size_t ahead = room + n + kAhead;
      if (ahead < missing.size()) state.policy->PrefetchPast(blocks.keys[missing[ahead]]);
      refused = !state.policy->Admits(newcomer(room + n), victim);
      return !refused;
    });
  }
  if (stored == missing.size()) return blocks.count;
  if (!refused) return std::nullopt;
  for (size_t i = stored; i < missing.size(); ++i) state.policy->Refuse(newcomer(i));
  return missing[stored];
}

std::optional<uint64_t> PrefixIndex::Reserve(Tier tier, const BlockKey* parent, const BlockRun& wanted,
                                             const Purpose& purpose, std::vector<uint32_t>* positions,
                                             std::vector<SlotId>* slots) {
  Require(purpose.importance <= kImportanceMax, "importance is out of range");
  if (wanted.tokens != nullptr) wanted.tokens->RequireFit(wanted.count);
  const std::lock_guard<std::mutex> lock(mutex_);
  TierState& state = Of(tier);
  // Before anything is changed: what can fail. What gets an entry here gets a slot, too; the parent may get one.
  EnsureRoom(std::min<size_t>(wanted.count, state.pool.num_slots()) + 1);
  Tick();
  BlockRun blocks = wanted;  // as far as they can be stored
  // Blocks of this very request that are here already must not be what makes room for the others:
  // they are pinned first, which is undone whatever happens. Not needed where there is room for all.
  std::vector<uint32_t> present;
  auto unpin_present = [&] {
    for (uint32_t entry : present) Unpin(entry, tier);
  };
  if (state.pool.num_free() < blocks.count) {
    std::vector<uint32_t> missing;
    Walk walk(*this, {blocks.keys, blocks.count, nullptr});
    for (size_t i = 0; i < blocks.count; ++i) {
      const uint32_t entry = walk.Next(i);
      if (entry != kNil && StateOf(entry, tier) != State::kAbsent) {
        AddPin(entry, tier);
        present.push_back(entry);
      } else {
        missing.push_back(static_cast<uint32_t>(i));
      }
    }
    const uint32_t anchor = parent != nullptr ? Find(*parent) : kNil;
    if (anchor != kNil && StateOf(anchor, tier) != State::kAbsent) {
      AddPin(anchor, tier);  // a parent that is evicted for its own child helps nobody
      present.push_back(anchor);
    }
    const std::optional<size_t> stored = MakeRoom(tier, parent, anchor, blocks, missing, purpose);
    if (!stored) {
      unpin_present();
      return std::nullopt;
    }
    blocks.count = *stored;
  }
  Transaction txn{tier, {}, 0};
  // The chain is linked even where blocks are present: they may have come before their parent. Entries are looked
  // for here and not before, because eviction may have freed some, and the parent's.
  const uint32_t anchor = parent != nullptr ? FindOrCreate(*parent) : kNil;
  const size_t num_created = FindOrNameRest(blocks, FindLeading(blocks));
  state.pool.Allocate(num_created, &fresh_slots_);
  const SlotId* fresh = fresh_slots_.data();
  uint32_t previous = anchor;
  uint32_t position = 0;
  {
    Toucher touched(*this, false);
    for (size_t f = 0; f < found_.size(); ++f) {
      const Found& found = found_[f];
      if (found.created) {
        const bool goes_on = f + 1 < found_.size() && found_[f + 1].created;
        const bool linked = f > 0 && found_[f - 1].created;
        const Run run{found.entry, found.count, tier};
        WriteNew(run, fresh, Residency::kWritten, purpose.importance, previous, linked, goes_on);
        if (blocks.tokens != nullptr) KeepTokens(found.entry, *blocks.tokens, position, found.count);
        for (uint32_t i = 0; i < found.count; ++i) positions->push_back(position + i);
        slots->insert(slots->end(), fresh, fresh + found.count);
        AppendRun(&txn.runs, run);
        fresh += found.count;
        previous = found.entry + found.count - 1;
        position += found.count;
        continue;
      }
      touched.Add(found.entry, found.count);
      for (uint32_t entry = found.entry; entry < found.entry + found.count; ++entry, ++position) {
        Link(entry, previous);
        if (blocks.tokens != nullptr && !has_tokens_[entry]) KeepTokens(entry, *blocks.tokens, position, 1);
        if (purpose.importance > traits_.importance[entry]) RaiseImportance(entry, purpose.importance);
        if (StateOf(entry, tier) == State::kAbsent) {
          Occupy(entry, tier, state.pool.Allocate());
          AddPin(entry, tier);
          positions->push_back(position);
          slots->push_back(At(entry, tier).slot);
          AppendRun(&txn.runs, {entry, 1, tier});
        }
        previous = entry;
      }
    }
  }
  for (const Run& run : txn.runs) {
    state.policy->Store(run.first, run.count, &keys_[run.first], purpose.staging);
  }
  txn.count = positions->size();
  state.count[static_cast<int>(State::kWriting)] += static_cast<uint32_t>(num_created);
  state.pinned += static_cast<uint32_t>(num_created);
  fresh_slots_.clear();
  FreeIfUnused(anchor);  // a parent that nothing was stored under, or only blocks that have another
  uint64_t id = 0;
  if (txn.count > 0) {
    id = next_id_++;
    transactions_.emplace(id, std::move(txn));
  }
  unpin_present();
  return id;
}

size_t PrefixIndex::Commit(uint64_t txn, const uint8_t* ok, size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto it = transactions_.find(txn);
  Require(it != transactions_.end(), "commit of an unknown transaction");
  const Transaction& t = it->second;
  Require(ok == nullptr || count == t.count, "commit: one ok byte per reserved block");
  size_t published = 0;
  size_t position = t.count;
  // Children first: giving a failed parent back must not free an entry that a child still needs.
  for (size_t r = t.runs.size(); r-- > 0;) {
    for (uint32_t i = t.runs[r].count; i-- > 0;) {
      const uint32_t entry = t.runs[r].first + i;
      --position;
      if (ok == nullptr || ok[position] != 0) {
        At(entry, t.tier).set_state(State::kReady);
        ++published;
      } else {
        SetState(entry, t.tier, State::kDying);
      }
      Unpin(entry, t.tier);
    }
  }
  Of(t.tier).count[static_cast<int>(State::kWriting)] -= static_cast<uint32_t>(published);
  Of(t.tier).count[static_cast<int>(State::kReady)] += static_cast<uint32_t>(published);
  transactions_.erase(it);
  return published;
}

bool PrefixIndex::Abort(uint64_t txn) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto it = transactions_.find(txn);
  if (it == transactions_.end()) return false;
  const Transaction& t = it->second;
  for (size_t r = t.runs.size(); r-- > 0;) {
    for (uint32_t i = t.runs[r].count; i-- > 0;) {
      SetState(t.runs[r].first + i, t.tier, State::kDying);
      Unpin(t.runs[r].first + i, t.tier);
    }
  }
  transactions_.erase(it);
  return true;
}

size_t PrefixIndex::Invalidate(Tier tier, const BlockKey* keys, size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t dropped = 0;
  for (size_t i = count; i-- > 0;) {
    const uint32_t entry = Find(keys[i]);
    if (entry != kNil) dropped += Drop(entry, tier);
  }
  return dropped;
}

size_t PrefixIndex::InvalidateTier(Tier tier) {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t dropped = 0;
  for (uint32_t entry = 0; entry < end_; ++entry) {
    if (!IsFreed(entry)) dropped += Drop(entry, tier);
  }
  return dropped;
}

size_t PrefixIndex::Restore(Tier tier, const BlockKey* keys, const BlockKey* parents,
                            const SlotId* slots, size_t count, std::vector<uint8_t>* taken) {
  const std::lock_guard<std::mutex> lock(mutex_);
  TierState& state = Of(tier);
  // With every slot free no block is ready, being written or dying.
  Require(state.pool.num_free() == state.pool.num_slots(), "restore into a tier that is not empty");

  // From the last to the first, so that what contradicts a later record is seen to.
  taken->assign(count, 0);
  size_t num_taken = 0;
  {
    std::vector<bool> used(state.pool.num_slots(), false);
    KeyTable seen(std::min<size_t>(count, state.pool.num_slots()));
    for (size_t i = count; i-- > 0;) {
      if (slots[i] < 0 || static_cast<uint32_t>(slots[i]) >= state.pool.num_slots() || used[slots[i]]) {
        continue;
      }
      if (seen.FindOrInsert(keys[i], static_cast<uint32_t>(i), keys) != KeyTable::kNone) continue;
      used[slots[i]] = true;
      (*taken)[i] = 1;
      ++num_taken;
    }
  }
  // In the order in which they were written: what was written together gets consecutive entries.
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) table_.Prefetch(keys[i + kAhead]);
    if (!(*taken)[i]) continue;
    const uint32_t entry = FindOrCreate(keys[i]);
    // A second parent would not be linked, and its placeholder would stay for ever.
    if (!(parents[i] == BlockKey{}) && !(parents[i] == keys[i]) && nodes_[entry].parent == kNil) {
      Link(entry, FindOrCreate(parents[i]));
    }
    Tick();
    state.pool.Take(slots[i]);
    Occupy(entry, tier, slots[i]);
    state.policy->Store(entry, 1, &keys_[entry], true);
    SetState(entry, tier, State::kReady);
    UpdateEvictable(entry, tier);
  }
  return num_taken;
}

size_t PrefixIndex::Blocks(Tier tier, std::vector<BlockKey>* keys, std::vector<BlockKey>* parents,
                           std::vector<SlotId>* slots) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (uint32_t entry = 0; entry < end_; ++entry) {
    if (IsFreed(entry) || StateOf(entry, tier) != State::kReady) continue;
    keys->push_back(keys_[entry]);
    parents->push_back(nodes_[entry].parent == kNil ? BlockKey{} : keys_[nodes_[entry].parent]);
    slots->push_back(At(entry, tier).slot);
  }
  return keys->size();
}

TierStats PrefixIndex::Stats(Tier tier) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const TierState& state = Of(tier);
  TierStats stats;
  stats.slots = state.pool.num_slots();
  stats.free = state.pool.num_free();
  stats.ready = state.count[static_cast<int>(State::kReady)];
  stats.writing = state.count[static_cast<int>(State::kWriting)];
  stats.pinned = state.pinned;
  stats.evicted = state.evicted;
  return stats;
}

size_t PrefixIndex::num_leases() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return leases_.size();
}

size_t PrefixIndex::num_transactions() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return transactions_.size();
}

size_t PrefixIndex::num_entries() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_entries_;
}

size_t PrefixIndex::memory_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t per_entry = sizeof(BlockKey) + sizeof(Node) + tokens_kept_ * sizeof(int32_t) +
                           (tokens_kept_ > 0) + sizeof(uint16_t) + sizeof(uint8_t);
  size_t bytes = end_ * per_entry + table_.memory_bytes();
  for (const TierState& state : tiers_) bytes += state.pool.memory_bytes() + state.policy->memory_bytes();
  return bytes;
}

std::string PrefixIndex::CheckIntegrity() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<uint32_t> pins[kNumTiers], children[kNumTiers];
  std::vector<uint32_t> structural(end_, 0);
  for (int t = 0; t < kNumTiers; ++t) {
    pins[t].assign(end_, 0);
    children[t].assign(end_, 0);
  }
  for (const auto& [id, lease] : leases_) {
    for (const Run& run : lease) {
      for (uint32_t i = 0; i < run.count; ++i) pins[static_cast<int>(run.tier)][run.first + i]++;
    }
  }
  for (const auto& [id, txn] : transactions_) {
    size_t count = 0;
    for (const Run& run : txn.runs) {
      for (uint32_t entry = run.first; entry < run.first + run.count; ++entry, ++count) {
        pins[static_cast<int>(txn.tier)][entry]++;
        if (StateOf(entry, txn.tier) != State::kWriting) return "a reserved block is not being written";
      }
    }
    if (count != txn.count) return "a transaction has lost blocks";
  }
  std::vector<bool> in_use(end_, true);
  size_t freed = 0;
  for (uint32_t first = first_free_; first != kNil; first = ReadFreeRun(first).next) {
    for (uint32_t id = first; id < first + ReadFreeRun(first).count; ++id, ++freed) {
      if (!IsFreed(id) || !in_use[id]) return "an entry in use is free";
      in_use[id] = false;
    }
  }
  if (num_entries_ + freed != end_) return "entries are lost";
  for (uint32_t id = 0; id < end_; ++id) {
    if (!in_use[id]) continue;
    if (IsFreed(id)) return "a free entry is lost";
    if (Find(keys_[id]) != id) return "an entry is not found by its key";
    const Node& node = nodes_[id];
    if (node.parent == kNil) continue;
    structural[node.parent]++;
    for (int t = 0; t < kNumTiers; ++t) {
      children[t][node.parent] += StateOf(id, static_cast<Tier>(t)) != State::kAbsent;
    }
  }
  if (table_.size() != num_entries_) return "the table has an entry too many";
  for (int t = 0; t < kNumTiers; ++t) {
    const TierState& state = tiers_[t];
    const Tier tier = static_cast<Tier>(t);
    std::unordered_set<SlotId> used;
    std::vector<bool> evictable(end_, false);
    uint32_t pinned = 0, count[4] = {};
    for (uint32_t id = 0; id < end_; ++id) {
      if (!in_use[id]) continue;
      const Residency& r = At(id, tier);
      pinned += r.pins() > 0;
      count[static_cast<int>(r.state())]++;
      const bool absent = StateOf(id, tier) == State::kAbsent;
      if (!absent && (r.slot < 0 || static_cast<uint32_t>(r.slot) >= state.pool.num_slots())) {
        return "no such slot";
      }
      if (!absent && !used.insert(r.slot).second) return "a slot is used twice";
      if (!absent && state.pool.IsFree(r.slot)) return "a slot in use is free";
      if (r.pins() != pins[t][id]) return "pins without a lease or transaction";
      if (StateOf(id, tier) == State::kDying && r.pins() == 0) return "a dropped block kept its slot";
      if (r.children != children[t][id]) return "wrong count of resident children";
      evictable[id] = StateOf(id, tier) == State::kReady && r.pins() == 0 && r.children == 0;
      if (evictable[id] != r.evictable()) return "wrong about what may be evicted";
    }
    if (used.size() + state.pool.num_free() != state.pool.num_slots()) return "slots are lost";
    if (state.pool.num_slots() > 0) {
      const std::string problem = state.policy->Check(evictable);
      if (!problem.empty()) return problem;
    }
    if (pinned != state.pinned) return "wrong count of pinned blocks";
    for (int k = static_cast<int>(State::kWriting); k <= static_cast<int>(State::kDying); ++k) {
      if (count[k] != state.count[k]) return "wrong count of blocks by state";
    }
  }
  for (uint32_t id = 0; id < end_; ++id) {
    if (!in_use[id]) continue;
    if (nodes_[id].num_children != structural[id]) return "wrong count of children";
    bool needed = structural[id] > 0;
    for (int t = 0; t < kNumTiers; ++t) needed |= StateOf(id, static_cast<Tier>(t)) != State::kAbsent;
    if (!needed) return "an entry that nothing refers to";
  }
  return "";
}

}  // namespace flexkv
