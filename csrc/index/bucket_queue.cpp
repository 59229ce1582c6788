#include "index/bucket_queue.hpp"

#include <algorithm>
#include <utility>

namespace flexkv {

BucketQueue::BucketQueue(GrowingArray<QueueLink>* links) : links_(links), used_(kBuckets, false) { Clear(); }

void BucketQueue::Clear() {
  buckets_.resize(kBuckets);
  for (uint32_t i = 0; i < kBuckets; ++i) buckets_[i] = {i | kBucket, i | kBucket};
  used_ = BitTree(kBuckets, false);
}

size_t BucketQueue::Lowest() const {
  const size_t found = used_.LowestFrom(base_ % kBuckets);
  return found != SIZE_MAX ? found : used_.Lowest();
}

void BucketQueue::Insert(uint32_t entry, uint64_t priority, bool in_front) {
  if (size_ == 0) {
    shift_ = 0;
    base_ = top_ = priority;
  }
  uint64_t bucket = priority >> shift_;
  while (bucket >= base_ + kBuckets) {
    base_ += (Lowest() + kBuckets - base_ % kBuckets) % kBuckets;
    if (bucket < base_ + kBuckets) break;
    Widen();
    bucket = priority >> shift_;
  }
  // What is older than all the others: the ring starts with it, if its other end leaves room.
  while (bucket < base_) {
    if (top_ - bucket < kBuckets) {
      base_ = bucket;
    } else {
      Widen();
      bucket = priority >> shift_;
    }
  }
  top_ = std::max(top_, bucket);
  const size_t position = bucket % kBuckets;
  const uint32_t end = static_cast<uint32_t>(position) | kBucket;
  const uint32_t previous = in_front ? end : At(end).previous;
  const uint32_t next = in_front ? At(end).next : end;
  (*links_)[entry] = {previous, next};
  At(previous).next = entry;
  At(next).previous = entry;
  used_.Insert(position);
  ++size_;
}

void BucketQueue::Erase(uint32_t entry) {
  const QueueLink link = (*links_)[entry];
  At(link.previous).next = link.next;
  At(link.next).previous = link.previous;
  if (link.previous == link.next) used_.Erase(link.next & ~kBucket);  // it was alone
  --size_;
}

uint32_t BucketQueue::Front() const { return size_ == 0 ? kNone : buckets_[Lowest()].next; }

void BucketQueue::Widen() {
  const std::vector<QueueLink> old = std::exchange(buckets_, {});
  Clear();
  for (size_t i = 0; i < kBuckets; ++i) {
    const size_t position = (base_ + i) % kBuckets;
    const QueueLink& list = old[position];
    if (list.next == (static_cast<uint32_t>(position) | kBucket)) continue;
    const size_t target = ((base_ + i) >> 1) % kBuckets;
    const uint32_t end = static_cast<uint32_t>(target) | kBucket;
    const uint32_t before = At(end).previous;
    At(before).next = list.next;
    At(list.next).previous = before;
    At(list.previous).next = end;
    At(end).previous = list.previous;
    used_.Insert(target);
  }
  base_ >>= 1;
  top_ >>= 1;
  ++shift_;
}

std::vector<uint32_t> BucketQueue::Entries() const {
  std::vector<uint32_t> entries;
  for (size_t i = 0; i < kBuckets; ++i) {
    const uint32_t end = static_cast<uint32_t>((base_ + i) % kBuckets) | kBucket;
    for (uint32_t at = buckets_[end & ~kBucket].next; at != end; at = (*links_)[at].next) {
      entries.push_back(at);
    }
  }
  return entries;
}

}  // namespace flexkv
