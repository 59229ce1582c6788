#include "cuda/cuda_slots.hpp"

#include <algorithm>
#include <utility>

namespace flexkv {

SlotReader::SlotReader(std::shared_ptr<CudaDriver> cuda, size_t slots_max)
    : cuda_(std::move(cuda)), events_(std::make_shared<EventPool>(cuda_, false)), capacity_(slots_max) {
  const CudaContext context(*cuda_);
  // Once, at the start: pinned memory is given out when the device has nothing to do.
  ring_ = static_cast<int64_t*>(cuda_->AllocatePinned(capacity_ * sizeof(int64_t)));
}

SlotReader::~SlotReader() {
  const CudaContext context(*cuda_);
  if (ring_ != nullptr) cuda_->FreePinned(ring_);
}

std::shared_ptr<AwaitedSlots> SlotReader::Read(uint64_t address, size_t count, uint64_t stream_handle) {
  const auto stream = reinterpret_cast<CudaDriver::Stream>(stream_handle);
  const size_t bytes = count * sizeof(int64_t);
  auto slots = std::make_shared<AwaitedSlots>(count);
  std::string error;
  const CudaContext context(*cuda_);
  std::unique_lock<std::mutex> lock(mutex_);
  CollectLocked();
  size_t begin = 0;
  if (ring_ == nullptr || !FindRoom(count, &begin)) {
    lock.unlock();
    if (!cuda_->CopyToHost(slots->slots_.data(), address, bytes, stream, &error) ||
        !cuda_->Synchronize(stream, &error)) {
      Fail(*slots, std::move(error));
    } else {
      slots->state_.store(CudaDriver::State::kDone);
    }
  } else if (!cuda_->CopyToHost(ring_ + begin, address, bytes, stream, &error)) {
    Fail(*slots, std::move(error));
  } else {
    StreamEvent event = events_->Record(stream, &error);
    if (event == nullptr) Fail(*slots, std::move(error));  // but its part of the ring is written to
    pending_.push_back({slots, begin, std::move(event), stream});
  }
  return slots;
}

void SlotReader::Collect() {
  std::lock_guard<std::mutex> lock(mutex_);
  CollectLocked();
}

void SlotReader::CollectLocked() {
  while (!pending_.empty()) {
    Pending& first = pending_.front();
    std::string error;
    const CudaDriver::State state = first.event != nullptr ? cuda_->QueryEvent(first.event.get(), &error)
                                                           : cuda_->QueryStream(first.stream, &error);
    if (state == CudaDriver::State::kPending) return;
    AwaitedSlots& slots = *first.slots;
    if (state == CudaDriver::State::kFailed) {
      Fail(slots, std::move(error));
      // What cannot be asked may still be written to, unless the stream cannot be asked either: the device is lost.
      if (first.event == nullptr) {
        pending_.pop_front();
      } else {
        first.event = nullptr;
      }
      continue;
    }
    if (first.event != nullptr) {
      std::copy_n(ring_ + first.begin, slots.slots_.size(), slots.slots_.data());
      slots.state_.store(CudaDriver::State::kDone);
    }
    pending_.pop_front();
  }
}

bool SlotReader::FindRoom(size_t count, size_t* begin) const {
  *begin = 0;
  if (pending_.empty()) return count <= capacity_;
  const size_t tail = pending_.front().begin;
  const size_t head = pending_.back().begin + pending_.back().slots->size();
  if (head <= tail) {  // it goes round already
    *begin = head;
    return tail - head >= count;
  }
  if (capacity_ - head >= count) *begin = head;
  return capacity_ - head >= count || tail >= count;
}

void SlotReader::Fail(AwaitedSlots& slots, std::string error) {
  if (slots.state_.load() == CudaDriver::State::kFailed) return;
  slots.error_ = "token slots could not be read: " + error;
  slots.state_.store(CudaDriver::State::kFailed);
}

}  // namespace flexkv
