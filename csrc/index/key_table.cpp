#include "index/key_table.hpp"

#include <algorithm>
#include <utility>
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
  size_t at = Home(tag);
  for (size_t steps = 0; buckets_[at].id_plus_1 != 0; ++steps, at = After(at)) {
    const Bucket& bucket = buckets_[at];
    if (bucket.tag == tag && keys[bucket.id_plus_1 - 1] == key) return bucket.id_plus_1 - 1;
    if (FromHome(at) < steps) break;
  }
  return kNone;
}

uint32_t KeyTable::FindOrInsert(const BlockKey& key, uint32_t id, const BlockKey* keys) {
  if (!HasRoomFor(size_ + 1)) Grow();
  const uint32_t tag = Tag(key);
  size_t at = Home(tag);
  for (size_t steps = 0; buckets_[at].id_plus_1 != 0; ++steps, at = After(at)) {
    const Bucket& bucket = buckets_[at];
    if (bucket.tag == tag && keys[bucket.id_plus_1 - 1] == key) return bucket.id_plus_1 - 1;
    if (FromHome(at) < steps) break;
  }
  InsertAt(at, {tag, id + 1});
  ++size_;
  return kNone;
}

size_t KeyTable::InsertNew(const BlockKey* added, size_t count, uint32_t first_id, BlockKey* keys,
                           uint32_t* found) {
  for (size_t i = 0; i < std::min(kAhead, count); ++i) Prefetch(added[i]);
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) Prefetch(added[i + kAhead]);
    keys[first_id + i] = added[i];
    *found = FindOrInsert(added[i], first_id + static_cast<uint32_t>(i), keys);
    if (*found != kNone) return i;
  }
  return count;
}

bool KeyTable::Erase(const BlockKey& key, uint32_t id) {
  size_t hole = Home(Tag(key));
  for (size_t steps = 0; buckets_[hole].id_plus_1 != id + 1; ++steps, hole = After(hole)) {
    if (buckets_[hole].id_plus_1 == 0 || FromHome(hole) < steps) return false;
  }
  // Whoever is not at home moves up: no lookup ever crosses a grave.
  for (size_t at = After(hole); buckets_[at].id_plus_1 != 0 && FromHome(at) > 0; at = After(at)) {
    buckets_[hole] = buckets_[at];
    hole = at;
  }
  buckets_[hole] = {0, 0};
  --size_;
  return true;
}

// Puts a bucket's content before what is there, which moves on.
void KeyTable::InsertAt(size_t at, Bucket inserted) {
  for (; buckets_[at].id_plus_1 != 0; at = After(at)) std::swap(inserted, buckets_[at]);
  buckets_[at] = inserted;
}

bool KeyTable::HasRoomFor(size_t count) const {
  return static_cast<double>(count) * kRoomMin <= static_cast<double>(num_buckets_);
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
    for (size_t steps = 0; buckets_[at].id_plus_1 != 0 && FromHome(at) >= steps; ++steps) at = After(at);
    InsertAt(at, bucket);
  }
}

}  // namespace flexkv
