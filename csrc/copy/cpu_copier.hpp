// Copies where the device pool is CPU memory: threads that share each copy out among them, in chunks.
//
// Loads go before stores, and of the loads the one whose next layer comes first in the model: all loads of a batch share
// its gate, which opens a layer when the last of them has it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "copy/copier.hpp"
#include "copy/cpu_copy.hpp"
#include "memory/block_layout.hpp"
#include "memory/host_pool.hpp"

namespace flexkv {

class CpuCopier final : public Copier {
 public:
  CpuCopier(const BlockLayout& layout, std::shared_ptr<HostPool> host, int threads);
  ~CpuCopier() override;

  void Submit(DeviceCopy copy) override;
  std::shared_ptr<LayerGate> MakeGate(int num_layers) const override;
  // The thread that has verified a block copies it on: it is in that core's cache, and memory is what attention and
  // load both want.
  bool copies_at_once() const override { return true; }
  void CopyAtOnce(const CopiedBlocks& blocks, size_t block, int layer_begin, int layer_end) override;
  const std::string& note() const override { return note_; }

 private:
  struct Job;
  using Queue = std::deque<std::shared_ptr<Job>>;
  static std::shared_ptr<Job> NextJob(const Queue& queue);
  BlockCopy At(const CopiedBlocks& blocks, size_t block) const;
  void Loop();
  void OrderByRow(Job& job) const;
  void CopyChunk(Job& job, size_t chunk);

  const BlockLayout& layout_;
  const std::shared_ptr<HostPool> host_;
  const std::string note_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Queue loads_, stores_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace flexkv
