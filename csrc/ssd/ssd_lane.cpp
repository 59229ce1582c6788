#include "ssd/ssd_lane.hpp"

#include <algorithm>
#include <cerrno>

namespace flexkv {

namespace {

// Transfers that are handed to the kernel together. Small enough that the disk starts on the first
// ones while the checksums of the next are computed.
constexpr size_t kBatchBytes = size_t{2} << 20;
constexpr size_t kBatchMax = 32;
// Host memory is registered with the ring in pieces, as it gets populated in the background.
constexpr size_t kRegisterBytes = size_t{256} << 20;
// How often deadlines are looked at while something is in flight.
constexpr double kTickS = 0.1;
constexpr double kIdleS = 10;
// The limit on writes may save up so much of what was not used.
constexpr double kBurstS = 0.05;

}  // namespace

double WriteLimit::Take(size_t bytes, double now_s) {
  if (rate_ <= 0) return 0;
  std::lock_guard<std::mutex> lock(mutex_);
  available_ = std::min(available_ + (now_s - last_s_) * rate_, kBurstS * rate_);
  last_s_ = now_s;
  // May go into debt: a block that is larger than the burst must get through as well.
  if (available_ < 0) return -available_ / rate_;
  available_ -= static_cast<double>(bytes);
  return 0;
}

SsdLane::SsdLane(std::shared_ptr<SsdStore> store, size_t shard, LowerTier::Above above,
                 std::unique_ptr<IoEngine> engine, std::shared_ptr<WriteLimit> limit)
    : store_(std::move(store)),
      shard_(store_->shard(shard)),
      above_(std::move(above)),
      engine_(std::move(engine)),
      limit_(std::move(limit)),
      num_shards_(store_->num_shards()) {
  // As many again as can be in flight: what has landed is verified while others fly.
  flights_.resize(2 * static_cast<size_t>(engine_->depth()));
  for (Flight& flight : flights_) free_.push_back(&flight);
  engine_->RegisterFile(shard_.fd());
  thread_ = std::thread([this] { Loop(); });
}

SsdLane::~SsdLane() {
  stop_.store(true);
  engine_->Wake();
  thread_.join();
}

double SsdLane::oldest_s() const {
  const double start_s = oldest_start_s_.load(std::memory_order_relaxed);
  return start_s > 0 ? Now() - start_s : 0;
}

void SsdLane::Start(TierTransfer* transfer, std::vector<uint32_t> blocks) {
  auto work = std::make_unique<Work>();
  work->transfer = transfer;
  work->blocks = std::move(blocks);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    inbox_.push_back(std::move(work));
  }
  engine_->Wake();
}

void SsdLane::TakeInbox() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& work : inbox_) (work->transfer->store ? writes_ : reads_).push_back(std::move(work));
  inbox_.clear();
}

void SsdLane::Loop() {
  std::vector<Io*> ended;
  for (;;) {
    TakeInbox();
    const double held_back_s = Refill();
    EndIfDone(&reads_);
    EndIfDone(&writes_);
    if (reads_.empty() && writes_.empty() && stop_.load()) return;
    if (register_memory_) RegisterMemory();
    double wait_s =
        in_flight_ > 0 || !reads_.empty() || !writes_.empty() || register_memory_ ? kTickS : kIdleS;
    if (held_back_s > 0) wait_s = std::min(wait_s, held_back_s);
    ended.clear();
    engine_->Reap(&ended, wait_s);
    in_flight_ -= static_cast<int>(ended.size());
    for (Io* io : ended) writes_in_flight_ -= io->write;
    // The disk gets its next work before we look at what it brought.
    if (!ended.empty()) {
      TakeInbox();
      Refill();
    }
    for (Io* io : ended) Land(static_cast<Flight*>(io));
    WatchClock();
  }
}

double SsdLane::Refill() {
  Io* batch[kBatchMax];
  size_t count = 0, bytes = 0;
  double wait_s = 0;
  auto submit = [&] {
    if (count > 0) engine_->Submit(batch, count);
    count = bytes = 0;
  };
  const int depth = engine_->depth();
  for (const bool write : {false, true}) {
    while (in_flight_ < depth && !free_.empty()) {
      Work* work = NextWork(write);
      if (work == nullptr) break;
      if (write) {
        const bool reading = in_flight_ > writes_in_flight_ || !reads_.empty();
        if (reading && writes_in_flight_ >= std::max(1, depth / 8)) break;
        // What is given up passes without waiting for its turn.
        const double now = Now();
        if (!work->transfer->GivenUp(now) && (wait_s = limit_->Take(slice_offsets_.back(), now)) > 0) break;
      }
      Flight* flight = free_.back();
      if (!Prepare(work, flight)) continue;
      free_.pop_back();
      ++in_flight_;
      writes_in_flight_ += write;
      batch[count++] = flight;
      bytes += flight->bytes;
      if (count == kBatchMax || bytes >= kBatchBytes) submit();
    }
  }
  submit();
  return wait_s;
}

// Whose turn it is. Among reads those that somebody waits for step by step come first, and of them the
// one that is least far: all loads of a batch share the layers that its forward waits for.
SsdLane::Work* SsdLane::NextWork(bool write) {
  Work* best = nullptr;
  for (auto& work : write ? writes_ : reads_) {
    if (work->all_started()) continue;
    if (write) return work.get();
    const bool stepwise = static_cast<bool>(work->transfer->on_step);
    if (best == nullptr || (stepwise && !best->transfer->on_step) || (stepwise && work->step < best->step)) {
      best = work.get();
    }
  }
  return best;
}

// Makes the next block of `work` ready to be moved. False if it is not to be moved any more.
bool SsdLane::Prepare(Work* work, Flight* flight) {
  TierTransfer& t = *work->transfer;
  const uint32_t block = work->blocks[work->next];
  const uint32_t step = work->step;
  if (++work->next == work->blocks.size()) {
    work->next = 0;
    work->step++;
  }
  const double now = Now();
  if (t.GivenUp(now)) t.Spoil(block, BlockOutcome::kDropped);
  if (!t.Good(block)) return false;  // the rest of it is of no use
  const uint32_t slot = static_cast<uint32_t>(static_cast<size_t>(t.tier_slots[block]) / num_shards_);
  const uint32_t slice_begin = t.step_begin(step);
  const uint32_t slice_end = t.step_ends[step];
  const size_t begin = slice_offsets_[slice_begin];
  *flight = Flight{};
  flight->write = t.store;
  flight->fd = shard_.fd();
  flight->offset = kSlotsOffset + slot * slice_offsets_.back() + begin;
  flight->data = HostSlot(t.host_slots[block]) + begin;
  flight->bytes = static_cast<uint32_t>(slice_offsets_[slice_end] - begin);
  flight->work = work;
  flight->block = block;
  flight->step = step;
  flight->start_s = now;
  flight->busy = true;
  if (t.store) {
    // From here on the slot does not hold what it held before, whatever becomes of the write.
    shard_.Retire(slot);
    for (uint32_t slice = slice_begin; slice < slice_end; ++slice) {
      shard_.SetChecksum(t.keys[block], slot, slice, HostSlot(t.host_slots[block]) + slice_offsets_[slice]);
    }
  }
  work->in_flight++;
  return true;
}

bool SsdLane::IsWhatWasWritten(const Flight& flight) const {
  const TierTransfer& t = *flight.work->transfer;
  const uint32_t slot = static_cast<uint32_t>(static_cast<size_t>(t.tier_slots[flight.block]) / num_shards_);
  for (uint32_t slice = t.step_begin(flight.step); slice < t.step_ends[flight.step]; ++slice) {
    if (!shard_.Verify(t.keys[flight.block], slot, slice,
                       HostSlot(t.host_slots[flight.block]) + slice_offsets_[slice])) {
      return false;
    }
  }
  return true;
}

void SsdLane::Land(Flight* flight) {
  Work* work = flight->work;
  TierTransfer& t = *work->transfer;
  const uint32_t block = flight->block;
  if (flight->error == ECANCELED && t.cancelled->load(std::memory_order_relaxed)) {
    t.Spoil(block, BlockOutcome::kDropped);
  } else if (flight->error != 0) {
    t.Spoil(block, BlockOutcome::kFailed,
            std::string(t.store ? "SSD write failed: " : "SSD read failed: ") +
                (flight->error == ENODATA     ? "the file is shorter than it should be"
                 : flight->error == ECANCELED ? "it took too long"
                                              : std::strerror(flight->error)));
  } else if (t.store || IsWhatWasWritten(*flight)) {
    t.Land(flight->step, block);
  } else if (t.cancelled->load(std::memory_order_relaxed)) {
    // Cancelled because the store was cleared: says nothing about the disk.
    t.Spoil(block, BlockOutcome::kDropped);
  } else {
    t.Spoil(block, BlockOutcome::kCorrupt, "SSD read failed: a block is not what was written");
  }
  flight->busy = false;
  free_.push_back(flight);
  work->in_flight--;
}

void SsdLane::EndIfDone(std::deque<std::unique_ptr<Work>>* queue) {
  for (auto it = queue->begin(); it != queue->end();) {
    Work& work = **it;
    if (!work.all_started() || work.in_flight > 0) {
      ++it;
      continue;
    }
    TierTransfer* transfer = work.transfer;
    it = queue->erase(it);
    transfer->End();
  }
}

void SsdLane::WatchClock() {
  double oldest_s = 0;
  const double now = Now();
  for (Flight& flight : flights_) {
    if (!flight.busy) continue;
    if (oldest_s == 0 || flight.start_s < oldest_s) oldest_s = flight.start_s;
    const TierTransfer& t = *flight.work->transfer;
    const bool late = now - flight.start_s > kIoTimeoutS || (t.deadline_s > 0 && now > t.deadline_s) ||
                      t.cancelled->load(std::memory_order_relaxed);
    if (late && !flight.asked) {
      flight.asked = true;
      engine_->Cancel(&flight);
    }
  }
  oldest_start_s_.store(oldest_s, std::memory_order_relaxed);
}

void SsdLane::RegisterMemory() {
  const size_t populated = above_.host->populated_bytes();
  const size_t bytes = std::min(kRegisterBytes, above_.host->total_bytes() - registered_bytes_);
  if (populated < registered_bytes_ + bytes) return;
  register_memory_ = bytes > 0 && engine_->RegisterMemory(above_.host->base() + registered_bytes_, bytes);
  if (register_memory_) registered_bytes_ += bytes;
}

}  // namespace flexkv
