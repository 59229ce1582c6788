// What a tier below the CPU tier is to those who move blocks: the contract between the transfer engine, which
// has ops of graphs, and whoever brings blocks to a medium and back. The other half of a tier, what it holds
// and whether it works, is Python's (sglang_flexkv/common/lower_tier.py).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/types.hpp"
#include "memory/host_pool.hpp"

namespace flexkv {

enum class BlockOutcome : uint8_t {
  kGood,
  kFailed,   // the medium said no
  kCorrupt,  // came back, and is not what was stored
  kDropped,  // not moved: cancelled, or too late
  kMissing,  // was there once, for all we know, and is not any more: says nothing about the medium
};

// One op of a graph: the same slices of some blocks, in one direction. It may go in steps: the first slices
// of all blocks, then the next of all blocks.
//
// The tier's side of it: Begin; for every block and step either Land, when its bytes are where they belong
// (and, of a load, were compared with what was stored), or Spoil; and End for each part, when nothing of that
// part touches memory any more. The last End ends the op, and the transfer is gone.
struct TierTransfer {
  bool store = false;  // host pool -> tier; else a load
  const BlockKey* keys = nullptr;
  const int64_t* host_slots = nullptr;
  const int64_t* tier_slots = nullptr;
  size_t num_blocks = 0;
  uint32_t slice_begin = 0;
  std::vector<uint32_t> step_ends;  // slices; every step begins where the one before it ends
  double deadline_s = 0;            // what has not started by then is dropped; 0: none
  const std::atomic<bool>* cancelled = nullptr;
  // Called for a step of a block that landed, by several threads of the tier at the same time. May be empty.
  std::function<void(uint32_t step, uint32_t block)> on_block;
  // Called when a step of every block has landed. May be empty; if not, somebody waits for the steps, and
  // they should go before other loads.
  std::function<void(uint32_t step)> on_step;
  std::function<void()> on_end;

  uint32_t num_steps() const { return static_cast<uint32_t>(step_ends.size()); }
  uint32_t step_begin(uint32_t step) const { return step == 0 ? slice_begin : step_ends[step - 1]; }
  // What has not started of it is not to start any more. Times are the engine's, see LowerTier::Above.
  bool GivenUp(double now_s) const {
    return cancelled->load(std::memory_order_relaxed) || (deadline_s > 0 && now_s > deadline_s);
  }

  // The tier shares it out among so many of its threads, at least one; a block belongs to one of them.
  void Begin(size_t num_parts);
  // Whether it is still worth while to move more of a block.
  bool Good(uint32_t block) const { return outcome[block] == BlockOutcome::kGood; }
  // By the thread that has the block.
  void Land(uint32_t step, uint32_t block);
  // A block keeps the first that went wrong with it, the transfer the first error.
  void Spoil(uint32_t block, BlockOutcome how, const std::string& why = "");
  void End();

  // Out.
  std::vector<BlockOutcome> outcome;
  uint32_t Count(BlockOutcome how) const { return count_[static_cast<int>(how)].load(); }  // kGood left out
  std::string error;                                                                       // the first

 private:
  std::vector<std::atomic<size_t>> step_left_;  // blocks that are missing
  std::atomic<size_t> parts_left_{0};
  std::atomic<uint32_t> count_[5] = {};
  std::mutex mutex_;
};

class LowerTier {
 public:
  // Where blocks come from and go to.
  struct Above {
    std::shared_ptr<HostPool> host;
    std::vector<size_t> slice_offsets;  // within a host slot, one more than slices; the last is its size
    std::chrono::steady_clock::time_point epoch;  // of all times
    double Now() const {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - epoch).count();
    }
  };

  virtual ~LowerTier() = default;

  // An engine is going to start transfers. Throws UsageError where the shape of the slots is not the tier's,
  // and SystemError where something below cannot be set up.
  virtual void Attach(const Above& above) = 0;
  // No transfer is on its way, and none will come.
  virtual void Detach() = 0;

  // Slots that transfers may name. The index hands them out; what is in them is the tier's affair.
  virtual uint64_t num_slots() const = 0;
  // Moves blocks; returns at once. What was loaded is compared with what was stored before it lands. Any
  // number of transfers may be under way, and none of two that run touch the same slot unless both load.
  virtual void Start(TierTransfer* transfer) = 0;
  // Some transfer was cancelled: it should end without waiting for something else to happen.
  virtual void Wake() = 0;
  // For how long the oldest access to the medium has been on its way; 0 if there is none.
  virtual double oldest_s() const = 0;
  // How it moves them, for people: a name, and the reason if it is a fall-back.
  virtual std::string engine_name() const = 0;
  virtual std::string engine_note() const { return ""; }
};

}  // namespace flexkv
