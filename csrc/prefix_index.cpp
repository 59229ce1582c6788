#include "prefix_index.hpp"

#include <algorithm>
#include <unordered_set>

namespace flexkv {

PrefixIndex::PrefixIndex(uint32_t cpu_slots, uint32_t ssd_slots) {
  const uint32_t capacity[kNumTiers] = {cpu_slots, ssd_slots};
  for (int t = 0; t < kNumTiers; ++t) {
    Require(capacity[t] <= static_cast<uint32_t>(INT32_MAX), "a tier holds at most 2^31 - 1 slots");
    tiers_[t].capacity = capacity[t];
    tiers_[t].free_slots.reserve(capacity[t]);
    // Low slots first: a pool that is never full touches only the memory it uses.
    for (uint32_t slot = capacity[t]; slot-- > 0;) {
      tiers_[t].free_slots.push_back(static_cast<SlotId>(slot));
    }
  }
}

uint32_t PrefixIndex::Find(const BlockKey& key) const {
  auto it = by_key_.find(key);
  return it == by_key_.end() ? kNil : it->second;
}

uint32_t PrefixIndex::FindOrCreate(const BlockKey& key) {
  auto [it, inserted] = by_key_.try_emplace(key, kNil);
  if (!inserted) return it->second;
  uint32_t id;
  if (!free_entries_.empty()) {
    id = free_entries_.back();
    free_entries_.pop_back();
    entries_[id] = Entry{};
  } else {
    id = static_cast<uint32_t>(entries_.size());
    entries_.emplace_back();
  }
  entries_[id].key = key;
  it->second = id;
  return id;
}

void PrefixIndex::Link(uint32_t child, uint32_t parent) {
  // A key is a chained hash: a block has one parent for ever. A parent that is given later than the
  // child (write_back spills leaves first) is linked then.
  if (parent == kNil || parent == child || entries_[child].parent != kNil) return;
  entries_[child].parent = parent;
  entries_[parent].num_children++;
  for (int t = 0; t < kNumTiers; ++t) {
    if (entries_[child].tier[t].state == State::kAbsent) continue;
    entries_[parent].tier[t].children++;
    UpdateEvictable(parent, static_cast<Tier>(t));
  }
}

void PrefixIndex::Touch(uint32_t entry) {
  entries_[entry].last_use = clock_;
  for (int t = 0; t < kNumTiers; ++t) {
    const uint32_t pos = entries_[entry].tier[t].heap_pos;
    if (pos != kNil) HeapSift(static_cast<Tier>(t), pos);
  }
}

void PrefixIndex::UpdateEvictable(uint32_t entry, Tier tier) {
  const Residency& r = At(entry, tier);
  const bool evictable = r.state == State::kReady && r.pins == 0 && r.children == 0;
  if (evictable && r.heap_pos == kNil) HeapPush(tier, entry);
  if (!evictable && r.heap_pos != kNil) HeapErase(tier, entry);
}

void PrefixIndex::Occupy(uint32_t entry, Tier tier, SlotId slot) {
  Residency& r = At(entry, tier);
  r.slot = slot;
  SetState(entry, tier, State::kWriting);
  const uint32_t parent = entries_[entry].parent;
  if (parent != kNil) {
    At(parent, tier).children++;
    UpdateEvictable(parent, tier);
  }
}

void PrefixIndex::Vacate(uint32_t entry, Tier tier) {
  Residency& r = At(entry, tier);
  tiers_[static_cast<int>(tier)].free_slots.push_back(r.slot);
  r.slot = kNoSlot;
  SetState(entry, tier, State::kAbsent);
  UpdateEvictable(entry, tier);
  const uint32_t parent = entries_[entry].parent;
  if (parent != kNil) {
    At(parent, tier).children--;
    UpdateEvictable(parent, tier);
  }
  FreeIfUnused(entry);
}

void PrefixIndex::FreeIfUnused(uint32_t entry) {
  while (entry != kNil) {
    Entry& e = entries_[entry];
    if (e.num_children != 0) return;
    for (const Residency& r : e.tier) {
      if (r.state != State::kAbsent || r.pins != 0) return;
    }
    const uint32_t parent = e.parent;
    by_key_.erase(e.key);
    free_entries_.push_back(entry);
    if (parent != kNil) entries_[parent].num_children--;
    entry = parent;  // a placeholder goes with its last child
  }
}

void PrefixIndex::SetState(uint32_t entry, Tier tier, State state) {
  uint32_t* count = tiers_[static_cast<int>(tier)].count;
  State& current = At(entry, tier).state;
  if (current != State::kAbsent) count[static_cast<int>(current)]--;
  if (state != State::kAbsent) count[static_cast<int>(state)]++;
  current = state;
}

void PrefixIndex::AddPin(uint32_t entry, Tier tier) {
  if (At(entry, tier).pins++ == 0) tiers_[static_cast<int>(tier)].pinned++;
  UpdateEvictable(entry, tier);
}

void PrefixIndex::Unpin(uint32_t entry, Tier tier) {
  Residency& r = At(entry, tier);
  r.pins--;
  if (r.pins == 0) tiers_[static_cast<int>(tier)].pinned--;
  if (r.pins == 0 && r.state == State::kDying) {
    Vacate(entry, tier);
  } else {
    UpdateEvictable(entry, tier);
  }
}

bool PrefixIndex::Drop(uint32_t entry, Tier tier) {
  Residency& r = At(entry, tier);
  if (r.state != State::kReady) return false;  // a writer still owns it, or it is going already
  SetState(entry, tier, State::kDying);
  UpdateEvictable(entry, tier);
  if (r.pins == 0) Vacate(entry, tier);
  return true;
}

std::vector<uint8_t> PrefixIndex::Match(const BlockKey* keys, size_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<uint8_t> found;
  ++clock_;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t entry = Find(keys[i]);
    if (entry == kNil) break;
    uint8_t mask = 0;
    for (int t = 0; t < kNumTiers; ++t) {
      if (entries_[entry].tier[t].state == State::kReady) mask |= static_cast<uint8_t>(1u << t);
    }
    if (mask == 0) break;
    Touch(entry);
    found.push_back(mask);
  }
  return found;
}

uint64_t PrefixIndex::Acquire(const BlockKey* keys, size_t count, std::optional<Tier> tier,
                              Located* out) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Pin> pins;
  ++clock_;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t entry = Find(keys[i]);
    if (entry == kNil) break;
    int chosen = -1;
    for (int t = 0; t < kNumTiers && chosen < 0; ++t) {
      if (tier && static_cast<int>(*tier) != t) continue;
      if (entries_[entry].tier[t].state == State::kReady) chosen = t;
    }
    if (chosen < 0) break;
    AddPin(entry, static_cast<Tier>(chosen));
    Touch(entry);
    pins.push_back({entry, static_cast<Tier>(chosen)});
    out->tiers.push_back(static_cast<uint8_t>(chosen));
    out->slots.push_back(entries_[entry].tier[chosen].slot);
  }
  if (pins.empty()) return 0;
  const uint64_t id = next_id_++;
  leases_.emplace(id, std::move(pins));
  return id;
}

bool PrefixIndex::Release(uint64_t lease) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = leases_.find(lease);
  if (it == leases_.end()) return false;
  for (const Pin& pin : it->second) Unpin(pin.entry, pin.tier);
  leases_.erase(it);
  return true;
}

std::optional<uint64_t> PrefixIndex::Reserve(Tier tier, const BlockKey* parent,
                                             const BlockKey* keys, size_t count,
                                             std::vector<uint32_t>* positions,
                                             std::vector<SlotId>* slots) {
  std::lock_guard<std::mutex> lock(mutex_);
  TierState& state = tiers_[static_cast<int>(tier)];
  // Blocks of this very request that are here already must not be what makes room for the others:
  // pin them first, and undo it whatever happens.
  std::vector<uint32_t> present;
  size_t needed = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t entry = Find(keys[i]);
    if (entry != kNil && At(entry, tier).state != State::kAbsent) {
      AddPin(entry, tier);
      present.push_back(entry);
    } else {
      ++needed;
    }
  }
  uint32_t anchor = parent != nullptr ? Find(*parent) : kNil;
  if (anchor != kNil && At(anchor, tier).state != State::kAbsent) {
    AddPin(anchor, tier);  // a parent that is evicted for its own child helps nobody
    present.push_back(anchor);
  }
  auto unpin_present = [&] {
    for (uint32_t entry : present) Unpin(entry, tier);
  };

  // Whatever is not pinned can go, unless a pinned block sits below it. Checking the bound first
  // keeps a request that cannot fit from emptying the tier for nothing.
  if (needed > state.capacity - state.pinned) {
    unpin_present();
    return std::nullopt;
  }
  while (state.free_slots.size() < needed && !state.evictable.empty()) {
    state.evicted++;
    Drop(state.evictable[0], tier);
  }
  if (state.free_slots.size() < needed) {
    unpin_present();
    return std::nullopt;
  }
  ++clock_;
  uint64_t id = 0;
  if (needed > 0) {
    Transaction txn{tier, {}};
    txn.entries.reserve(needed);
    // The chain is linked even where blocks are present: they may have come before their parent.
    // Eviction above may have freed the anchor's entry, so it is looked up again.
    uint32_t previous = parent != nullptr ? FindOrCreate(*parent) : kNil;
    for (size_t i = 0; i < count; ++i) {
      const uint32_t entry = FindOrCreate(keys[i]);
      Link(entry, previous);
      if (At(entry, tier).state == State::kAbsent) {
        const SlotId slot = state.free_slots.back();
        state.free_slots.pop_back();
        Occupy(entry, tier, slot);
        AddPin(entry, tier);  // the writer's pin
        positions->push_back(static_cast<uint32_t>(i));
        slots->push_back(slot);
        txn.entries.push_back(entry);
      }
      Touch(entry);
      previous = entry;
    }
    id = next_id_++;
    transactions_.emplace(id, std::move(txn));
  }
  unpin_present();
  return id;
}

size_t PrefixIndex::Commit(uint64_t txn, const uint8_t* ok, size_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = transactions_.find(txn);
  Require(it != transactions_.end(), "commit of an unknown transaction");
  const Transaction& t = it->second;
  Require(ok == nullptr || count == t.entries.size(), "commit: one ok byte per reserved block");
  size_t published = 0;
  // Children first: giving a failed parent back must not free an entry that a child still needs.
  for (size_t i = t.entries.size(); i-- > 0;) {
    const bool good = ok == nullptr || ok[i] != 0;
    SetState(t.entries[i], t.tier, good ? State::kReady : State::kDying);
    published += good;
    Unpin(t.entries[i], t.tier);
  }
  transactions_.erase(it);
  return published;
}

bool PrefixIndex::Abort(uint64_t txn) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = transactions_.find(txn);
  if (it == transactions_.end()) return false;
  const Transaction& t = it->second;
  for (size_t i = t.entries.size(); i-- > 0;) {
    SetState(t.entries[i], t.tier, State::kDying);
    Unpin(t.entries[i], t.tier);
  }
  transactions_.erase(it);
  return true;
}

size_t PrefixIndex::Invalidate(Tier tier, const BlockKey* keys, size_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t dropped = 0;
  for (size_t i = count; i-- > 0;) {
    const uint32_t entry = Find(keys[i]);
    if (entry != kNil) dropped += Drop(entry, tier);
  }
  return dropped;
}

size_t PrefixIndex::InvalidateTier(Tier tier) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<uint32_t> ready;
  for (const auto& [key, entry] : by_key_) {
    if (At(entry, tier).state == State::kReady) ready.push_back(entry);
  }
  for (uint32_t entry : ready) Drop(entry, tier);
  return ready.size();
}

size_t PrefixIndex::Restore(Tier tier, const BlockKey* keys, const BlockKey* parents,
                            const SlotId* slots, size_t count, std::vector<uint8_t>* taken) {
  std::lock_guard<std::mutex> lock(mutex_);
  TierState& state = tiers_[static_cast<int>(tier)];
  // With every slot free no block is ready, being written or dying.
  Require(state.free_slots.size() == state.capacity, "restore into a tier that is not empty");
  const size_t most = std::min<size_t>(count, state.capacity);
  by_key_.reserve(by_key_.size() + most);
  entries_.reserve(entries_.size() + most);

  taken->assign(count, 0);
  std::vector<uint32_t> restored;
  restored.reserve(most);
  std::vector<bool> used(state.capacity, false);
  // From the last to the first, so that what contradicts a later record is seen to. No block is
  // readable before all links stand: the heap then gets only leaves, the oldest first, and never
  // has to be put in order.
  for (size_t i = count; i-- > 0;) {
    if (slots[i] < 0 || static_cast<uint32_t>(slots[i]) >= state.capacity || used[slots[i]]) continue;
    const uint32_t entry = FindOrCreate(keys[i]);
    if (At(entry, tier).state != State::kAbsent) continue;
    used[slots[i]] = true;
    Occupy(entry, tier, slots[i]);
    // A second parent would not be linked, and its placeholder would stay for ever.
    if (!(parents[i] == BlockKey{}) && entries_[entry].parent == kNil) {
      Link(entry, FindOrCreate(parents[i]));
    }
    restored.push_back(entry);
    (*taken)[i] = 1;
  }
  for (size_t i = restored.size(); i-- > 0;) {
    ++clock_;
    SetState(restored[i], tier, State::kReady);
    Touch(restored[i]);
    UpdateEvictable(restored[i], tier);
  }
  state.free_slots.clear();
  for (uint32_t slot = state.capacity; slot-- > 0;) {
    if (!used[slot]) state.free_slots.push_back(static_cast<SlotId>(slot));
  }
  return restored.size();
}

TierStats PrefixIndex::Stats(Tier tier) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const TierState& state = tiers_[static_cast<int>(tier)];
  TierStats stats;
  stats.slots = state.capacity;
  stats.free = static_cast<uint32_t>(state.free_slots.size());
  stats.ready = state.count[static_cast<int>(State::kReady)];
  stats.writing = state.count[static_cast<int>(State::kWriting)];
  stats.pinned = state.pinned;
  stats.evicted = state.evicted;
  return stats;
}

size_t PrefixIndex::num_leases() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return leases_.size();
}

size_t PrefixIndex::num_transactions() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return transactions_.size();
}

size_t PrefixIndex::memory_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t bytes = entries_.capacity() * sizeof(Entry) + free_entries_.capacity() * sizeof(uint32_t);
  bytes += by_key_.bucket_count() * sizeof(void*) +
           by_key_.size() * (sizeof(std::pair<BlockKey, uint32_t>) + 2 * sizeof(void*));
  for (const TierState& state : tiers_) {
    bytes += state.free_slots.capacity() * sizeof(SlotId) +
             state.evictable.capacity() * sizeof(uint32_t);
  }
  return bytes;
}

std::string PrefixIndex::CheckIntegrity() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<uint32_t> pins[kNumTiers], children[kNumTiers];
  std::vector<uint32_t> structural(entries_.size(), 0);
  for (int t = 0; t < kNumTiers; ++t) {
    pins[t].assign(entries_.size(), 0);
    children[t].assign(entries_.size(), 0);
  }
  for (const auto& [id, lease] : leases_) {
    for (const Pin& pin : lease) pins[static_cast<int>(pin.tier)][pin.entry]++;
  }
  for (const auto& [id, txn] : transactions_) {
    for (uint32_t entry : txn.entries) {
      pins[static_cast<int>(txn.tier)][entry]++;
      if (At(entry, txn.tier).state != State::kWriting) return "a reserved block is not being written";
    }
  }
  if (by_key_.size() + free_entries_.size() != entries_.size()) return "entries are lost";
  for (const auto& [key, id] : by_key_) {
    const Entry& e = entries_[id];
    if (!(e.key == key)) return "an entry sits under another key";
    if (e.parent != kNil) {
      structural[e.parent]++;
      for (int t = 0; t < kNumTiers; ++t) {
        children[t][e.parent] += e.tier[t].state != State::kAbsent;
      }
    }
  }
  for (int t = 0; t < kNumTiers; ++t) {
    const TierState& state = tiers_[t];
    std::unordered_set<SlotId> seen(state.free_slots.begin(), state.free_slots.end());
    if (seen.size() != state.free_slots.size()) return "a slot is free twice";
    size_t evictable = 0;
    uint32_t pinned = 0, count[4] = {};
    for (const auto& [key, id] : by_key_) {
      const Residency& r = entries_[id].tier[t];
      pinned += r.pins > 0;
      count[static_cast<int>(r.state)]++;
      if ((r.slot == kNoSlot) != (r.state == State::kAbsent)) return "slot and state disagree";
      if (r.slot != kNoSlot && !seen.insert(r.slot).second) return "a slot is used twice";
      if (r.slot != kNoSlot && static_cast<uint32_t>(r.slot) >= state.capacity) return "no such slot";
      if (r.pins != pins[t][id]) return "pins without a lease or transaction";
      if (r.state == State::kDying && r.pins == 0) return "a dropped block kept its slot";
      if (r.children != children[t][id]) return "wrong count of resident children";
      const bool can_go = r.state == State::kReady && r.pins == 0 && r.children == 0;
      if (can_go != (r.heap_pos != kNil)) return "the eviction heap misses or keeps an entry";
      if (can_go) {
        ++evictable;
        if (r.heap_pos >= state.evictable.size() || state.evictable[r.heap_pos] != id) {
          return "the eviction heap points elsewhere";
        }
        if (r.heap_pos > 0) {
          const uint32_t above = state.evictable[(r.heap_pos - 1) / 2];
          if (entries_[above].last_use > entries_[id].last_use) return "the eviction heap is unordered";
        }
      }
    }
    if (evictable != state.evictable.size()) return "the eviction heap has strangers";
    if (seen.size() != state.capacity) return "slots are lost";
    if (pinned != state.pinned) return "wrong count of pinned blocks";
    for (int k = static_cast<int>(State::kWriting); k <= static_cast<int>(State::kDying); ++k) {
      if (count[k] != state.count[k]) return "wrong count of blocks by state";
    }
  }
  for (const auto& [key, id] : by_key_) {
    const Entry& e = entries_[id];
    if (e.num_children != structural[id]) return "wrong count of children";
    bool used = e.num_children > 0;
    for (const Residency& r : e.tier) used |= r.state != State::kAbsent;
    if (!used) return "an entry that nothing refers to";
  }
  return "";
}

// ---- heap of evictable leaves ------------------------------------------------------------------

void PrefixIndex::HeapPush(Tier tier, uint32_t entry) {
  auto& heap = tiers_[static_cast<int>(tier)].evictable;
  heap.push_back(entry);
  At(entry, tier).heap_pos = static_cast<uint32_t>(heap.size() - 1);
  HeapSift(tier, At(entry, tier).heap_pos);
}

void PrefixIndex::HeapErase(Tier tier, uint32_t entry) {
  auto& heap = tiers_[static_cast<int>(tier)].evictable;
  const uint32_t pos = At(entry, tier).heap_pos;
  At(entry, tier).heap_pos = kNil;
  const uint32_t last = heap.back();
  heap.pop_back();
  if (last == entry) return;
  heap[pos] = last;
  At(last, tier).heap_pos = pos;
  HeapSift(tier, pos);
}

void PrefixIndex::HeapSift(Tier tier, uint32_t pos) {
  auto& heap = tiers_[static_cast<int>(tier)].evictable;
  auto older = [&](uint32_t a, uint32_t b) { return entries_[a].last_use < entries_[b].last_use; };
  auto place = [&](uint32_t at, uint32_t entry) {
    heap[at] = entry;
    At(entry, tier).heap_pos = at;
  };
  const uint32_t entry = heap[pos];
  while (pos > 0) {
    const uint32_t up = (pos - 1) / 2;
    if (!older(entry, heap[up])) break;
    place(pos, heap[up]);
    pos = up;
  }
  for (;;) {
    size_t down = 2 * static_cast<size_t>(pos) + 1;
    if (down >= heap.size()) break;
    if (down + 1 < heap.size() && older(heap[down + 1], heap[down])) ++down;
    if (!older(heap[down], entry)) break;
    place(pos, heap[down]);
    pos = static_cast<uint32_t>(down);
  }
  place(pos, entry);
}

}  // namespace flexkv
