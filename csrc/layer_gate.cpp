#include "layer_gate.hpp"

#include <chrono>

#include "types.hpp"

namespace flexkv {

LayerGate::LayerGate(int num_layers) : num_layers_(num_layers), left_(num_layers, 0) {
  Require(num_layers > 0, "a gate needs at least one layer");
}

void LayerGate::Expect(int loads) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int& left : left_) left += loads;
}

void LayerGate::Arrive(int layer) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    left_[layer]--;
    int open = open_.load(std::memory_order_relaxed);
    while (open < num_layers_ && left_[open] <= 0) ++open;
    open_.store(open, std::memory_order_release);
  }
  changed_.notify_all();
}

void LayerGate::Fail() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    failed_.store(true);
  }
  changed_.notify_all();
}

bool LayerGate::Wait(int layer, double timeout_s) {
  if (open_.load(std::memory_order_acquire) > layer) return !failed_.load();
  std::unique_lock<std::mutex> lock(mutex_);
  const bool in_time = changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), [&] {
    return failed_.load() || open_.load(std::memory_order_relaxed) > layer;
  });
  return in_time && !failed_.load();
}

int LayerGate::open_layers() const { return open_.load(std::memory_order_acquire); }

}  // namespace flexkv
