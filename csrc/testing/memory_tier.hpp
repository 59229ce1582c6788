// A tier in memory, the simplest that keeps the contract of LowerTier: what contract tests run on beside the
// SSD tier. It fails, loses bits and stands still on demand.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tier/lower_tier.hpp"

namespace flexkv {

class MemoryTier : public LowerTier {
 public:
  explicit MemoryTier(uint64_t num_slots) : slots_(num_slots) {}
  ~MemoryTier() override { Detach(); }

  void Attach(const Above& above) override;
  void Detach() override;
  uint64_t num_slots() const override { return slots_.size(); }
  void Start(TierTransfer* transfer) override;
  void Wake() override { changed_.notify_all(); }
  double oldest_s() const override;
  std::string engine_name() const override { return "memory"; }

  // Faults, from now on: loads or stores fail; nothing moves.
  void set_failing(bool loads, bool stores);
  void set_stalled(bool stalled);
  // One bit of what a slot holds is another one. False if it holds nothing.
  bool Damage(int64_t slot);

 private:
  struct Slot {
    BlockKey key;
    std::vector<char> bytes;
    std::vector<uint64_t> sums;  // per slice
  };
  void Loop();
  void Run(TierTransfer* transfer);
  bool Move(TierTransfer* transfer, uint32_t step, uint32_t block);
  uint64_t SumOf(const char* block, uint32_t slice) const;

  Above above_;
  std::vector<Slot> slots_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<TierTransfer*> waiting_;
  bool stop_ = false, loads_fail_ = false, stores_fail_ = false, stalled_ = false;
  double stalled_since_s_ = 0;  // 0: nothing stands still
  std::thread thread_;
};

}  // namespace flexkv
