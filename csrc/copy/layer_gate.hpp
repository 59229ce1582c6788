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

#include "cuda/cuda_stream.hpp"

namespace flexkv {

// One gate serves all loads of a batch: a layer is open when every one of them has passed it. A load that
// fails passes what it has left, too: the gate says when to go on, not which loads are good. A gate with one
// layer serves a store: it is open when the device's slots may be written again.
//
// On a GPU nobody need wait for that. Once the copies of a layer are on a stream, another stream can wait for
// the event behind them (StreamWait). Until then the host waits: no stream ever waits for what is not on a
// stream yet.
class LayerGate {
 public:
  // `cuda`: whose streams copy; nullptr where the device pool is CPU memory.
  explicit LayerGate(int num_layers, std::shared_ptr<CudaDriver> cuda = nullptr);
  LayerGate(const LayerGate&) = delete;
  LayerGate& operator=(const LayerGate&) = delete;

  int num_layers() const { return num_layers_; }
  // Before the first load is submitted: how many loads will report.
  void Expect(int loads);
  // Waits until `layer` is open. Returns how many layers are, counted from the first, so that who goes
  // through them in order need not ask for each; 0 if the time is up.
  int Wait(int layer, double timeout_s);
  // Makes what is queued on `stream` (a CUstream) from now on wait until `layer` is open. Waits here, outside
  // the driver and without a lock, until all copies of it are on a stream. False if the time is up.
  bool StreamWait(int layer, uint64_t stream, double timeout_s);
  // Open layers, counted from the first, without waiting.
  int open_layers() const;

  // That many of the expected loads have been handed to the engine. True if those were all.
  bool Submitted(int loads);
  // Whether more of the expected loads are to come, and the last one came less than `max` ago.
  bool AwaitsLoads(std::chrono::steady_clock::duration max) const;

  // A load's copies of these layers are on a stream of copies, and the event behind them. A Pass follows for
  // each. `stream`: which one, counted from 0.
  void Queued(const std::vector<int>& layers, const StreamEvent& event, size_t stream);
  // A load's bytes of this layer are on the device, or never will be.
  void Pass(int layer, bool was_queued = false);

 private:
  // Behind what was queued last on one stream of copies.
  struct Last {
    StreamEvent event;
    uint64_t number = 0;  // of that event; 0: there is none
  };
  struct Layer {
    int left = 0;            // loads that have not passed
    int left_queued = 0;     // loads that are not even on a stream
    std::vector<Last> last;  // by stream: several may have parts of a layer
  };
  void Open();

  const int num_layers_;
  const std::shared_ptr<CudaDriver> cuda_;
  std::atomic<int> open_{0};
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Layer> layers_;
  int open_queued_ = 0;       // layers that will be open when the streams of copies get there
  uint64_t last_number_ = 0;  // events have running numbers: what was queued last on a stream lands last
  int unsubmitted_ = 0;       // loads that are expected and not even known to the engine
  std::chrono::steady_clock::time_point submitted_;  // when the last one came
  uint64_t waiting_stream_ = 0;                      // the last one that was told to wait,
  std::vector<uint64_t> waiting_numbers_;            // and for which event of each stream of copies
};

}  // namespace flexkv
