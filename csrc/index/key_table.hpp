// From keys to entries: open addressing, eight bytes a bucket, so that what is looked up one after
// the other can be fetched ahead. Keys are not stored here: a bucket has 32 bits of the key's hash,
// and the array of keys decides.
//
// Buckets that follow each other without a gap are in the order of their homes, so a lookup of what is
// not there, and an erasure, end after a few steps and not at the next gap, a cache line later.
#pragma once

#include <cstdint>

#include "base/types.hpp"
#include "index/growing_array.hpp"

namespace flexkv {

class KeyTable {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;
  // Who looks up many fetches the buckets of so many keys ahead of the one that he needs.
  static constexpr size_t kAhead = 16;

  // `expected` entries fit without growing, which would stop everybody for a while.
  explicit KeyTable(size_t expected);

  // The entry of a key. `keys[id]` is the key of entry id.
  uint32_t Find(const BlockKey& key, const BlockKey* keys) const;
  // The entry of a key; if it has none it gets `id`, and kNone is returned.
  uint32_t FindOrInsert(const BlockKey& key, uint32_t id, const BlockKey* keys);
  // Gives the keys entries from `first_id` on, which is written to `keys`, as long as they have none. Returns how many
  // that were; if not all, `found` is the entry of the next.
  size_t InsertNew(const BlockKey* added, size_t count, uint32_t first_id, BlockKey* keys, uint32_t* found);
  // False if the entry is not in it.
  bool Erase(const BlockKey& key, uint32_t id);
  // Makes room for that many entries in all; throws std::bad_alloc. Inserting them cannot fail then.
  void Reserve(size_t count) {
    while (!HasRoomFor(count)) Grow();
  }
  // The buckets that are looked at for this key, which may lie in two cache lines.
  void Prefetch(const BlockKey& key) const {
    const Bucket* home = buckets_.data() + Home(Tag(key));
    __builtin_prefetch(home);
    __builtin_prefetch(home + kProbed);
  }

  size_t size() const { return size_; }
  size_t memory_bytes() const { return num_buckets_ * sizeof(Bucket); }

 private:
  struct Bucket {
    uint32_t tag;
    uint32_t id_plus_1;  // 0: empty, which is what untouched memory holds
  };

  static constexpr size_t kProbed = 5;  // buckets, mostly

  static uint32_t Tag(const BlockKey& key) {
    return static_cast<uint32_t>((BlockKeyHash()(key) * 0xD6E8FEB86659FD93ull) >> 32);
  }
  size_t Home(uint32_t tag) const { return (static_cast<uint64_t>(tag) * num_buckets_) >> 32; }
  size_t FromHome(size_t bucket) const {
    const size_t home = Home(buckets_[bucket].tag);
    return bucket >= home ? bucket - home : bucket + num_buckets_ - home;
  }
  size_t After(size_t bucket) const { return bucket + 1 == num_buckets_ ? 0 : bucket + 1; }
  void InsertAt(size_t at, Bucket inserted);
  bool HasRoomFor(size_t count) const;
  void Grow();

  GrowingArray<Bucket> buckets_;
  size_t num_buckets_ = 0;
  size_t size_ = 0;
};

}  // namespace flexkv
