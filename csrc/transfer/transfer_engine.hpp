// The data plane: runs graphs of copies between the device pool, the host pool and the SSD files.
// It moves bytes and decides nothing.
//
// Guarantees: every op of a submitted graph ends exactly once, as done, failed or cancelled; a graph
// is reported exactly once, after its last op; an op starts only after its dependencies are done, and
// one that follows a read by layers copies a layer of a block only after that was read and verified;
// loads that a forward waits for go before stores, and their layers in the order of the model, whatever
// request they belong to. No thread here ever takes the GIL.
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
#include <unordered_map>
#include <vector>

#include "base/types.hpp"
#include "copy/copier.hpp"
#include "copy/layer_gate.hpp"
#include "memory/block_layout.hpp"
#include "memory/host_pool.hpp"
#include "ssd/io_engine.hpp"
#include "ssd/ssd_lane.hpp"
#include "ssd/ssd_store.hpp"
#include "transfer/cost_fit.hpp"
#include "transfer/graph.hpp"

namespace flexkv {

struct TransferStats {
  uint64_t ops_done[kNumTransferTypes] = {};
  uint64_t ops_failed[kNumTransferTypes] = {};
  uint64_t ops_cancelled[kNumTransferTypes] = {};
  uint64_t bytes[kNumTransferTypes] = {};
  double busy_s[kNumTransferTypes] = {};           // time in which at least one was moving bytes
  double queue_s[kNumTransferTypes] = {};          // copies on a GPU: the host's time for queueing them
  uint64_t queued_blocks[kNumTransferTypes] = {};  // of ops that have not ended
  uint64_t corrupt_blocks = 0;
  uint64_t refused_graphs[kNumTransferTypes] = {};  // background graphs that found this queue full
  uint32_t layers_per_read = 0;                     // at most, of the last read that was followed by layers
};

struct SsdIoOptions {
  IoEngineKind kind = IoEngineKind::kAuto;
  int depth = 64;                // transfers in flight per directory
  double write_bytes_per_s = 0;  // over all directories; 0: no limit
  uint32_t slices_per_read = 0;  // of reads that are followed by layers; 0: by measured cost
};

class TransferEngine {
 public:
  // `cuda_device` < 0: the device pool is CPU memory. Background graphs may have `queue_bytes` of each
  // type of transfer waiting or running, and one graph more; 0: no limit. `cuda_library` is for tests,
  // see CudaDriver::Load.
  TransferEngine(BlockLayout layout, std::shared_ptr<HostPool> host, int copy_threads, int cuda_device,
                 size_t queue_bytes, const std::string& cuda_library);
  ~TransferEngine();

  // Puts an SSD tier under the engine, or takes it away. No disk op may be pending.
  void AttachSsd(std::shared_ptr<SsdStore> store, const SsdIoOptions& options);
  void DetachSsd();
  // For how long the oldest disk transfer has been on its way; 0 if there is none.
  double ssd_oldest_io_s() const;

  // A gate for graphs of this engine; on a GPU streams can wait for it.
  std::shared_ptr<LayerGate> MakeGate(int num_layers) const;

  // Token slots that are int64 values in the device's memory, for ops to be submitted: copied behind what is on the
  // caller's stream (a CUstream), and nobody waits for that. See SlotReader::Read.
  std::shared_ptr<AwaitedSlots> ReadSlots(uint64_t address, size_t count, uint64_t stream);

  // Checks every index of the graph (UsageError) and starts it. Slots that are awaited are checked when they are
  // there: their op fails. Returns its id, or 0 for a background
  // graph that finds the queues full: back pressure, nothing was started.
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
  const std::string& cuda_note() const;  // what the GPU cannot do; empty if everything, or without one
  const std::vector<Slice>& slices() const { return slices_; }
  double Now() const;

 private:
  using Graph = RunningGraph;
  using Op = RunningOp;
  void Dispatch(Op* op);
  // Starts to copy some layers of an op, unless it is given up.
  void StartPiece(Op* op, int layer_begin, int layer_end);
  // False if the op is given up. If not, an EndPiece follows.
  bool BeginPiece(Op* op);
  void EndPiece(Op* op, int layers_copied, std::string error);
  // What the op follows by layers has ended.
  void EndUpstream(Op* op);
  void FinishCopy(Op* op);
  // The op's gate need not wait for it any longer: these layers have landed, or, where the op has failed,
  // never will.
  void Pass(Op* op, int layer_begin, int layer_end);
  void PassRest(Op* op);
  void Finish(Op* op, OpStatus status, std::string error, std::vector<uint8_t> ok);
  bool ShouldSkip(const Op& op) const;
  static std::string WhyCancelled(const Op& op);
  static CopiedBlocks BlocksOf(const Op* op);
  void BindSlots(Op* op, CopiedBlocks* blocks) const;
  void StartDiskOp(Op* op);
  void EndDiskOp(Op* op);
  void ForwardBlock(Op* op, size_t block, int layer_begin, int layer_end);
  void ForwardLayers(Op* op, int layer_begin, int layer_end);
  void LearnReadCost(const Op& op, OpStatus status);
  void Busy(TransferType type, int change);
  // No copy from or to the device has started and not ended. Called with the mutex held.
  bool DeviceIsIdle() const {
    return running_[static_cast<int>(TransferType::kH2D)] + running_[static_cast<int>(TransferType::kD2H)] ==
           0;
  }

  const BlockLayout layout_;
  const size_t queue_blocks_;  // background graphs are refused beyond; 0: never
  const std::shared_ptr<HostPool> host_;
  std::vector<Slice> slices_;
  std::shared_ptr<SsdStore> ssd_;
  std::vector<std::unique_ptr<SsdLane>> lanes_;  // one per directory
  // Per transfer and per byte. Before anything was read: an NVMe disk of the slower kind.
  CostFit read_cost_{10e-6, 0.5e-9};
  uint32_t slices_per_read_ = 0;
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
  int running_[kNumTransferTypes] = {};  // pieces, or disk ops, that move bytes
  double busy_since_s_[kNumTransferTypes] = {};
  double reads_mixed_s_ = 0;  // when two reads from disk last ran at the same time

  std::unique_ptr<Copier> copier_;
};

}  // namespace flexkv
