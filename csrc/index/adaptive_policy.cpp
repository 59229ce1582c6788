#include "index/adaptive_policy.hpp"

#include <algorithm>

namespace flexkv {

AdaptivePolicy::AdaptivePolicy(uint32_t capacity, const BlockTraits& traits)
    : traits_(traits), model_(capacity), used_(kImportanceMax + 1, false) {}

void AdaptivePolicy::Tick() {
  model_.BeginCall();
  num_candidates_ = 0;
  places_chosen_ = false;
  limit_ = UINT64_MAX;
}

void AdaptivePolicy::Store(uint32_t first, uint32_t count, const BlockKey* keys, bool staging) {
  constexpr uint32_t kAhead = 16;
  for (uint32_t i = 0; i < count; ++i) {
    if (i + kAhead < count) model_.Prefetch(keys[i + kAhead]);
    blocks_[first + i].set_past(model_.Arrive(keys[i], staging));
    blocks_[first + i].place = kHeld;
  }
  num_blocks_ = std::max<size_t>(num_blocks_, static_cast<size_t>(first) + count);
  num_candidates_ = 0;
}

void AdaptivePolicy::Touch(uint32_t first, uint32_t count, bool use) {
  if (!use) return;
  for (uint32_t id = first; id < first + count; ++id) {
    Block& block = blocks_[id];
    if (block.place == kAbsent) continue;
    block.set_past(model_.Use(block.past()));
    if (block.place < kFirstPlace) continue;
    leaves_[block.importance].leaves[block.place - kFirstPlace].standing = block.standing;
  }
  num_candidates_ = 0;
}

void AdaptivePolicy::SetEvictable(uint32_t id, bool evictable, bool laid_bare) {
  Block& block = blocks_[id];
  if (evictable) block.importance = traits_.importance[id];
  const size_t importance = block.importance;
  Leaves& of = leaves_[importance];
  if (evictable) {
    of.leaves.Reserve(of.count + size_t{1});
    of.leaves[of.count] = {id, block.standing};
    block.place = kFirstPlace + of.count++;
    used_.Insert(importance);
    // Among equals a prompt that has begun to go goes on going, rather than many losing their ends.
    if (num_candidates_ > 0 && importance == importance_) Consider({id, block.standing}, laid_bare);
  } else {
    const Leaf last = of.leaves[--of.count];
    of.leaves[block.place - kFirstPlace] = last;
    blocks_[last.id].place = block.place;
    block.place = kHeld;
    if (of.count == 0) {
      used_.Erase(importance);
    } else {
      // Who moves when some more have gone.
      __builtin_prefetch(&blocks_[of.leaves[of.count - std::min(of.count, kMovesAhead)].id], 1);
    }
    Forget(id);
  }
}

void AdaptivePolicy::Remove(uint32_t id, const BlockKey& key) {
  model_.Leave(key, blocks_[id].past());
  blocks_[id] = {};
}

uint32_t AdaptivePolicy::Victim() {
  if (used_.empty()) return kNone;
  const size_t importance = used_.Lowest();
  if (importance != importance_) {
    num_candidates_ = 0;
    places_chosen_ = false;
    limit_ = UINT64_MAX;
  }
  importance_ = importance;
  if (num_candidates_ <= kDrawAgain) Draw(leaves_[importance]);
  if (num_candidates_ == 0) Draw(leaves_[importance]);  // all leaves that are below the limit have gone
  return candidates_[num_candidates_ - 1].id;
}

void AdaptivePolicy::ChoosePlaces(const Leaves& of) {
  // One in each part of all leaves: no leaf is drawn twice.
  const uint32_t lines = (of.count + kSideBySide - 1) / kSideBySide;
  for (uint32_t i = 0; i < kPlaces; ++i) {
    const uint32_t begin = lines * uint64_t{i} / kPlaces, end = lines * uint64_t{i + 1} / kPlaces;
    places_[i] = begin + Random(end - begin);
    __builtin_prefetch(&of.leaves[places_[i] * size_t{kSideBySide}]);
  }
  places_chosen_ = true;
}

void AdaptivePolicy::Draw(const Leaves& of) {
  std::array<Candidate, kPlaces * kSideBySide> drawn;
  uint32_t num_drawn = 0;
  const bool all = of.count <= drawn.size();  // few enough to look at all of them
  const uint64_t limit = all ? UINT64_MAX : limit_;
  auto take = [&](uint32_t first, uint32_t count) {
    for (uint32_t i = first; i < first + count; ++i) {
      const Leaf& leaf = of.leaves[i];
      drawn[num_drawn] = {model_.Order(leaf.standing), leaf.id};
      num_drawn += drawn[num_drawn].order <= limit;  // without a branch, which nobody could predict
    }
  };
  if (all) {
    take(0, of.count);
  } else {
    if (!places_chosen_) ChoosePlaces(of);
    for (const uint32_t place : places_) {
      const uint32_t first = place * kSideBySide;
      if (first < of.count) take(first, std::min(kSideBySide, of.count - first));  // else it has gone since
    }
    ChoosePlaces(of);  // of the next draw, which finds them at hand
  }
  auto lower = [](const Candidate& one, const Candidate& other) { return one.order < other.order; };
  Candidate* end = drawn.data() + num_drawn;
  if (num_drawn > kChosen) {
    end = drawn.data() + kChosen;
    std::nth_element(drawn.data(), end, drawn.data() + num_drawn, lower);
  }
  std::sort(drawn.data(), end, lower);
  if (num_drawn < kChosen / 2) {
    limit_ = UINT64_MAX;  // most of them have gone: the next draw is a first one
  } else if (limit_ == UINT64_MAX) {
    limit_ = end[-1].order;
  }
  end = std::remove_if(drawn.data(), end, [&](const Candidate& candidate) {
    return std::any_of(candidates_.data(), candidates_.data() + num_candidates_,
                       [&](const Candidate& other) { return other.id == candidate.id; });
  });
  const uint32_t num_chosen = static_cast<uint32_t>(end - drawn.data());
  std::copy_backward(candidates_.data(), candidates_.data() + num_candidates_,
                     candidates_.data() + num_candidates_ + num_chosen);
  std::reverse_copy(drawn.data(), end, candidates_.data());
  num_candidates_ += num_chosen;
}

void AdaptivePolicy::Consider(const Leaf& leaf, bool before_equals) {
  const uint64_t order = model_.Order(leaf.standing);
  if (num_candidates_ == kCandidates) {  // the last of them makes room
    if (order >= candidates_[0].order) return;
    std::copy(candidates_.begin() + 1, candidates_.end(), candidates_.begin());
    --num_candidates_;
  }
  uint32_t place = num_candidates_++;
  for (; place > 0; --place) {
    const Candidate& before = candidates_[place - 1];
    if (before_equals ? order <= before.order : order < before.order) break;
    candidates_[place] = before;
  }
  candidates_[place] = {order, leaf.id};
}

void AdaptivePolicy::Forget(uint32_t id) {
  for (uint32_t i = num_candidates_; i-- > 0;) {
    if (candidates_[i].id != id) continue;
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
  const Block& block = blocks_[victim];
  if (newcomer.importance != block.importance) return newcomer.importance > block.importance;
  return model_.Worth(model_.Preview(newcomer.key).standing) >= model_.Worth(block.standing);
}

void AdaptivePolicy::Refuse(const Newcomer& newcomer) {
  model_.Leave(newcomer.key, model_.Arrive(newcomer.key, false));
}

uint32_t AdaptivePolicy::After(uint32_t id) const {
  for (uint32_t i = num_candidates_; i-- > 1;) {
    if (candidates_[i].id == id) return candidates_[i - 1].id;
  }
  return kNone;
}

void AdaptivePolicy::Prefetch(uint32_t id) const { __builtin_prefetch(&blocks_[id], 1); }

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
      if (block.place != kFirstPlace + i || block.importance != importance ||
          traits_.importance[leaf.id] != importance) {
        return "a leaf is in another place than its block says";
      }
      if (leaf.standing.last != block.standing.last || leaf.standing.kind != block.standing.kind) {
        return "a leaf is drawn by what is not true any more";
      }
    }
    count += of.count;
  }
  if (count != static_cast<size_t>(std::count(evictable.begin(), evictable.end(), true))) {
    return "what may go cannot be drawn";
  }
  for (uint32_t i = 0; i < num_candidates_; ++i) {
    const uint32_t id = candidates_[i].id;
    if (id >= evictable.size() || !evictable[id] || traits_.importance[id] != importance_) {
      return "a candidate may not go";
    }
    for (uint32_t other = 0; other < i; ++other) {
      if (candidates_[other].id == id) return "a candidate is there twice";
    }
  }
  return model_.Check();
}

}  // namespace flexkv
