#include "key_table.hpp"

#include <algorithm>
#include <vector>

namespace flexkv {
namespace {

// Buckets per entry. Linear probing looks at two to four neighbours then, mostly in one cache line.
constexpr double kRoom = 1.3;
constexpr double kRoomMin = 1.12;
constexpr size_t kBucketsMin = 64;

}  // namespace

KeyTable::KeyTable(size_t expected) {
  num_buckets_ = std::max(kBucketsMin, static_cast<size_t>(static_cast<double>(expected) * kRoom) + 1);
  buckets_.Reserve(num_buckets_, true);
}

uint32_t KeyTable::Find(const BlockKey& key, const BlockKey* keys) const {
  const uint32_t tag = Tag(key);
  for (size_t at = Home(tag); buckets_[at].id_plus_1 != 0; at = After(at)) {
    if (buckets_[at].tag == tag && keys[buckets_[at].id_plus_1 - 1] == key) {
      return buckets_[at].id_plus_1 - 1;
    }
  }
  return kNone;
}

uint32_t KeyTable::FindOrInsert(const BlockKey& key, uint32_t id, const BlockKey* keys) {
  if (static_cast<double>(size_ + 1) * kRoomMin > static_cast<double>(num_buckets_)) Grow();
  const uint32_t tag = Tag(key);
  size_t at = Home(tag);
  for (; buckets_[at].id_plus_1 != 0; at = After(at)) {
    if (buckets_[at].tag == tag && keys[buckets_[at].id_plus_1 - 1] == key) {
      return buckets_[at].id_plus_1 - 1;
    }
  }
  buckets_[at] = {tag, id + 1};
  ++size_;
  return kNone;
}

void KeyTable::Erase(const BlockKey& key, uint32_t id) {
  size_t hole = Home(Tag(key));
  while (buckets_[hole].id_plus_1 != id + 1) hole = After(hole);
  // Whoever sits further from home than the hole moves into it: no lookup ever crosses a grave.
  for (size_t at = After(hole); buckets_[at].id_plus_1 != 0; at = After(at)) {
    const size_t home = Home(buckets_[at].tag);
    const size_t from_home = at >= home ? at - home : at + num_buckets_ - home;
    const size_t from_hole = at >= hole ? at - hole : at + num_buckets_ - hole;
    if (from_home < from_hole) continue;
    buckets_[hole] = buckets_[at];
    hole = at;
  }
  buckets_[hole] = {0, 0};
  --size_;
}

void KeyTable::Grow() {
  const size_t grown = num_buckets_ * 2;
  std::vector<Bucket> old;
  old.reserve(size_);
  buckets_.Reserve(grown);  // what can fail comes first
  for (size_t at = 0; at < num_buckets_; ++at) {
    if (buckets_[at].id_plus_1 != 0) old.push_back(buckets_[at]);
    buckets_[at] = {0, 0};
  }
  num_buckets_ = grown;
  for (const Bucket& bucket : old) {
    size_t at = Home(bucket.tag);
    while (buckets_[at].id_plus_1 != 0) at = After(at);
    buckets_[at] = bucket;
  }
}

}  // namespace flexkv
