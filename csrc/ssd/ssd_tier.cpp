#include "ssd/ssd_tier.hpp"

#include <algorithm>
#include <utility>

namespace flexkv {

SsdTier::SsdTier(std::shared_ptr<SsdStore> store, const SsdIoOptions& options)
    : store_(std::move(store)), options_(options) {}

void SsdTier::Attach(const Above& above) {
  Require(lanes_.empty(), "an SSD tier is under one engine at a time");
  Require(store_->slot_bytes() == above.slice_offsets.back() &&
              store_->slice_bytes().size() + 1 == above.slice_offsets.size(),
          "the SSD tier has slots of another shape");
  engine_note_.clear();
  std::vector<std::unique_ptr<SsdLane>> lanes;
  for (size_t shard = 0; shard < store_->num_shards(); ++shard) {
    auto engine = store_->disk()->MakeEngine(options_.kind, options_.depth, &engine_note_);
    engine_name_ = engine->name();
    lanes.push_back(std::make_unique<SsdLane>(store_, shard, above, std::move(engine), options_.write_limit));
  }
  lanes_ = std::move(lanes);
}

void SsdTier::Start(TierTransfer* transfer) {
  std::vector<std::vector<uint32_t>> by_lane(lanes_.size());
  for (size_t b = 0; b < transfer->num_blocks; ++b) {
    by_lane[static_cast<size_t>(transfer->tier_slots[b]) % lanes_.size()].push_back(static_cast<uint32_t>(b));
  }
  const auto used =
      std::count_if(by_lane.begin(), by_lane.end(), [](auto& blocks) { return !blocks.empty(); });
  transfer->Begin(static_cast<size_t>(used));
  // The last lane may end the transfer before this loop does: nothing of it is touched in it.
  for (size_t i = 0; i < by_lane.size(); ++i) {
    if (!by_lane[i].empty()) lanes_[i]->Start(transfer, std::move(by_lane[i]));
  }
}

void SsdTier::Wake() {
  for (auto& lane : lanes_) lane->Wake();
}

double SsdTier::oldest_s() const {
  double oldest = 0;
  for (const auto& lane : lanes_) oldest = std::max(oldest, lane->oldest_s());
  return oldest;
}

}  // namespace flexkv
