// Which keys may belong to entries without a parent: the first blocks of prompts, and fragments whose
// place in a prompt nobody said. Fixed memory; it may say yes for a key that it was not given.
//
// It is what makes new prompts cheap to recognise: a block whose predecessor has no entry can only have
// an entry that has no parent, so behind a block that is new only these have to be looked for.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/types.hpp"

namespace flexkv {

class RootFilter {
 public:
  // For an index of so many entries.
  explicit RootFilter(size_t expected)
      : num_cells_(std::bit_ceil(std::clamp(expected / kEntriesPerCell, kCellsMin, kCellsMax))),
        bits_(num_cells_ / 64),
        counts_(num_cells_) {}

  void Add(const BlockKey& key) {
    const size_t cell = CellOf(key);
    if (counts_[cell] < kMany) ++counts_[cell];
    bits_[cell / 64] |= 1ull << (cell % 64);
  }
  // Takes back one Add of this key.
  void Remove(const BlockKey& key) {
    const size_t cell = CellOf(key);
    if (counts_[cell] == kMany) return;  // it has lost count, and stays
    if (--counts_[cell] == 0) bits_[cell / 64] &= ~(1ull << (cell % 64));
  }
  bool MayHold(const BlockKey& key) const {
    const size_t cell = CellOf(key);
    return (bits_[cell / 64] >> (cell % 64)) & 1;
  }

  void PrefetchCount(const BlockKey& key) const { __builtin_prefetch(&counts_[CellOf(key)], 1); }

  // Whether a filter that was given just these would say the same, but for cells that lost count.
  bool Same(const RootFilter& fresh) const {
    for (size_t cell = 0; cell < num_cells_; ++cell) {
      if (counts_[cell] != kMany && counts_[cell] != fresh.counts_[cell]) return false;
      if (((bits_[cell / 64] >> (cell % 64)) & 1) != (counts_[cell] != 0)) return false;
    }
    return true;
  }
  size_t memory_bytes() const { return bits_.size() * sizeof(uint64_t) + counts_.size(); }

 private:
  static constexpr size_t kEntriesPerCell = 8;
  static constexpr size_t kCellsMin = 1024;
  static constexpr size_t kCellsMax = 1u << 17;  // 16 KiB of bits, which stay in a cache while they are asked
  static constexpr uint8_t kMany = UINT8_MAX;

  size_t CellOf(const BlockKey& key) const { return BlockKeyHash()(key) & (num_cells_ - 1); }

  size_t num_cells_;
  std::vector<uint64_t> bits_;  // of the cells whose count is not 0
  std::vector<uint8_t> counts_;
};

}  // namespace flexkv
