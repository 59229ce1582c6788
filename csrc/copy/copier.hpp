// Copies between the host pool and a device pool: the one interface of copying on a CPU and on a GPU.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/types.hpp"
#include "copy/layer_gate.hpp"
#include "cuda/cuda_stream.hpp"

namespace flexkv {

class AwaitedSlots;

// Which bytes: some blocks of one layout. Who asks keeps the arrays alive.
struct CopiedBlocks {
  const int64_t* host_slots = nullptr;   // one per block
  const int64_t* token_slots = nullptr;  // tokens_per_block per block
  const int64_t* first_rows = nullptr;   // what BlockLayout::FirstRows says of token_slots
  size_t count = 0;
  bool to_device = false;
  // What Summarize finds out: the rows of every block follow one another; the last of the host slots.
  bool in_sequence = true;
  int64_t last_host_slot = 0;

  void Summarize();
  // Those of two copies, summarized; the arrays are still those of this one.
  CopiedBlocks With(const CopiedBlocks& others) const;
};

// One copy of some layers of some blocks. What it points to lives until on_end was called.
struct DeviceCopy {
  CopiedBlocks blocks;
  // Where the blocks are on the device, if that is yet to come: `bind` completes `blocks` then. From a thread
  // of the copier, the same for all copies of one direction. Throws UsageError for slots that cannot be.
  std::shared_ptr<AwaitedSlots> awaited;
  std::function<void(CopiedBlocks* blocks)> bind;
  int layer_begin = 0;
  int layer_end = 0;
  std::shared_ptr<LayerGate> gate;  // whose loads are copied as one
  bool follows_read = false;        // some layers of a load, as they come from below: not to be held back
  const std::vector<uint64_t>* wait_events = nullptr;  // CUDA events before which nothing is touched
  const std::atomic<bool>* cancelled = nullptr;
  // From a thread of the copier, before on_end: all blocks have these layers. Not called by a copier that can
  // say so at the end only.
  std::function<void(int layer_begin, int layer_end)> on_landed;
  // With a gate, from a thread of the copier, before on_end: the copies of these layers are on a stream, and
  // the event behind them. Not called for layers that could not be queued. `stream` tells those of a copier apart.
  std::function<void(int layer_begin, int layer_end, const StreamEvent& event, size_t stream)> on_queued;
  // Called once, from a thread of the copier, when nothing of this copy touches memory any more.
  std::function<void(OpStatus status, std::string error)> on_end;
};

class Copier {
 public:
  static constexpr size_t kStreamsMax = 2;  // of one direction

  // Of one direction, so far.
  struct Times {
    double busy_s;   // for which the device has copied, by its own clock
    double queue_s;  // the host's, for queueing
  };

  // Every copy must have ended.
  virtual ~Copier() = default;

  virtual void Submit(DeviceCopy copy) = 0;
  // Some gate has all of its loads: they are submitted, or will be layer by layer as reads go on.
  virtual void LoadsComplete() {}
  // A gate for loads and stores of this copier.
  virtual std::shared_ptr<LayerGate> MakeGate(int num_layers) const = 0;

  // Whether layers of a block that has just been read are copied at once by the thread that read them
  // (CopyAtOnce), instead of being submitted when all blocks have them.
  virtual bool copies_at_once() const { return false; }
  virtual void CopyAtOnce(const CopiedBlocks&, size_t, int, int) {}

  // Where the device has a clock of its own.
  virtual std::optional<Times> TimesOf(bool) const { return std::nullopt; }
  // Which ways copies take here, and what the device cannot do, in words; empty if nothing is to be said.
  virtual const std::string& note() const = 0;
};

}  // namespace flexkv
