#include "copy/cuda_copier.hpp"

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <utility>

#include "cuda/cuda_driver.hpp"

namespace flexkv {

namespace {

// A launch or a copy costs the host about 3 us and the device a little less. Neighbouring layers go together
// until they are worth it (1 MiB is 20 us on a fast link), and the loads of a batch together take no more
// than this many groups, each with an event behind it: 64 layers are to cost the host 200 us at most.
constexpr size_t kGroupBytesMin = size_t{1} << 20;
constexpr int kGroupsMax = 32;

// How often the ends of copies are looked for. Nobody's forward waits for this, as that is what events are
// for.
constexpr auto kPollInterval = std::chrono::microseconds(100);

// The loads of a batch are submitted some tens of microseconds apart. One that has not come for so long is
// not waited for: its caller was held up, and the link is not to be idle for that.
constexpr auto kNextLoadMax = std::chrono::milliseconds(5);

// The first layers of a load go in smaller pieces: a forward waits for them.
constexpr size_t kFirstPieceDivisor = 4;
// What is stored goes in larger ones, as nobody waits for its first layers.
constexpr size_t kStoredPieceBytes = size_t{4} << 20;

}  // namespace

CudaCopier::CudaCopier(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout,
                       std::shared_ptr<HostPool> host, const EnginePieces& pieces,
                       std::shared_ptr<SlotReader> slot_reader)
    : cuda_(std::move(cuda)),
      layout_(layout),
      host_(std::move(host)),
      engine_path_(cuda_, layout_, *host_),
      buffer_piece_bytes_(pieces.buffer),
      timed_events_(std::make_shared<EventPool>(cuda_, true)),
      slot_reader_(std::move(slot_reader)) {
  const CudaContext context(*cuda_);
  loads_.to_device = true;
  loads_.alone_bytes = pieces.loads;
  stores_.alone_bytes = pieces.stores;
  for (Direction* direction : {&loads_, &stores_}) {
    direction->route = std::make_unique<KernelPath::Route>(cuda_, direction->to_device);
  }
  note_ = "pieces have " + std::to_string(engine_path_.piece_bytes(true) >> 10) + " KiB";
  // The smallest pieces that there can be. Where they are large enough no buffer is needed, which is much memory.
  if (engine_path_.piece_bytes(false) < std::max(loads_.alone_bytes, stores_.alone_bytes)) {
    kernel_path_ =
        std::make_unique<KernelPath>(cuda_, layout_, *host_, engine_path_, *loads_.route, *stores_.route);
    note_ += kernel_path_->usable() ? ", smaller ones go through a buffer on the device"
                                    : ", no buffer for smaller ones: " + kernel_path_->note();
  }
  for (Direction* direction : {&loads_, &stores_}) {
    direction->thread = std::thread([this, direction] { Loop(*direction); });
  }
}

CudaCopier::~CudaCopier() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (Direction* direction : {&loads_, &stores_}) direction->thread.join();
  const CudaContext context(*cuda_);
  for (Direction* direction : {&loads_, &stores_}) direction->route.reset();
  kernel_path_.reset();
}

void CudaCopier::Submit(DeviceCopy copy) {
  Submission submission{std::move(copy)};
  if (!submission.copy.awaited) submission.copy.blocks.Summarize();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    (submission.copy.blocks.to_device ? loads_ : stores_).submitted.push_back(std::move(submission));
  }
  wake_.notify_all();
}

std::shared_ptr<LayerGate> CudaCopier::MakeGate(int num_layers) const {
  return std::make_shared<LayerGate>(num_layers, cuda_);
}

void CudaCopier::LoadsComplete() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    loads_.complete = true;
  }
  wake_.notify_all();
}

void CudaCopier::Loop(Direction& direction) {
  std::string error;
  const bool current = cuda_->MakeCurrent(&error);
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    const auto wanted = [&] { return stop_ || direction.complete || !direction.submitted.empty(); };
    if (!direction.waiting.empty() || !direction.flights.empty()) {
      wake_.wait_for(lock, kPollInterval, wanted);
    } else {
      wake_.wait(lock, wanted);
    }
    if (stop_) return;
    for (Submission& submission : direction.submitted) {
      if (!current) submission.error = error;
      direction.waiting.push_back(std::move(submission));
    }
    direction.submitted.clear();
    direction.complete = false;
    // Under the mutex: a gate that has all of its loads by now has them all in `waiting`. Each gate is asked once:
    // its answer may change at any moment, and the loads of one batch are held back together or not at all.
    std::map<const LayerGate*, bool> awaits_loads;
    for (Submission& submission : direction.waiting) {
      const auto [gate, is_new] = awaits_loads.try_emplace(submission.copy.gate.get());
      if (is_new) gate->second = gate->first && gate->first->AwaitsLoads(kNextLoadMax);
      submission.held_back = gate->second && MayBeHeldBack(submission.copy);
    }
    lock.unlock();
    Reap(direction);
    StartWaiting(direction);
    lock.lock();
  }
}

void CudaCopier::StartWaiting(Direction& direction) {
  std::deque<Submission> ready, held_back;
  std::set<const LayerGate*>
      incomplete;  // some of their loads wait for slots, which all of a batch get at one time
  slot_reader_->Collect();
  for (Submission& submission : direction.waiting) {
    if (!AwaitsSlots(submission)) continue;
    submission.held_back = true;
    if (!submission.copy.follows_read) incomplete.insert(submission.copy.gate.get());
  }
  for (Submission& submission : direction.waiting) {
    if (EndedWaiting(submission)) continue;
    const DeviceCopy& copy = submission.copy;
    const bool batch = direction.to_device && copy.gate && !copy.follows_read;
    // Loads may overtake each other. Stores keep their order: it is the order of the forwards they wait for.
    const bool behind = !direction.to_device && !held_back.empty();
    const bool waits = submission.held_back || behind || (batch && incomplete.count(copy.gate.get()) > 0);
    (waits ? held_back : ready).push_back(std::move(submission));
  }
  // What comes first in the model goes first, whatever request it belongs to.
  if (direction.to_device) {
    std::stable_sort(ready.begin(), ready.end(), [](const Submission& a, const Submission& b) {
      return a.copy.layer_begin < b.copy.layer_begin;
    });
  }
  direction.waiting.clear();
  while (!ready.empty()) {
    std::unique_ptr<Flight> flight = TakeFlight(ready);
    const bool blocked = !direction.to_device && !direction.waiting.empty();
    if (!blocked && Start(direction, flight)) continue;
    std::move(flight->submissions.begin(), flight->submissions.end(), std::back_inserter(direction.waiting));
  }
  std::move(held_back.begin(), held_back.end(), std::back_inserter(direction.waiting));
}

bool CudaCopier::EndedWaiting(Submission& submission) {
  if (submission.error.empty() && !submission.copy.cancelled->load()) return false;
  End(submission, "");
  return true;
}

bool CudaCopier::AwaitsSlots(Submission& submission) {
  DeviceCopy& copy = submission.copy;
  if (!copy.awaited || !submission.error.empty() || copy.cancelled->load()) return false;
  const CudaDriver::State state = copy.awaited->state();
  if (state == CudaDriver::State::kPending) return true;
  if (state == CudaDriver::State::kFailed) {
    submission.error = copy.awaited->error();
    return false;
  }
  try {
    copy.bind(&copy.blocks);
    copy.blocks.Summarize();
    copy.awaited.reset();
  } catch (const UsageError& error) {
    submission.error = error.what();
  }
  return false;
}

bool CudaCopier::MayBeHeldBack(const DeviceCopy& copy) {
  return copy.blocks.to_device && copy.gate && !copy.follows_read;
}

bool CudaCopier::IsPinned(const CopiedBlocks& blocks) const {
  return (static_cast<size_t>(blocks.last_host_slot) + 1) * host_->slot_bytes() <= host_->pinned_bytes();
}

bool CudaCopier::GoesThroughBuffer(const CopiedBlocks& blocks, bool pinned) const {
  // The call that loads memory that is not pinned waits for the stream, and that one might wait for a kernel.
  return (pinned || !blocks.to_device) &&
         engine_path_.piece_bytes(blocks.in_sequence) < (blocks.to_device ? loads_ : stores_).alone_bytes &&
         KernelTakes(blocks);
}

std::unique_ptr<CudaCopier::Flight> CudaCopier::TakeFlight(std::deque<Submission>& ready) const {
  auto flight = std::make_unique<Flight>();
  flight->blocks = ready.front().copy.blocks;
  flight->pinned = IsPinned(flight->blocks);
  flight->submissions.push_back(std::move(ready.front()));
  ready.pop_front();
  // Memory that is not pinned is copied by a call that waits for the end: such a copy goes alone.
  if (!flight->blocks.to_device || !flight->copy().gate || !flight->pinned) return flight;
  std::deque<Submission> others;
  for (Submission& other : ready) {
    const DeviceCopy &first = flight->copy(), &copy = other.copy;
    const CopiedBlocks together = flight->blocks.With(copy.blocks);
    if (copy.gate == first.gate && copy.layer_begin == first.layer_begin &&
        copy.layer_end == first.layer_end && IsPinned(copy.blocks) &&
        KernelTakes(together) == KernelTakes(flight->blocks)) {
      flight->blocks = together;
      flight->submissions.push_back(std::move(other));
    } else {
      others.push_back(std::move(other));
    }
  }
  ready.swap(others);
  return flight;
}

bool CudaCopier::Start(Direction& direction, std::unique_ptr<Flight>& flight) {
  for (const Submission& submission : flight->submissions) {
    for (uint64_t event : *submission.copy.wait_events) {
      std::vector<uint64_t>& events = flight->wait_events;
      if (std::find(events.begin(), events.end(), event) == events.end()) events.push_back(event);
    }
  }
  if (StateOfEvents(*flight) == CudaDriver::State::kFailed) {
    for (Submission& submission : flight->submissions) End(submission, flight->error);
    return true;
  }
  // The driver copies memory that is not pinned by way of a buffer of its own, and its call returns only when
  // the stream has got that far. Nobody who needs the driver meanwhile should wait for a forward.
  if (!flight->pinned && (flight->waits() || !direction.flights.empty())) return false;
  JoinArrays(*flight);
  if (GoesThroughBuffer(flight->blocks, flight->pinned)) {
    flight->described = kernel_path_->Describe(flight->blocks);
    if (!flight->described) return false;
  }
  Queue(direction, std::move(flight));
  return true;
}

CudaDriver::State CudaCopier::StateOfEvents(Flight& flight) {
  for (; flight.waits(); ++flight.events_seen) {
    const auto event = reinterpret_cast<CudaDriver::Event>(flight.wait_events[flight.events_seen]);
    const CudaDriver::State state = cuda_->QueryEvent(event, &flight.error);
    if (state != CudaDriver::State::kDone) return state;
  }
  return CudaDriver::State::kDone;
}

void CudaCopier::JoinArrays(Flight& flight) const {
  if (flight.submissions.size() == 1) return;
  const size_t per_block = static_cast<size_t>(layout_.tokens_per_block());
  flight.host_slots.reserve(flight.blocks.count);
  flight.first_rows.reserve(flight.blocks.count);
  flight.token_slots.reserve(flight.blocks.count * per_block);
  for (const Submission& submission : flight.submissions) {
    const CopiedBlocks& part = submission.copy.blocks;
    flight.host_slots.insert(flight.host_slots.end(), part.host_slots, part.host_slots + part.count);
    flight.first_rows.insert(flight.first_rows.end(), part.first_rows, part.first_rows + part.count);
    flight.token_slots.insert(flight.token_slots.end(), part.token_slots,
                              part.token_slots + part.count * per_block);
  }
  flight.blocks.host_slots = flight.host_slots.data();
  flight.blocks.first_rows = flight.first_rows.data();
  flight.blocks.token_slots = flight.token_slots.data();
}

void CudaCopier::Queue(Direction& direction, std::unique_ptr<Flight> flight) {
  const auto start = std::chrono::steady_clock::now();
  KernelPath::Route& route = *direction.route;
  CopyStream& first = flight->described ? route.first() : route.engines;
  bool good = true;
  if (flight->waits()) {
    first.MakeRoom(flight->wait_events.size());
    for (uint64_t event : flight->wait_events) {
      good = good && cuda_->StreamWaitEvent(first.get(), event, &flight->error);
    }
  }
  std::string ignored;
  flight->start = timed_events_->Record(first.get(), &ignored);
  good = good && (!flight->described ||
                  kernel_path_->QueueDescriptors(flight->blocks, *flight->described, route, &flight->error));
  if (good) direction.to_device ? QueueLoad(*flight, route) : QueueStore(*flight, route);
  // Whatever was queued must have left the pools before the slots are given to somebody else, so one that
  // failed half-way is followed to its end, too; without an event, to the end of its streams.
  flight->end = RecordEnd(*flight, route);
  direction.flights.push_back(std::move(flight));
  direction.queue_s.fetch_add(
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
}

bool CudaCopier::QueueLoad(Flight& flight, KernelPath::Route& route) {
  const DeviceCopy& copy = flight.copy();
  const CopiedBlocks& blocks = flight.blocks;
  const int layers = copy.layer_end - copy.layer_begin;
  // The first layer goes alone: a forward waits for it.
  const int layers_min = copy.gate ? std::max(1, (layers + kGroupsMax - 3) / (kGroupsMax - 1)) : layers;
  for (int begin = copy.layer_begin; begin < copy.layer_end;) {
    if (std::all_of(flight.submissions.begin(), flight.submissions.end(),
                    [](const Submission& submission) { return submission.copy.cancelled->load(); })) {
      return true;
    }
    const bool first = copy.gate && begin == copy.layer_begin;
    int end = begin;
    size_t bytes = 0;
    while (end < copy.layer_end && (end - begin < (first ? 1 : layers_min) || bytes < kGroupBytesMin)) {
      bytes += layout_.layer_bytes(end) * blocks.count;
      ++end;
    }
    if (flight.described) {
      const size_t piece =
          std::max(buffer_piece_bytes_ / (first ? kFirstPieceDivisor : 1), layout_.layers_bytes(begin, end));
      end = kernel_path_->EndOfPiece(begin, copy.layer_end, piece);
    }
    if (!QueueLayers(flight, begin, end, route) || !TellQueued(flight, begin, end, route)) return false;
    begin = end;
  }
  return true;
}

bool CudaCopier::QueueStore(Flight& flight, KernelPath::Route& route) {
  const DeviceCopy& copy = flight.copy();
  for (int begin = copy.layer_begin; begin < copy.layer_end;) {
    const int end = flight.described ? kernel_path_->EndOfPiece(begin, copy.layer_end, kStoredPieceBytes)
                                     : copy.layer_end;
    if (!QueueLayers(flight, begin, end, route)) return false;
    begin = end;
  }
  return TellQueued(flight, 0, 1, route);
}

bool CudaCopier::QueueLayers(Flight& flight, int layer_begin, int layer_end, KernelPath::Route& route) {
  if (!flight.described) {
    return engine_path_.Queue(flight.blocks, layer_begin, layer_end, flight.pinned, route.engines,
                              &flight.error);
  }
  flight.behind_layers = kernel_path_->Queue(flight.blocks, *flight.described, layer_begin, layer_end,
                                             flight.pinned, route, &flight.error);
  return flight.behind_layers != nullptr;
}

bool CudaCopier::TellQueued(Flight& flight, int layer_begin, int layer_end, KernelPath::Route& route) {
  if (!flight.copy().gate) return true;
  const StreamEvent event = flight.described ? flight.behind_layers : route.engines.Record(&flight.error);
  if (event == nullptr) return false;
  // What goes by copy engines alone does not wait for what goes through the buffer: each has a stream.
  const size_t stream = flight.described ? 1 : 0;
  for (Submission& submission : flight.submissions) {
    submission.copy.on_queued(layer_begin, layer_end, event, stream);
  }
  return true;
}

StreamEvent CudaCopier::RecordEnd(const Flight& flight, KernelPath::Route& route) {
  std::string ignored;
  if (!flight.described) return timed_events_->Record(route.engines.get(), &ignored);
  // What is complete has its last stream wait for the other one already.
  if (!flight.error.empty()) {
    const StreamEvent event = route.first().Record(&ignored);
    if (event == nullptr || !route.last().WaitFor(event, &ignored)) return nullptr;
  }
  return timed_events_->Record(route.last().get(), &ignored);
}

void CudaCopier::Reap(Direction& direction) {
  while (!direction.flights.empty()) {
    Flight& flight = *direction.flights.front();
    std::string error;
    CudaDriver::State state = CudaDriver::State::kFailed;
    if (flight.end != nullptr) {
      state = cuda_->QueryEvent(flight.end.get(), &error);
      if (state == CudaDriver::State::kPending) return;
      if (flight.error.empty()) flight.error = error;
    }
    // Without an event, or one that cannot be asked: when the streams are idle. If that cannot be asked either,
    // the device is lost, and nothing on it runs any more.
    if (state == CudaDriver::State::kFailed) {
      for (CopyStream* stream : {&direction.route->engines, &direction.route->kernels}) {
        if (cuda_->QueryStream(stream->get(), &error) == CudaDriver::State::kPending) return;
      }
    }
    if (flight.error.empty()) flight.error = error;
    if (flight.described) kernel_path_->Release(*flight.described);
    if (flight.error.empty() && flight.start != nullptr && flight.end != nullptr) {
      direction.busy_s.fetch_add(cuda_->SecondsBetween(flight.start.get(), flight.end.get()));
    }
    const std::unique_ptr<Flight> ended = std::move(direction.flights.front());
    direction.flights.pop_front();
    for (Submission& submission : ended->submissions) End(submission, ended->error);
  }
}

void CudaCopier::End(Submission& submission, const std::string& flight_error) {
  const DeviceCopy& copy = submission.copy;
  const std::string& error = flight_error.empty() ? submission.error : flight_error;
  const OpStatus status = !error.empty()           ? OpStatus::kFailed
                          : copy.cancelled->load() ? OpStatus::kCancelled
                                                   : OpStatus::kDone;
  copy.on_end(status, error);
}

}  // namespace flexkv
