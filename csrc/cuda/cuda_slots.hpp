// Token slots that are in the device's memory, where a scheduler's allocator computes them, on their way to the host.
//
// Whoever asks such memory for its values waits for all that its stream holds, a forward for instance. So they are
// copied in stream order, and copies that need them wait for them where nobody waits for the copies' thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/cuda_driver.hpp"
#include "cuda/cuda_stream.hpp"

namespace flexkv {

// Slots that are there, or never will be, when SlotReader::Collect has found out.
class AwaitedSlots {
 public:
  explicit AwaitedSlots(size_t count) : slots_(count) {}
  size_t size() const { return slots_.size(); }
  CudaDriver::State state() const { return state_.load(); }
  const int64_t* data() const { return slots_.data(); }  // when they are there
  const std::string& error() const { return error_; }    // when they never will be

 private:
  friend class SlotReader;
  std::vector<int64_t> slots_;
  std::string error_;
  std::atomic<CudaDriver::State> state_{CudaDriver::State::kPending};
};

// Any thread may call.
class SlotReader {
 public:
  // Up to so many slots may be on their way without anybody waiting.
  SlotReader(std::shared_ptr<CudaDriver> cuda, size_t slots_max);
  // The device must have done what it was told, or must be lost.
  ~SlotReader();
  SlotReader(const SlotReader&) = delete;
  SlotReader& operator=(const SlotReader&) = delete;

  // Copies int64 values behind what is on the caller's stream. Their memory must stay as it is until what is on the
  // stream by then has happened. Waits for that if there is no room: that many are on their way. Never throws: what
  // fails is said by the slots.
  std::shared_ptr<AwaitedSlots> Read(uint64_t address, size_t count, uint64_t stream);
  // Looks which have come.
  void Collect();

 private:
  struct Pending {
    std::shared_ptr<AwaitedSlots> slots;
    size_t begin;
    StreamEvent event;  // nullptr: it could not be recorded
    CudaDriver::Stream stream;
  };
  // With the mutex held.
  void CollectLocked();
  bool FindRoom(size_t count, size_t* begin) const;
  static void Fail(AwaitedSlots& slots, std::string error);

  const std::shared_ptr<CudaDriver> cuda_;
  const std::shared_ptr<EventPool> events_;
  const size_t capacity_;
  int64_t* ring_ = nullptr;  // pinned; nullptr: not to be had, every Read waits
  // Held while the driver is called. Who holds it waits for nothing but what is on a stream.
  std::mutex mutex_;
  std::deque<Pending> pending_;  // oldest first, and so is the ring
};

}  // namespace flexkv
