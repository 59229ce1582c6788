// The policy `adaptive`: of some leaves that are drawn by lot the one of the least worth goes, and a
// newcomer that is worth less stays outside. What a block is worth says ReuseModel.
//
// Worths change with time, so an order of all leaves would have to be kept up all the time. A draw
// costs the same whatever the size of the tier, and the same calls lead to the same draws.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "index/bit_tree.hpp"
#include "index/eviction.hpp"
#include "index/growing_array.hpp"
#include "index/reuse_model.hpp"

namespace flexkv {

class AdaptivePolicy final : public EvictionPolicy {
 public:
  AdaptivePolicy(uint32_t capacity, const BlockTraits& traits);

  void Reserve(size_t count, bool populate) override {
    blocks_.Reserve(count, populate);
    leaves_[0].leaves.Reserve(count);  // most requests are of no importance
  }
  void Tick() override;
  void Store(uint32_t first, uint32_t count, const BlockKey* keys, bool staging) override;
  void Touch(uint32_t first, uint32_t count, bool use) override;
  void SetEvictable(uint32_t id, bool evictable, bool laid_bare) override;
  void Remove(uint32_t id, const BlockKey& key) override;
  uint32_t Victim() override;

  bool selective() const override { return true; }
  bool Admits(const Newcomer& newcomer, uint32_t victim) const override;
  void Refuse(const Newcomer& newcomer) override;
  bool Remembers(const BlockKey& key) const override { return model_.Remembers(key); }

  uint32_t After(uint32_t id) const override;
  void Prefetch(uint32_t id) const override;
  void PrefetchPast(const BlockKey& key) const override { model_.Prefetch(key); }

  size_t memory_bytes() const override;
  std::string Check(const std::vector<bool>& evictable) const override;

 private:
  // All that is looked at of a victim lies side by side.
  struct Block {
    ReuseModel::Standing standing;
    uint8_t uses;
    uint8_t importance;  // of a leaf: where it is among the others
    uint32_t place;      // among the leaves of its importance, counted from kFirstPlace; or one of these:

    ReuseModel::Past past() const { return {standing, uses}; }
    void set_past(const ReuseModel::Past& past) {
      standing = past.standing;
      uses = past.uses;
    }
  };
  static_assert(sizeof(Block) == 12);
  static constexpr uint32_t kAbsent = 0, kHeld = 1, kFirstPlace = 2;
  // What is drawn: a leaf with all that its worth depends on, so that a draw reads nothing else.
  struct Leaf {
    uint32_t id;
    ReuseModel::Standing standing;
  };
  struct Leaves {
    GrowingArray<Leaf> leaves;
    uint32_t count = 0;
  };
  struct Candidate {
    uint64_t order;  // by ReuseModel: the lower goes first
    uint32_t id;
  };
  // A draw takes leaves that lie side by side, a cache line of them, at several places, because those
  // that lie side by side came at about the same time. Its best go after those of the draw before; when
  // half of them are left there is another. So it is known some time before who goes, and what it takes
  // is on its way from memory by then: that is what evicting many costs.
  static constexpr uint32_t kSideBySide = 64 / sizeof(Leaf), kPlaces = 8;
  static constexpr uint32_t kChosen = 16, kDrawAgain = kChosen / 2;
  static constexpr uint32_t kCandidates = 32;  // with leaves that came about since they were chosen
  // Of those that move because others go so many are fetched ahead.
  static constexpr uint32_t kMovesAhead = 4;

  void Draw(const Leaves& of);
  void ChoosePlaces(const Leaves& of);
  void Consider(const Leaf& leaf, bool before_equals);
  void Forget(uint32_t id);
  uint32_t Random(uint32_t below);

  const BlockTraits& traits_;
  ReuseModel model_;
  GrowingArray<Block> blocks_;
  size_t num_blocks_ = 0;
  std::array<Leaves, kImportanceMax + 1> leaves_;
  BitTree used_;  // importances of which there are leaves
  uint64_t random_ = 0x9E3779B97F4A7C15;
  // The best of what was drawn in this call, the next victim last. All of one importance.
  std::array<Candidate, kCandidates> candidates_;
  uint32_t num_candidates_ = 0;
  // Where the next draw of this call takes its leaves, in units of kSideBySide; if it was said already.
  std::array<uint32_t, kPlaces> places_;
  bool places_chosen_ = false;
  // What the draws of this call after the first choose: what would have been among the best of the first.
  uint64_t limit_ = UINT64_MAX;
  size_t importance_ = 0;
};

}  // namespace flexkv
