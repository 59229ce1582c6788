// The data plane: runs graphs of copies between the device pool, the host pool and the tiers below it.
// It moves bytes and decides nothing.
//
// Guarantees: every op of a submitted graph ends exactly once, as done, failed or cancelled; a graph is
// reported exactly once, after its last op; an op that follows a read by layers copies a layer of a block
// only after that was read and verified; loads that a forward waits for go before stores, and their layers in
// the order of the model, whatever request they belong to. No thread here ever takes the GIL.
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
#include "copy/cuda_measure.hpp"
#include "copy/layer_gate.hpp"
#include "memory/block_layout.hpp"
#include "memory/host_pool.hpp"
#include "tier/lower_tier.hpp"
#include "transfer/cost_fit.hpp"
#include "transfer/graph.hpp"

namespace flexkv {

class SlotReader;

// Of all ops between two places, in one direction.
struct TransferStats {
  std::string name;  // H2D, D2H, and of a lower tier named X: X2H, H2X
  uint64_t ops_done = 0;
  uint64_t ops_failed = 0;
  uint64_t ops_cancelled = 0;
  uint64_t bytes = 0;
  double busy_s = 0;            // time in which at least one was moving bytes
  double queue_s = 0;           // copies on a GPU: the host's time for queueing them
  uint64_t queued_bytes = 0;    // of ops that have not ended
  uint64_t refused_graphs = 0;  // background graphs that found this queue full
  // Of loads from a lower tier:
  uint64_t corrupt_blocks = 0;   // were not what had been stored
  uint64_t missing_blocks = 0;   // were not there any more
  uint32_t layers_per_read = 0;  // at most, of the last one that was followed by layers
};

class TransferEngine {
 public:
  // `cuda_device` < 0: the device pool is CPU memory. Background graphs may have `queue_bytes` of each type
  // of transfer waiting or running, and one graph more; 0: no limit. `lower_tiers` are the names, in
  // statistics, of the tiers that may be attached. `cuda_library` is for tests, see CudaDriver::Load. The
  // layout and the pool are those of the first group.
  TransferEngine(BlockLayout layout, std::shared_ptr<HostPool> host, int copy_threads, int cuda_device,
                 size_t queue_bytes, const std::vector<std::string>& lower_tiers,
                 const std::string& cuda_library);
  ~TransferEngine();

  // A further part that blocks have, in a pool of its own. Before the first graph. `gate_layers` says which
  // layer of a gate each of its layers is; where there are none they are the gate's own. Returns its number:
  // ops name it.
  uint32_t AddGroup(BlockLayout layout, std::shared_ptr<HostPool> host, std::vector<int> gate_layers);
  // The same for the first group.
  void SetGateLayers(std::vector<int> gate_layers) { groups_[0]->gate_layers = std::move(gate_layers); }

  // Puts a tier under a group, or takes it away; 1 is the first below the CPU tier. No op of it may be
  // pending. Loads that are followed by layers go `slices_per_read` slices at a time, 0: by measured cost.
  void Attach(Tier number, std::shared_ptr<LowerTier> tier, uint32_t slices_per_read, uint32_t group);
  void Detach(Tier number, uint32_t group);

  // A gate for graphs of this engine; on a GPU streams can wait for it.
  std::shared_ptr<LayerGate> MakeGate(int num_layers) const;

  // Token slots that are int64 values in the device's memory, for ops to be submitted: copied behind what is
  // on the caller's stream (a CUstream), and nobody waits for that. See SlotReader::Read.
  std::shared_ptr<AwaitedSlots> ReadSlots(uint64_t address, size_t count, uint64_t stream);

  // Checks every index of the graph (UsageError) and starts it. Slots that are awaited are checked when they
  // are there: their op fails. Returns its id, or 0 for a background graph that finds the queues full: back
  // pressure, nothing was started.
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

  std::vector<TransferStats> Stats() const;
  const std::string& cuda_note() const { return cuda_note_; }  // which ways copies take on a GPU, in words
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
  // Layers of the gate that are no layers of the op's group.
  void PassOthers(Op* op);
  void PassRest(Op* op);
  void Finish(Op* op, OpStatus status, std::string error, std::vector<uint8_t> ok);
  bool ShouldSkip(const Op& op) const;
  static std::string WhyCancelled(const Op& op);
  static CopiedBlocks BlocksOf(const Op* op);
  void BindSlots(Op* op, CopiedBlocks* blocks) const;
  void StartLowerOp(Op* op);
  void EndLowerOp(Op* op);
  void ForwardBlock(Op* op, size_t block, int layer_begin, int layer_end);
  void ForwardLayers(Op* op, int layer_begin, int layer_end);
  void LearnReadCost(const Op& op, OpStatus status);

  // Ops between two places, in one direction.
  struct Route {
    TransferStats stats;
    int running = 0;  // pieces, or lower ops, that move bytes
    double busy_since_s = 0;
  };
  struct Below {
    std::shared_ptr<LowerTier> tier;  // null: away
    uint32_t slices_per_read = 0;
    // Per transfer and per byte. Before anything was read: an NVMe disk of the slower kind.
    CostFit read_cost{10e-6, 0.5e-9};
    double reads_mixed_s = 0;  // when two loads last ran at the same time
  };
  Route& RouteOf(TransferType type, Tier tier = Tier::kCpu) {
    const bool out = type == TransferType::kD2H || type == TransferType::kH2Lower;
    return routes_[2 * static_cast<size_t>(tier) + out];
  }
  Route& RouteOf(const Op& op) { return RouteOf(op.spec.type, op.spec.tier); }
  struct Group {
    explicit Group(BlockLayout of) : layout(std::move(of)) {}
    BlockLayout layout;
    std::shared_ptr<HostPool> host;
    std::vector<int> gate_layers;  // empty: a layer is the gate's of the same number
    std::vector<Slice> slices;
    std::vector<std::unique_ptr<Below>> below;  // by number, from tier 1 on
    std::unique_ptr<Copier> copier;

    int GateLayer(int layer) const {
      return gate_layers.empty() ? layer : gate_layers[static_cast<size_t>(layer)];
    }
  };
  Group& GroupOf(const Op& op) const { return *groups_[op.spec.group]; }
  // That an op moves, all of it.
  size_t BytesOf(const Op& op) const;
  Below& BelowOf(Tier number, uint32_t group) const;
  Below& BelowOf(const Op& op) const { return BelowOf(op.spec.tier, op.spec.group); }
  void Busy(Route* route, int change);
  // No copy from or to the device has started and not ended. Called with the mutex held.
  bool DeviceIsIdle() const { return routes_[0].running + routes_[1].running == 0; }

  const int copy_threads_;
  const size_t queue_bytes_;  // background graphs are refused beyond; 0: never
  const size_t num_lower_tiers_;
  const std::shared_ptr<CudaDriver> cuda_;  // null: the device pools are CPU memory
  // One for all groups: whichever copier looks whether slots have come, it looks for all of them.
  std::shared_ptr<SlotReader> slot_reader_;  // null: on a CPU
  EnginePieces engine_pieces_;
  std::string cuda_note_;
  std::vector<std::unique_ptr<Group>> groups_;
  std::chrono::steady_clock::time_point epoch_;

  // Graphs and results.
  mutable std::mutex mutex_;
  std::condition_variable ended_;
  std::unordered_map<uint64_t, std::unique_ptr<Graph>> graphs_;
  std::deque<GraphResult> results_;
  std::vector<Route> routes_;  // device, then each lower tier: in, out
  uint64_t next_graph_ = 1;
};

}  // namespace flexkv
