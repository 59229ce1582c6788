// What was offered to a tier once: a filter that writes a block only when it comes back keeps
// one-shot prompts from wearing the disk and from pushing out what is read again.
//
// A set-associative table of fingerprints rather than a Bloom filter: it forgets the oldest by
// itself, one key at a time, and one key costs one cache line. Not thread-safe: it has one owner.
#pragma once

#include <cstdint>
#include <vector>

#include "base/types.hpp"

namespace flexkv {

class AdmissionFilter {
 public:
  // Remembers about the last `capacity` distinct keys, in 8 bytes each.
  explicit AdmissionFilter(size_t capacity);

  // Per key 1 if it was noted before and is not forgotten; notes it either way. A key that occurs
  // twice in one call counts as noted the second time. A false 1 has odds of 8 in 2^32.
  std::vector<uint8_t> Seen(const BlockKey* keys, size_t count);

  // Forgets everything.
  void Clear();

  size_t memory_bytes() const { return sets_.size() * sizeof(Set); }

 private:
  static constexpr int kWays = 8;

  // Fingerprints, most recently noted first; 0 is an empty way. The order is the age, so a set
  // needs no further state.
  struct alignas(32) Set {
    uint32_t ways[kWays] = {};
  };

  std::vector<Set> sets_;
};

}  // namespace flexkv
