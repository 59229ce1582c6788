// The data plane: runs graphs of copies between the device pool, the host pool and the SSD files.
// It moves bytes and decides nothing.
//
// Guarantees: every op of a submitted graph ends exactly once, as done, failed or cancelled; a graph
// is reported exactly once, after its last op; an op starts only after its dependencies are done;
// loads that a forward waits for go before stores. No thread here ever takes the GIL.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "block_layout.hpp"
#include "host_pool.hpp"
#include "io_engine.hpp"
#include "ssd_lane.hpp"
#include "ssd_store.hpp"
#include "types.hpp"

namespace flexkv {

class CudaDriver;

enum class TransferType : uint8_t { kH2D, kD2H, kDisk2H, kH2Disk };
constexpr int kNumTransferTypes = 4;

enum class OpStatus : uint8_t { kPending, kDone, kFailed, kCancelled };

// Tells a forward, layer by layer, when the loads it was promised have landed. One gate serves all
// loads of a batch: a layer is open when every one of them has passed it.
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

struct OpSpec {
  TransferType type = TransferType::kH2D;
  // Token slots of the device pool (tokens_per_block per block), host slots, or SSD slots.
  std::vector<int64_t> src;
  std::vector<int64_t> dst;
  int layer_begin = 0;
  int layer_end = 0;    // 0: all layers. Disk ops move whole slices (see SlicesOf)
  std::vector<BlockKey> keys;   // disk ops: which block each slot holds, or is to hold
  std::vector<uint32_t> after;  // positions of ops in the graph that must be done first
};

struct GraphSpec {
  std::vector<OpSpec> ops;
  std::shared_ptr<LayerGate> gate;     // told by every H2D op of the graph
  std::vector<uint64_t> wait_events;   // CUDA events to wait for before touching the device pool
  double timeout_s = 0;                // ops that have not started by then are cancelled; 0: none
};

struct OpResult {
  OpStatus status = OpStatus::kPending;
  std::vector<uint8_t> ok;   // disk ops: per block; empty when all are like `status`
  uint32_t corrupt = 0;      // blocks that were read but are not what was written
  double start_s = 0;        // on the engine's monotonic clock
  double end_s = 0;
};

struct GraphResult {
  uint64_t graph = 0;
  bool done = false;         // every op is done
  std::string error;         // the first failure, in words
  std::vector<OpResult> ops;
};

struct TransferStats {
  uint64_t ops_done[kNumTransferTypes] = {};
  uint64_t ops_failed[kNumTransferTypes] = {};
  uint64_t ops_cancelled[kNumTransferTypes] = {};
  uint64_t bytes[kNumTransferTypes] = {};
  double busy_s[kNumTransferTypes] = {};
  uint64_t corrupt_blocks = 0;
};

struct SsdIoOptions {
  IoEngineKind kind = IoEngineKind::kAuto;
  int depth = 64;               // transfers in flight per directory
  double write_bytes_per_s = 0; // over all directories; 0: no limit
};

class TransferEngine {
 public:
  // `cuda_device` < 0: the device pool is CPU memory.
  TransferEngine(BlockLayout layout, std::shared_ptr<HostPool> host, int copy_threads, int cuda_device);
  ~TransferEngine();

  // Puts an SSD tier under the engine, or takes it away. No disk op may be pending.
  void AttachSsd(std::shared_ptr<SsdStore> store, const SsdIoOptions& options);
  void DetachSsd();
  // For how long the oldest disk transfer has been on its way; 0 if there is none.
  double ssd_oldest_io_s() const;

  // Checks every index of the graph (UsageError) and starts it. Returns its id.
  uint64_t Submit(GraphSpec spec);
  // Ops that have not started are cancelled; running ones end by themselves. The graph is reported
  // as usual. False if it is not known (ended already).
  bool Cancel(uint64_t graph);
  // Graphs that ended since the last call, in the order in which they ended.
  std::vector<GraphResult> Poll();
  // Waits until `graph` has ended or the time is up; does not take its result from Poll.
  bool Wait(uint64_t graph, double timeout_s);
  // Waits until no graph is left. False when the time is up.
  bool Drain(double timeout_s);

  // Waits until no copy from or to the device runs. With every graph cancelled none will start.
  bool DrainDevice(double timeout_s);

  int event_fd() const { return event_fd_; }  // readable while Poll has something
  size_t num_pending() const;
  TransferStats Stats() const;
  const std::string& io_engine_name() const { return io_name_; }
  const std::string& io_engine_note() const { return io_note_; }
  const std::vector<Slice>& slices() const { return slices_; }
  double Now() const;

 private:
  struct Graph;
  struct Op;
  struct CopyJob;
  struct CopyQueue {
    std::deque<std::shared_ptr<CopyJob>> jobs;
  };
  void Dispatch(Op* op);
  void Finish(Op* op, OpStatus status, std::string error, std::vector<uint8_t> ok);
  bool ShouldSkip(const Op& op) const;
  void CopyLoop();
  void OrderByRow(CopyJob& job) const;
  void CopyChunk(CopyJob& job, size_t chunk);
  void CudaLoop(bool to_device);
  void CudaRun(Op* op, void* stream, bool to_device);
  void StartDiskOp(Op* op);
  void EndDiskOp(Op* op);

  const BlockLayout layout_;
  const std::shared_ptr<HostPool> host_;
  std::vector<Slice> slices_;
  std::shared_ptr<SsdStore> ssd_;
  std::vector<std::unique_ptr<SsdLane>> lanes_;  // one per directory
  std::shared_ptr<CudaDriver> cuda_;
  int event_fd_ = -1;
  std::string io_name_ = "none", io_note_;
  std::chrono::steady_clock::time_point epoch_;

  // Graphs and results.
  mutable std::mutex mutex_;
  std::condition_variable ended_;
  std::unordered_map<uint64_t, std::unique_ptr<Graph>> graphs_;
  std::deque<GraphResult> results_;
  TransferStats stats_;
  uint64_t next_graph_ = 1;
  size_t device_ops_ = 0;  // that have started and not ended

  // Copies. Index 0: loads (H2D), index 1: stores (D2H). CPU threads serve both, loads first; on CUDA
  // each direction has its own thread and stream.
  std::mutex copy_mutex_;
  std::condition_variable copy_wake_;
  CopyQueue copy_queue_[2];
  std::vector<std::thread> copy_threads_;
  std::atomic<bool> stop_{false};
};

}  // namespace flexkv
