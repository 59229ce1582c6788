#include "ssd/ssd_store.hpp"

#include <algorithm>

namespace flexkv {

SsdStore::SsdStore(SsdStoreOptions options, std::shared_ptr<Disk> disk)
    : options_(std::move(options)), disk_(std::move(disk)) {
  Require(!options_.shards.empty() && options_.num_slots > 0, "the SSD tier needs a directory and a slot");
  for (uint32_t bytes : options_.slice_bytes) slot_bytes_ += bytes;
  const uint64_t per_shard = (options_.num_slots + options_.shards.size() - 1) / options_.shards.size();
  for (const SsdPaths& paths : options_.shards) {
    shards_.push_back(std::make_unique<SsdShard>(disk_, paths, options_));
  }
  // All are looked at before the first is changed.
  for (auto& shard : shards_) shard->Start(per_shard);
  struct Found {
    uint64_t sequence;
    int64_t slot;
  };
  std::vector<Found> found;
  for (size_t i = 0; i < shards_.size(); ++i) {
    const std::vector<SsdEntry>& entries = shards_[i]->entries();
    for (size_t local = 0; local < entries.size(); ++local) {
      const uint64_t slot = local * shards_.size() + i;
      if (entries[local].sequence == 0 || slot >= options_.num_slots) continue;
      found.push_back({entries[local].sequence, static_cast<int64_t>(slot)});
    }
    sequence_ = std::max(sequence_, shards_[i]->last_sequence());
  }
  std::sort(found.begin(), found.end(),
            [](const Found& a, const Found& b) { return a.sequence < b.sequence; });
  recovered_.keys.reserve(found.size());
  recovered_.parents.reserve(found.size());
  recovered_.slots.reserve(found.size());
  for (const Found& each : found) {
    const Place place = At(each.slot);
    const SsdEntry& entry = place.shard->entries()[place.slot];
    recovered_.keys.push_back(entry.key);
    recovered_.parents.push_back(entry.parent);
    recovered_.slots.push_back(each.slot);
  }
}

void SsdStore::CheckSlots(const int64_t* slots, size_t count) const {
  for (size_t i = 0; i < count; ++i) {
    Require(slots[i] >= 0 && static_cast<uint64_t>(slots[i]) < options_.num_slots, "SSD slot out of range");
  }
}

void SsdStore::Publish(const BlockKey* keys, const BlockKey* parents, const int64_t* slots, size_t count) {
  CheckSlots(slots, count);
  std::lock_guard<std::mutex> lock(sequence_mutex_);
  for (size_t i = 0; i < count; ++i) {
    const Place place = At(slots[i]);
    place.shard->Publish(keys[i], parents[i], place.slot, ++sequence_);
  }
}

void SsdStore::Drop(const int64_t* slots, size_t count) {
  CheckSlots(slots, count);
  std::lock_guard<std::mutex> lock(sequence_mutex_);
  for (size_t i = 0; i < count; ++i) {
    const Place place = At(slots[i]);
    place.shard->Drop(place.slot, ++sequence_);
  }
}

bool SsdStore::Sync(double timeout_s) {
  bool synced = true;
  for (auto& shard : shards_) synced = shard->Sync(timeout_s) && synced;
  return synced;
}

void SsdStore::Clear(bool keep) {
  for (auto& shard : shards_) shard->Clear(keep);
}

std::string SsdStore::error() const {
  for (auto& shard : shards_) {
    if (std::string error = shard->error(); !error.empty()) return error;
  }
  return "";
}

std::string SsdStore::notes() const {
  std::string notes;
  for (auto& shard : shards_) {
    if (!shard->note().empty()) notes += (notes.empty() ? "" : "\n") + shard->note();
    if (!shard->direct()) {
      notes += (notes.empty() ? "" : "\n") + shard->paths().directory +
               " does not support O_DIRECT, or not in pages of 4 KiB; the SSD tier goes through the page "
               "cache there";
    }
    if (shard->by_writing()) {
      notes += (notes.empty() ? "" : "\n") + shard->paths().directory +
               " does not support fallocate; the SSD tier's space was reserved by writing zeros there";
    }
  }
  return notes;
}

SsdStoreStats SsdStore::Stats() const {
  SsdStoreStats stats;
  for (auto& shard : shards_) shard->AddStats(&stats);
  return stats;
}

}  // namespace flexkv
