// What a block is worth, learned from what happened to others like it: the model behind the policy
// `adaptive`.
//
// A block's worth is the time of its last use plus a bonus for its class, and the least worth goes
// first. Without a bonus that is LRU. Classes are how often a block was used, with old uses fading,
// and whether it lies deep in its prompt. Per class the model counts how many blocks came and how
// many of them were used again, also after they had left (a bounded table of ghosts remembers them);
// a class that is used again more often than the mean earns a longer stay, one that is not a shorter
// one, and a class about which little is known the same as everybody: then it is LRU.
//
// The clock counts blocks that were not here, so nothing depends on the speed of the machine or on
// the size of a tier. Constants were chosen on the first half of Mooncake's conversation trace and
// on generated ones; docs/eviction.md has the measurements.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/types.hpp"

namespace flexkv {

class ReuseModel {
 public:
  // What is kept of a block, in its tier and for a while after.
  struct Past {
    uint64_t last;  // use, by the model's clock
    uint8_t count;  // of uses, faded: 2^(count / kCountSteps)
    uint8_t kind;   // class
  };

  // `deep`: blocks from which on a prompt counts as deep.
  ReuseModel(uint32_t capacity, uint32_t deep);

  // A new call begins: blocks that follow belong together.
  void BeginRequest();
  // A block came that was not here; `staging`: on its way to a reader who is going to use it.
  Past Arrive(const BlockKey& key, uint32_t depth, bool staging) {
    const Past past = any_ghost_ ? ArriveAgain(key, depth, staging) : Classify(0, depth);
    ++clock_;
    return past;
  }
  // What Arrive would say, without a trace.
  Past Preview(const BlockKey& key, uint32_t depth) const;
  Past Use(const Past& past, uint32_t depth) {
    const uint64_t age = clock_ - past.last;
    CountReuse(past.kind, age, depth);
    return Classify(Faded(past.count, age), depth);
  }
  // It left, or stayed outside: it becomes a ghost.
  void Leave(const BlockKey& key, const Past& past);

  uint64_t Worth(const Past& past) const { return past.last + bonus_[past.kind]; }
  bool Remembers(const BlockKey& key) const { return FindGhost(key) != nullptr; }
  void Prefetch(const BlockKey& key) const { __builtin_prefetch(&ghosts_[SetOfKey(key, ghosts_.size())]); }
  size_t memory_bytes() const { return ghosts_.size() * sizeof(GhostSet); }

 private:
  static constexpr int kCountClasses = 6;
  static constexpr int kKinds = 2 * kCountClasses;
  static constexpr int kWays = 8;

  // What is remembered of a block that left; `age_unit_` ticks make one unit of `last`.
  struct Ghost {
    uint16_t last;
    uint8_t count;
    uint8_t kind;
  };
  // Fingerprints apart from the rest, so that all of them are compared at once. 0: none.
  struct alignas(64) GhostSet {
    uint32_t fingerprints[kWays];  // the last to leave first
    Ghost ghosts[kWays];
  };
  static_assert(sizeof(GhostSet) == 64, "one cache line");

  // Where a key is in its set; kWays if it is not.
  static int WayOf(const GhostSet& set, uint32_t fingerprint) {
    int found = kWays;
    for (int way = kWays; way-- > 0;) found = set.fingerprints[way] == fingerprint ? way : found;
    return found;
  }
  const Ghost* FindGhost(const BlockKey& key) const;
  Past ArriveAgain(const BlockKey& key, uint32_t depth, bool staging);
  uint64_t AgeOf(const Ghost& ghost) const;
  uint8_t Fade(uint8_t count, uint64_t age) const;
  // The count after one more use, the former ones faded. Blocks of one prompt mostly have one past.
  uint8_t Faded(uint8_t count, uint64_t age) const {
    if (age != faded_age_ || count != faded_from_) {
      faded_to_ = Fade(count, age);
      faded_from_ = count;
      faded_age_ = age;
    }
    return faded_to_;
  }
  uint8_t KindOf(uint8_t count, uint32_t depth) const {
    return static_cast<uint8_t>(2 * count_classes_[count] + (depth >= deep_));
  }
  Past Classify(uint8_t count, uint32_t depth) {
    const uint8_t kind = KindOf(count, depth);
    // The start of all prompts is used by everybody and tells nothing about anybody.
    if (depth > 0) {
      new_trials_[kind]++;
      if (kind != previous_kind_) new_runs_[kind]++;
      previous_kind_ = kind;
    }
    return {clock_, count, kind};
  }
  void CountReuse(uint8_t kind, uint64_t age, uint32_t depth) {
    if (depth == 0 || age > horizon_) return;
    new_reuses_[kind]++;
    new_age_sum_ += age;
    new_age_count_++;
  }
  void Refresh();

  const double capacity_;
  const uint32_t deep_;
  const uint64_t horizon_;
  uint64_t clock_ = 0;
  uint64_t next_refresh_ = 0;
  uint64_t age_unit_;
  int previous_kind_ = -1;

  std::array<double, kKinds> trials_{};  // blocks that came to a class
  std::array<double, kKinds> reuses_{};  // of them, those that were used again
  std::array<double, kKinds> runs_{};    // requests, more or less: blocks of one come and go together
  // The same since the last refresh.
  std::array<uint64_t, kKinds> new_trials_{}, new_reuses_{}, new_runs_{};
  uint64_t new_age_sum_ = 0, new_age_count_ = 0;
  std::array<uint64_t, kKinds> bonus_{};
  double reuse_age_ = 0;  // mean ticks until a block is used again; 0: not known yet
  double age_sum_ = 0, age_count_ = 0;
  std::vector<GhostSet> ghosts_;
  bool any_ghost_ = false;  // a tier that was never full is not asked to look
  std::array<uint8_t, 256> count_classes_{};

  // The last answer of Faded.
  mutable uint64_t faded_age_ = UINT64_MAX;
  mutable uint8_t faded_from_ = 0, faded_to_ = 0;
};

}  // namespace flexkv
