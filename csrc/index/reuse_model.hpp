// What a block is worth, learned from what happened to others like it: the model behind the policy
// `adaptive`.
//
// A block's worth is the hits it promises for the room it takes: of all spans of time that begin
// now the best ratio of the odds that it is used within the span to the time that it would stay in
// the tier for that. The odds come from histograms of the age at which blocks were used again, one
// per class of how often they were used before, and they count what was used again after it had
// left, or was never let in, too (a bounded table of ghosts remembers it). Without evidence the
// odds fall with age: then it is LRU, and little evidence moves worths away from that only as far as
// it is beyond doubt.
//
// The clock counts blocks that were used or came, so nothing depends on the speed of the machine.
// docs/eviction.md has the formula, the constants and the measurements.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/types.hpp"

namespace flexkv {

class ReuseModel {
 public:
  static constexpr int kClasses = 8;
  static constexpr int kTimeBits = 29;  // the clock comes round after half a billion blocks, which may
                                        // make a block that nobody asked for that long look new

  // What a block's worth depends on.
  struct Standing {
    uint32_t last : kTimeBits;  // use, or arrival, by the model's clock
    uint32_t kind : 32 - kTimeBits;
  };
  // What is kept of it, in its tier and for a while after.
  struct Past {
    Standing standing;
    uint8_t uses;
  };

  explicit ReuseModel(uint32_t capacity);

  // A new call begins. What was counted is made use of from time to time; worths change with that
  // and with the clock, which stands still while a call chooses victims.
  void BeginCall() {
    if (clock_ >= next_refresh_) Refresh();
  }
  // A block came that was not here. `staging`: somebody is going to use it, and that will be counted.
  Past Arrive(const BlockKey& key, bool staging);
  // What Arrive would say, without a trace.
  Past Preview(const BlockKey& key) const;
  Past Use(const Past& past) {
    CountReuse(past.standing);
    return Enter(past.uses + 1u);
  }
  // It left, or stayed outside: it becomes a ghost.
  void Leave(const BlockKey& key, const Past& past);

  float Worth(const Standing& block) const { return worth_[block.kind][CellOf(AgeOf(block.last))]; }
  // Of two blocks the lower should go first: the one of less worth (which is above zero, so its bits
  // have its order), of equals the one used longer ago.
  uint64_t Order(const Standing& block) const {
    const uint32_t age = AgeOf(block.last);
    return uint64_t{std::bit_cast<uint32_t>(worth_[block.kind][CellOf(age)])} << 32 | (kTimeMask - age);
  }

  bool Remembers(const BlockKey& key) const { return FindGhost(key) != nullptr; }
  void Prefetch(const BlockKey& key) const { __builtin_prefetch(&ghosts_[SetOfKey(key, ghosts_.size())]); }
  size_t memory_bytes() const { return ghosts_.size() * sizeof(GhostSet); }
  // Returns "" or what is broken.
  std::string Check() const;

 private:
  static constexpr uint32_t kTimeMask = (1u << kTimeBits) - 1;
  static constexpr int kCellsPerOctave = 4;
  static constexpr int kCells = kCellsPerOctave * (kTimeBits + 1);
  static constexpr int kWays = 8;
  static constexpr int kGhostTimeBits = 24;
  static constexpr uint32_t kGhostUnit = 1u << (kTimeBits - kGhostTimeBits);

  // What is remembered of a block that left; the time in units of kGhostUnit.
  struct Ghost {
    uint32_t last : kGhostTimeBits;
    uint32_t uses : 32 - kGhostTimeBits;
  };
  // Fingerprints apart from the rest, so that all of them are compared at once. 0: none.
  struct alignas(64) GhostSet {
    uint32_t fingerprints[kWays];  // the last to leave first
    Ghost ghosts[kWays];
  };
  static_assert(sizeof(GhostSet) == 64, "one cache line");

  // Per cell of age, oldest last: blocks of a class that were used again at that age.
  using Histogram = std::array<double, kCells>;

  // 0, 1, 2, 3 to 5, 6 to 11, 12 to 23, 24 to 47, and more.
  static uint32_t ClassOf(uint32_t uses) {
    return uses < 3 ? uses : std::min<uint32_t>(kClasses - 1, 2 + std::bit_width(uses / 3));
  }
  // Quarters of an octave on a logarithmic scale: neighbours then are alike in width as in what they
  // count, without which they could not be smoothed.
  static int CellOf(uint32_t age) {
    const uint32_t from_one = age + 1;
    const int octave = std::bit_width(from_one) - 1;
    // 2^31 times 1 to 2, compared with 2^(1/4) and so on.
    const uint32_t mantissa = from_one << (31 - octave);
    const int quarter = (mantissa >= 0x9837F052) + (mantissa >= 0xB504F334) + (mantissa >= 0xD744FCCB);
    return kCellsPerOctave * octave + quarter;
  }

  // Where a key is in its set; kWays if it is not.
  static int WayOf(const GhostSet& set, uint32_t fingerprint) {
    int found = kWays;
    for (int way = kWays; way-- > 0;) found = set.fingerprints[way] == fingerprint ? way : found;
    return found;
  }
  const Ghost* FindGhost(const BlockKey& key) const;
  Past PastOf(const Ghost& ghost) const;
  uint32_t AgeOf(uint32_t last) const { return (static_cast<uint32_t>(clock_) - last) & kTimeMask; }
  Past Now(uint32_t uses) const {
    const uint32_t kept = std::min<uint32_t>(uses, UINT8_MAX);
    return {{static_cast<uint32_t>(clock_) & kTimeMask, ClassOf(kept)}, static_cast<uint8_t>(kept)};
  }
  Past Enter(uint32_t uses) {
    const Past past = Now(uses);
    entered_[past.standing.kind] += 1;
    ++clock_;
    return past;
  }
  void CountReuse(const Standing& block) { reused_[block.kind][CellOf(AgeOf(block.last))] += 1; }
  // Worths by age, of blocks `hits` of which were used again at what age.
  Histogram Worths(Histogram hits, double blocks) const;
  void Refresh();

  const double window_;  // ticks that evidence lasts
  uint64_t clock_ = 0;
  uint64_t next_refresh_ = 0;
  std::array<double, kCells + 1> cell_begin_;  // the youngest age in a cell
  std::array<double, kClasses> entered_{};     // blocks that came to a class
  std::array<Histogram, kClasses> reused_{};
  std::array<std::array<float, kCells>, kClasses> worth_{};  // by class and age
  std::vector<GhostSet> ghosts_;
  bool any_ghost_ = false;  // a tier that was never full is not asked to look
};

}  // namespace flexkv
