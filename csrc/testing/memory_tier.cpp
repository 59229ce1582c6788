#include "testing/memory_tier.hpp"

#include <cstring>

namespace flexkv {

void MemoryTier::Attach(const Above& above) {
  Require(!thread_.joinable(), "a tier is under one engine at a time");
  above_ = above;
  stop_ = false;
  thread_ = std::thread([this] { Loop(); });
}

void MemoryTier::Detach() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void MemoryTier::Start(TierTransfer* transfer) {
  transfer->Begin(1);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(transfer);
  }
  changed_.notify_all();
}

double MemoryTier::oldest_s() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stalled_since_s_ > 0 ? above_.Now() - stalled_since_s_ : 0;
}

void MemoryTier::set_failing(bool loads, bool stores) {
  const std::lock_guard<std::mutex> lock(mutex_);
  loads_fail_ = loads;
  stores_fail_ = stores;
}

void MemoryTier::set_stalled(bool stalled) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stalled_ = stalled;
  }
  changed_.notify_all();
}

bool MemoryTier::Damage(int64_t slot) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<char>& bytes = slots_[static_cast<size_t>(slot)].bytes;
  if (bytes.empty()) return false;
  bytes[bytes.size() / 2] ^= 1;
  return true;
}

void MemoryTier::Loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || !waiting_.empty(); });
    if (waiting_.empty()) return;
    TierTransfer* transfer = waiting_.front();
    waiting_.pop_front();
    if (stalled_) {
      stalled_since_s_ = above_.Now();
      changed_.wait(lock, [&] { return !stalled_ || transfer->GivenUp(above_.Now()); });
      stalled_since_s_ = 0;
    }
    lock.unlock();
    Run(transfer);
    lock.lock();
  }
}

void MemoryTier::Run(TierTransfer* transfer) {
  for (uint32_t step = 0; step < transfer->num_steps(); ++step) {
    for (uint32_t block = 0; block < transfer->num_blocks; ++block) {
      if (transfer->GivenUp(above_.Now())) transfer->Spoil(block, BlockOutcome::kDropped);
      if (transfer->Good(block) && Move(transfer, step, block)) transfer->Land(step, block);
    }
  }
  transfer->End();
}

bool MemoryTier::Move(TierTransfer* transfer, uint32_t step, uint32_t block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (transfer->store ? stores_fail_ : loads_fail_) {
    transfer->Spoil(block, BlockOutcome::kFailed, "the memory of the tier failed");
    return false;
  }
  Slot& slot = slots_[static_cast<size_t>(transfer->tier_slots[block])];
  char* host = above_.host->Slot(transfer->host_slots[block]);
  const std::vector<size_t>& offsets = above_.slice_offsets;
  if (transfer->store && step == 0) {
    slot = {transfer->keys[block], std::vector<char>(offsets.back()),
            std::vector<uint64_t>(offsets.size() - 1)};
  }
  for (uint32_t slice = transfer->step_begin(step); slice < transfer->step_ends[step]; ++slice) {
    if (transfer->store) {
      std::memcpy(&slot.bytes[offsets[slice]], host + offsets[slice], offsets[slice + 1] - offsets[slice]);
      slot.sums[slice] = SumOf(slot.bytes.data(), slice);
      continue;
    }
    const bool held = !slot.bytes.empty() && slot.key == transfer->keys[block];
    if (held) {
      std::memcpy(host + offsets[slice], &slot.bytes[offsets[slice]], offsets[slice + 1] - offsets[slice]);
    }
    if (!held || SumOf(host, slice) != slot.sums[slice]) {
      transfer->Spoil(block, BlockOutcome::kCorrupt, "a block is not what was stored");
      return false;
    }
  }
  return true;
}

uint64_t MemoryTier::SumOf(const char* block, uint32_t slice) const {
  uint64_t sum = 14695981039346656037ull;  // FNV-1a, by words: slices are whole pages
  for (size_t at = above_.slice_offsets[slice]; at < above_.slice_offsets[slice + 1];
       at += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, block + at, sizeof word);
    sum = (sum ^ word) * 1099511628211ull;
  }
  return sum;
}

}  // namespace flexkv
