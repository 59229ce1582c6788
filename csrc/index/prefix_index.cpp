#include "index/prefix_index.hpp"

#include <algorithm>
#include <bit>

#include "index/key_table.hpp"

namespace flexkv {
namespace {

constexpr size_t kAhead = KeyTable::kAhead;

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

PrefixIndex::PrefixIndex(const std::vector<TierSetup>& tiers, uint32_t tokens_per_block, bool keep_tokens,
                         bool watched)
    : graph_(tiers, tokens_per_block, keep_tokens, watched) {}

void PrefixIndex::RequireTier(Tier tier) const {
  Require(static_cast<size_t>(tier) < graph_.num_tiers(), "there is no tier of this number");
}

// ---- looking up, and leases ----

template <typename AnyWalk>
size_t PrefixIndex::MatchAlong(AnyWalk& walk, size_t count, uint8_t* masks) {
  walk.RequireFit();
  graph_.Tick();
  Toucher touched(graph_, false);
  size_t found = 0;
  for (; found < count; ++found) {
    const uint32_t entry = walk.Next(found);
    if (entry == kNil) break;
    masks[found] = graph_.ReadableTiers(entry);
    if (masks[found] == 0) break;
    touched.Add(entry);
  }
  return found;
}

template <typename AnyWalk>
uint64_t PrefixIndex::AcquireAlong(AnyWalk& walk, size_t count, std::optional<Tier> tier, bool use,
                                   uint8_t* tiers, SlotId* slots, size_t* found) {
  walk.RequireFit();
  graph_.Tick();
  std::vector<Run> pins;
  const uint8_t wanted = tier ? static_cast<uint8_t>(1u << static_cast<int>(*tier)) : uint8_t{0xFF};
  Toucher touched(graph_, use);
  size_t i = 0;
  for (; i < count; ++i) {
    const uint32_t entry = walk.Next(i);
    if (entry == kNil) break;
    const uint8_t mask = graph_.ReadableTiers(entry) & wanted;
    if (mask == 0) break;
    const Tier chosen = static_cast<Tier>(std::countr_zero(mask));
    // Somebody else is bringing it to the CPU tier right now, where it can be read when he is done; or what
    // was there is forgotten, and its slot is not given back before its last reader has gone.
    if (!tier && chosen != Tier::kCpu && graph_.StateOf(entry, Tier::kCpu) != State::kAbsent) break;
    graph_.AddPin(entry, chosen);
    touched.Add(entry);
    AppendRun(&pins, {entry, 1, chosen});
    tiers[i] = static_cast<uint8_t>(chosen);
    slots[i] = graph_.SlotOf(entry, chosen);
  }
  *found = i;
  if (i == 0) return 0;
  const uint64_t id = next_id_++;
  leases_.emplace(id, std::move(pins));
  return id;
}

size_t PrefixIndex::Match(const BlockRun& blocks, uint8_t* masks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Walk walk(graph_, blocks);
  return MatchAlong(walk, blocks.count, masks);
}

size_t PrefixIndex::MatchTokens(const TokenRun& run, BlockKey* keys, uint8_t* masks) {
  TokenWalk walk(graph_, run, keys);
  size_t found;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    found = MatchAlong(walk, run.count, masks);
  }
  walk.NameRest();
  return found;
}

uint64_t PrefixIndex::Acquire(const BlockRun& blocks, std::optional<Tier> tier, bool use, uint8_t* tiers,
                              SlotId* slots, size_t* found) {
  if (tier) RequireTier(*tier);
  const std::lock_guard<std::mutex> lock(mutex_);
  Walk walk(graph_, blocks);
  return AcquireAlong(walk, blocks.count, tier, use, tiers, slots, found);
}

uint64_t PrefixIndex::AcquireTokens(const TokenRun& run, bool use, BlockKey* keys, uint8_t* tiers,
                                    SlotId* slots, size_t* found) {
  TokenWalk walk(graph_, run, keys);
  uint64_t lease;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    lease = AcquireAlong(walk, run.count, std::nullopt, use, tiers, slots, found);
  }
  walk.NameRest();
  return lease;
}

void PrefixIndex::Held(const BlockKey* keys, size_t count, uint8_t* masks) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) graph_.Prefetch(keys[i + kAhead]);
    const uint32_t entry = graph_.Find(keys[i]);
    masks[i] = entry == kNil ? uint8_t{0} : graph_.ReadableTiers(entry);
    const bool in_cpu = masks[i] & 1;
    if (masks[i] != 0 && !in_cpu && graph_.StateOf(entry, Tier::kCpu) != State::kAbsent) masks[i] = 0;
  }
}

bool PrefixIndex::Release(uint64_t lease) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto it = leases_.find(lease);
  if (it == leases_.end()) return false;
  for (const Run& run : it->second) {
    for (uint32_t i = 0; i < run.count; ++i) graph_.Unpin(run.first + i, run.tier);
  }
  leases_.erase(it);
  return true;
}

uint64_t PrefixIndex::Writer(Tier tier, const BlockKey& key) {
  RequireTier(tier);
  const std::lock_guard<std::mutex> lock(mutex_);
  const uint32_t entry = graph_.Find(key);
  if (entry == kNil || graph_.StateOf(entry, tier) != State::kWriting) return 0;
  for (const auto& [id, txn] : transactions_) {
    if (txn.tier != tier) continue;
    for (const Run& run : txn.runs) {
      if (entry >= run.first && entry - run.first < run.count) return id;
    }
  }
  return 0;
}

// ---- storing ----

size_t PrefixIndex::Evict(Tier tier, size_t count) {
  RequireTier(tier);
  const std::lock_guard<std::mutex> lock(mutex_);
  graph_.Tick();
  return graph_.Evict(tier, count, nullptr);
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
  Walk walk(graph_, {blocks.keys, blocks.count, nullptr});
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
    const Run run = graph_.TakeEntries(blocks.count - i);  // mostly they are all new
    uint32_t found;
    const uint32_t num_new = graph_.InsertNew(run, blocks.keys + i, &found);
    if (num_new > 0) found_.push_back({run.first, num_new, true});
    if (num_new < run.count) AddFound(found);
    created += num_new;
    i += num_new + (num_new < run.count);
  }
  return created;
}

// Evicts what it takes to store the blocks that are not there, for as many of them as the policy
// admits. `anchor` is the parent's entry, if it has one. Returns how many of the leading blocks
// (there already or not) can be stored; nullopt if pins leave no room.
std::optional<size_t> PrefixIndex::MakeRoom(Tier tier, const BlockKey* parent, uint32_t anchor,
                                            const BlockRun& blocks, const std::vector<uint32_t>& missing,
                                            const Purpose& purpose) {
  TierState& state = graph_.Of(tier);
  const size_t room = state.pool.num_free();
  if (missing.size() <= room) return blocks.count;
  const bool in_part = !purpose.required && state.policy->selective();
  // Whatever is not pinned can go, unless a pinned block sits below it. Checking the bound first
  // keeps a request that cannot fit from emptying the tier for nothing.
  if (!in_part && missing.size() > state.pool.num_slots() - state.pinned) return std::nullopt;
  auto newcomer = [&](size_t i) {
    return EvictionPolicy::Newcomer{blocks.keys[missing[i]], purpose.importance};
  };
  size_t stored = 0;
  bool refused = false;
  if (purpose.required) {
    stored = room + graph_.Evict(tier, missing.size() - room, nullptr);
  } else if (parent != nullptr && (anchor == kNil || graph_.StateOf(anchor, tier) == State::kAbsent) &&
             state.policy->Remembers(*parent)) {
    refused = true;  // its prompt was cut off before it: nobody would find it
  } else {
    stored = room + graph_.Evict(tier, missing.size() - room, [&](size_t n, uint32_t victim) {
      const size_t ahead = room + n + kAhead;
      if (ahead < missing.size()) state.policy->PrefetchPast(blocks.keys[missing[ahead]]);
      refused = !state.policy->Admits(newcomer(room + n), victim);
      return !refused;
    });
  }
  if (stored == missing.size()) return blocks.count;
  if (!refused && (!in_part || stored == 0)) return std::nullopt;
  for (size_t i = stored; i < missing.size(); ++i) state.policy->Refuse(newcomer(i));
  return missing[stored];
}

std::optional<uint64_t> PrefixIndex::Reserve(Tier tier, const BlockKey* parent, const BlockRun& wanted,
                                             const Purpose& purpose, std::vector<uint32_t>* positions,
                                             std::vector<SlotId>* slots) {
  RequireTier(tier);
  Require(purpose.importance <= kImportanceMax, "importance is out of range");
  if (wanted.tokens != nullptr) wanted.tokens->RequireFit(wanted.count);
  const std::lock_guard<std::mutex> lock(mutex_);
  TierState& state = graph_.Of(tier);
  // Before anything is changed: what can fail. What gets an entry here gets a slot, too; the parent may get
  // one.
  graph_.EnsureRoom(std::min<size_t>(wanted.count, state.pool.num_slots()) + 1);
  graph_.Tick();
  BlockRun blocks = wanted;  // as far as they can be stored
  // Blocks of this very request that are here already must not be what makes room for the others:
  // they are pinned first, which is undone whatever happens. Not needed where there is room for all.
  std::vector<uint32_t> present;
  auto unpin_present = [&] {
    for (uint32_t entry : present) graph_.Unpin(entry, tier);
  };
  if (state.pool.num_free() < blocks.count) {
    std::vector<uint32_t> missing;
    Walk walk(graph_, {blocks.keys, blocks.count, nullptr});
    for (size_t i = 0; i < blocks.count; ++i) {
      const uint32_t entry = walk.Next(i);
      if (entry != kNil && graph_.StateOf(entry, tier) != State::kAbsent) {
        graph_.AddPin(entry, tier);
        present.push_back(entry);
      } else {
        missing.push_back(static_cast<uint32_t>(i));
      }
    }
    const uint32_t anchor = parent != nullptr ? graph_.Find(*parent) : kNil;
    if (anchor != kNil && graph_.StateOf(anchor, tier) != State::kAbsent) {
      graph_.AddPin(anchor, tier);  // a parent that is evicted for its own child helps nobody
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
  // The chain is linked even where blocks are present: they may have come before their parent. Entries are
  // looked for here and not before, because eviction may have freed some, and the parent's.
  const uint32_t anchor = parent != nullptr ? graph_.FindOrCreate(*parent) : kNil;
  const size_t num_created = FindOrNameRest(blocks, FindLeading(blocks));
  state.pool.Allocate(num_created, &fresh_slots_);
  const SlotId* fresh = fresh_slots_.data();
  uint32_t previous = anchor;
  uint32_t position = 0;
  {
    Toucher touched(graph_, false);
    for (size_t f = 0; f < found_.size(); ++f) {
      const Found& found = found_[f];
      if (found.created) {
        const bool goes_on = f + 1 < found_.size() && found_[f + 1].created;
        const bool linked = f > 0 && found_[f - 1].created;
        const Run run{found.entry, found.count, tier};
        graph_.WriteNew(run, fresh, purpose.importance, previous, linked, goes_on);
        if (blocks.tokens != nullptr) graph_.KeepTokens(found.entry, *blocks.tokens, position, found.count);
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
        graph_.Link(entry, previous);
        if (blocks.tokens != nullptr && !graph_.HasTokens(entry))
          graph_.KeepTokens(entry, *blocks.tokens, position, 1);
        if (purpose.importance > graph_.ImportanceOf(entry))
          graph_.RaiseImportance(entry, purpose.importance);
        if (graph_.StateOf(entry, tier) == State::kAbsent) {
          graph_.Occupy(entry, tier, state.pool.Allocate());
          graph_.AddPin(entry, tier);
          positions->push_back(position);
          slots->push_back(graph_.SlotOf(entry, tier));
          AppendRun(&txn.runs, {entry, 1, tier});
        }
        previous = entry;
      }
    }
  }
  for (const Run& run : txn.runs) {
    state.policy->Store(run.first, run.count, graph_.KeysFrom(run.first), purpose.staging);
  }
  txn.count = positions->size();
  fresh_slots_.clear();
  graph_.FreeIfUnused(anchor);  // a parent that nothing was stored under, or only blocks that have another
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
        graph_.SetState(entry, t.tier, State::kReady);
        ++published;
      } else {
        graph_.SetState(entry, t.tier, State::kDying);
      }
      graph_.Unpin(entry, t.tier);
    }
  }
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
      graph_.SetState(t.runs[r].first + i, t.tier, State::kDying);
      graph_.Unpin(t.runs[r].first + i, t.tier);
    }
  }
  transactions_.erase(it);
  return true;
}

// ---- forgetting, and coming back ----

size_t PrefixIndex::Invalidate(Tier tier, const BlockKey* keys, size_t count) {
  RequireTier(tier);
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t dropped = 0;
  for (size_t i = count; i-- > 0;) {
    const uint32_t entry = graph_.Find(keys[i]);
    if (entry != kNil) dropped += graph_.Drop(entry, tier);
  }
  return dropped;
}

size_t PrefixIndex::InvalidateTier(Tier tier) {
  RequireTier(tier);
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t dropped = 0;
  for (uint32_t entry = 0; entry < graph_.end(); ++entry) {
    if (graph_.InUse(entry)) dropped += graph_.Drop(entry, tier);
  }
  return dropped;
}

size_t PrefixIndex::Restore(Tier tier, const BlockKey* keys, const BlockKey* parents, const SlotId* slots,
                            size_t count, std::vector<uint8_t>* taken) {
  RequireTier(tier);
  const std::lock_guard<std::mutex> lock(mutex_);
  TierState& state = graph_.Of(tier);
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
    if (i + kAhead < count) graph_.Prefetch(keys[i + kAhead]);
    if (!(*taken)[i]) continue;
    const uint32_t entry = graph_.FindOrCreate(keys[i]);
    // A second parent would not be linked, and its placeholder would stay for ever.
    if (!(parents[i] == BlockKey{}) && !(parents[i] == keys[i]) && graph_.ParentOf(entry) == kNil) {
      graph_.Link(entry, graph_.FindOrCreate(parents[i]));
    }
    graph_.Tick();
    state.pool.Take(slots[i]);
    graph_.Occupy(entry, tier, slots[i]);
    state.policy->Store(entry, 1, graph_.KeysFrom(entry), true);
    graph_.SetState(entry, tier, State::kReady);
    graph_.UpdateEvictable(entry, tier);
  }
  return num_taken;
}

size_t PrefixIndex::Blocks(Tier tier, std::vector<BlockKey>* keys, std::vector<BlockKey>* parents,
                           std::vector<SlotId>* slots) {
  RequireTier(tier);
  const std::lock_guard<std::mutex> lock(mutex_);
  for (uint32_t entry = 0; entry < graph_.end(); ++entry) {
    if (!graph_.InUse(entry) || graph_.StateOf(entry, tier) != State::kReady) continue;
    keys->push_back(graph_.KeyOf(entry));
    const uint32_t parent = graph_.ParentOf(entry);
    parents->push_back(parent == kNil ? BlockKey{} : graph_.KeyOf(parent));
    slots->push_back(graph_.SlotOf(entry, tier));
  }
  return keys->size();
}

// ---- what is there ----

size_t PrefixIndex::Watch(const BlockKey* keys, size_t count, uint64_t first) {
  Require(graph_.watched(), "this index was made without watching");
  Require(first != 0, "a watched block has a number, and not 0");
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t num_watched = 0;
  Walk walk(graph_, {keys, count, nullptr});
  for (size_t i = 0; i < count; ++i) {
    const uint32_t entry = walk.Next(i);
    if (entry != kNil) num_watched += graph_.Watch(entry, first + i);
  }
  return num_watched;
}

std::vector<Sighting> PrefixIndex::TakeSightings() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return graph_.TakeSightings();
}

TierStats PrefixIndex::Stats(Tier tier) const {
  RequireTier(tier);
  const std::lock_guard<std::mutex> lock(mutex_);
  const TierState& state = graph_.Of(tier);
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
  return graph_.num_entries();
}

size_t PrefixIndex::memory_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return graph_.memory_bytes();
}

std::string PrefixIndex::CheckIntegrity() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::vector<uint32_t>> pins(graph_.num_tiers(), std::vector<uint32_t>(graph_.end(), 0));
  for (const auto& [id, lease] : leases_) {
    for (const Run& run : lease) {
      for (uint32_t i = 0; i < run.count; ++i) pins[static_cast<size_t>(run.tier)][run.first + i]++;
    }
  }
  for (const auto& [id, txn] : transactions_) {
    size_t count = 0;
    for (const Run& run : txn.runs) {
      for (uint32_t entry = run.first; entry < run.first + run.count; ++entry, ++count) {
        pins[static_cast<size_t>(txn.tier)][entry]++;
        if (graph_.StateOf(entry, txn.tier) != State::kWriting)
          return "a reserved block is not being written";
      }
    }
    if (count != txn.count) return "a transaction has lost blocks";
  }
  return graph_.Check(pins);
}

}  // namespace flexkv
