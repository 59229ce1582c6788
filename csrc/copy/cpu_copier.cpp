#include "copy/cpu_copier.hpp"

#include <algorithm>
#include <span>
#include <utility>

namespace flexkv {

namespace {

// One unit of work of a thread: large enough to hide the queue, small enough that a load that
// arrives behind a large store waits for well under a millisecond.
constexpr size_t kChunkBytes = size_t{512} << 10;

}  // namespace

struct CpuCopier::Job {
  DeviceCopy copy;
  int layers_per_chunk = 1;
  size_t blocks_per_chunk = 1;
  size_t chunks_per_group = 1;  // a group: the layers of a chunk, over all blocks
  size_t num_chunks = 0;
  size_t next = 0;  // under mutex_
  std::atomic<size_t> left{0};
  std::atomic<bool> incomplete{false};          // some of its chunks were not copied: it was cancelled
  std::vector<std::atomic<size_t>> group_left;  // chunks that are missing per group
  std::once_flag ordered;
  std::vector<BlockCopy> blocks;  // in the order of their rows

  int next_layer() const {
    return copy.layer_begin + static_cast<int>(next / chunks_per_group) * layers_per_chunk;
  }
};

CpuCopier::CpuCopier(const BlockLayout& layout, std::shared_ptr<HostPool> host, int threads)
    : layout_(layout), host_(std::move(host)) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Loop(); });
}

CpuCopier::~CpuCopier() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

std::shared_ptr<LayerGate> CpuCopier::MakeGate(int num_layers) const {
  return std::make_shared<LayerGate>(num_layers);
}

void CpuCopier::Submit(DeviceCopy copy) {
  auto job = std::make_shared<Job>();
  const size_t num_blocks = copy.blocks.count;
  const size_t layers = static_cast<size_t>(copy.layer_end - copy.layer_begin);
  const size_t layer_bytes = layout_.layer_bytes(copy.layer_begin);
  const size_t per_chunk = std::clamp<size_t>(kCopyRunBytes / layer_bytes, 1, layers);
  job->layers_per_chunk = static_cast<int>(per_chunk);
  const size_t groups = (layers + per_chunk - 1) / per_chunk;
  // Several threads share even a small layer: a forward waits for the first one.
  const size_t share = (num_blocks + threads_.size() - 1) / threads_.size();
  job->blocks_per_chunk =
      std::clamp<size_t>(kChunkBytes / (layer_bytes * per_chunk), 1, std::max<size_t>(1, share));
  job->chunks_per_group = (num_blocks + job->blocks_per_chunk - 1) / job->blocks_per_chunk;
  job->num_chunks = job->chunks_per_group * groups;
  job->left.store(job->num_chunks);
  job->group_left = std::vector<std::atomic<size_t>>(groups);
  for (auto& left : job->group_left) left.store(job->chunks_per_group);
  job->copy = std::move(copy);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    (job->copy.blocks.to_device ? loads_ : stores_).push_back(std::move(job));
  }
  wake_.notify_all();
}

void CpuCopier::CopyAtOnce(const CopiedBlocks& blocks, size_t block, int layer_begin, int layer_end) {
  const BlockCopy one = At(blocks, block);
  CopyLayersCpu(layout_, layer_begin, layer_end, {&one, 1}, blocks.to_device);
  FenceCopies();
}

BlockCopy CpuCopier::At(const CopiedBlocks& blocks, size_t block) const {
  const size_t per_block = static_cast<size_t>(layout_.tokens_per_block());
  return {host_->Slot(blocks.host_slots[block]), blocks.token_slots + block * per_block,
          blocks.first_rows[block]};
}

std::shared_ptr<CpuCopier::Job> CpuCopier::NextJob(const Queue& queue) {
  return *std::min_element(queue.begin(), queue.end(),
                           [](const auto& a, const auto& b) { return a->next_layer() < b->next_layer(); });
}

void CpuCopier::Loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stop_ || !loads_.empty() || !stores_.empty(); });
    if (stop_) return;
    Queue& queue = !loads_.empty() ? loads_ : stores_;
    std::shared_ptr<Job> job = &queue == &loads_ ? NextJob(queue) : queue.front();
    const size_t chunk = job->next++;
    if (job->next == job->num_chunks) queue.erase(std::find(queue.begin(), queue.end(), job));
    lock.unlock();
    CopyChunk(*job, chunk);
    lock.lock();
  }
}

void CpuCopier::OrderByRow(Job& job) const {
  const CopiedBlocks& blocks = job.copy.blocks;
  const size_t per_block = static_cast<size_t>(layout_.tokens_per_block());
  std::vector<std::pair<int64_t, size_t>> rows(blocks.count);
  for (size_t b = 0; b < rows.size(); ++b) {
    const int64_t first = blocks.first_rows[b];
    rows[b] = {first >= 0 ? first : blocks.token_slots[b * per_block], b};
  }
  std::sort(rows.begin(), rows.end());
  job.blocks.reserve(rows.size());
  for (const auto& [row, b] : rows) job.blocks.push_back(At(blocks, b));
}

void CpuCopier::CopyChunk(Job& job, size_t chunk) {
  const DeviceCopy& copy = job.copy;
  const size_t group = chunk / job.chunks_per_group;
  const int layer_begin = copy.layer_begin + static_cast<int>(group) * job.layers_per_chunk;
  const int layer_end = std::min(copy.layer_end, layer_begin + job.layers_per_chunk);
  const size_t first = chunk % job.chunks_per_group * job.blocks_per_chunk;
  const size_t last = std::min(copy.blocks.count, first + job.blocks_per_chunk);
  // A cancelled job still counts its chunks down, so that it ends once, but moves nothing more.
  if (copy.cancelled->load(std::memory_order_relaxed)) {
    job.incomplete.store(true);
  } else {
    std::call_once(job.ordered, [&] { OrderByRow(job); });
    const auto blocks = std::span(job.blocks).subspan(first, last - first);
    CopyLayersCpu(layout_, layer_begin, layer_end, blocks, copy.blocks.to_device);
    FenceCopies();
  }
  if (job.group_left[group].fetch_sub(1) == 1 && !job.incomplete.load())
    copy.on_landed(layer_begin, layer_end);
  if (job.left.fetch_sub(1) == 1)
    copy.on_end(job.incomplete.load() ? OpStatus::kCancelled : OpStatus::kDone, "");
}

}  // namespace flexkv
