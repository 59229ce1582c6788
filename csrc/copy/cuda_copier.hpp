// Copies between the host pool and a device pool on a CUDA GPU, in the order of streams: the host queues them
// and looks now and then which have ended. It waits for none.
//
// Loads have one stream, stores another, each with a thread that queues. Nothing is ever queued behind what has yet to
// be queued: the events that a copy waits for are recorded, and what waits for a copy waits for an event behind it. So
// what is on a stream always comes to its end.
//
// A gate opens a layer when the last load of its batch has it. So the loads of a gate are copied as one: some layers
// of all of them, then the next. They are submitted one after the other, and the first ones wait for the last, which
// takes microseconds. They do not wait for one that does not come soon, and a copy that follows a read from SSD
// neither waits nor is waited for.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/types.hpp"
#include "copy/cuda_paths.hpp"
#include "copy/layer_gate.hpp"
#include "cuda/cuda_slots.hpp"
#include "cuda/cuda_stream.hpp"
#include "memory/block_layout.hpp"
#include "memory/host_pool.hpp"

namespace flexkv {

// One copy of some layers of some blocks. What it points to lives until on_end was called.
struct DeviceCopy {
  CopiedBlocks blocks;
  // Where the blocks are on the device, if that is yet to come: `bind` completes `blocks` then. From a thread of the
  // copier, the same for all copies of one direction. Throws UsageError for slots that cannot be.
  std::shared_ptr<AwaitedSlots> awaited;
  std::function<void(CopiedBlocks* blocks)> bind;
  int layer_begin = 0;
  int layer_end = 0;
  std::shared_ptr<LayerGate> gate;  // whose loads are copied as one
  bool follows_read = false;  // some layers of a load, as they come from SSD: not to be held back
  const std::vector<uint64_t>* wait_events = nullptr;  // CUDA events before which nothing is touched
  const std::atomic<bool>* cancelled = nullptr;
  // With a gate, from a thread of the copier, before on_end: the copies of these layers are on a stream, and the
  // event behind them. Not called for layers that could not be queued.
  std::function<void(int layer_begin, int layer_end, const StreamEvent& event)> on_queued;
  // Called once, from a thread of the copier, when nothing of this copy touches memory any more.
  std::function<void(OpStatus status, std::string error)> on_end;
};

class CudaCopier {
 public:
  // Throws SystemError if the device gives not even a stream.
  CudaCopier(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, std::shared_ptr<HostPool> host);
  // Every copy must have ended.
  ~CudaCopier();

  void Submit(DeviceCopy copy);
  // So many loads of the gate are submitted, or will be layer by layer as reads go on. With the last of them those
  // go that were held back for it.
  void LoadsSubmitted(LayerGate& gate, int loads);

  const std::shared_ptr<CudaDriver>& cuda() const { return cuda_; }
  // Reads the slots of copies that are submitted later.
  SlotReader& slot_reader() { return slot_reader_; }
  // For how long the device has copied in one direction, so far, by its own clock.
  double busy_s(bool to_device) const { return (to_device ? loads_ : stores_).busy_s.load(); }
  // The host's time for queueing the copies of one direction, so far.
  double queue_s(bool to_device) const { return (to_device ? loads_ : stores_).queue_s.load(); }
  // Which ways copies take here, and what the device cannot do, in words.
  const std::string& note() const { return note_; }

 private:
  // A copy, from Submit to its end.
  struct Submission {
    DeviceCopy copy;
    bool held_back = false;
    std::string error = {};
  };
  // What goes to a stream as one: a copy, or loads of one gate and the same layers.
  struct Flight {
    std::vector<Submission> submissions;
    CopiedBlocks blocks;                                       // of all of them
    std::vector<int64_t> host_slots, token_slots, first_rows;  // what `blocks` points to, unless it is one copy
    std::vector<uint64_t> wait_events;
    size_t events_seen = 0;  // of wait_events, that have happened
    bool by_kernel = false, pinned = false;
    std::optional<KernelPath::Descriptors> described;
    StreamEvent start, end;  // timed; without `end` it ends when its stream is idle
    std::string error;

    bool waits() const { return events_seen < wait_events.size(); }
    // For what is the same in all submissions.
    const DeviceCopy& copy() const { return submissions.front().copy; }
  };
  struct Direction {
    bool to_device = false;
    std::unique_ptr<CopyStream> stream;
    std::deque<std::unique_ptr<Flight>> flights;  // in stream order
    std::deque<Submission> submitted;             // under mutex_
    bool complete = false;                        // under mutex_: a gate has been given all of its loads
    std::deque<Submission> waiting;               // for slots, events, descriptors, or for other loads
    std::atomic<double> queue_s{0}, busy_s{0};
    std::thread thread;
  };

  void Loop(Direction& direction);
  void StartWaiting(Direction& direction);
  // True if it ended: it failed, or was cancelled.
  bool EndedWaiting(Submission& submission);
  // Whether it has to wait for its slots. If they are there, they are bound.
  bool AwaitsSlots(Submission& submission);
  // Whether more loads of its gate will be here in a moment.
  static bool IsHeldBack(const DeviceCopy& copy);
  bool IsPinned(const CopiedBlocks& blocks) const;
  bool GoesByKernel(const CopiedBlocks& blocks, bool pinned) const;
  // Takes the first of `ready`, and the other loads that can go with it.
  std::unique_ptr<Flight> TakeFlight(std::deque<Submission>& ready) const;
  // True if the flight is on a stream or has ended, false if its time has not come.
  bool Start(Direction& direction, std::unique_ptr<Flight>& flight);
  CudaDriver::State StateOfEvents(Flight& flight);
  void JoinArrays(Flight& flight) const;
  void Queue(Direction& direction, std::unique_ptr<Flight> flight);
  bool QueueLoad(Flight& flight, CopyStream& stream);
  bool QueueStore(Flight& flight, CopyStream& stream);
  // Tells all of the flight that these layers are on the stream.
  bool TellQueued(Flight& flight, int layer_begin, int layer_end, CopyStream& stream);
  void Reap(Direction& direction);
  void End(Submission& submission, const std::string& flight_error);

  const std::shared_ptr<CudaDriver> cuda_;
  const BlockLayout& layout_;
  const std::shared_ptr<HostPool> host_;
  std::string note_;
  EnginePath engine_path_;
  std::unique_ptr<KernelPath> kernel_path_;
  size_t engine_piece_bytes_ = 0;  // pieces of this size and more go by the copy engines
  std::shared_ptr<EventPool> timed_events_;
  SlotReader slot_reader_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Direction loads_, stores_;
  bool stop_ = false;
};

}  // namespace flexkv
