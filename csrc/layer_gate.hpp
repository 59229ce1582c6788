// Tells a forward, layer by layer, when the loads it was promised have landed.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "stream_flags.hpp"

namespace flexkv {

// One gate serves all loads of a batch: a layer is open when every one of them has passed it. A load that fails
// passes what it has left, too: the gate says when to go on, not which loads are good. A gate with one layer
// serves a store: it is open when the device's slots may be written again.
//
// On a GPU a gate has a flag per layer, which the copying stream raises and StreamWait makes another stream
// wait for. What no stream raises the host does, when the layer opens or the gate goes: no stream waits for ever.
class LayerGate {
 public:
  explicit LayerGate(int num_layers, std::shared_ptr<StreamFlags> flags = nullptr);
  ~LayerGate();
  LayerGate(const LayerGate&) = delete;
  LayerGate& operator=(const LayerGate&) = delete;

  int num_layers() const { return num_layers_; }
  // Before the first load is submitted: how many loads will report.
  void Expect(int loads);
  // Waits until `layer` is open. Returns how many layers are, counted from the first, so that who goes through
  // them in order need not ask for each; 0 if the time is up.
  int Wait(int layer, double timeout_s);
  // Makes what is queued on `stream` (a CUstream) from now on wait until `layer` is open, and returns at once;
  // the copy need not have been queued yet. Waits here, like Wait, where streams cannot wait for memory. False
  // if the time is up. Whatever opens the gate must not be queued behind this wait.
  bool StreamWait(int layer, uint64_t stream, double timeout_s);
  // Open layers, counted from the first, without waiting.
  int open_layers() const;

  // That many of the expected loads have been handed to the engine. True if those were all.
  bool Submitted(int loads);
  // Whether more of the expected loads are to come, and the last one came less than `max` ago.
  bool AwaitsLoads(std::chrono::steady_clock::duration max) const;

  // A load's bytes of this layer are on the device, or never will be.
  void Pass(int layer);

  // The copies of this layer for so many loads are on a stream, behind all other copies for this gate that have
  // not ended: raises the flags of the layers that are open by then. A Pass per load follows when they have. Of a
  // load that passes a layer without having queued it no stream can tell: from there on the host raises the flags.
  bool Queued(int layer, int loads, void* stream, std::string* error);

 private:
  const int num_layers_;
  const std::shared_ptr<StreamFlags> flags_;
  const StreamFlags::Row row_;  // without words where the host has to wait
  std::atomic<int> open_{0};
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int> left_;         // loads that have not passed, per layer
  std::vector<int> left_queued_;  // loads that are not even on a stream
  int open_queued_ = 0;           // layers that will be open when the stream gets there
  int unsubmitted_ = 0;           // loads that are expected and not even known to the engine
  std::chrono::steady_clock::time_point submitted_;  // when the last one came
  uint64_t waiting_stream_ = 0;   // the last one that was told to wait,
  int waiting_layer_ = -1;        // and for what
};

}  // namespace flexkv
