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

#include "types.hpp"

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
  Past Arrive(const BlockKey& key, uint32_t depth, bool staging);
  // What Arrive would say, without a trace.
  Past Preview(const BlockKey& key, uint32_t depth) const;
  Past Use(const Past& past, uint32_t depth);
  // It left, or stayed outside: it becomes a ghost.
  void Leave(const BlockKey& key, const Past& past);

  uint64_t Worth(const Past& past) const { return past.last + bonus_[past.kind]; }
  bool Remembers(const BlockKey& key) const { return FindGhost(key) != nullptr; }
  void Prefetch(const BlockKey& key) const { __builtin_prefetch(&SetOf(key)); }
  size_t memory_bytes() const { return ghosts_.size() * sizeof(GhostSet); }

 private:
  static constexpr int kCountClasses = 6;
  static constexpr int kKinds = 2 * kCountClasses;
  static constexpr int kWays = 8;

  // Eight bytes; `age_unit_` ticks make one unit of `last`.
  struct Ghost {
    uint32_t fingerprint;  // 0: none
    uint16_t last;
    uint8_t count;
    uint8_t kind;
  };
  struct alignas(64) GhostSet {
    Ghost ways[kWays];  // the last to leave first
  };

  const GhostSet& SetOf(const BlockKey& key) const;
  const Ghost* FindGhost(const BlockKey& key) const;
  static uint32_t Fingerprint(const BlockKey& key);
  uint64_t AgeOf(const Ghost& ghost) const;
  uint8_t Faded(uint8_t count, uint64_t age) const;
  uint8_t KindOf(uint8_t count, uint32_t depth) const;
  Past Classify(uint8_t count, uint32_t depth);
  void CountReuse(uint8_t kind, uint64_t age, uint32_t depth);
  void Refresh();

  const double capacity_;
  const uint32_t deep_;
  uint64_t clock_ = 0;
  uint64_t next_refresh_ = 0;
  uint64_t age_unit_;
  int previous_kind_ = -1;

  std::array<double, kKinds> trials_{};  // blocks that came to a class
  std::array<double, kKinds> reuses_{};  // of them, those that were used again
  std::array<double, kKinds> runs_{};    // requests, more or less: blocks of one come and go together
  std::array<uint64_t, kKinds> bonus_{};
  double reuse_age_ = 0;  // mean ticks until a block is used again; 0: not known yet
  double age_sum_ = 0, age_count_ = 0;
  std::vector<GhostSet> ghosts_;
  bool any_ghost_ = false;  // a tier that was never full is not asked to look

  // Blocks of one prompt mostly have one past: the last answer of Faded.
  mutable uint64_t faded_age_ = UINT64_MAX;
  mutable uint8_t faded_from_ = 0, faded_to_ = 0;
};

}  // namespace flexkv
