#include "host_pool.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "cuda_driver.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older kernels answer EINVAL and fault lazily
#endif

namespace flexkv {

HostPool::HostPool(size_t num_slots, size_t slot_bytes)
    : num_slots_(num_slots), slot_bytes_(slot_bytes) {
  Require(slot_bytes > 0 && slot_bytes % kIoAlignment == 0,
          "slot_bytes must be a positive multiple of 4096");
  Require(num_slots > 0, "a host pool needs at least one slot");
  mapped_bytes_ = AlignUp(total_bytes(), kIoAlignment);
  // NORESERVE: the size was checked against the machine's memory; overcommit must not refuse it.
  void* mem = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mem == MAP_FAILED) {
    throw SystemError("cannot map " + std::to_string(mapped_bytes_) +
                      " bytes for the CPU tier: " + std::strerror(errno));
  }
  base_ = static_cast<char*>(mem);
  // Fewer TLB misses and page faults where the system has huge pages; refusal costs nothing.
  (void)madvise(base_, mapped_bytes_, MADV_HUGEPAGE);
  // A forked child must not inherit (and copy on write) gigabytes that it never uses.
  (void)madvise(base_, mapped_bytes_, MADV_DONTFORK);
}

HostPool::~HostPool() {
  stop_.store(true);
  if (pinner_.joinable()) pinner_.join();
  if (cuda_) {
    for (size_t at = 0; at < pinned_bytes_.load(); at += kPinChunkBytes) {
      cuda_->HostUnregister(base_ + at);
    }
  }
  munmap(base_, mapped_bytes_);
}

void HostPool::StartPinning(std::shared_ptr<CudaDriver> cuda) {
  Require(!pinner_.joinable(), "pinning was started already");
  cuda_ = std::move(cuda);
  pinner_ = std::thread([this] { PinLoop(); });
}

void HostPool::PinLoop() {
  bool lockable = true;
  for (size_t at = 0; at < mapped_bytes_ && !stop_.load(); at += kPinChunkBytes) {
    const size_t bytes = std::min(kPinChunkBytes, mapped_bytes_ - at);
    if (lockable) {
      lockable = cuda_ ? cuda_->HostRegister(base_ + at, bytes) : mlock(base_ + at, bytes) == 0;
    }
    if (lockable) {
      pinned_bytes_.fetch_add(bytes);
    } else if (madvise(base_ + at, bytes, MADV_POPULATE_WRITE) != 0) {
      return;  // the kernel cannot; pages come on first use
    }
    populated_bytes_.fetch_add(bytes);
  }
}

}  // namespace flexkv
