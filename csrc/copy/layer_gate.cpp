#include "copy/layer_gate.hpp"

#include <algorithm>
#include <utility>

#include "base/types.hpp"

namespace flexkv {

LayerGate::LayerGate(int num_layers, std::shared_ptr<CudaDriver> cuda)
    : num_layers_(num_layers), cuda_(std::move(cuda)), layers_(static_cast<size_t>(num_layers)) {
  Require(num_layers > 0, "a gate needs at least one layer");
}

void LayerGate::Expect(int loads) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Layer& layer : layers_) {
    layer.left += loads;
    layer.left_queued += loads;
  }
  unsubmitted_ += loads;
  submitted_ = std::chrono::steady_clock::now();
}

bool LayerGate::Submitted(int loads) {
  std::lock_guard<std::mutex> lock(mutex_);
  unsubmitted_ -= loads;
  submitted_ = std::chrono::steady_clock::now();
  return unsubmitted_ <= 0;
}

bool LayerGate::AwaitsLoads(std::chrono::steady_clock::duration max) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return unsubmitted_ > 0 && std::chrono::steady_clock::now() - submitted_ < max;
}

void LayerGate::Queued(const std::vector<int>& layers, const StreamEvent& event, size_t stream) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++last_number_;
    if (waiting_numbers_.size() <= stream) waiting_numbers_.resize(stream + 1);
    for (int at : layers) {
      Layer& queued = layers_[static_cast<size_t>(at)];
      queued.left_queued--;
      if (queued.last.size() <= stream) queued.last.resize(stream + 1);
      queued.last[stream] = {event, last_number_};
    }
    Open();
  }
  changed_.notify_all();
}

void LayerGate::Pass(int layer, bool was_queued) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Layer& passed = layers_[static_cast<size_t>(layer)];
    passed.left--;
    if (!was_queued) passed.left_queued--;
    Open();
  }
  changed_.notify_all();
}

// With the mutex held.
void LayerGate::Open() {
  while (open_queued_ < num_layers_ && layers_[static_cast<size_t>(open_queued_)].left_queued <= 0)
    ++open_queued_;
  int open = open_.load(std::memory_order_relaxed);
  while (open < num_layers_ && layers_[static_cast<size_t>(open)].left <= 0) ++open;
  open_.store(open, std::memory_order_release);
}

int LayerGate::Wait(int layer, double timeout_s) {
  if (const int open = open_layers(); open > layer) return open;
  std::unique_lock<std::mutex> lock(mutex_);
  const bool in_time = changed_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                                         [&] { return open_.load(std::memory_order_relaxed) > layer; });
  return in_time ? open_.load(std::memory_order_relaxed) : 0;
}

bool LayerGate::StreamWait(int layer, uint64_t stream, double timeout_s) {
  Require(layer >= 0 && layer < num_layers_, "the gate has no such layer");
  if (open_layers() > layer) return true;
  if (!cuda_) return Wait(layer, timeout_s) > 0;
  std::vector<Last> last;  // by stream of copies: what it got last of this layer and those below it
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                           [&] { return open_queued_ > layer; })) {
      return false;
    }
    last.resize(waiting_numbers_.size());
    for (int at = 0; at <= layer; ++at) {
      const std::vector<Last>& below = layers_[static_cast<size_t>(at)].last;
      for (size_t i = 0; i < below.size(); ++i) {
        if (below[i].number > last[i].number) last[i] = below[i];
      }
    }
    // Attention asks twice per layer, for K and for V, and layers are copied in groups.
    for (size_t i = 0; i < last.size(); ++i) {
      if (waiting_stream_ == stream && waiting_numbers_[i] >= last[i].number) last[i].number = 0;
    }
    if (std::all_of(last.begin(), last.end(), [](const Last& each) { return each.number == 0; })) return true;
  }
  std::string error;
  for (const Last& each : last) {
    if (each.number == 0) continue;
    if (!cuda_->StreamWaitEvent(reinterpret_cast<void*>(stream), reinterpret_cast<uint64_t>(each.event.get()),
                                &error)) {
      return Wait(layer, timeout_s) > 0;
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (waiting_stream_ != stream) std::fill(waiting_numbers_.begin(), waiting_numbers_.end(), 0);
  waiting_stream_ = stream;
  for (size_t i = 0; i < last.size(); ++i) {
    waiting_numbers_[i] = std::max(waiting_numbers_[i], last[i].number);
  }
  return true;
}

int LayerGate::open_layers() const { return open_.load(std::memory_order_acquire); }

}  // namespace flexkv
