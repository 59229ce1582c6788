// A stream of ours, and events behind what is on it.
//
// A stream waits only for what is on a stream already: for an event, which has been recorded. Whatever is queued on a
// GPU then comes to its end by itself, in any order of its hardware queues and whatever driver call holds a lock
// until it has. What has yet to be queued is waited for on the host, outside the driver.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda/cuda_driver.hpp"

namespace flexkv {

// A recorded event (get() is the CUevent). It is used again when nobody holds it any more.
using StreamEvent = std::shared_ptr<void>;

class EventPool : public std::enable_shared_from_this<EventPool> {
 public:
  EventPool(std::shared_ptr<CudaDriver> cuda, bool timed) : cuda_(std::move(cuda)), timed_(timed) {}
  ~EventPool();

  // Behind everything that is on the stream; nullptr on failure.
  StreamEvent Record(CudaDriver::Stream stream, std::string* error);

 private:
  const std::shared_ptr<CudaDriver> cuda_;
  const bool timed_;
  std::mutex mutex_;
  std::vector<CudaDriver::Event> free_;
};

// Used by one thread at a time.
class CopyStream {
 public:
  // Throws SystemError. An urgent stream's work goes before that of others.
  CopyStream(std::shared_ptr<CudaDriver> cuda, bool urgent);
  ~CopyStream();
  CopyStream(const CopyStream&) = delete;
  CopyStream& operator=(const CopyStream&) = delete;

  CudaDriver::Stream get() const { return stream_; }
  // Before so many commands are queued: waits until a driver's queue has room for them. Who adds to a full one waits
  // inside the driver, maybe with a lock that a forward's launches need.
  void MakeRoom(size_t commands);
  // An event behind everything that is on the stream, for other streams to wait for; nullptr on failure.
  StreamEvent Record(std::string* error) { return events_->Record(stream_, error); }
  // Has what is queued from now on wait for an event, which has been recorded.
  bool WaitFor(const StreamEvent& event, std::string* error);

 private:
  struct Mark {
    StreamEvent event;
    size_t commands;  // since the mark before
  };

  const std::shared_ptr<CudaDriver> cuda_;
  const std::shared_ptr<EventPool> events_;
  CudaDriver::Stream stream_;
  std::deque<Mark> marks_;
  size_t unmarked_ = 0;  // commands behind the last mark
  size_t queued_ = 0;    // that may not have run
};

}  // namespace flexkv
