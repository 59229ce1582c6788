// The engine's ops between the host pool and a tier below: in which steps a load goes, and what goes on to
// the device with each of them.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "transfer/transfer_engine.hpp"

namespace flexkv {

void TransferEngine::StartLowerOp(Op* op) {
  const Group& group = GroupOf(*op);
  Below& below = BelowOf(*op);
  const bool store = op->spec.type == TransferType::kH2Lower;
  op->lower = std::make_unique<TierTransfer>();
  TierTransfer* transfer = op->lower.get();
  transfer->store = store;
  transfer->keys = op->spec.keys.data();
  transfer->host_slots = (store ? op->spec.src : op->spec.dst).data();
  transfer->tier_slots = (store ? op->spec.dst : op->spec.src).data();
  transfer->num_blocks = op->num_blocks;
  while (group.slices[transfer->slice_begin].layer_begin != op->spec.layer_begin) transfer->slice_begin++;
  uint32_t slice_end = transfer->slice_begin + 1;
  while (group.slices[slice_end - 1].layer_end != op->spec.layer_end) slice_end++;
  transfer->step_ends = {slice_end};
  const bool followed = !op->followers.empty();
  if (followed) {
    std::vector<size_t> bytes;
    for (uint32_t i = transfer->slice_begin; i < slice_end; ++i) bytes.push_back(group.slices[i].bytes);
    const size_t per_read = below.slices_per_read > 0 ? below.slices_per_read
                                                      : SlicesPerRead(below.read_cost, op->num_blocks, bytes);
    transfer->step_ends = StepsOfRead(bytes.size(), per_read);
    for (uint32_t& end : transfer->step_ends) end += transfer->slice_begin;
    if (group.copier->copies_at_once()) {
      transfer->on_block = [this, op, transfer, &group](uint32_t step, uint32_t block) {
        ForwardBlock(op, block, group.slices[transfer->step_begin(step)].layer_begin,
                     group.slices[transfer->step_ends[step] - 1].layer_end);
      };
    }
    transfer->on_step = [this, op, transfer, &group](uint32_t step) {
      ForwardLayers(op, group.slices[transfer->step_begin(step)].layer_begin,
                    group.slices[transfer->step_ends[step] - 1].layer_end);
    };
  }
  transfer->deadline_s = op->graph->deadline_s;
  transfer->cancelled = &op->graph->cancelled;
  transfer->on_end = [this, op] { EndLowerOp(op); };
  std::shared_ptr<LowerTier> tier;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    tier = below.tier;
    Route& route = RouteOf(*op);
    Busy(&route, +1);
    if (!store && route.running > 1) below.reads_mixed_s = Now();
    if (followed) {
      route.stats.layers_per_read = 0;
      for (uint32_t step = 0; step < transfer->num_steps(); ++step) {
        const int layers = group.slices[transfer->step_ends[step] - 1].layer_end -
                           group.slices[transfer->step_begin(step)].layer_begin;
        route.stats.layers_per_read = std::max(route.stats.layers_per_read, static_cast<uint32_t>(layers));
      }
    }
  }
  // The op may have ended, and the graph with it, before this returns.
  tier->Start(transfer);
}

void TransferEngine::EndLowerOp(Op* op) {
  TierTransfer& transfer = *op->lower;
  const uint32_t corrupt = transfer.Count(BlockOutcome::kCorrupt);
  const uint32_t missing = transfer.Count(BlockOutcome::kMissing);
  const bool failed = transfer.Count(BlockOutcome::kFailed) + corrupt + missing > 0;
  const OpStatus status = failed                                       ? OpStatus::kFailed
                          : transfer.Count(BlockOutcome::kDropped) > 0 ? OpStatus::kCancelled
                                                                       : OpStatus::kDone;
  op->result.corrupt = corrupt;
  op->result.missing = missing;
  LearnReadCost(*op, status);
  std::string error = status == OpStatus::kCancelled ? WhyCancelled(*op) : transfer.error;
  std::vector<uint8_t> ok;
  if (status != OpStatus::kDone) {
    for (BlockOutcome outcome : transfer.outcome) ok.push_back(outcome == BlockOutcome::kGood);
  }
  Finish(op, status, std::move(error), std::move(ok));
}

// Only from loads that had the tier's loads for themselves, as far as we know.
void TransferEngine::LearnReadCost(const Op& op, OpStatus status) {
  const TierTransfer& transfer = *op.lower;
  Below& below = BelowOf(op);
  bool alone;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Route& route = RouteOf(op);
    const bool others = route.running > 1;
    alone = !others && below.reads_mixed_s < op.result.start_s;
    if (others && !transfer.store) below.reads_mixed_s = Now();
    Busy(&route, -1);
  }
  if (transfer.store || !alone || status != OpStatus::kDone) return;
  size_t bytes = 0;
  for (uint32_t i = transfer.slice_begin; i < transfer.step_ends.back(); ++i)
    bytes += GroupOf(op).slices[i].bytes;
  below.read_cost.Observe(static_cast<double>(op.num_blocks * transfer.num_steps()),
                          static_cast<double>(op.num_blocks * bytes), Now() - op.result.start_s);
}

// Some layers of one block of a read are in host memory.
void TransferEngine::ForwardBlock(Op* op, size_t block, int layer_begin, int layer_end) {
  for (uint32_t next : op->followers) {
    Op& load = op->graph->ops[next];
    if (!BeginPiece(&load)) continue;
    GroupOf(load).copier->CopyAtOnce(BlocksOf(&load), block, layer_begin, layer_end);
    EndPiece(&load, 0, "");
  }
}

// Layers of all blocks of a read are in host memory.
void TransferEngine::ForwardLayers(Op* op, int layer_begin, int layer_end) {
  std::vector<Op>& ops = op->graph->ops;
  const Group& group = GroupOf(*op);
  for (uint32_t next : op->followers) {
    Op& load = ops[next];
    if (load.num_blocks == 0) continue;
    if (!group.copier->copies_at_once()) {
      StartPiece(&load, layer_begin, layer_end);
    } else if (BeginPiece(&load)) {  // and so before each of its blocks: they have been copied
      Pass(&load, layer_begin, layer_end);
      EndPiece(&load, layer_end - layer_begin, "");
    }
  }
}

}  // namespace flexkv
