#include "cuda/cuda_stream.hpp"

#include <chrono>
#include <thread>

namespace flexkv {

namespace {

// A driver's queue holds about a thousand commands, those of the event after them included.
constexpr size_t kCommandsMax = 768;
constexpr size_t kCommandsPerMark = 128;

// A queue of this depth lasts longer: pieces of 16 KiB take a link about 0.3 us each.
constexpr auto kRoomPollInterval = std::chrono::microseconds(50);

}  // namespace

EventPool::~EventPool() {
  const CudaContext context(*cuda_);
  for (CudaDriver::Event event : free_) cuda_->DestroyEvent(event);
}

StreamEvent EventPool::Record(CudaDriver::Stream stream, std::string* error) {
  CudaDriver::Event event = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      event = free_.back();
      free_.pop_back();
    }
  }
  if (event == nullptr) event = cuda_->CreateEvent(timed_, error);
  if (event == nullptr) return nullptr;
  StreamEvent held(event, [pool = shared_from_this()](void* unused) {
    std::lock_guard<std::mutex> lock(pool->mutex_);
    pool->free_.push_back(unused);
  });
  return cuda_->RecordEvent(event, stream, error) ? held : nullptr;
}

CopyStream::CopyStream(std::shared_ptr<CudaDriver> cuda, bool urgent)
    : cuda_(std::move(cuda)),
      events_(std::make_shared<EventPool>(cuda_, false)),
      stream_(cuda_->CreateStream(urgent)) {}

CopyStream::~CopyStream() {
  std::string ignored;
  cuda_->Synchronize(stream_, &ignored);
  cuda_->DestroyStream(stream_);
}

bool CopyStream::WaitFor(const StreamEvent& event, std::string* error) {
  MakeRoom(1);
  return cuda_->StreamWaitEvent(stream_, reinterpret_cast<uint64_t>(event.get()), error);
}

void CopyStream::MakeRoom(size_t commands) {
  std::string ignored;
  if (unmarked_ >= kCommandsPerMark) {
    // Without an event it is not known when they have run: they are not counted any more.
    if (StreamEvent event = Record(&ignored)) {
      marks_.push_back({std::move(event), unmarked_});
    } else {
      queued_ -= unmarked_;
    }
    unmarked_ = 0;
  }
  while (!marks_.empty()) {
    if (cuda_->QueryEvent(marks_.front().event.get(), &ignored) != CudaDriver::State::kPending) {
      queued_ -= marks_.front().commands;
      marks_.pop_front();
    } else if (queued_ + commands > kCommandsMax) {
      std::this_thread::sleep_for(kRoomPollInterval);
    } else {
      break;
    }
  }
  unmarked_ += commands;
  queued_ += commands;
}

}  // namespace flexkv
