// The I/O thread of one directory of the SSD tier: moves blocks, or slices of blocks, between host
// slots and SSD slots, and verifies everything it reads before anybody else sees it.
//
// Reads go before writes: while a read is waiting or in flight, writes get a small share of the queue
// depth. Nothing here waits for one transfer while it could start another; what was read is verified
// while the disk works on what comes next.
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "memory/host_pool.hpp"
#include "ssd/io_engine.hpp"
#include "ssd/ssd_store.hpp"

namespace flexkv {

// Holds writes back to so many bytes per second, over all directories of the tier. 0: no limit.
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

enum class BlockOutcome : uint8_t {
  kGood,
  kFailed,   // an I/O error
  kCorrupt,  // failed verification
  kDropped,  // not moved: cancelled, or too late
};

// One op of a graph: the same slices of some blocks, in one direction. It may go in steps: the first slices
// of all blocks, then the next of all blocks.
struct SsdTransfer {
  bool write = false;
  const BlockKey* keys = nullptr;
  const int64_t* host_slots = nullptr;
  const int64_t* ssd_slots = nullptr;
  size_t num_blocks = 0;
  uint32_t slice_begin = 0;
  std::vector<uint32_t> step_ends;  // slices; every step begins where the one before it ends
  double deadline_s = 0;            // what has not started by then is dropped; 0: none
  const std::atomic<bool>* cancelled = nullptr;
  // Called by a lane when it has read a step of a block and found it right, by several lanes at the same
  // time. May be empty.
  std::function<void(uint32_t step, uint32_t block)> on_block;
  // Called by a lane when a step of every block is there. May be empty; if not, somebody waits for the
  // steps, and they go before other reads.
  std::function<void(uint32_t step)> on_step;
  std::function<void()> on_end;  // called by the lane that ends last

  uint32_t num_steps() const { return static_cast<uint32_t>(step_ends.size()); }
  uint32_t step_begin(uint32_t step) const { return step == 0 ? slice_begin : step_ends[step - 1]; }
  // Prepares what the lanes write to.
  void Reset(size_t num_lanes) {
    outcome.assign(num_blocks, BlockOutcome::kGood);
    step_left = std::vector<std::atomic<size_t>>(num_steps());
    for (auto& blocks : step_left) blocks.store(num_blocks);
    left.store(num_lanes);
  }

  // Out. Blocks are told apart by their byte: every block belongs to one lane.
  std::vector<BlockOutcome> outcome;
  std::vector<std::atomic<size_t>> step_left;  // blocks that are missing
  std::atomic<size_t> left{0};                 // lanes that are not done
  std::atomic<uint32_t> count[4] = {};         // blocks by outcome, kGood left out
  std::mutex mutex;
  std::string error;  // the first
};

class SsdLane {
 public:
  // Calls that take longer are asked to end, and fail.
  static constexpr double kIoTimeoutS = 20;

  SsdLane(std::shared_ptr<SsdStore> store, size_t shard, std::shared_ptr<HostPool> host,
          std::vector<size_t> slice_offsets, std::unique_ptr<IoEngine> engine,
          std::shared_ptr<WriteLimit> limit, std::chrono::steady_clock::time_point epoch);
  // Everything that was started must have ended.
  ~SsdLane();

  // Moves those blocks of the transfer that belong to this directory.
  void Start(SsdTransfer* transfer, std::vector<uint32_t> blocks);
  // For how long the oldest transfer that is on its way has been so; 0 if there is none.
  double oldest_s() const;
  // Ends what was cancelled without waiting for something else to happen.
  void Wake() { engine_->Wake(); }

 private:
  struct Work {
    SsdTransfer* transfer = nullptr;
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

  double Now() const;
  void Loop();
  void TakeInbox();
  // Starts what may be started. Returns how long to wait before writes may go on, 0 if they are not
  // held back.
  double Refill();
  Work* NextWork(bool write);
  bool Prepare(Work* work, Flight* flight);
  void Land(Flight* flight);
  void EndIfDone(std::deque<std::unique_ptr<Work>>* queue);
  void WatchClock();
  void RegisterMemory();

  const std::shared_ptr<SsdStore> store_;
  SsdShard& shard_;
  const std::shared_ptr<HostPool> host_;
  const std::vector<size_t> slice_offsets_;  // one more than slices
  const std::unique_ptr<IoEngine> engine_;
  const std::shared_ptr<WriteLimit> limit_;
  const std::chrono::steady_clock::time_point epoch_;
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
