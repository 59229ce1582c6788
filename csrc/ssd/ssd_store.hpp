// The SSD tier's store: the slots of all directories as one row, and what they hold. Slot s of the tier is slot
// s / num_shards of shard s % num_shards; see ssd_shard.hpp for what a directory keeps and promises.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/types.hpp"
#include "ssd/disk.hpp"
#include "ssd/ssd_shard.hpp"

namespace flexkv {

// Blocks that were found, least recently written first.
struct Recovered {
  std::vector<BlockKey> keys, parents;
  std::vector<int64_t> slots;
};

class SsdStore {
 public:
  // Opens or creates the files and replays the journals. Throws MismatchError, or SystemError with the
  // reason (a DiskError where a call failed).
  SsdStore(SsdStoreOptions options, std::shared_ptr<Disk> disk);

  Recovered TakeRecovered() { return std::exchange(recovered_, {}); }

  struct Place {
    SsdShard* shard;
    uint32_t slot;
  };
  Place At(int64_t slot) const {
    const size_t count = shards_.size();
    return {shards_[static_cast<size_t>(slot) % count].get(),
            static_cast<uint32_t>(static_cast<size_t>(slot) / count)};
  }
  size_t num_shards() const { return shards_.size(); }
  SsdShard& shard(size_t index) const { return *shards_[index]; }
  uint64_t num_slots() const { return options_.num_slots; }
  uint64_t slot_bytes() const { return slot_bytes_; }
  const std::vector<uint32_t>& slice_bytes() const { return options_.slice_bytes; }
  const std::shared_ptr<Disk>& disk() const { return disk_; }

  // Makes blocks whose data was written known to the next process. Parents: zero for none.
  void Publish(const BlockKey* keys, const BlockKey* parents, const int64_t* slots, size_t count);
  void Drop(const int64_t* slots, size_t count);
  bool Sync(double timeout_s);
  // Forgets everything; with keep = false also what will be stored from now on, at the next start.
  void Clear(bool keep);
  // Why a journal cannot be written any more, "" while all is well.
  std::string error() const;
  // Remarks of the opening, one per line: started fresh because ..., damage skipped.
  std::string notes() const;
  SsdStoreStats Stats() const;

 private:
  void CheckSlots(const int64_t* slots, size_t count) const;

  const SsdStoreOptions options_;
  const std::shared_ptr<Disk> disk_;
  uint64_t slot_bytes_ = 0;
  std::vector<std::unique_ptr<SsdShard>> shards_;
  Recovered recovered_;
  std::mutex sequence_mutex_;
  uint64_t sequence_ = 0;
};

}  // namespace flexkv
