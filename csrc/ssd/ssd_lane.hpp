// The I/O thread of one directory of the SSD tier: moves blocks, or slices of blocks, between host
// slots and SSD slots, and verifies everything it reads before anybody else sees it.
//
// Reads go before writes: while a read is waiting or in flight, writes get a small share of the queue
// depth. Nothing here waits for one transfer while it could start another; what was read is verified
// while the disk works on what comes next.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "ssd/io_engine.hpp"
#include "ssd/ssd_store.hpp"
#include "tier/lower_tier.hpp"

namespace flexkv {

// Holds writes back to so many bytes per second: those of all lanes, and of all tiers, that were given it. 0: no limit.
class WriteLimit {
 public:
  explicit WriteLimit(double bytes_per_s) : rate_(bytes_per_s), available_(0) {}
  // Takes the bytes and returns 0, or returns how many seconds to wait before asking again.
  double Take(size_t bytes, double now_s);

 private:
  std::mutex mutex_;
  const double rate_;
  double available_;
  double last_s_ = 0;
};

class SsdLane {
 public:
  // Calls that take longer are asked to end, and fail.
  static constexpr double kIoTimeoutS = 20;

  SsdLane(std::shared_ptr<SsdStore> store, size_t shard, LowerTier::Above above,
          std::unique_ptr<IoEngine> engine, std::shared_ptr<WriteLimit> limit);
  // Everything that was started must have ended.
  ~SsdLane();

  // Moves those blocks of the transfer that belong to this directory.
  void Start(TierTransfer* transfer, std::vector<uint32_t> blocks);
  // For how long the oldest transfer that is on its way has been so; 0 if there is none.
  double oldest_s() const;
  // Ends what was cancelled without waiting for something else to happen.
  void Wake() { engine_->Wake(); }

 private:
  struct Work {
    TierTransfer* transfer = nullptr;
    std::vector<uint32_t> blocks;
    uint32_t step = 0;
    size_t next = 0;  // into blocks, within the step
    size_t in_flight = 0;

    bool all_started() const { return step == transfer->num_steps(); }
  };
  struct Flight : Io {
    Work* work = nullptr;
    uint32_t block = 0;
    uint32_t step = 0;
    double start_s = 0;
    bool busy = false;
    bool asked = false;  // to end early
  };

  double Now() const { return above_.Now(); }
  char* HostSlot(int64_t slot) const { return above_.host->Slot(slot); }
  void Loop();
  void TakeInbox();
  // Starts what may be started. Returns how long to wait before writes may go on, 0 if they are not
  // held back.
  double Refill();
  Work* NextWork(bool write);
  bool Prepare(Work* work, Flight* flight);
  bool IsWhatWasWritten(const Flight& flight) const;
  void Land(Flight* flight);
  void EndIfDone(std::deque<std::unique_ptr<Work>>* queue);
  void WatchClock();
  void RegisterMemory();

  const std::shared_ptr<SsdStore> store_;
  SsdShard& shard_;
  const LowerTier::Above above_;
  const std::vector<size_t>& slice_offsets_ = above_.slice_offsets;
  const std::unique_ptr<IoEngine> engine_;
  const std::shared_ptr<WriteLimit> limit_;
  const size_t num_shards_;

  std::mutex mutex_;
  std::vector<std::unique_ptr<Work>> inbox_;

  // The thread's own.
  std::deque<std::unique_ptr<Work>> reads_, writes_;
  std::vector<Flight> flights_;
  std::vector<Flight*> free_;
  int in_flight_ = 0, writes_in_flight_ = 0;
  size_t registered_bytes_ = 0;
  bool register_memory_ = true;

  std::atomic<double> oldest_start_s_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace flexkv
