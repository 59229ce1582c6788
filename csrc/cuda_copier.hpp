// Copies between the host pool and a device pool on a CUDA GPU, in the order of streams: the host queues them
// and looks now and then which have ended. It waits for none.
//
// Nothing is ever queued where it could block what it depends on. A copy waits for events of the caller's, work
// on streams that may in turn wait for the gate of an earlier batch, whose last layers may still be on their way
// from SSD. So a stream of ours that waits for an event is left to the one gate (batch) that it waits for, and one
// stream for loads never waits at all: what is late always finds a way.
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

#include "block_layout.hpp"
#include "cuda_paths.hpp"
#include "host_pool.hpp"
#include "layer_gate.hpp"
#include "stream_flags.hpp"
#include "types.hpp"

namespace flexkv {

// One copy of some layers of some blocks. What it points to lives until on_end was called.
struct DeviceCopy {
  CopiedBlocks blocks;
  int layer_begin = 0;
  int layer_end = 0;
  // Told of every layer that is queued, or, of stores, of its only one. The owner of the copy tells it the rest.
  std::shared_ptr<LayerGate> gate;
  bool follows_read = false;  // some layers of a load, as they come from SSD: not to be held back
  const std::vector<uint64_t>* wait_events = nullptr;  // CUDA events before which nothing is touched
  const std::atomic<bool>* cancelled = nullptr;
  // Called from a thread of the copier, at most once and before on_end: nobody is to wait for this copy any
  // longer. It ends as failed, whenever that is.
  std::function<void()> on_late;
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

  // What gates need so that streams can wait for them; nullptr where the host has to.
  const std::shared_ptr<StreamFlags>& flags() const { return flags_; }
  // The host's time for queueing the copies of one direction, so far.
  double queue_s(bool to_device) const { return (to_device ? loads_ : stores_).queue_s.load(); }
  // What this device cannot do, in words; empty if it can do everything.
  const std::string& note() const { return note_; }

 private:
  using Clock = std::chrono::steady_clock;
  // A copy, from Submit to its end.
  struct Submission {
    DeviceCopy copy;
    Clock::time_point since;
    bool held_back = false;
    bool late = false;
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
    size_t num_commands = 0;
    std::optional<KernelPath::Descriptors> described;
    CudaDriver::Event end = nullptr;  // nullptr: it ends when its stream is idle
    std::string error;

    bool waits() const { return events_seen < wait_events.size(); }
    // For what is the same in all submissions.
    const DeviceCopy& copy() const { return submissions.front().copy; }
  };
  struct Lane {
    CudaDriver::Stream stream = nullptr;
    std::deque<std::unique_ptr<Flight>> flights;  // in stream order
    bool waits = false;                           // an event that its flights wait for may be yet to happen
    size_t num_commands = 0;                      // of its flights
  };
  struct Direction {
    bool to_device = false;
    std::vector<Lane> lanes;
    std::deque<Submission> submitted;       // under mutex_
    bool complete = false;                  // under mutex_: a gate has been given all of its loads
    std::deque<Submission> waiting;         // for events, for a lane, or for other loads
    std::vector<CudaDriver::Event> events;  // to be used again
    std::atomic<double> queue_s{0};
    std::thread thread;
  };

  void Loop(Direction& direction);
  void StartWaiting(Direction& direction);
  // True if it ended: it failed, or was cancelled.
  bool EndedWaiting(Submission& submission);
  // Whether more loads of its gate will be here in a moment.
  static bool IsHeldBack(const DeviceCopy& copy);
  bool IsPinned(const CopiedBlocks& blocks) const;
  // Takes the first of `ready`, and the other loads that can go with it.
  std::unique_ptr<Flight> TakeFlight(std::deque<Submission>& ready) const;
  // True if the flight is on a stream or has ended, false if its time has not come.
  bool Start(Direction& direction, std::unique_ptr<Flight>& flight);
  CudaDriver::State StateOfEvents(Flight& flight);
  Lane* FindLane(Direction& direction, const Flight& flight);
  void JoinArrays(Flight& flight) const;
  void Queue(Direction& direction, Lane& lane, std::unique_ptr<Flight> flight);
  bool QueueLayers(Flight& flight, void* stream);
  void Reap(Direction& direction);
  void GiveUpIfLate(Submission& submission);
  void End(Submission& submission, const std::string& flight_error);

  const std::shared_ptr<CudaDriver> cuda_;
  const BlockLayout& layout_;
  const std::shared_ptr<HostPool> host_;
  std::shared_ptr<StreamFlags> flags_;
  std::string note_;
  EnginePath engine_path_;
  std::unique_ptr<KernelPath> kernel_path_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Direction loads_, stores_;
  bool stop_ = false;
};

}  // namespace flexkv
