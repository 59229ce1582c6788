// Copies between the host pool and a device pool on a CUDA GPU. Each direction has a thread and a
// stream of its own: loads never wait behind stores.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "block_layout.hpp"
#include "host_pool.hpp"
#include "layer_gate.hpp"
#include "types.hpp"

namespace flexkv {

class CudaDriver;

// One copy of some layers of some blocks. What it points to lives until on_end was called.
struct DeviceCopy {
  bool to_device = false;
  const int64_t* host_slots = nullptr;   // one per block
  const int64_t* token_slots = nullptr;  // tokens_per_block per block
  const int64_t* first_rows = nullptr;   // what BlockLayout::FirstRows says of token_slots
  size_t num_blocks = 0;
  int layer_begin = 0;
  int layer_end = 0;
  std::shared_ptr<LayerGate> gate;                      // loads: told of every layer
  const std::vector<uint64_t>* wait_events = nullptr;   // CUDA events before which nothing is touched
  const std::atomic<bool>* cancelled = nullptr;
  // Called once, from a thread of the copier, when nothing of this copy touches memory any more.
  std::function<void(OpStatus status, std::string error)> on_end;
};

class CudaCopier {
 public:
  CudaCopier(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, std::shared_ptr<HostPool> host);
  // Every copy must have ended.
  ~CudaCopier();

  void Submit(DeviceCopy copy);

 private:
  struct Direction {
    std::deque<DeviceCopy> queue;
    std::thread thread;
  };
  void Loop(Direction& direction);
  void Run(const DeviceCopy& copy, void* stream);

  const std::shared_ptr<CudaDriver> cuda_;
  const BlockLayout& layout_;
  const std::shared_ptr<HostPool> host_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Direction loads_, stores_;
  bool stop_ = false;
};

}  // namespace flexkv
