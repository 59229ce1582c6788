#include "index/admission_filter.hpp"

#include <algorithm>

namespace flexkv {

namespace {

// Keys fall on sets at random, so a set needs more ways than its share of keys: with 4 a set on
// average, 1 set in 50 gets more than its 8 ways hold, and less than 1 % of the keys are lost early.
constexpr size_t kKeysPerSet = 4;

}  // namespace

AdmissionFilter::AdmissionFilter(size_t capacity) {
  Require(capacity > 0 && capacity <= UINT32_MAX, "an admission filter holds 1 to 2^32 - 1 keys");
  sets_.resize((capacity + kKeysPerSet - 1) / kKeysPerSet);
}

std::vector<uint8_t> AdmissionFilter::Seen(const BlockKey* keys, size_t count) {
  std::vector<uint8_t> seen(count, 0);
  for (size_t i = 0; i < count; ++i) {
    Set& set = sets_[SetOfKey(keys[i], sets_.size())];
    const uint32_t fingerprint = FingerprintOfKey(keys[i]);
    uint32_t* const end = set.ways + kWays;
    uint32_t* way = std::find(set.ways, end, fingerprint);
    if (way != end) {
      seen[i] = 1;
    } else {
      way = end - 1;  // the oldest goes
    }
    std::move_backward(set.ways, way, way + 1);
    set.ways[0] = fingerprint;
  }
  return seen;
}

void AdmissionFilter::Clear() { std::fill(sets_.begin(), sets_.end(), Set{}); }

}  // namespace flexkv
