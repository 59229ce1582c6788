#include "stream_flags.hpp"

#include <algorithm>
#include <atomic>

#include "cuda_driver.hpp"
#include "types.hpp"

namespace flexkv {

namespace {
constexpr size_t kChunkWords = 4096;
// Two gates do not share a cache line, which the GPU and the processor would take from each other.
constexpr size_t kLineWords = 16;

uint64_t AddressOf(const StreamFlags::Row& row, int at) {
  return row.address + static_cast<uint64_t>(at) * sizeof(uint32_t);
}
}  // namespace

std::shared_ptr<StreamFlags> StreamFlags::Make(std::shared_ptr<CudaDriver> cuda, std::string* note) {
  if (!cuda->has_stream_values()) {
    *note = "the driver has no stream memory operations (CUDA 11.7 brought them)";
    return nullptr;
  }
  std::shared_ptr<StreamFlags> flags(new StreamFlags(cuda));
  const Row row = flags->Take(1);
  if (row.words == nullptr) {
    *note = "no pinned memory for the flags of streams";
    return nullptr;
  }
  void* stream = cuda->CreateStream(false);
  const bool works = flags->QueueRaise(row, 0, stream, note) && flags->QueueWait(row, 0, stream, note) &&
                     cuda->Synchronize(stream, note) && IsRaised(row, 0);
  cuda->DestroyStream(stream);
  flags->GiveBack(row);
  if (works) return flags;
  if (note->empty()) *note = "a stream's write to pinned memory did not arrive";
  return nullptr;
}

StreamFlags::Row StreamFlags::Take(int size) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Row>& free = free_[size];
  if (!free.empty()) {
    Row row = free.back();
    free.pop_back();
    ++row.value;
    return row;
  }
  const size_t words = AlignUp(static_cast<size_t>(size), kLineWords);
  if (chunk_left_ < words) {
    const CudaContext context(*cuda_);
    const size_t chunk = std::max(words, kChunkWords);
    void* memory = cuda_->AllocatePinned(chunk * sizeof(uint32_t));
    const uint64_t address = memory != nullptr ? cuda_->DeviceAddress(memory) : 0;
    if (address == 0) return {};
    std::fill_n(static_cast<uint32_t*>(memory), chunk, 0u);
    chunk_ = static_cast<uint32_t*>(memory);
    chunk_address_ = address;
    chunk_left_ = chunk;
  }
  const Row row{chunk_, chunk_address_, 1, size};
  chunk_ += words;
  chunk_address_ += words * sizeof(uint32_t);
  chunk_left_ -= words;
  return row;
}

void StreamFlags::GiveBack(const Row& row) {
  if (row.words == nullptr) return;
  for (int at = 0; at < row.size; ++at) Raise(row, at);
  std::lock_guard<std::mutex> lock(mutex_);
  free_[row.size].push_back(row);
}

bool StreamFlags::IsRaised(const Row& row, int at) {
  return std::atomic_ref<uint32_t>(row.words[at]).load(std::memory_order_acquire) == row.value;
}

void StreamFlags::Raise(const Row& row, int at) {
  std::atomic_ref<uint32_t>(row.words[at]).store(row.value, std::memory_order_release);
}

bool StreamFlags::QueueRaise(const Row& row, int at, void* stream, std::string* error) {
  return cuda_->StreamWriteValue(stream, AddressOf(row, at), row.value, error);
}

bool StreamFlags::QueueWait(const Row& row, int at, void* stream, std::string* error) {
  return cuda_->StreamWaitValue(stream, AddressOf(row, at), row.value, error);
}

}  // namespace flexkv
