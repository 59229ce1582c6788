// A set of small numbers that finds its lowest member in a handful of steps, however large it is: a
// bitmap, and above it bitmaps of which words below are not empty.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace flexkv {

class BitTree {
 public:
  // A set of numbers below `size`: all of them, or none.
  BitTree(size_t size, bool full) {
    do {
      std::vector<uint64_t> level(size / 64 + 1, full ? ~0ull : 0);
      if (full) level.back() = (1ull << (size % 64)) - 1;
      size = level.size() - (full && level.back() == 0);
      levels_.push_back(std::move(level));
    } while (levels_.back().size() > 1);
  }

  void Insert(size_t number) {
    for (auto& level : levels_) {
      uint64_t& word = level[number / 64];
      const bool had_some = word != 0;
      word |= 1ull << (number % 64);
      if (had_some) return;
      number /= 64;
    }
  }

  void Erase(size_t number) {
    for (auto& level : levels_) {
      uint64_t& word = level[number / 64];
      word &= ~(1ull << (number % 64));
      if (word != 0) return;
      number /= 64;
    }
  }

  bool Contains(size_t number) const { return (levels_[0][number / 64] >> (number % 64)) & 1; }
  bool empty() const { return levels_.back()[0] == 0; }

  // The lowest member; the set must not be empty.
  size_t Lowest() const {
    size_t at = 0;
    for (size_t level = levels_.size(); level-- > 0;) {
      at = at * 64 + static_cast<size_t>(std::countr_zero(levels_[level][at]));
    }
    return at;
  }

  // Takes the `count` lowest members out and hands them to `taken` in runs: the first, and how many
  // follow each other. There must be as many.
  template <typename Taken>
  void TakeLowest(size_t count, Taken taken) {
    while (count > 0) {
      const size_t first = Lowest();
      uint64_t word = levels_[0][first / 64];
      const size_t base = first / 64 * 64;
      while (word != 0 && count > 0) {
        const size_t start = static_cast<size_t>(std::countr_zero(word));
        const size_t length = std::min(count, static_cast<size_t>(std::countr_one(word >> start)));
        taken(base + start, length);
        word &= ~((length == 64 ? ~0ull : (1ull << length) - 1) << start);
        count -= length;
      }
      levels_[0][first / 64] = word;
      size_t at = first / 64;
      for (size_t level = 1; word == 0 && level < levels_.size(); ++level) {
        levels_[level][at / 64] &= ~(1ull << (at % 64));
        word = levels_[level][at / 64];
        at /= 64;
      }
    }
  }

  // The lowest member that is not below `from`; SIZE_MAX if there is none.
  size_t LowestFrom(size_t from) const {
    for (size_t level = 0; level < levels_.size(); ++level) {
      const size_t word = from / 64;
      if (word >= levels_[level].size()) return SIZE_MAX;
      const uint64_t rest = levels_[level][word] & (~0ull << (from % 64));
      if (rest != 0) {
        size_t at = word * 64 + static_cast<size_t>(std::countr_zero(rest));
        while (level-- > 0) at = at * 64 + static_cast<size_t>(std::countr_zero(levels_[level][at]));
        return at;
      }
      from = word + 1;
    }
    return SIZE_MAX;
  }

  size_t memory_bytes() const {
    size_t words = 0;
    for (const auto& level : levels_) words += level.size();
    return words * sizeof(uint64_t);
  }

 private:
  // levels_[0] has a bit per number; levels_[n + 1] one per word of levels_[n], set if that is not 0.
  std::vector<std::vector<uint64_t>> levels_;
};

}  // namespace flexkv
