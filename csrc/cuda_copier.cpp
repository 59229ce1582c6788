#include "cuda_copier.hpp"

#include <utility>

#include "cuda_driver.hpp"

namespace flexkv {

CudaCopier::CudaCopier(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout,
                       std::shared_ptr<HostPool> host)
    : cuda_(std::move(cuda)), layout_(layout), host_(std::move(host)) {
  loads_.thread = std::thread([this] { Loop(loads_); });
  stores_.thread = std::thread([this] { Loop(stores_); });
}

CudaCopier::~CudaCopier() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  loads_.thread.join();
  stores_.thread.join();
}

void CudaCopier::Submit(DeviceCopy copy) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    (copy.to_device ? loads_ : stores_).queue.push_back(std::move(copy));
  }
  wake_.notify_all();
}

void CudaCopier::Loop(Direction& direction) {
  cuda_->MakeCurrent();
  void* stream = cuda_->CreateStream();
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || !direction.queue.empty(); });
    if (stop_) break;
    const DeviceCopy copy = std::move(direction.queue.front());
    direction.queue.pop_front();
    lock.unlock();
    Run(copy, stream);
    lock.lock();
  }
  lock.unlock();
  cuda_->DestroyStream(stream);
}

void CudaCopier::Run(const DeviceCopy& copy, void* stream) {
  const size_t per_block = static_cast<size_t>(layout_.tokens_per_block());
  const int64_t rows = layout_.rows_per_block();
  std::string error;
  bool good = true;
  bool cancelled = copy.cancelled->load();
  for (uint64_t event : *copy.wait_events) {
    good = good && cuda_->StreamWaitEvent(stream, event, &error);
  }
  for (int layer = copy.layer_begin; layer < copy.layer_end && good && !cancelled; ++layer) {
    for (size_t b = 0; b < copy.num_blocks && good; ++b) {
      char* host = host_->Slot(copy.host_slots[b]) + layout_.layer_offset(layer);
      const int64_t first = copy.first_rows[b];
      for (const DeviceBuffer& buffer : layout_.buffers(layer)) {
        const bool whole = first >= 0 && buffer.row_stride == buffer.row_bytes;
        const int64_t pieces = whole ? 1 : rows;
        const size_t bytes = static_cast<size_t>(buffer.row_bytes * (whole ? rows : 1));
        for (int64_t i = 0; i < pieces && good; ++i) {
          const int64_t row =
              first >= 0 ? first + i : copy.token_slots[b * per_block + static_cast<size_t>(i)];
          const uint64_t device = buffer.base + static_cast<uint64_t>(row * buffer.row_stride);
          good = copy.to_device ? cuda_->CopyToDevice(device, host, bytes, stream, &error)
                                : cuda_->CopyToHost(host, device, bytes, stream, &error);
          host += bytes;
        }
      }
    }
    // A layer is announced only when its bytes are on the device; a store is synchronised once.
    if (copy.to_device || layer + 1 == copy.layer_end) {
      good = good && cuda_->Synchronize(stream, &error);
    }
    cancelled = copy.cancelled->load();
    if (good && !cancelled && copy.to_device && copy.gate) copy.gate->Arrive(layer);
  }
  if (!good || cancelled) {
    // Whatever was queued must have left the pools before the slots are given to somebody else.
    std::string ignored;
    cuda_->Synchronize(stream, &ignored);
  }
  copy.on_end(!good ? OpStatus::kFailed : cancelled ? OpStatus::kCancelled : OpStatus::kDone, error);
}

}  // namespace flexkv
