// Graphs of copies: as they are submitted, while they run, and what became of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/types.hpp"
#include "copy/layer_gate.hpp"
#include "tier/lower_tier.hpp"

namespace flexkv {

class AwaitedSlots;

// Between device and host, and between host and a tier below.
enum class TransferType : uint8_t { kH2D, kD2H, kLower2H, kH2Lower };

struct OpSpec {
  TransferType type = TransferType::kH2D;
  Tier tier = Tier::kCpu;  // lower ops: which one; else the CPU tier
  uint32_t group = 0;      // whose part of the blocks (TransferEngine::AddGroup); slots are its own
  // Token slots of the device pool (tokens_per_block per block), host slots, or slots of the lower tier.
  std::vector<int64_t> src;
  std::vector<int64_t> dst;
  // Device copies: the slots are on their way (TransferEngine::ReadSlots). Instead of them `src` or `dst`
  // then says for each block which one of these it is, tokens_per_block slots being one.
  std::shared_ptr<AwaitedSlots> awaited;
  int layer_begin = 0;
  int layer_end = 0;           // 0: all layers. Lower ops move whole slices (see SlicesOf)
  std::vector<BlockKey> keys;  // lower ops: which block each slot holds, or is to hold
  // H2D: position of the LOWER2H op of the same layers that it follows layer by layer, or -1. The read
  // then goes in steps of a few layers, as many as its measured cost makes worth while.
  int32_t after_layers = -1;
};

struct GraphSpec {
  std::vector<OpSpec> ops;
  // Passed at every layer by every H2D op of the graph, whatever becomes of it; or, a gate with one layer, by
  // its D2H op when the device's slots may be written again.
  std::shared_ptr<LayerGate> gate;
  std::vector<uint64_t> wait_events;  // CUDA events to wait for before touching the device pool
  double timeout_s = 0;               // ops that have not started by then are cancelled; 0: none
  bool background = false;            // nobody waits for it: refused when too much is queued
};

struct OpResult {
  OpStatus status = OpStatus::kPending;
  std::vector<uint8_t> ok;  // lower ops: per block; empty when all are like `status`
  uint32_t corrupt = 0;     // blocks that were read but are not what was written
  uint32_t missing = 0;     // blocks that the tier does not have any more
  double start_s = 0;       // on the engine's monotonic clock
  double end_s = 0;
};

struct GraphResult {
  uint64_t graph = 0;
  bool done = false;  // every op is done
  std::string error;  // the first failure, in words
  std::vector<OpResult> ops;
};

enum class LayerState : uint8_t { kUnknown, kQueued, kPassed };

struct RunningGraph;

// An op while it runs: the engine's own.
struct RunningOp {
  RunningGraph* graph = nullptr;
  OpSpec spec;
  // Device copies; of one that awaited its slots touched by the thread of the copier alone.
  std::vector<int64_t> token_slots;  // if they were awaited, else they are in `spec`
  std::vector<int64_t> first_rows;
  size_t num_blocks = 0;
  bool poisoned = false;            // what it follows did not get done
  std::vector<uint32_t> followers;  // layer by layer, by their position in the graph
  OpResult result;
  std::unique_ptr<TierTransfer> lower;  // lower ops that have started

  // Device copies, under the engine's mutex: pieces are ranges of layers.
  int pieces_running = 0;
  int layers_left = 0;
  bool more_pieces = false;  // what it follows by layers has not ended
  std::string error;
  // What the gate knows of each of its layers. Each is written by one thread at a time, and the op's end
  // comes after all of them, so without a lock.
  std::vector<LayerState> at_gate;
};

struct RunningGraph {
  uint64_t id = 0;
  std::vector<RunningOp> ops;
  std::shared_ptr<LayerGate> gate;
  std::vector<uint64_t> wait_events;
  double deadline_s = 0;
  size_t left = 0;
  std::atomic<bool> cancelled{false};
  std::string error;
};

}  // namespace flexkv
