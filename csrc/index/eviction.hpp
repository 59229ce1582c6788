// Which block of a tier goes first. One policy object per tier; the index tells it what happens and
// asks it for victims. It decides nothing about what may go: the index says so, block by block
// (SetEvictable), and that is only ever a leaf that nobody holds.
//
// Only what may go is queued or drawn, so no call passes by anything else: every call takes constant
// time per block.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/types.hpp"
#include "index/growing_array.hpp"

namespace flexkv {

enum class EvictionPolicyKind : uint8_t { kAdaptive, kCost, kLru, kLfu, kSlru, kS3Fifo, kFifo };

// What the index knows about its entries and every policy may use.
struct BlockTraits {
  GrowingArray<uint16_t> depth;      // blocks before it in its prompt, as far as is known
  GrowingArray<uint8_t> importance;  // of its request, 0 to kImportanceMax; the less important go first
};
constexpr uint8_t kImportanceMax = 127;
constexpr uint16_t kDepthMax = UINT16_MAX;  // and beyond

class EvictionPolicy {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  virtual ~EvictionPolicy() = default;

  // Room for entries up to `count`; `populate`: with memory that is there already.
  virtual void Reserve(size_t count, bool populate) = 0;
  // A new call of the index begins: what follows happens at one time.
  virtual void Tick() = 0;
  // Blocks of consecutive ids came to the tier. `staging`: from another tier and on their way to a
  // reader, who will be counted; otherwise somebody had to compute them.
  virtual void Store(uint32_t first, uint32_t count, const BlockKey* keys, bool staging) = 0;
  // Entries of consecutive ids, blocks of one prompt, were looked at; some may be in other tiers
  // only. `use`: it was not only asked for them, they are read.
  virtual void Touch(uint32_t first, uint32_t count, bool use) = 0;
  // It may go, or may not, from now on. `laid_bare`: because the last block behind it went.
  virtual void SetEvictable(uint32_t id, bool evictable, bool laid_bare) = 0;
  // A block left the tier.
  virtual void Remove(uint32_t id, const BlockKey& key) = 0;
  // The block that should go first, of those that may; kNone if there is none. It must be removed.
  virtual uint32_t Victim() = 0;

  // Whether it may leave newcomers outside: then it is asked about each that others would have to go
  // for, and a prompt may be stored in part.
  virtual bool selective() const { return false; }
  // Whether a block that is not there is worth as much as this victim of the tier's; if not it should
  // stay outside, with all that comes after it in its prompt.
  struct Newcomer {
    BlockKey key;
    uint8_t importance;
  };
  virtual bool Admits(const Newcomer&, uint32_t) const { return true; }
  // It was left outside.
  virtual void Refuse(const Newcomer&) {}
  // Whether it was in the tier, or left outside, not long ago.
  virtual bool Remembers(const BlockKey&) const { return false; }

  // For who evicts many: what probably goes after this one (kNone: nobody can say), and hints that
  // a block is about to go, and that a key is about to come or go.
  virtual uint32_t After(uint32_t id) const = 0;
  virtual void Prefetch(uint32_t id) const = 0;
  virtual void PrefetchPast(const BlockKey&) const {}

  virtual size_t memory_bytes() const = 0;
  // Returns "" or what is broken; `evictable` says of each id below `count` whether it may go.
  virtual std::string Check(const std::vector<bool>& evictable) const = 0;
};

struct EvictionSetup {
  EvictionPolicyKind kind;
  uint32_t capacity;  // blocks of the tier
  uint32_t tokens_per_block;
};

// `traits` must outlive the policy.
std::unique_ptr<EvictionPolicy> MakeEvictionPolicy(const EvictionSetup& setup, const BlockTraits& traits);

}  // namespace flexkv
