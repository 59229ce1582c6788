#include <algorithm>

#include "index/adaptive_policy.hpp"
#include "index/admission_filter.hpp"
#include "index/bit_tree.hpp"
#include "index/bucket_queue.hpp"
#include "index/eviction.hpp"

namespace flexkv {
namespace {

constexpr uint8_t kUsesMax = 31;

struct Meta {
  uint32_t stamp_low;  // time by the policy's clock; of what is the rule's business
  uint16_t stamp_high;
  uint8_t uses;      // times it was used since it came, or what else the rule counts
  uint8_t kind : 4;  // the rule's
  uint8_t resident : 1;
  uint8_t queued : 1;  // it may go

  uint64_t stamp() const { return static_cast<uint64_t>(stamp_high) << 32 | stamp_low; }
  void set_stamp(uint64_t stamp) {
    stamp_low = static_cast<uint32_t>(stamp);
    stamp_high = static_cast<uint16_t>(stamp >> 32);
  }
};
static_assert(sizeof(Meta) == 8, "one word a block");

// A rule puts blocks into levels, the lowest of which goes first, and ranks them within.

struct FifoRule {
  static constexpr uint32_t kLevels = 1;
  static constexpr bool kTouches = false;
  FifoRule(const EvictionSetup&, const BlockTraits&) {}
  void Tick() { ++now; }
  void Store(uint32_t, Meta& meta, const BlockKey&, bool) { meta.set_stamp(now); }
  void Touch(uint32_t, Meta&, bool) {}
  uint32_t Level(const Meta&) const { return 0; }
  uint64_t Rank(const Meta& meta) const { return meta.stamp(); }
  // Whether to look at the second level before the first.
  bool SecondFirst() const { return false; }
  // Whether a victim gets another chance, and what then becomes of it: another level or rank.
  bool Spares(const Meta&) const { return false; }
  void Spare(Meta&) {}
  void Chosen(const Meta&) {}  // as a victim
  void Remove(const Meta&, const BlockKey&) {}
  size_t memory_bytes() const { return 0; }

  uint64_t now = 0;  // calls; 48 bits of it are kept, which lasts for thousands of years
};

struct LruRule : FifoRule {
  static constexpr bool kTouches = true;
  using FifoRule::FifoRule;
  void Touch(uint32_t, Meta& meta, bool) { meta.set_stamp(now); }
};

// The least often used, and of those the least recently used.
struct LfuRule : LruRule {
  static constexpr uint32_t kLevels = kUsesMax + 1;
  using LruRule::LruRule;
  void Touch(uint32_t, Meta& meta, bool use) {
    meta.set_stamp(now);
    if (use && meta.uses < kUsesMax) ++meta.uses;
  }
  uint32_t Level(const Meta& meta) const { return meta.uses; }
};

// Segmented LRU: what was used is protected, in four fifths of the tier at most.
struct SlruRule : LruRule {
  static constexpr uint32_t kLevels = 2;
  SlruRule(const EvictionSetup& setup, const BlockTraits& traits)
      : LruRule(setup, traits), protected_max(setup.capacity / 5 * 4) {}
  void Touch(uint32_t, Meta& meta, bool use) {
    meta.set_stamp(now);
    if (!use || meta.kind == 1) return;
    meta.kind = 1;
    ++num_protected;
  }
  uint32_t Level(const Meta& meta) const { return meta.kind; }
  bool SecondFirst() const { return num_protected > protected_max; }
  bool Spares(const Meta& meta) const { return meta.kind == 1 && num_protected > protected_max; }
  void Spare(Meta& meta) {
    meta.kind = 0;  // once more from the start, as if it had come just now
    meta.set_stamp(now);
    --num_protected;
  }
  void Remove(const Meta& meta, const BlockKey&) { num_protected -= meta.kind; }

  uint32_t protected_max;
  uint32_t num_protected = 0;
};

// S3-FIFO: a tenth of the tier tries out what is new, the rest keeps what was used there or had been
// here before.
struct S3FifoRule : FifoRule {
  static constexpr uint32_t kLevels = 2;
  static constexpr bool kTouches = true;
  static constexpr uint8_t kUsesKept = 3;
  S3FifoRule(const EvictionSetup& setup, const BlockTraits& traits)
      : FifoRule(setup, traits),
        small_max(setup.capacity / 10),
        ghosts(2 * std::max<size_t>(1, setup.capacity)) {}
  void Store(uint32_t, Meta& meta, const BlockKey& key, bool) {
    meta.set_stamp(now);
    meta.kind = ghosts.Seen(&key, 1)[0];
    num_small += meta.kind == 0;
  }
  void Touch(uint32_t, Meta& meta, bool use) {
    if (use && meta.uses < kUsesKept) ++meta.uses;
  }
  uint32_t Level(const Meta& meta) const { return meta.kind; }
  bool SecondFirst() const { return num_small <= small_max; }
  bool Spares(const Meta& meta) const { return meta.uses > 0; }
  void Spare(Meta& meta) {
    if (meta.kind == 0) {
      meta.kind = 1;
      meta.uses = 0;
      --num_small;
    } else {
      --meta.uses;
    }
    meta.set_stamp(now);
  }
  void Remove(const Meta& meta, const BlockKey&) { num_small -= meta.kind == 0; }
  size_t memory_bytes() const { return ghosts.memory_bytes(); }

  uint32_t small_max;
  uint32_t num_small = 0;
  AdmissionFilter ghosts;
};

// What a block would cost to compute again, times how often it was used, on top of the worth of what
// went last (so that nothing lives on old merits for ever). A token deep in a prompt costs more: its
// attention reads all that is before it, as much as all the rest of it costs from kEvenDepth on.
struct CostRule : FifoRule {
  static constexpr bool kTouches = true;
  static constexpr uint64_t kUnit = 1024;       // worth of a block without a past, never used
  static constexpr uint64_t kEvenDepth = 8192;  // tokens
  CostRule(const EvictionSetup& setup, const BlockTraits& block_traits)
      : FifoRule(setup, block_traits), traits(block_traits), tokens_per_block(setup.tokens_per_block) {}
  void Store(uint32_t id, Meta& meta, const BlockKey&, bool) { meta.set_stamp(Worth(id, 0)); }
  void Touch(uint32_t id, Meta& meta, bool use) {
    if (use && meta.uses < kUsesMax) ++meta.uses;
    meta.set_stamp(Worth(id, meta.uses));
  }
  void Chosen(const Meta& meta) { age = std::max(age, meta.stamp()); }
  uint64_t Worth(uint32_t id, uint64_t uses) const {
    const uint64_t tokens_before = static_cast<uint64_t>(traits.depth[id]) * tokens_per_block;
    return age + (uses + 1) * (kUnit + kUnit * tokens_before / kEvenDepth);
  }

  const BlockTraits& traits;
  uint32_t tokens_per_block;
  uint64_t age = 0;
};

template <typename Rule>
class QueuedPolicy final : public EvictionPolicy {
 public:
  QueuedPolicy(const EvictionSetup& setup, const BlockTraits& traits)
      : traits_(traits),
        rule_(setup, traits),
        queues_((kImportanceMax + 1) * Rule::kLevels),
        used_(queues_.size(), false) {}

  void Reserve(size_t count, bool populate) override {
    metas_.Reserve(count, populate);
    links_.Reserve(count, populate);
  }

  void Tick() override { rule_.Tick(); }

  void Store(uint32_t first, uint32_t count, const BlockKey* keys, bool staging) override {
    for (uint32_t i = 0; i < count; ++i) {
      Meta meta{};
      meta.resident = true;
      rule_.Store(first + i, meta, keys[i], staging);
      metas_[first + i] = meta;
    }
    num_entries_ = std::max<size_t>(num_entries_, static_cast<size_t>(first) + count);
  }

  void Touch(uint32_t first, uint32_t count, bool use) override {
    if constexpr (Rule::kTouches) {
      for (uint32_t id = first; id < first + count; ++id) {
        Meta& meta = metas_[id];
        if (!meta.resident) continue;
        if (meta.queued) Leave(id);
        rule_.Touch(id, meta, use);
        if (meta.queued) Enter(id);
      }
    }
  }

  void SetEvictable(uint32_t id, bool evictable, bool laid_bare) override {
    metas_[id].queued = evictable;
    if (evictable) {
      // Among equals a prompt that has begun to go goes on going, rather than many losing their ends.
      Enter(id, laid_bare);
    } else {
      Leave(id);
    }
  }

  void Remove(uint32_t id, const BlockKey& key) override {
    rule_.Remove(metas_[id], key);
    metas_[id] = {};
  }

  uint32_t Victim() override {
    while (!used_.empty()) {
      size_t level = used_.Lowest();
      if constexpr (Rule::kLevels == 2) {
        if (level % 2 == 0 && rule_.SecondFirst() && used_.Contains(level + 1)) ++level;
      }
      const uint32_t id = queues_[level]->Front();
      if (!rule_.Spares(metas_[id])) {
        rule_.Chosen(metas_[id]);
        return id;
      }
      Leave(id);
      rule_.Spare(metas_[id]);
      Enter(id);
    }
    return kNone;
  }

  uint32_t After(uint32_t id) const override {
    const uint32_t next = links_[id].next;
    return next < kEntriesEnd ? next : kNone;
  }

  void Prefetch(uint32_t id) const override {
    __builtin_prefetch(&links_[id], 1);
    __builtin_prefetch(&metas_[id], 1);
    __builtin_prefetch(&traits_.importance[id]);
  }

  std::string Check(const std::vector<bool>& evictable) const override {
    size_t queued = 0;
    for (const auto& queue : queues_) {
      if (queue == nullptr) continue;
      const std::vector<uint32_t> entries = queue->Entries();
      if (entries.size() != queue->size()) return "an eviction queue has miscounted";
      for (uint32_t id : entries) {
        if (id >= evictable.size() || !evictable[id]) return "a block that must not go is queued";
        if (!metas_[id].resident) return "a block that is not in the tier is queued";
        if (queues_[Level(id)] != queue) return "a block is in another block's queue";
      }
      if (used_.Contains(static_cast<size_t>(&queue - queues_.data())) != (queue->size() > 0)) {
        return "a queue is overlooked";
      }
      queued += entries.size();
    }
    for (const bool one : evictable) queued -= one;
    return queued == 0 ? "" : "a block that may go is in no queue";
  }

  size_t memory_bytes() const override {
    size_t bytes = num_entries_ * (sizeof(Meta) + sizeof(QueueLink)) + rule_.memory_bytes();
    for (const auto& queue : queues_) {
      if (queue != nullptr) bytes += queue->memory_bytes();
    }
    return bytes;
  }

 private:
  static constexpr uint32_t kEntriesEnd = 1u << 31;

  size_t Level(uint32_t id) const { return traits_.importance[id] * Rule::kLevels + rule_.Level(metas_[id]); }

  void Enter(uint32_t id, bool in_front = false) {
    const size_t level = Level(id);
    if (queues_[level] == nullptr) queues_[level] = std::make_unique<BucketQueue>(&links_);
    queues_[level]->Insert(id, rule_.Rank(metas_[id]), in_front);
    used_.Insert(level);
  }

  void Leave(uint32_t id) {
    const size_t level = Level(id);
    queues_[level]->Erase(id);
    if (queues_[level]->size() == 0) used_.Erase(level);
  }

  const BlockTraits& traits_;
  Rule rule_;
  GrowingArray<Meta> metas_;
  GrowingArray<QueueLink> links_;
  size_t num_entries_ = 0;
  std::vector<std::unique_ptr<BucketQueue>> queues_;  // by importance, then the rule's level
  BitTree used_;                                      // queues that are not empty
};

}  // namespace

std::unique_ptr<EvictionPolicy> MakeEvictionPolicy(const EvictionSetup& setup, const BlockTraits& traits) {
  switch (setup.kind) {
    case EvictionPolicyKind::kAdaptive:
      return std::make_unique<AdaptivePolicy>(setup.capacity, traits);
    case EvictionPolicyKind::kCost:
      return std::make_unique<QueuedPolicy<CostRule>>(setup, traits);
    case EvictionPolicyKind::kLru:
      return std::make_unique<QueuedPolicy<LruRule>>(setup, traits);
    case EvictionPolicyKind::kLfu:
      return std::make_unique<QueuedPolicy<LfuRule>>(setup, traits);
    case EvictionPolicyKind::kSlru:
      return std::make_unique<QueuedPolicy<SlruRule>>(setup, traits);
    case EvictionPolicyKind::kS3Fifo:
      return std::make_unique<QueuedPolicy<S3FifoRule>>(setup, traits);
    case EvictionPolicyKind::kFifo:
      return std::make_unique<QueuedPolicy<FifoRule>>(setup, traits);
  }
  throw UsageError("no such eviction policy");
}

}  // namespace flexkv
