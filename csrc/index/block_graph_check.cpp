// The integrity of a BlockGraph, recomputed from nothing: what model tests ask after every step.
#include <string>
#include <unordered_set>
#include <vector>

#include "index/block_graph.hpp"

namespace flexkv {

std::string BlockGraph::Check(const std::vector<std::vector<uint32_t>>& pins) const {
  std::vector<std::vector<uint32_t>> children(tiers_.size(), std::vector<uint32_t>(end_, 0));
  std::vector<uint32_t> structural(end_, 0);
  std::vector<bool> in_use(end_, true);
  size_t freed = 0;
  for (uint32_t first = first_free_; first != kNil; first = ReadFreeRun(first).next) {
    for (uint32_t id = first; id < first + ReadFreeRun(first).count; ++id, ++freed) {
      if (InUse(id) || !in_use[id]) return "an entry in use is free";
      in_use[id] = false;
    }
  }
  if (num_entries_ + freed != end_) return "entries are lost";
  for (uint32_t id = 0; id < end_; ++id) {
    if (!in_use[id]) continue;
    if (!InUse(id)) return "a free entry is lost";
    if (Find(keys_[id]) != id) return "an entry is not found by its key";
    const uint32_t parent = ParentOf(id);
    if (parent == kNil) continue;
    structural[parent]++;
    for (size_t t = 0; t < tiers_.size(); ++t) {
      children[t][parent] += StateOf(id, static_cast<Tier>(t)) != State::kAbsent;
    }
  }
  if (table_.size() != num_entries_) return "the table has an entry too many";
  for (size_t t = 0; t < tiers_.size(); ++t) {
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
    if (NodeOf(id).num_children != structural[id]) return "wrong count of children";
    bool needed = structural[id] > 0;
    for (size_t t = 0; t < tiers_.size(); ++t) needed |= StateOf(id, static_cast<Tier>(t)) != State::kAbsent;
    if (!needed) return "an entry that nothing refers to";
  }
  return "";
}

}  // namespace flexkv
