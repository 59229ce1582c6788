// Entries in the order in which they should go: lists of entries of about the same priority, in a
// ring of buckets that moves with the priorities.
//
// Every operation takes constant time, also taking an entry out of the middle, so nothing in here is
// ever out of date and nobody waits while something is put in order. The price is resolution: within
// a bucket the first to come is the first to go, except for who is put in front. Buckets start one priority wide and double when the
// span outgrows the ring, so an entry is away from its place by at most a thousandth of the largest
// span since the queue was empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "index/bit_tree.hpp"
#include "index/growing_array.hpp"

namespace flexkv {

// Neighbours of an entry in its list.
struct QueueLink {
  uint32_t previous;
  uint32_t next;
};

class BucketQueue {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  // An entry may be in one of all the queues that share these links.
  explicit BucketQueue(GrowingArray<QueueLink>* links);

  // Entries must be below 2^31, and in the array of links; a lower priority goes earlier.
  // `in_front`: before those of the same bucket.
  void Insert(uint32_t entry, uint64_t priority, bool in_front = false);
  void Erase(uint32_t entry);
  // The entry that should go first; kNone if there is none.
  uint32_t Front() const;

  size_t size() const { return size_; }
  size_t memory_bytes() const { return buckets_.size() * sizeof(QueueLink) + used_.memory_bytes(); }
  // All entries, the first to go first.
  std::vector<uint32_t> Entries() const;

 private:
  static constexpr size_t kBuckets = 2048;
  static constexpr uint32_t kBucket = 1u << 31;  // a link to a bucket: the end of its list

  QueueLink& At(uint32_t link) { return link & kBucket ? buckets_[link & ~kBucket] : (*links_)[link]; }
  size_t Lowest() const;  // ring position of the first bucket in use
  void Clear();
  void Widen();

  GrowingArray<QueueLink>* links_;
  std::vector<QueueLink> buckets_;  // ring; previous is the last of the list, next the first
  BitTree used_;
  uint64_t base_ = 0;  // the first bucket of the ring, counted from priority 0
  uint64_t top_ = 0;   // no bucket above it was used since the queue was empty
  int shift_ = 0;      // a bucket is 2^shift_ priorities wide
  size_t size_ = 0;
};

}  // namespace flexkv
