// Types shared by the whole core. Nothing here allocates, locks or does I/O.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace flexkv {

// Identity of one block: 128 bits of a chained hash that covers every token before it and the
// namespace (model, dtype, layout, tenant ...). Equal keys therefore mean equal KV bytes.
struct BlockKey {
  uint64_t lo = 0;
  uint64_t hi = 0;
  bool operator==(const BlockKey& other) const { return lo == other.lo && hi == other.hi; }
};
static_assert(sizeof(BlockKey) == 16, "keys are passed to and from numpy as pairs of uint64");

// Keys are hashes already: folding the halves is all the mixing a table needs.
struct BlockKeyHash {
  size_t operator()(const BlockKey& key) const { return key.lo ^ (key.hi * 0x9E3779B97F4A7C15ull); }
};

// For tables that remember keys by a fingerprint, in sets. A key is a hash already: one half says
// where, the other what. Multiplying by the number of sets spreads 32 bits over any number of them
// without a division.
inline size_t SetOfKey(const BlockKey& key, size_t num_sets) {
  return static_cast<size_t>(((key.hi >> 32) * num_sets) >> 32);
}
// Never 0, which stands for an empty place.
inline uint32_t FingerprintOfKey(const BlockKey& key) {
  const uint32_t low = static_cast<uint32_t>(key.lo);
  return low != 0 ? low : 1;
}

using SlotId = int32_t;
constexpr SlotId kNoSlot = -1;

// Tiers by their place in a list, nearest to the device first: the order in which a hit is looked for. The
// first is the CPU tier, through which everything goes; what the others are only they know.
enum class Tier : uint8_t { kCpu = 0 };
constexpr size_t kTiersMax = 8;  // a block's tiers are a mask of 8 bits

enum class OpStatus : uint8_t { kPending, kDone, kFailed, kCancelled };

// A caller broke the contract of an API (wrong size, unknown id). Faults of the world below
// (disk, driver) are results, never this.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Something below could not be set up (no memory, no io_uring, no CUDA driver).
class SystemError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void Require(bool ok, const std::string& what) {
  if (!ok) throw UsageError(what);
}

inline size_t AlignUp(size_t value, size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// O_DIRECT needs memory, offset and length aligned to the logical block size of the disk; 4 KiB
// covers every disk sold.
constexpr size_t kIoAlignment = 4096;

}  // namespace flexkv
