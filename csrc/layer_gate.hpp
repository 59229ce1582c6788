// Tells a forward, layer by layer, when the loads it was promised have landed.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <vector>

namespace flexkv {

// One gate serves all loads of a batch: a layer is open when every one of them has passed it.
class LayerGate {
 public:
  explicit LayerGate(int num_layers);
  int num_layers() const { return num_layers_; }
  // Before the first load is submitted: how many loads will report.
  void Expect(int loads);
  // Waits until `layer` is open. False if the loads failed or the time is up.
  bool Wait(int layer, double timeout_s);
  // Open layers, counted from the first, without waiting.
  int open_layers() const;
  bool failed() const { return failed_.load(); }

  void Arrive(int layer);
  void Fail();

 private:
  const int num_layers_;
  std::atomic<int> open_{0};
  std::atomic<bool> failed_{false};
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int> left_;
};

}  // namespace flexkv
