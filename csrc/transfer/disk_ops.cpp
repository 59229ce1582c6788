// The engine's disk ops: how an op is shared out among the lanes, in which steps a read goes, and what goes on to the
// device with each of them.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "transfer/transfer_engine.hpp"

namespace flexkv {

void TransferEngine::StartDiskOp(Op* op) {
  const bool write = op->spec.type == TransferType::kH2Disk;
  auto disk = std::make_unique<SsdTransfer>();
  SsdTransfer* transfer = disk.get();
  transfer->write = write;
  transfer->keys = op->spec.keys.data();
  transfer->host_slots = (write ? op->spec.src : op->spec.dst).data();
  transfer->ssd_slots = (write ? op->spec.dst : op->spec.src).data();
  transfer->num_blocks = op->num_blocks;
  while (slices_[transfer->slice_begin].layer_begin != op->spec.layer_begin) transfer->slice_begin++;
  uint32_t slice_end = transfer->slice_begin + 1;
  while (slices_[slice_end - 1].layer_end != op->spec.layer_end) slice_end++;
  transfer->step_ends = {slice_end};
  const std::vector<Op>& ops = op->graph->ops;
  const bool followed = std::any_of(op->successors.begin(), op->successors.end(),
                                    [&](uint32_t next) { return ops[next].spec.after_layers >= 0; });
  if (followed) {
    std::vector<size_t> bytes;
    for (uint32_t i = transfer->slice_begin; i < slice_end; ++i) bytes.push_back(slices_[i].bytes);
    const size_t per_read =
        slices_per_read_ > 0 ? slices_per_read_ : SlicesPerRead(read_cost_, op->num_blocks, bytes);
    transfer->step_ends = StepsOfRead(bytes.size(), per_read);
    for (uint32_t& end : transfer->step_ends) end += transfer->slice_begin;
    if (copier_->copies_at_once()) {
      transfer->on_block = [this, op, transfer](uint32_t step, uint32_t block) {
        ForwardBlock(op, block, slices_[transfer->step_begin(step)].layer_begin,
                     slices_[transfer->step_ends[step] - 1].layer_end);
      };
    }
    transfer->on_step = [this, op, transfer](uint32_t step) {
      ForwardLayers(op, slices_[transfer->step_begin(step)].layer_begin,
                    slices_[transfer->step_ends[step] - 1].layer_end);
    };
  }
  transfer->deadline_s = op->graph->deadline_s;
  transfer->cancelled = &op->graph->cancelled;
  transfer->on_end = [this, op] { EndDiskOp(op); };
  op->disk = std::move(disk);
  std::vector<std::vector<uint32_t>> by_lane(lanes_.size());
  for (size_t b = 0; b < op->num_blocks; ++b) {
    by_lane[static_cast<size_t>(transfer->ssd_slots[b]) % lanes_.size()].push_back(static_cast<uint32_t>(b));
  }
  size_t lanes = 0;
  for (const auto& blocks : by_lane) lanes += !blocks.empty();
  transfer->Reset(lanes);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Busy(op->spec.type, +1);
    if (!write && running_[static_cast<int>(op->spec.type)] > 1) reads_mixed_s_ = Now();
    if (followed) {
      stats_.layers_per_read = 0;
      for (uint32_t step = 0; step < transfer->num_steps(); ++step) {
        const int layers = slices_[transfer->step_ends[step] - 1].layer_end -
                           slices_[transfer->step_begin(step)].layer_begin;
        stats_.layers_per_read = std::max(stats_.layers_per_read, static_cast<uint32_t>(layers));
      }
    }
  }
  // The last lane may end the op, and the graph with it, before this loop does: nothing of the op is
  // touched in it.
  for (size_t i = 0; i < by_lane.size(); ++i) {
    if (!by_lane[i].empty()) lanes_[i]->Start(transfer, std::move(by_lane[i]));
  }
}

void TransferEngine::EndDiskOp(Op* op) {
  SsdTransfer& disk = *op->disk;
  const auto count = [&](BlockOutcome outcome) { return disk.count[static_cast<int>(outcome)].load(); };
  const bool failed = count(BlockOutcome::kFailed) > 0 || count(BlockOutcome::kCorrupt) > 0;
  const OpStatus status = failed                              ? OpStatus::kFailed
                          : count(BlockOutcome::kDropped) > 0 ? OpStatus::kCancelled
                                                              : OpStatus::kDone;
  op->result.corrupt = count(BlockOutcome::kCorrupt);
  LearnReadCost(*op, status);
  std::string error = status == OpStatus::kCancelled ? WhyCancelled(*op) : disk.error;
  std::vector<uint8_t> ok;
  if (status != OpStatus::kDone) {
    for (BlockOutcome outcome : disk.outcome) ok.push_back(outcome == BlockOutcome::kGood);
  }
  Finish(op, status, std::move(error), std::move(ok));
}

// Only from reads that had the disk's reads for themselves, as far as we know.
void TransferEngine::LearnReadCost(const Op& op, OpStatus status) {
  const SsdTransfer& disk = *op.disk;
  bool alone;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const bool others = running_[static_cast<int>(op.spec.type)] > 1;
    alone = !others && reads_mixed_s_ < op.result.start_s;
    if (others && !disk.write) reads_mixed_s_ = Now();
    Busy(op.spec.type, -1);
  }
  if (disk.write || !alone || status != OpStatus::kDone) return;
  size_t bytes = 0;
  for (uint32_t i = disk.slice_begin; i < disk.step_ends.back(); ++i) bytes += slices_[i].bytes;
  read_cost_.Observe(static_cast<double>(op.num_blocks * disk.num_steps()),
                     static_cast<double>(op.num_blocks * bytes), Now() - op.result.start_s);
}

// Some layers of one block of a read are in host memory.
void TransferEngine::ForwardBlock(Op* op, size_t block, int layer_begin, int layer_end) {
  for (uint32_t next : op->successors) {
    Op& load = op->graph->ops[next];
    if (load.spec.after_layers < 0 || !BeginPiece(&load)) continue;
    copier_->CopyAtOnce(BlocksOf(&load), block, layer_begin, layer_end);
    EndPiece(&load, 0, "");
  }
}

// Layers of all blocks of a read are in host memory.
void TransferEngine::ForwardLayers(Op* op, int layer_begin, int layer_end) {
  std::vector<Op>& ops = op->graph->ops;
  for (uint32_t next : op->successors) {
    Op& load = ops[next];
    if (load.spec.after_layers < 0 || load.num_blocks == 0) continue;
    if (!copier_->copies_at_once()) {
      StartPiece(&load, layer_begin, layer_end);
    } else if (BeginPiece(&load)) {  // and so before each of its blocks: they have been copied
      Pass(&load, layer_begin, layer_end);
      EndPiece(&load, layer_end - layer_begin, "");
    }
  }
}

}  // namespace flexkv
