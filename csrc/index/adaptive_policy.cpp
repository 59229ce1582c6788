#include "index/adaptive_policy.hpp"

#include <algorithm>

namespace flexkv {

AdaptivePolicy::AdaptivePolicy(uint32_t capacity, const BlockTraits& traits)
    : traits_(traits), model_(capacity), used_(kImportanceMax + 1, false) {}

void AdaptivePolicy::Tick() {
  model_.BeginCall();
  num_candidates_ = 0;
}

void AdaptivePolicy::Store(uint32_t first, uint32_t count, const BlockKey* keys, bool staging) {
  constexpr uint32_t kAhead = 16;
  for (uint32_t i = 0; i < count; ++i) {
    if (i + kAhead < count) model_.Prefetch(keys[i + kAhead]);
    blocks_[first + i] = {model_.Arrive(keys[i], staging), kHeld};
  }
  num_blocks_ = std::max<size_t>(num_blocks_, static_cast<size_t>(first) + count);
  num_candidates_ = 0;
}

void AdaptivePolicy::Touch(uint32_t first, uint32_t count, bool use) {
  if (!use) return;
  for (uint32_t id = first; id < first + count; ++id) {
    Block& block = blocks_[id];
    if (block.place == kAbsent) continue;
    block.past = model_.Use(block.past);
    if (block.place < kFirstPlace) continue;
    leaves_[traits_.importance[id]].leaves[block.place - kFirstPlace].standing = block.past.standing;
  }
  num_candidates_ = 0;
}

void AdaptivePolicy::SetEvictable(uint32_t id, bool evictable, bool laid_bare) {
  Block& block = blocks_[id];
  const size_t importance = traits_.importance[id];
  Leaves& of = leaves_[importance];
  if (evictable) {
    of.leaves.Reserve(of.count + size_t{1});
    of.leaves[of.count] = {id, block.past.standing};
    block.place = kFirstPlace + of.count++;
    used_.Insert(importance);
    // Among equals a prompt that has begun to go goes on going, rather than many losing their ends.
    if (num_candidates_ > 0 && importance == importance_) Consider({id, block.past.standing}, laid_bare);
  } else {
    const Leaf last = of.leaves[--of.count];
    of.leaves[block.place - kFirstPlace] = last;
    blocks_[last.id].place = block.place;
    block.place = kHeld;
    if (of.count == 0) {
      used_.Erase(importance);
    } else {
      __builtin_prefetch(&blocks_[of.leaves[of.count - 1].id], 1);  // who moves when the next one goes
    }
    Forget(id);
  }
}

void AdaptivePolicy::Remove(uint32_t id, const BlockKey& key) {
  model_.Leave(key, blocks_[id].past);
  blocks_[id] = {};
}

uint32_t AdaptivePolicy::Victim() {
  if (used_.empty()) return kNone;
  const size_t importance = used_.Lowest();
  if (importance != importance_) num_candidates_ = 0;
  importance_ = importance;
  if (num_candidates_ <= kCandidates / 2) Draw(leaves_[importance]);
  return candidates_[num_candidates_ - 1].leaf.id;
}

void AdaptivePolicy::Draw(const Leaves& of) {
  if (of.count <= kPlaces * kSideBySide) {  // few enough to look at all of them
    for (uint32_t i = 0; i < of.count; ++i) Consider(of.leaves[i], false);
    return;
  }
  uint32_t places[kPlaces];
  for (uint32_t& place : places) {
    place = Random(of.count);
    __builtin_prefetch(&of.leaves[place]);
    __builtin_prefetch(&of.leaves[std::min(place + kSideBySide, of.count) - 1]);
  }
  for (uint32_t next : places) {
    for (uint32_t i = 0; i < kSideBySide; ++i) {
      Consider(of.leaves[next], false);
      next = next + 1 < of.count ? next + 1 : 0;
    }
  }
}

void AdaptivePolicy::Consider(const Leaf& leaf, bool before_equals) {
  const Candidate candidate{leaf, model_.Worth(leaf.standing)};
  if (num_candidates_ == kCandidates && !Precedes(candidate, candidates_[0])) return;
  for (uint32_t i = 0; i < num_candidates_; ++i) {
    if (candidates_[i].leaf.id == leaf.id) return;
  }
  if (num_candidates_ == kCandidates) {  // the last of them makes room
    std::copy(candidates_.begin() + 1, candidates_.end(), candidates_.begin());
    --num_candidates_;
  }
  uint32_t place = num_candidates_++;
  for (; place > 0; --place) {
    const Candidate& before = candidates_[place - 1];
    const bool goes_later = before_equals ? !Precedes(before, candidate) : Precedes(candidate, before);
    if (goes_later) break;
    candidates_[place] = before;
  }
  candidates_[place] = candidate;
}

void AdaptivePolicy::Forget(uint32_t id) {
  for (uint32_t i = num_candidates_; i-- > 0;) {
    if (candidates_[i].leaf.id != id) continue;
    std::copy(candidates_.begin() + i + 1, candidates_.begin() + num_candidates_, candidates_.begin() + i);
    --num_candidates_;
    return;
  }
}

uint32_t AdaptivePolicy::Random(uint32_t below) {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return static_cast<uint32_t>((random_ >> 32) * below >> 32);
}

bool AdaptivePolicy::Admits(const Newcomer& newcomer, uint32_t victim) const {
  const uint8_t importance = traits_.importance[victim];
  if (newcomer.importance != importance) return newcomer.importance > importance;
  return model_.Worth(model_.Preview(newcomer.key).standing) >= model_.Worth(blocks_[victim].past.standing);
}

void AdaptivePolicy::Refuse(const Newcomer& newcomer) {
  model_.Leave(newcomer.key, model_.Arrive(newcomer.key, false));
}

uint32_t AdaptivePolicy::After(uint32_t id) const {
  for (uint32_t i = num_candidates_; i-- > 1;) {
    if (candidates_[i].leaf.id == id) return candidates_[i - 1].leaf.id;
  }
  return kNone;
}

void AdaptivePolicy::Prefetch(uint32_t id) const {
  __builtin_prefetch(&blocks_[id], 1);
  __builtin_prefetch(&traits_.importance[id]);
}

size_t AdaptivePolicy::memory_bytes() const {
  size_t bytes = num_blocks_ * sizeof(Block) + model_.memory_bytes();
  for (const Leaves& of : leaves_) bytes += of.count * sizeof(Leaf);
  return bytes;
}

std::string AdaptivePolicy::Check(const std::vector<bool>& evictable) const {
  size_t count = 0;
  for (size_t importance = 0; importance < leaves_.size(); ++importance) {
    const Leaves& of = leaves_[importance];
    if (used_.Contains(importance) != (of.count > 0)) return "leaves of an importance are overlooked";
    for (uint32_t i = 0; i < of.count; ++i) {
      const Leaf& leaf = of.leaves[i];
      if (leaf.id >= evictable.size() || !evictable[leaf.id]) return "what may not go can be drawn";
      const Block& block = blocks_[leaf.id];
      if (block.place != kFirstPlace + i || traits_.importance[leaf.id] != importance) {
        return "a leaf is in another place than its block says";
      }
      if (leaf.standing.last != block.past.standing.last || leaf.standing.kind != block.past.standing.kind) {
        return "a leaf is drawn by what is not true any more";
      }
    }
    count += of.count;
  }
  if (count != static_cast<size_t>(std::count(evictable.begin(), evictable.end(), true))) {
    return "what may go cannot be drawn";
  }
  for (uint32_t i = 0; i < num_candidates_; ++i) {
    const uint32_t id = candidates_[i].leaf.id;
    if (id >= evictable.size() || !evictable[id] || traits_.importance[id] != importance_) {
      return "a candidate may not go";
    }
    if (i > 0 && Precedes(candidates_[i - 1], candidates_[i])) return "candidates are out of order";
  }
  return model_.Check();
}

}  // namespace flexkv
