#include "layer_gate.hpp"

#include <utility>

#include "types.hpp"

namespace flexkv {

LayerGate::LayerGate(int num_layers, std::shared_ptr<StreamFlags> flags)
    : num_layers_(num_layers),
      flags_(std::move(flags)),
      row_(flags_ && num_layers > 0 ? flags_->Take(num_layers) : StreamFlags::Row{}),
      left_(num_layers, 0),
      left_queued_(num_layers, 0) {
  Require(num_layers > 0, "a gate needs at least one layer");
}

LayerGate::~LayerGate() {
  if (flags_) flags_->GiveBack(row_);
}

void LayerGate::Expect(int loads) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int& left : left_) left += loads;
  for (int& left : left_queued_) left += loads;
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

void LayerGate::Pass(int layer) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    left_[layer]--;
    int open = open_.load(std::memory_order_relaxed);
    for (; open < num_layers_ && left_[open] <= 0; ++open) {
      if (row_.words != nullptr) StreamFlags::Raise(row_, open);
    }
    open_.store(open, std::memory_order_release);
  }
  changed_.notify_all();
}

bool LayerGate::Queued(int layer, int loads, void* stream, std::string* error) {
  std::lock_guard<std::mutex> lock(mutex_);
  left_queued_[layer] -= loads;
  bool good = true;
  for (; open_queued_ < num_layers_ && left_queued_[open_queued_] <= 0; ++open_queued_) {
    good = good && (row_.words == nullptr || flags_->QueueRaise(row_, open_queued_, stream, error));
  }
  return good;
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
  if (row_.words == nullptr) return Wait(layer, timeout_s) > 0;
  if (StreamFlags::IsRaised(row_, layer)) return true;
  {
    // Attention asks twice per layer, for K and for V, and a layer is never open before those below it.
    std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_layer_ >= layer && waiting_stream_ == stream) return true;
  }
  // Without the lock: on a stream whose queue is full this call waits for the stream to move on, which may be
  // waiting for a copy that takes the lock.
  std::string error;
  if (flags_->QueueWait(row_, layer, reinterpret_cast<void*>(stream), &error)) {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_stream_ = stream;
    waiting_layer_ = layer;
    return true;
  }
  return Wait(layer, timeout_s) > 0;
}

int LayerGate::open_layers() const { return open_.load(std::memory_order_acquire); }

}  // namespace flexkv
