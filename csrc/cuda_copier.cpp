#include "cuda_copier.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

#include "cuda_driver.hpp"

namespace flexkv {

namespace {

// Two batches load at a time where SGLang overlaps scheduling with forwards; the last lane never waits.
constexpr size_t kLoadLanes = 3;

// A driver's queue holds about a thousand commands, and who adds to a full one waits. Behind a wait for an event
// that could be for what this thread has yet to queue, so there a lane takes no more than this.
constexpr size_t kCommandsBehindWait = 384;

// Above this the copy engines reach the speed of the link (a piece takes them about 1 us plus its bytes at 55
// GB/s: 256 KiB is 5 us) and cost no processor; below it pieces cost more than their bytes.
constexpr size_t kEnginePieceBytes = size_t{256} << 10;

// A launch costs the host about 3 us and the device a little less. Neighbouring layers go together until they are
// worth it (1 MiB is 20 us on a fast link), and the loads of a batch together take no more than this many launches:
// 64 layers are to cost the host 200 us at most, with a flag per layer.
constexpr size_t kGroupBytesMin = size_t{1} << 20;
constexpr int kGroupsMax = 32;

// How often the ends of copies are looked for. Nobody's forward waits for this, as that is what flags are for.
constexpr auto kPollInterval = std::chrono::microseconds(100);

// The loads of a batch are submitted some tens of microseconds apart. One that has not come for so long is not
// waited for: its caller was held up, and the link is not to be idle for that.
constexpr auto kNextLoadMax = std::chrono::milliseconds(5);

// A load that has not landed by now never will, for instance because the device runs its copies behind the very
// forward that waits for them (streams that share a queue). It is given up, which gets that forward unstuck.
constexpr auto kLate = std::chrono::seconds(30);

}  // namespace

CudaCopier::CudaCopier(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout,
                       std::shared_ptr<HostPool> host)
    : cuda_(std::move(cuda)), layout_(layout), host_(std::move(host)), engine_path_(cuda_, layout_, *host_) {
  const CudaContext context(*cuda_);
  flags_ = StreamFlags::Make(cuda_, &note_);
  if (!flags_) note_ = "the host waits for copies: " + note_;
  // Loads go first: a forward waits for them, and for nobody's stores.
  loads_.to_device = true;
  loads_.lanes = std::vector<Lane>(kLoadLanes);
  stores_.lanes = std::vector<Lane>(1);
  for (Direction* direction : {&loads_, &stores_}) {
    for (Lane& lane : direction->lanes) lane.stream = cuda_->CreateStream(direction->to_device);
  }
  kernel_path_ = std::make_unique<KernelPath>(cuda_, layout_, *host_, stores_.lanes[0].stream);
  if (!kernel_path_->usable()) {
    note_ += (note_.empty() ? "" : "; ") + ("small pieces go by the copy engines: " + kernel_path_->note());
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
  std::string ignored;
  for (Direction* direction : {&loads_, &stores_}) {
    for (Lane& lane : direction->lanes) cuda_->Synchronize(lane.stream, &ignored);
  }
  kernel_path_.reset();
  for (Direction* direction : {&loads_, &stores_}) {
    for (CudaDriver::Event event : direction->events) cuda_->DestroyEvent(event);
    for (Lane& lane : direction->lanes) cuda_->DestroyStream(lane.stream);
  }
}

void CudaCopier::Submit(DeviceCopy copy) {
  Submission submission{std::move(copy), Clock::now()};
  submission.copy.blocks.Summarize();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    (submission.copy.blocks.to_device ? loads_ : stores_).submitted.push_back(std::move(submission));
  }
  wake_.notify_all();
}

void CudaCopier::LoadsSubmitted(LayerGate& gate, int loads) {
  if (!gate.Submitted(loads)) return;
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
    const bool busy = !direction.waiting.empty() ||
                      std::any_of(direction.lanes.begin(), direction.lanes.end(),
                                  [](const Lane& lane) { return !lane.flights.empty(); });
    if (busy) {
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
    // Under the mutex: a gate that has all of its loads by now has them all in `waiting`.
    for (Submission& submission : direction.waiting) submission.held_back = IsHeldBack(submission.copy);
    lock.unlock();
    Reap(direction);
    StartWaiting(direction);
    lock.lock();
  }
}

void CudaCopier::StartWaiting(Direction& direction) {
  std::deque<Submission> ready, held_back;
  for (Submission& submission : direction.waiting) {
    if (EndedWaiting(submission)) continue;
    (submission.held_back ? held_back : ready).push_back(std::move(submission));
  }
  direction.waiting.swap(held_back);
  // What comes first in the model goes first, whatever request it belongs to.
  if (direction.to_device) {
    std::stable_sort(ready.begin(), ready.end(), [](const Submission& a, const Submission& b) {
      return a.copy.layer_begin < b.copy.layer_begin;
    });
  }
  while (!ready.empty()) {
    std::unique_ptr<Flight> flight = TakeFlight(ready);
    // Loads may overtake each other. Stores keep their order: it is the order of the forwards they wait for.
    const bool blocked = !direction.to_device && !direction.waiting.empty();
    if (!blocked && Start(direction, flight)) continue;
    std::move(flight->submissions.begin(), flight->submissions.end(), std::back_inserter(direction.waiting));
  }
}

bool CudaCopier::EndedWaiting(Submission& submission) {
  if (submission.error.empty() && !submission.copy.cancelled->load()) {
    GiveUpIfLate(submission);
    return false;
  }
  End(submission, "");
  return true;
}

bool CudaCopier::IsHeldBack(const DeviceCopy& copy) {
  return copy.blocks.to_device && copy.gate && !copy.follows_read && copy.gate->AwaitsLoads(kNextLoadMax);
}

bool CudaCopier::IsPinned(const CopiedBlocks& blocks) const {
  return (static_cast<size_t>(blocks.last_host_slot) + 1) * host_->slot_bytes() <= host_->pinned_bytes();
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
    if (copy.gate == first.gate && copy.layer_begin == first.layer_begin && copy.layer_end == first.layer_end &&
        IsPinned(copy.blocks) && kernel_path_->Takes(together) == kernel_path_->Takes(flight->blocks)) {
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
  const CopiedBlocks& blocks = flight->blocks;
  flight->by_kernel = flight->pinned && (!blocks.in_sequence || engine_path_.piece_bytes() < kEnginePieceBytes) &&
                      kernel_path_->Takes(blocks);
  const size_t layers = static_cast<size_t>(flight->copy().layer_end - flight->copy().layer_begin);
  flight->num_commands =
      flight->wait_events.size() + 2 * layers + 2 +
      (flight->by_kernel ? 0 : blocks.count * engine_path_.pieces_per_block(blocks.in_sequence));
  Lane* lane = FindLane(direction, *flight);
  if (lane == nullptr) return false;
  JoinArrays(*flight);
  if (flight->by_kernel) {
    flight->described = kernel_path_->Describe(blocks);
    if (!flight->described) return false;
  }
  Queue(direction, *lane, std::move(flight));
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

CudaCopier::Lane* CudaCopier::FindLane(Direction& direction, const Flight& flight) {
  std::vector<Lane>& lanes = direction.lanes;
  if (!direction.to_device && flight.pinned) return &lanes.front();
  // Behind the other loads of its gate, so that one flag can speak for all of them.
  Lane* of_gate = nullptr;
  for (Lane& lane : lanes) {
    for (const auto& other : lane.flights) {
      if (flight.copy().gate && other->copy().gate == flight.copy().gate) of_gate = &lane;
    }
  }
  // The driver copies memory that is not pinned by way of a buffer of its own, and its call returns only when the
  // stream has got that far: there must be nothing on it that waits.
  if (!flight.pinned) {
    Lane& lane = lanes.back();
    return !flight.waits() && of_gate == nullptr && lane.flights.empty() ? &lane : nullptr;
  }
  if (of_gate != nullptr) {
    const bool waits = of_gate->waits || flight.waits();
    const bool fits = !waits || of_gate->num_commands + flight.num_commands <= kCommandsBehindWait;
    return fits && !(flight.waits() && of_gate == &lanes.back()) ? of_gate : nullptr;
  }
  if (!flight.waits()) return &lanes.back();
  if (flight.num_commands > kCommandsBehindWait) return nullptr;
  for (Lane& lane : lanes) {
    if (&lane != &lanes.back() && lane.flights.empty()) return &lane;
  }
  return nullptr;
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

void CudaCopier::Queue(Direction& direction, Lane& lane, std::unique_ptr<Flight> flight) {
  const Clock::time_point start = Clock::now();
  if (lane.flights.empty()) {
    lane.waits = false;
    lane.num_commands = 0;
  }
  bool good = !flight->described ||
              kernel_path_->QueueDescriptors(flight->blocks, *flight->described, lane.stream, &flight->error);
  if (flight->waits()) {
    lane.waits = true;
    for (uint64_t event : flight->wait_events) {
      good = good && cuda_->StreamWaitEvent(lane.stream, event, &flight->error);
    }
  }
  good = good && QueueLayers(*flight, lane.stream);
  // Whatever was queued must have left the pools before the slots are given to somebody else, so one that failed
  // half-way is followed to its end, too; without an event, to the end of its stream.
  std::string ignored;
  if (direction.events.empty()) {
    flight->end = cuda_->CreateEvent(&ignored);
  } else {
    flight->end = direction.events.back();
    direction.events.pop_back();
  }
  if (flight->end != nullptr && !cuda_->RecordEvent(flight->end, lane.stream, &ignored)) {
    direction.events.push_back(flight->end);
    flight->end = nullptr;
  }
  lane.num_commands += flight->num_commands;
  lane.flights.push_back(std::move(flight));
  direction.queue_s.fetch_add(std::chrono::duration<double>(Clock::now() - start).count());
}

bool CudaCopier::QueueLayers(Flight& flight, void* stream) {
  const DeviceCopy& copy = flight.copy();
  const CopiedBlocks& blocks = flight.blocks;
  const int loads = static_cast<int>(flight.submissions.size());
  const bool by_layer = blocks.to_device && copy.gate;
  const int layers = copy.layer_end - copy.layer_begin;
  // The first layer goes alone: a forward waits for it.
  const int layers_min = by_layer ? std::max(1, (layers + kGroupsMax - 3) / (kGroupsMax - 1)) : layers;
  for (int begin = copy.layer_begin; begin < copy.layer_end;) {
    if (std::all_of(flight.submissions.begin(), flight.submissions.end(),
                    [](const Submission& submission) { return submission.copy.cancelled->load(); })) {
      return true;
    }
    const int at_once =
        flight.by_kernel ? kernel_path_->LayersAtOnce(blocks, begin, copy.layer_end) : copy.layer_end - begin;
    int end = begin;
    size_t bytes = 0;
    while (end < begin + at_once && (end - begin < (by_layer && begin == copy.layer_begin ? 1 : layers_min) ||
                                     bytes < kGroupBytesMin)) {
      bytes += layout_.layer_bytes(end) * blocks.count;
      ++end;
    }
    if (!(flight.by_kernel
              ? kernel_path_->Queue(blocks, *flight.described, begin, end, stream, &flight.error)
              : engine_path_.Queue(blocks, begin, end, flight.pinned, stream, &flight.error))) {
      return false;
    }
    for (int layer = begin; by_layer && layer < end; ++layer) {
      if (!copy.gate->Queued(layer, loads, stream, &flight.error)) return false;
    }
    begin = end;
  }
  return blocks.to_device || !copy.gate || copy.gate->Queued(0, loads, stream, &flight.error);
}

void CudaCopier::Reap(Direction& direction) {
  for (Lane& lane : direction.lanes) {
    while (!lane.flights.empty()) {
      Flight& flight = *lane.flights.front();
      std::string error;
      CudaDriver::State state = CudaDriver::State::kFailed;
      if (flight.end != nullptr) {
        state = cuda_->QueryEvent(flight.end, &error);
        if (state == CudaDriver::State::kPending) break;
        direction.events.push_back(std::exchange(flight.end, nullptr));
        if (flight.error.empty()) flight.error = error;
      }
      // Without an event, or one that cannot be asked: when the stream is idle. If that cannot be asked either,
      // the device is lost, and nothing on it runs any more.
      if (state == CudaDriver::State::kFailed) state = cuda_->QueryStream(lane.stream, &error);
      if (state == CudaDriver::State::kPending) break;
      if (flight.error.empty()) flight.error = error;
      if (flight.described) kernel_path_->Release(*flight.described);
      lane.num_commands -= flight.num_commands;
      const std::unique_ptr<Flight> ended = std::move(lane.flights.front());
      lane.flights.pop_front();
      for (Submission& submission : ended->submissions) End(submission, ended->error);
    }
    lane.waits = lane.waits && std::any_of(lane.flights.begin(), lane.flights.end(), [&](const auto& flight) {
                   return StateOfEvents(*flight) != CudaDriver::State::kDone;
                 });
    for (const auto& flight : lane.flights) {
      for (Submission& submission : flight->submissions) GiveUpIfLate(submission);
    }
  }
}

void CudaCopier::GiveUpIfLate(Submission& submission) {
  if (submission.late || !submission.copy.gate || Clock::now() - submission.since < kLate) return;
  submission.late = true;
  submission.error = "the copy has not ended after 30 s, and nobody waited for it any longer";
  submission.copy.on_late();
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
