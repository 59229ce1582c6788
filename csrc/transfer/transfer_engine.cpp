#include "transfer/transfer_engine.hpp"

#include <algorithm>
#include <utility>

#include "copy/cpu_copier.hpp"
#include "copy/cuda_copier.hpp"
#include "cuda/cuda_driver.hpp"
#include "cuda/cuda_slots.hpp"

namespace flexkv {

namespace {

bool IsDeviceCopy(TransferType type) { return type == TransferType::kH2D || type == TransferType::kD2H; }

}  // namespace

TransferEngine::TransferEngine(BlockLayout layout, std::shared_ptr<HostPool> host, int copy_threads,
                               int cuda_device, size_t queue_bytes,
                               const std::vector<std::string>& lower_tiers, const std::string& cuda_library)
    : copy_threads_(copy_threads),
      queue_bytes_(queue_bytes),
      num_lower_tiers_(lower_tiers.size()),
      cuda_(cuda_device >= 0 ? CudaDriver::Load(cuda_device, cuda_library) : nullptr),
      epoch_(std::chrono::steady_clock::now()) {
  Require(copy_threads > 0, "the transfer engine needs at least one copy thread");
  Require(lower_tiers.size() < kTiersMax, "too many tiers");
  routes_.resize(2 + 2 * lower_tiers.size());
  routes_[0].stats.name = "H2D";
  routes_[1].stats.name = "D2H";
  for (size_t i = 0; i < lower_tiers.size(); ++i) {
    routes_[2 * i + 2].stats.name = lower_tiers[i] + "2H";
    routes_[2 * i + 3].stats.name = "H2" + lower_tiers[i];
  }
  if (cuda_) {
    // Before any memory is pinned: while the driver registers it, it does nothing else.
    engine_pieces_ = MeasureEnginePieces(cuda_);
    cuda_note_ = engine_pieces_.note;
    // All slots of the first pool, once to be stored and once to be loaded; those of other groups are fewer.
    slot_reader_ = std::make_shared<SlotReader>(cuda_, 2 * static_cast<size_t>(layout.num_token_slots()));
  }
  AddGroup(std::move(layout), std::move(host), {});
}

uint32_t TransferEngine::AddGroup(BlockLayout layout, std::shared_ptr<HostPool> host,
                                  std::vector<int> gate_layers) {
  Require(host != nullptr, "the transfer engine needs a host pool");
  Require(host->slot_bytes() >= layout.block_bytes(), "a host slot is smaller than a block");
  Require(gate_layers.empty() || gate_layers.size() == static_cast<size_t>(layout.num_layers()),
          "a group needs a layer of the gate for each of its own");
  auto group = std::make_unique<Group>(std::move(layout));
  group->host = std::move(host);
  group->gate_layers = std::move(gate_layers);
  group->slices = SlicesOf(group->layout, group->host->slot_bytes(), kSlicesMax);
  for (size_t tier = 0; tier < num_lower_tiers_; ++tier) group->below.push_back(std::make_unique<Below>());
  group->host->StartPinning(cuda_);
  if (cuda_) {
    group->copier =
        std::make_unique<CudaCopier>(cuda_, group->layout, group->host, engine_pieces_, slot_reader_);
  } else {
    group->copier = std::make_unique<CpuCopier>(group->layout, group->host, copy_threads_);
  }
  const std::string& note = group->copier->note();
  if (cuda_note_.find(note) == std::string::npos) cuda_note_ += "; " + note;
  groups_.push_back(std::move(group));
  return static_cast<uint32_t>(groups_.size() - 1);
}

std::shared_ptr<LayerGate> TransferEngine::MakeGate(int num_layers) const {
  return groups_[0]->copier->MakeGate(num_layers);
}

TransferEngine::~TransferEngine() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [id, graph] : graphs_) graph->cancelled.store(true);
  }
  // Ops in the queues are drained as cancelled, running ones end: nobody writes to memory that is
  // about to be freed.
  Drain(1e9);
  for (auto& group : groups_) {
    group->copier.reset();
    for (auto& below : group->below) {
      if (below->tier) below->tier->Detach();
    }
  }
}

TransferEngine::Below& TransferEngine::BelowOf(Tier number, uint32_t group) const {
  const size_t tier = static_cast<size_t>(number);
  Require(group < groups_.size(), "there is no group of this number");
  Require(tier >= 1 && tier <= num_lower_tiers_, "there is no lower tier of this number");
  return *groups_[group]->below[tier - 1];
}

void TransferEngine::Attach(Tier number, std::shared_ptr<LowerTier> tier, uint32_t slices_per_read,
                            uint32_t group) {
  Below& below = BelowOf(number, group);
  Require(below.tier == nullptr, "a tier is attached already");
  const std::shared_ptr<HostPool>& host = groups_[group]->host;
  std::vector<size_t> offsets;
  for (const Slice& slice : groups_[group]->slices) offsets.push_back(slice.offset);
  offsets.push_back(host->slot_bytes());
  tier->Attach({host, std::move(offsets), epoch_});
  std::lock_guard<std::mutex> lock(mutex_);
  below.tier = std::move(tier);
  below.slices_per_read = slices_per_read;
}

void TransferEngine::Detach(Tier number, uint32_t group) {
  std::shared_ptr<LowerTier> tier;  // its threads are joined without the lock
  {
    std::lock_guard<std::mutex> lock(mutex_);
    tier.swap(BelowOf(number, group).tier);
  }
  if (tier) tier->Detach();
}

double TransferEngine::Now() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - epoch_).count();
}

std::shared_ptr<AwaitedSlots> TransferEngine::ReadSlots(uint64_t address, size_t count, uint64_t stream) {
  Require(slot_reader_ != nullptr, "only a pool on a GPU has token slots to wait for");
  return slot_reader_->Read(address, count, stream);
}

uint64_t TransferEngine::Submit(GraphSpec spec) {
  auto graph = std::make_unique<Graph>();
  graph->ops = std::vector<Op>(spec.ops.size());
  graph->gate = std::move(spec.gate);
  graph->wait_events = std::move(spec.wait_events);
  graph->deadline_s = spec.timeout_s > 0 ? Now() + spec.timeout_s : 0;
  graph->left = spec.ops.size();
  auto check_slots = [](const std::vector<int64_t>& slots, size_t limit, const char* what) {
    for (int64_t slot : slots) {
      Require(slot >= 0 && static_cast<size_t>(slot) < limit, std::string(what) + " slot out of range");
    }
  };
  for (size_t i = 0; i < spec.ops.size(); ++i) {
    Op& op = graph->ops[i];
    op.graph = graph.get();
    op.spec = std::move(spec.ops[i]);
    OpSpec& s = op.spec;
    Require(s.group < groups_.size(), "there is no group of this number");
    const Group& group = GroupOf(op);
    const BlockLayout& layout = group.layout;
    const size_t per_block = static_cast<size_t>(layout.tokens_per_block());
    const bool to_host = s.type == TransferType::kD2H || s.type == TransferType::kLower2H;
    const std::vector<int64_t>& host_side = to_host ? s.dst : s.src;
    const std::vector<int64_t>& far_side = to_host ? s.src : s.dst;
    op.num_blocks = host_side.size();
    check_slots(host_side, group.host->num_slots(), "host");
    if (s.layer_end == 0) s.layer_end = layout.num_layers();
    Require(s.layer_begin >= 0 && s.layer_begin < s.layer_end && s.layer_end <= layout.num_layers(),
            "layers out of range");
    if (IsDeviceCopy(s.type)) {
      if (s.awaited) {
        Require(slot_reader_ != nullptr, "only a pool on a GPU has token slots to wait for");
        Require(far_side.size() == op.num_blocks,
                "a device copy needs the place of each block's token slots");
        check_slots(far_side, s.awaited->size() / per_block, "awaited");
      } else {
        Require(far_side.size() == op.num_blocks * per_block,
                "a device copy needs tokens_per_block token slots for each block");
        op.first_rows = layout.FirstRows(far_side.data(), op.num_blocks);
      }
      Require(s.tier == Tier::kCpu, "a device copy is one of the CPU tier");
      if (graph->gate && s.type == TransferType::kH2D) {
        Require(!group.gate_layers.empty() || s.layer_end <= graph->gate->num_layers(),
                "the gate has fewer layers than the group");
        for (int layer : group.gate_layers) {
          Require(layer >= 0 && layer < graph->gate->num_layers(), "the gate lacks a layer of the group");
        }
      }
      // A store opens the one layer of its gate, whatever layers its group has.
      Require(!graph->gate || s.type == TransferType::kH2D || graph->gate->num_layers() == 1,
              "a store's gate has one layer");
      if (graph->gate) op.at_gate.resize(static_cast<size_t>(layout.num_layers()));
    } else {
      Require(far_side.size() == op.num_blocks && s.keys.size() == op.num_blocks,
              "a lower op needs one slot of its tier and one key for each block");
      // A plan may have been made before the tier was taken away: its ops fail, they are no misuse.
      const Below& below = BelowOf(op);
      check_slots(far_side, below.tier ? below.tier->num_slots() : SIZE_MAX, "tier");
      auto starts = [&](int layer) {
        return layer == layout.num_layers() ||
               std::any_of(group.slices.begin(), group.slices.end(),
                           [&](const Slice& x) { return x.layer_begin == layer; });
      };
      Require(starts(s.layer_begin) && starts(s.layer_end), "a lower op moves whole slices of layers");
    }
    op.layers_left = s.layer_end - s.layer_begin;
    if (s.after_layers >= 0) {
      const uint32_t before = static_cast<uint32_t>(s.after_layers);
      Require(s.type == TransferType::kH2D && before < i,
              "only a load can follow by layers, one op before it");
      const OpSpec& read = graph->ops[before].spec;
      Require(read.type == TransferType::kLower2H && read.group == s.group &&
                  read.layer_begin == s.layer_begin && read.layer_end == s.layer_end && read.dst == s.src,
              "a load follows a read of the same layers of the same blocks");
      graph->ops[before].followers.push_back(static_cast<uint32_t>(i));
      op.more_pieces = true;
    }
  }
  const std::shared_ptr<LayerGate> gate = graph->gate;
  std::vector<Op*> ready, loads;
  uint64_t id;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (spec.background && queue_bytes_ > 0) {
      // What is queued of the types it needs; one graph always fits, or a large one never would.
      for (const Op& op : graph->ops) {
        TransferStats& stats = RouteOf(op).stats;
        if (stats.queued_bytes >= queue_bytes_) {
          stats.refused_graphs++;
          return 0;
        }
      }
    }
    for (const Op& op : graph->ops) RouteOf(op).stats.queued_bytes += BytesOf(op);
    id = graph->id = next_graph_++;
    for (Op& op : graph->ops) {
      if (op.spec.after_layers < 0) ready.push_back(&op);
      if (op.spec.type == TransferType::kH2D) loads.push_back(&op);
    }
    if (graph->ops.empty()) {
      results_.push_back({id, true, "", {}});
    } else {
      graphs_.emplace(id, std::move(graph));
    }
  }
  if (ready.empty()) ended_.notify_all();
  for (Op* op : loads) PassOthers(op);
  for (Op* op : ready) Dispatch(op);
  // The graph may have ended meanwhile.
  if (gate && !loads.empty() && gate->Submitted(static_cast<int>(loads.size()))) {
    for (auto& group : groups_) group->copier->LoadsComplete();
  }
  return id;
}

bool TransferEngine::Cancel(uint64_t graph) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = graphs_.find(graph);
  if (it == graphs_.end()) return false;
  it->second->cancelled.store(true);
  for (auto& group : groups_) {
    for (auto& below : group->below) {
      if (below->tier) below->tier->Wake();
    }
  }
  return true;
}

std::vector<GraphResult> TransferEngine::Poll() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<GraphResult> out(std::make_move_iterator(results_.begin()),
                               std::make_move_iterator(results_.end()));
  results_.clear();
  return out;
}

bool TransferEngine::Wait(uint64_t graph, double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  return ended_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                         [&] { return graphs_.find(graph) == graphs_.end(); });
}

bool TransferEngine::Drain(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  return ended_.wait_for(lock, std::chrono::duration<double>(timeout_s), [&] { return graphs_.empty(); });
}

bool TransferEngine::DrainDevice(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  return ended_.wait_for(lock, std::chrono::duration<double>(timeout_s), [&] { return DeviceIsIdle(); });
}

std::vector<TransferStats> TransferEngine::Stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<TransferStats> stats;
  for (const Route& route : routes_) stats.push_back(route.stats);
  for (const bool to_device : {true, false}) {
    // What is submitted may wait for a forward first: where the device has a clock of its own, that one tells. The
    // parts of a load are copied at the same time over one link, which is busy for as long as the longest of them.
    double busy_s = 0, queue_s = 0;
    bool known = false;
    for (auto& group : groups_) {
      if (const std::optional<Copier::Times> times = group->copier->TimesOf(to_device)) {
        known = true;
        busy_s = std::max(busy_s, times->busy_s);
        queue_s += times->queue_s;
      }
    }
    if (known) stats[!to_device].busy_s = busy_s;
    if (known) stats[!to_device].queue_s = queue_s;
  }
  return stats;
}

bool TransferEngine::ShouldSkip(const Op& op) const {
  return op.poisoned || op.graph->cancelled.load() ||
         (op.graph->deadline_s > 0 && Now() > op.graph->deadline_s);
}

// In words, of an op that nobody gave up: its time was up.
std::string TransferEngine::WhyCancelled(const Op& op) {
  return op.poisoned || op.graph->cancelled.load() ? "" : "the deadline passed";
}

void TransferEngine::Dispatch(Op* op) {
  if (op->more_pieces && op->num_blocks > 0) {
    EndUpstream(op);
    return;
  }
  const OpSpec& s = op->spec;
  const bool device = IsDeviceCopy(s.type);
  if (device && op->num_blocks > 0) {
    StartPiece(op, s.layer_begin, s.layer_end);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!ShouldSkip(*op)) {
      op->result.start_s = Now();
    }
  }
  if (op->result.start_s == 0) {
    Finish(op, OpStatus::kCancelled, WhyCancelled(*op), {});
  } else if (device) {
    Finish(op, OpStatus::kDone, "", {});
  } else if (op->num_blocks == 0) {
    ForwardLayers(op, s.layer_begin, s.layer_end);
    Finish(op, OpStatus::kDone, "", {});
  } else if (BelowOf(*op).tier == nullptr) {
    Finish(op, OpStatus::kFailed, "the tier is away at the moment", {});
  } else {
    StartLowerOp(op);
  }
}

// ---- pieces of device copies -------------------------------------------------------------------

bool TransferEngine::BeginPiece(Op* op) {
  // One step with the question whether it may start: who cancels and then sees no copy running must not
  // see one start.
  std::lock_guard<std::mutex> lock(mutex_);
  if (ShouldSkip(*op)) return false;
  op->pieces_running++;
  Busy(&RouteOf(*op), +1);
  if (op->result.start_s == 0) op->result.start_s = Now();
  return true;
}

void TransferEngine::StartPiece(Op* op, int layer_begin, int layer_end) {
  if (!BeginPiece(op)) {
    if (!op->more_pieces) FinishCopy(op);
    return;  // else it ends when what it follows has ended
  }
  DeviceCopy copy;
  copy.blocks = BlocksOf(op);
  if (op->spec.awaited) {
    copy.awaited = op->spec.awaited;
    copy.bind = [this, op](CopiedBlocks* blocks) { BindSlots(op, blocks); };
  }
  copy.layer_begin = layer_begin;
  copy.layer_end = layer_end;
  copy.gate = op->graph->gate;
  copy.follows_read = op->spec.after_layers >= 0;
  copy.wait_events = &op->graph->wait_events;
  copy.cancelled = &op->graph->cancelled;
  copy.on_landed = [this, op](int begin, int end) {
    if (op->spec.type == TransferType::kH2D) Pass(op, begin, end);
  };
  copy.on_queued = [this, op](int begin, int end, const StreamEvent& event, size_t stream) {
    // Where a piece before has failed, all layers have been passed.
    if (op->at_gate[begin] != LayerState::kUnknown) return;
    std::fill(op->at_gate.begin() + begin, op->at_gate.begin() + end, LayerState::kQueued);
    // A store opens the one layer of its gate.
    const bool load = op->spec.type == TransferType::kH2D;
    std::vector<int> layers;
    for (int layer = begin; layer < end; ++layer)
      layers.push_back(load ? GroupOf(*op).GateLayer(layer) : layer);
    op->graph->gate->Queued(layers, event, op->spec.group * Copier::kStreamsMax + stream);
  };
  copy.on_end = [this, op, layer_begin, layer_end](OpStatus status, std::string error) {
    const bool done = status == OpStatus::kDone;
    if (done && op->spec.type == TransferType::kH2D) Pass(op, layer_begin, layer_end);
    // What is still being read for it is of no use any more: nobody need wait for that.
    if (status == OpStatus::kFailed) PassRest(op);
    if (status == OpStatus::kFailed && error.empty()) error = "a copy on the GPU failed";
    EndPiece(op, done ? layer_end - layer_begin : 0, std::move(error));
  };
  GroupOf(*op).copier->Submit(std::move(copy));
}

// Of a device copy.
CopiedBlocks TransferEngine::BlocksOf(const Op* op) {
  const OpSpec& s = op->spec;
  CopiedBlocks blocks;
  blocks.to_device = s.type == TransferType::kH2D;
  blocks.host_slots = (blocks.to_device ? s.src : s.dst).data();
  blocks.count = op->num_blocks;
  if (!s.awaited) {
    blocks.token_slots = (blocks.to_device ? s.dst : s.src).data();
    blocks.first_rows = op->first_rows.data();
  }
  return blocks;
}

void TransferEngine::BindSlots(Op* op, CopiedBlocks* blocks) const {
  const OpSpec& s = op->spec;
  if (op->token_slots.empty()) {  // or a piece before has done it
    const BlockLayout& layout = GroupOf(*op).layout;
    const size_t per_block = static_cast<size_t>(layout.tokens_per_block());
    std::vector<int64_t> slots;
    slots.reserve(op->num_blocks * per_block);
    for (int64_t place : s.type == TransferType::kH2D ? s.dst : s.src) {
      const int64_t* of_block = s.awaited->data() + static_cast<size_t>(place) * per_block;
      slots.insert(slots.end(), of_block, of_block + per_block);
    }
    op->first_rows = layout.FirstRows(slots.data(), op->num_blocks);
    op->token_slots = std::move(slots);
  }
  blocks->token_slots = op->token_slots.data();
  blocks->first_rows = op->first_rows.data();
}

// One more or one less op of this route is moving bytes. Called with the mutex held.
void TransferEngine::Busy(Route* route, int change) {
  if (route->running == 0) route->busy_since_s = Now();
  route->running += change;
  if (route->running == 0) route->stats.busy_s += Now() - route->busy_since_s;
}

void TransferEngine::EndPiece(Op* op, int layers_copied, std::string error) {
  bool finish;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Busy(&RouteOf(*op), -1);
    if (DeviceIsIdle()) ended_.notify_all();
    op->layers_left -= layers_copied;
    if (op->error.empty()) op->error = std::move(error);
    finish = --op->pieces_running == 0 && !op->more_pieces;
  }
  if (finish) FinishCopy(op);
}

void TransferEngine::EndUpstream(Op* op) {
  bool finish;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    op->more_pieces = false;
    finish = op->pieces_running == 0;
  }
  if (finish) FinishCopy(op);
}

void TransferEngine::FinishCopy(Op* op) {
  // Nothing of it runs, and nothing will start: its fields are ours.
  if (!op->error.empty()) {
    Finish(op, OpStatus::kFailed, std::move(op->error), {});
  } else if (op->layers_left == 0) {
    Finish(op, OpStatus::kDone, "", {});
  } else {
    Finish(op, OpStatus::kCancelled, WhyCancelled(*op), {});
  }
}

void TransferEngine::Pass(Op* op, int layer_begin, int layer_end) {
  if (op->graph->gate == nullptr) return;
  for (int layer = layer_begin; layer < layer_end; ++layer) {
    const LayerState before = std::exchange(op->at_gate[layer], LayerState::kPassed);
    if (before == LayerState::kPassed) continue;
    const int at = op->spec.type == TransferType::kH2D ? GroupOf(*op).GateLayer(layer) : layer;
    op->graph->gate->Pass(at, before == LayerState::kQueued);
  }
}

void TransferEngine::PassOthers(Op* op) {
  const Group& group = GroupOf(*op);
  if (op->graph->gate == nullptr || op->spec.type != TransferType::kH2D || group.gate_layers.empty()) return;
  std::vector<bool> own(static_cast<size_t>(op->graph->gate->num_layers()), false);
  for (int layer : group.gate_layers) own[static_cast<size_t>(layer)] = true;
  for (size_t layer = 0; layer < own.size(); ++layer) {
    if (!own[layer]) op->graph->gate->Pass(static_cast<int>(layer));
  }
}

void TransferEngine::PassRest(Op* op) {
  const bool load = op->spec.type == TransferType::kH2D;
  Pass(op, load ? op->spec.layer_begin : 0, load ? op->spec.layer_end : 1);
}

size_t TransferEngine::BytesOf(const Op& op) const {
  const BlockLayout& layout = GroupOf(op).layout;
  const int last = op.spec.layer_end - 1;
  return op.num_blocks *
         (layout.layer_offset(last) + layout.layer_bytes(last) - layout.layer_offset(op.spec.layer_begin));
}

void TransferEngine::Finish(Op* op, OpStatus status, std::string error, std::vector<uint8_t> ok) {
  Graph* graph = op->graph;
  if (IsDeviceCopy(op->spec.type)) PassRest(op);
  std::vector<Op*> ready;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    op->result.status = status;
    op->result.ok = std::move(ok);
    op->result.end_s = Now();
    if (op->result.start_s == 0) op->result.start_s = op->result.end_s;
    TransferStats& stats = RouteOf(*op).stats;
    stats.queued_bytes -= BytesOf(*op);
    if (status == OpStatus::kDone) {
      stats.ops_done++;
      stats.bytes += BytesOf(*op);
    } else if (status == OpStatus::kFailed) {
      stats.ops_failed++;
    } else {
      stats.ops_cancelled++;
    }
    stats.corrupt_blocks += op->result.corrupt;
    stats.missing_blocks += op->result.missing;
    if (!error.empty() && graph->error.empty()) graph->error = std::move(error);
    for (uint32_t next : op->followers) {
      graph->ops[next].poisoned = status != OpStatus::kDone;
      ready.push_back(&graph->ops[next]);
    }
    if (--graph->left == 0) {
      GraphResult result{graph->id, true, graph->error, {}};
      for (Op& each : graph->ops) {
        result.done = result.done && each.result.status == OpStatus::kDone;
        result.ops.push_back(std::move(each.result));
      }
      results_.push_back(std::move(result));
      graphs_.erase(graph->id);
      graph = nullptr;
      // With the lock: whoever waits for the last graph may destroy the engine as soon as it is let go of, and
      // the threads of a remote tier are not joined by that.
      ended_.notify_all();
    }
  }
  if (graph == nullptr) return;
  for (Op* next : ready) Dispatch(next);
}

}  // namespace flexkv
