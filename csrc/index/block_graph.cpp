#include "index/block_graph.hpp"

#include <algorithm>
#include <cstring>

namespace flexkv {
namespace {

constexpr uint32_t kEntriesMin = 1024;
// Entries whose memory is there from the start, at most (about 100 bytes each).
constexpr uint32_t kEntriesPopulated = 1u << 21;
constexpr uint32_t kEntriesMax = 1u << 31;

uint32_t SlotsOfLargest(const std::vector<TierSetup>& tiers) {
  uint64_t slots_max = 0, slots = 0;
  for (const TierSetup& tier : tiers) {
    slots_max = std::max<uint64_t>(slots_max, tier.slots);
    slots += tier.slots;
  }
  Require(!tiers.empty() && tiers.size() <= kTiersMax, "an index has 1 to 8 tiers");
  Require(slots <= kEntriesMax, "the tiers of an index have at most 2^31 slots together");
  return static_cast<uint32_t>(slots_max);
}

}  // namespace

BlockGraph::BlockGraph(const std::vector<TierSetup>& tiers, uint32_t tokens_per_block, bool keep_tokens,
                       bool watched)
    : tokens_kept_(keep_tokens ? tokens_per_block : 0),
      watched_(watched),
      node_bytes_(sizeof(Node) + tiers.size() * sizeof(Residency)),
      table_(SlotsOfLargest(tiers)) {
  for (const TierSetup& tier : tiers) {
    tiers_.emplace_back(tier.slots);
    tiers_.back().policy = MakeEvictionPolicy({tier.policy, tier.slots, tokens_per_block}, traits_);
  }
  ReserveEntries(std::clamp(SlotsOfLargest(tiers), kEntriesMin, kEntriesPopulated), true);
}

size_t BlockGraph::memory_bytes() const {
  const size_t per_entry = sizeof(BlockKey) + node_bytes_ + tokens_kept_ * sizeof(int32_t) +
                           (tokens_kept_ > 0) + watched_ * sizeof(uint64_t) + sizeof(uint16_t) +
                           sizeof(uint8_t);
  size_t bytes = end_ * per_entry + table_.memory_bytes();
  for (const TierState& state : tiers_) bytes += state.pool.memory_bytes() + state.policy->memory_bytes();
  return bytes;
}

void BlockGraph::ReserveEntries(size_t count, bool populate) {
  Require(count <= kEntriesMax, "the index is full");
  keys_.Reserve(count, populate);
  nodes_.Reserve(count * node_bytes_, populate);
  if (tokens_kept_ > 0) {
    tokens_.Reserve(count * tokens_kept_, populate);
    has_tokens_.Reserve(count, populate);
  }
  if (watched_) numbers_.Reserve(count, populate);
  traits_.depth.Reserve(count, populate);
  traits_.importance.Reserve(count, populate);
  for (TierState& tier : tiers_) {
    if (tier.pool.num_slots() > 0) tier.policy->Reserve(count, populate);
  }
  reserved_ = static_cast<uint32_t>(count);
}

void BlockGraph::Tick() {
  for (TierState& tier : tiers_) tier.policy->Tick();
}

void BlockGraph::EnsureRoom(size_t count) {
  const size_t end = end_ + count;
  if (end > reserved_) ReserveEntries(std::max({size_t{kEntriesMin}, end, end_ + end_ / size_t{2}}), false);
  table_.Reserve(num_entries_ + count);
}

BlockGraph::Run BlockGraph::TakeEntries(size_t count_max) {
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
void BlockGraph::GiveBack(const Run& run) {
  num_entries_ -= run.count;
  if (run.first + run.count == end_) {
    end_ = run.first;
  } else {
    AddFreeRun(run);
  }
}

void BlockGraph::AddFreeRun(const Run& run) {
  // A prompt goes from its end, so what went before it is mostly the next entry.
  FreeRun free{first_free_, run.count};
  if (first_free_ != kNil && first_free_ == run.first + run.count) {
    free = ReadFreeRun(first_free_);
    free.count += run.count;
  }
  first_free_ = run.first;
  WriteFreeRun(first_free_, free);
}

uint32_t BlockGraph::InsertNew(const Run& run, const BlockKey* keys, uint32_t* found) {
  const uint32_t num_new =
      static_cast<uint32_t>(table_.InsertNew(keys, run.count, run.first, keys_.data(), found));
  if (tokens_kept_ > 0) std::fill_n(&has_tokens_[run.first], num_new, uint8_t{0});
  if (watched_) std::fill_n(&numbers_[run.first], num_new, uint64_t{0});
  if (num_new < run.count) GiveBack({run.first + num_new, run.count - num_new, {}});
  return num_new;
}

uint32_t BlockGraph::FindOrCreate(const BlockKey& key) {
  EnsureRoom(1);
  uint32_t found;
  const Run run = TakeEntries(1);
  if (InsertNew(run, &key, &found) == 0) return found;
  const uint32_t entry = run.first;
  NodeOf(entry) = {kNil, 0};
  std::fill_n(TiersOf(entry), tiers_.size(), Residency{});
  traits_.depth[entry] = 0;
  traits_.importance[entry] = 0;
  return entry;
}

void BlockGraph::WriteNew(const Run& run, const SlotId* slots, uint8_t importance, uint32_t previous,
                          bool linked, bool goes_on) {
  const size_t t = static_cast<size_t>(run.tier);
  uint32_t depth = DepthUnder(previous);
  for (uint32_t i = 0; i < run.count; ++i) {
    const uint32_t has_child = i + 1 < run.count || goes_on;
    Node& node = NodeOf(run.first + i);
    node.parent = i == 0 ? previous : run.first + i - 1;
    node.num_children = has_child;
    Residency* tiers = TiersOf(run.first + i);
    for (size_t other = 0; other < tiers_.size(); ++other) {
      Residency& r = tiers[other];
      r.slot = other == t ? slots[i] : 0;
      r.children = other == t ? has_child : 0;
      r.word = other == t ? Residency::kWritten : 0;
    }
    traits_.depth[run.first + i] = static_cast<uint16_t>(std::min<uint32_t>(depth++, kDepthMax));
  }
  std::memset(&traits_.importance[run.first], importance, run.count);
  Of(run.tier).count[static_cast<int>(State::kWriting)] += run.count;
  Of(run.tier).pinned += run.count;
  if (!linked && previous != kNil) {
    NodeOf(previous).num_children++;
    Residency& above = At(previous, run.tier);
    above.children++;
    if (above.evictable()) UpdateEvictable(previous, run.tier);
  }
}

uint16_t BlockGraph::DepthUnder(uint32_t parent) const {
  if (parent == kNil) return 0;
  return std::min(traits_.depth[parent], static_cast<uint16_t>(kDepthMax - 1)) + 1;
}

bool BlockGraph::HoldsTokens(uint32_t entry, const TokenView& tokens, size_t block) {
  if (has_tokens_[entry]) return tokens.Equal(block, Tokens(entry));
  // It came back from a disk, whose records have keys only; or it is a place kept for a parent.
  KeepTokens(entry, tokens, block, 1);
  return true;
}

void BlockGraph::KeepTokens(uint32_t entry, const TokenView& tokens, size_t block, size_t count) {
  tokens.Copy(block, count, Tokens(entry));
  std::memset(&has_tokens_[entry], 1, count);
}

void BlockGraph::Link(uint32_t child, uint32_t parent) {
  // A key is a chained hash: a block has one parent for ever. A parent that is given later than the
  // child (write_back spills leaves first) is linked then.
  if (parent == kNil || parent == child || NodeOf(child).parent != kNil) return;
  // Chained keys know no circle, but a disk's records may claim one. Only what has children of its
  // own can be its parent's ancestor.
  if (NodeOf(child).num_children > 0) {
    for (uint32_t above = parent; above != kNil; above = NodeOf(above).parent) {
      if (above == child) return;
    }
  }
  NodeOf(child).parent = parent;
  NodeOf(parent).num_children++;
  traits_.depth[child] = DepthUnder(parent);
  for (size_t t = 0; t < tiers_.size(); ++t) {
    const Tier tier = static_cast<Tier>(t);
    if (StateOf(child, tier) == State::kAbsent) continue;
    At(parent, tier).children++;
    UpdateEvictable(parent, tier);
  }
}

void BlockGraph::RaiseImportance(uint32_t entry, uint8_t importance) {
  // A policy knows where a block is queued by what the block is.
  Residency* tiers = TiersOf(entry);
  for (size_t t = 0; t < tiers_.size(); ++t) {
    if (tiers[t].evictable()) tiers_[t].policy->SetEvictable(entry, false, false);
  }
  traits_.importance[entry] = importance;
  for (size_t t = 0; t < tiers_.size(); ++t) {
    if (tiers[t].evictable()) tiers_[t].policy->SetEvictable(entry, true, false);
  }
}

void BlockGraph::FreeIfUnused(uint32_t entry) {
  while (entry != kNil) {
    if (NodeOf(entry).num_children != 0) return;
    const Residency* tiers = TiersOf(entry);
    for (size_t t = 0; t < tiers_.size(); ++t) {
      if (tiers[t].state() != State::kAbsent || tiers[t].pins() != 0) return;
    }
    const uint32_t parent = NodeOf(entry).parent;
    Free(entry);
    if (parent != kNil) NodeOf(parent).num_children--;
    entry = parent;  // a placeholder goes with its last child
  }
}

void BlockGraph::Free(uint32_t entry) {
  if (watched_ && numbers_[entry] != 0) sightings_.push_back({numbers_[entry], {}, Sight::kForgotten});
  table_.Erase(keys_[entry], entry);
  --num_entries_;
  AddFreeRun({entry, 1, {}});
}

void BlockGraph::UpdateEvictable(uint32_t entry, Tier tier, bool laid_bare) {
  Residency& r = At(entry, tier);
  const bool evictable = r.state() == State::kReady && r.pins() == 0 && r.children == 0;
  if (evictable == r.evictable()) return;
  r.word ^= Residency::kEvictable;
  Of(tier).policy->SetEvictable(entry, evictable, laid_bare);
}

void BlockGraph::Occupy(uint32_t entry, Tier tier, SlotId slot) {
  At(entry, tier).slot = slot;
  SetState(entry, tier, State::kWriting);
  const uint32_t parent = NodeOf(entry).parent;
  if (parent != kNil) {
    At(parent, tier).children++;
    UpdateEvictable(parent, tier);
  }
}

void BlockGraph::Vacate(uint32_t entry, Tier tier) {
  Of(tier).pool.Free(At(entry, tier).slot);
  SetState(entry, tier, State::kAbsent);
  UpdateEvictable(entry, tier);
  Of(tier).policy->Remove(entry, keys_[entry]);
  const uint32_t parent = NodeOf(entry).parent;
  if (parent != kNil) {
    At(parent, tier).children--;
    UpdateEvictable(parent, tier, true);
  }
  FreeIfUnused(entry);
}

void BlockGraph::SetState(uint32_t entry, Tier tier, State state) {
  Residency& r = At(entry, tier);
  uint32_t* count = Of(tier).count;
  if (r.state() != State::kAbsent) count[static_cast<int>(r.state())]--;
  const bool was_readable = r.state() == State::kReady, is_readable = state == State::kReady;
  r.set_state(state);
  if (watched_ && was_readable != is_readable && numbers_[entry] != 0) {
    sightings_.push_back({numbers_[entry], tier, is_readable ? Sight::kCame : Sight::kWent});
  }
  if (state != State::kAbsent) count[static_cast<int>(state)]++;
}

bool BlockGraph::Watch(uint32_t entry, uint64_t number) {
  if (numbers_[entry] != 0) return false;
  numbers_[entry] = number;
  for (size_t t = 0; t < tiers_.size(); ++t) {
    const Tier tier = static_cast<Tier>(t);
    if (StateOf(entry, tier) == State::kReady) sightings_.push_back({number, tier, Sight::kCame});
  }
  return true;
}

bool BlockGraph::Drop(uint32_t entry, Tier tier) {
  if (StateOf(entry, tier) != State::kReady) return false;  // a writer still owns it, or it is going
  SetState(entry, tier, State::kDying);
  UpdateEvictable(entry, tier);
  if (At(entry, tier).pins() == 0) Vacate(entry, tier);
  return true;
}

void BlockGraph::PrefetchKey(Tier tier, const BlockKey& key) const {
  table_.Prefetch(key);
  Of(tier).policy->PrefetchPast(key);
}

size_t BlockGraph::Evict(Tier tier, size_t count, const std::function<bool(size_t, uint32_t)>& admits) {
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
      __builtin_prefetch(&NodeOf(last), 1);
      __builtin_prefetch(&keys_[last]);
      ahead[num_seen++ % kLookahead] = last;
    }
    if (num_seen - num_ahead > kLookahead / 2) {
      PrefetchKey(tier, keys_[ahead[(num_ahead + kLookahead / 2 - 1) % kLookahead]]);
    }
    // Where a prompt goes from its end, its parents follow, which mostly lie before it.
    if (victim >= kLookahead && NodeOf(victim).parent == victim - 1) {
      PrefetchKey(tier, keys_[victim - kLookahead / 2]);
    }
    Drop(victim, tier);
  }
  state.evicted += evicted;
  return evicted;
}

}  // namespace flexkv
