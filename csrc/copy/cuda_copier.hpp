// Copies between the host pool and a device pool on a CUDA GPU, in the order of streams: the host queues them
// and looks now and then which have ended. It waits for none.
//
// Loads have their streams, stores others, each with a thread that queues. Nothing is ever queued behind what
// has yet to be queued: the events that a copy waits for are recorded, and what waits for a copy waits for an
// event behind it. So what is on a stream always comes to its end.
//
// A gate opens a layer when the last load of its batch has it. So the loads of a gate are copied as one: some
// layers of all of them, then the next. They are submitted one after the other, and the first ones wait for
// the last, which takes microseconds. They do not wait for one that does not come soon, and a copy that
// follows a read neither waits nor is waited for.
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
#include "copy/copier.hpp"
#include "copy/cuda_measure.hpp"
#include "copy/cuda_paths.hpp"
#include "copy/layer_gate.hpp"
#include "cuda/cuda_slots.hpp"
#include "cuda/cuda_stream.hpp"
#include "memory/block_layout.hpp"
#include "memory/host_pool.hpp"

namespace flexkv {

class CudaCopier final : public Copier {
 public:
  // `pieces`: which are large for copy engines. `slot_reader`: of the slots that copies wait for. Throws SystemError
  // if the device gives not even a stream.
  CudaCopier(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, std::shared_ptr<HostPool> host,
             const EnginePieces& pieces, std::shared_ptr<SlotReader> slot_reader);
  ~CudaCopier() override;

  void Submit(DeviceCopy copy) override;
  // With the last of them those go that were held back for it.
  void LoadsComplete() override;
  std::shared_ptr<LayerGate> MakeGate(int num_layers) const override;
  std::optional<Times> TimesOf(bool to_device) const override {
    const Direction& direction = to_device ? loads_ : stores_;
    return Times{direction.busy_s.load(), direction.queue_s.load()};
  }
  const std::string& note() const override { return note_; }

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
    CopiedBlocks blocks;  // of all of them
    std::vector<int64_t> host_slots, token_slots,
        first_rows;  // what `blocks` points to, unless it is one copy
    std::vector<uint64_t> wait_events;
    size_t events_seen = 0;  // of wait_events, that have happened
    bool pinned = false;
    std::optional<KernelPath::Descriptors> described;  // to the kernel; nothing: by copy engines alone
    StreamEvent behind_layers;                         // that were described and queued last
    StreamEvent start, end;  // timed; without `end` it ends when its streams are idle
    std::string error;

    bool waits() const { return events_seen < wait_events.size(); }
    // For what is the same in all submissions.
    const DeviceCopy& copy() const { return submissions.front().copy; }
  };
  struct Direction {
    bool to_device = false;
    std::unique_ptr<KernelPath::Route> route;
    size_t alone_bytes = 0;                       // pieces of this size and more go by copy engines alone
    std::deque<std::unique_ptr<Flight>> flights;  // in the order in which they were queued
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
  // Whether it may wait for the other loads of its gate.
  static bool MayBeHeldBack(const DeviceCopy& copy);
  bool IsPinned(const CopiedBlocks& blocks) const;
  bool GoesThroughBuffer(const CopiedBlocks& blocks, bool pinned) const;
  bool KernelTakes(const CopiedBlocks& blocks) const { return kernel_path_ && kernel_path_->Takes(blocks); }
  // Takes the first of `ready`, and the other loads that can go with it.
  std::unique_ptr<Flight> TakeFlight(std::deque<Submission>& ready) const;
  // True if the flight is on a stream or has ended, false if its time has not come.
  bool Start(Direction& direction, std::unique_ptr<Flight>& flight);
  CudaDriver::State StateOfEvents(Flight& flight);
  void JoinArrays(Flight& flight) const;
  void Queue(Direction& direction, std::unique_ptr<Flight> flight);
  bool QueueLoad(Flight& flight, KernelPath::Route& route);
  bool QueueStore(Flight& flight, KernelPath::Route& route);
  bool QueueLayers(Flight& flight, int layer_begin, int layer_end, KernelPath::Route& route);
  // Tells all of the flight that these layers are on a stream.
  bool TellQueued(Flight& flight, int layer_begin, int layer_end, KernelPath::Route& route);
  // Behind all of the flight; nullptr on failure.
  StreamEvent RecordEnd(const Flight& flight, KernelPath::Route& route);
  void Reap(Direction& direction);
  void End(Submission& submission, const std::string& flight_error);

  const std::shared_ptr<CudaDriver> cuda_;
  const BlockLayout& layout_;
  const std::shared_ptr<HostPool> host_;
  std::string note_;
  EnginePath engine_path_;
  std::unique_ptr<KernelPath> kernel_path_;  // nullptr where no pieces are small
  const size_t buffer_piece_bytes_;          // of a block, that copy engines carry to a buffer at once
  std::shared_ptr<EventPool> timed_events_;
  const std::shared_ptr<SlotReader> slot_reader_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Direction loads_, stores_;
  bool stop_ = false;
};

}  // namespace flexkv
