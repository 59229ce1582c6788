// The CPU tier's memory: one page-aligned arena of equal slots, locked in the background so that the
// server serves while a large pool is still being pinned.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "base/types.hpp"

namespace flexkv {

class CudaDriver;

class HostPool {
 public:
  // Maps num_slots * slot_bytes of memory: zero memory of its own, or that of a file, a memfd, which other
  // processes may map as well. The file grows to that size, and need not stay open. slot_bytes must be a
  // multiple of kIoAlignment. Throws SystemError if the memory cannot be had.
  HostPool(size_t num_slots, size_t slot_bytes, int file = kOwnMemory);
  ~HostPool();
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  static constexpr int kOwnMemory = -1;

  // An empty file in memory for pools of several processes, closed where another program is started. Throws
  // SystemError if there is none to be had.
  static int MakeFile();

  // The pool is pinned in chunks of this size, each of them one registration with CUDA. Small enough that a
  // server that stops does not wait for it, large enough to be cheap per byte.
  static constexpr size_t kPinChunkBytes = size_t{64} << 20;

  char* Slot(int64_t slot) const { return base_ + static_cast<size_t>(slot) * slot_bytes_; }
  char* base() const { return base_; }
  size_t num_slots() const { return num_slots_; }
  size_t slot_bytes() const { return slot_bytes_; }
  size_t total_bytes() const { return num_slots_ * slot_bytes_; }

  // Starts pinning, chunk by chunk, in a thread of its own: faulted in, then registered with CUDA if `cuda`
  // is given, otherwise locked with mlock where RLIMIT_MEMLOCK lets it. Processes of one user take turns, a
  // chunk each, and one that registers with CUDA rests as long as each registration took: the driver does it
  // under locks that launches need. The pool is usable all the while; a transfer out of memory that is not
  // pinned yet is only slower.
  void StartPinning(std::shared_ptr<CudaDriver> cuda);
  // Pinned memory is at the pool's beginning.
  size_t pinned_bytes() const { return pinned_bytes_.load(std::memory_order_acquire); }
  size_t populated_bytes() const { return populated_bytes_.load(std::memory_order_relaxed); }

 private:
  void MapFile(int file);
  void PinLoop();

  char* base_ = nullptr;
  size_t num_slots_;
  size_t slot_bytes_;
  size_t mapped_bytes_ = 0;
  std::shared_ptr<CudaDriver> cuda_;
  std::thread pinner_;
  std::atomic<bool> stop_{false};
  std::atomic<size_t> pinned_bytes_{0};
  std::atomic<size_t> populated_bytes_{0};
};

}  // namespace flexkv
