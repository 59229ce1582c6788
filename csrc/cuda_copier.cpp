#include "cuda_copier.hpp"

#include <algorithm>
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
// worth it (1 MiB is 20 us on a fast link), and no load takes more than this many launches: 64 layers are to cost
// the host 200 us at most, with a flag per layer.
constexpr size_t kGroupBytesMin = size_t{1} << 20;
constexpr int kGroupsMax = 32;

// How often the ends of copies are looked for. Nobody's forward waits for this, as that is what flags are for.
constexpr auto kPollInterval = std::chrono::microseconds(100);

// A load that has not landed by now never will, for instance because the device runs its copies behind the very
// forward that waits for them (streams that share a queue). The gate opens as failed, which gets it unstuck.
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
  auto flight = std::make_unique<Flight>();
  flight->copy = std::move(copy);
  flight->copy.blocks.Summarize();
  flight->since = Clock::now();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    (flight->copy.blocks.to_device ? loads_ : stores_).submitted.push_back(std::move(flight));
  }
  wake_.notify_all();
}

void CudaCopier::Loop(Direction& direction) {
  std::string error;
  const bool current = cuda_->MakeCurrent(&error);
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    const auto wanted = [&] { return stop_ || !direction.submitted.empty(); };
    const bool busy = !direction.waiting.empty() ||
                      std::any_of(direction.lanes.begin(), direction.lanes.end(),
                                  [](const Lane& lane) { return !lane.flights.empty(); });
    if (busy) {
      wake_.wait_for(lock, kPollInterval, wanted);
    } else {
      wake_.wait(lock, wanted);
    }
    if (stop_) return;
    for (auto& flight : direction.submitted) {
      if (!current) flight->error = error;
      direction.waiting.push_back(std::move(flight));
    }
    direction.submitted.clear();
    lock.unlock();
    Reap(direction);
    StartWaiting(direction);
    lock.lock();
  }
}

void CudaCopier::StartWaiting(Direction& direction) {
  std::deque<std::unique_ptr<Flight>> still;
  for (auto& flight : direction.waiting) {
    // Loads may overtake each other. Stores keep their order: it is the order of the forwards they wait for.
    const bool blocked = !direction.to_device && !still.empty();
    if (blocked || !Start(direction, flight)) still.push_back(std::move(flight));
  }
  direction.waiting.swap(still);
}

bool CudaCopier::Start(Direction& direction, std::unique_ptr<Flight>& flight) {
  const DeviceCopy& copy = flight->copy;
  const CudaDriver::State events = flight->error.empty() ? StateOfEvents(*flight) : CudaDriver::State::kFailed;
  if (events == CudaDriver::State::kFailed || copy.cancelled->load()) {
    End(*flight);
    return true;
  }
  OpenGateIfLate(*flight);
  const CopiedBlocks& blocks = copy.blocks;
  flight->pinned =
      (static_cast<size_t>(blocks.last_host_slot) + 1) * host_->slot_bytes() <= host_->pinned_bytes();
  flight->by_kernel = flight->pinned && (!blocks.in_sequence || engine_path_.piece_bytes() < kEnginePieceBytes) &&
                      kernel_path_->Takes(blocks);
  const size_t layers = static_cast<size_t>(copy.layer_end - copy.layer_begin);
  flight->num_commands = copy.wait_events->size() + 2 * layers + 2 +
                         (flight->by_kernel ? 0 : blocks.count * engine_path_.pieces_per_block(blocks.in_sequence));
  const bool events_done = events == CudaDriver::State::kDone;
  Lane* lane = FindLane(direction, *flight, events_done);
  if (lane == nullptr) return false;
  if (flight->by_kernel) {
    flight->described = kernel_path_->Describe(blocks);
    if (!flight->described) return false;
  }
  Queue(direction, *lane, std::move(flight), events_done);
  return true;
}

CudaDriver::State CudaCopier::StateOfEvents(Flight& flight) {
  const std::vector<uint64_t>& events = *flight.copy.wait_events;
  for (; flight.events_done < events.size(); ++flight.events_done) {
    const auto event = reinterpret_cast<CudaDriver::Event>(events[flight.events_done]);
    const CudaDriver::State state = cuda_->QueryEvent(event, &flight.error);
    if (state != CudaDriver::State::kDone) return state;
  }
  return CudaDriver::State::kDone;
}

CudaCopier::Lane* CudaCopier::FindLane(Direction& direction, const Flight& flight, bool events_done) {
  std::vector<Lane>& lanes = direction.lanes;
  // The driver copies memory that is not pinned by way of a buffer of its own, and its call returns only when the
  // stream has got that far: there must be nothing on it that waits.
  if (!flight.pinned) {
    if (!events_done) return nullptr;
    Lane& lane = lanes.back();
    return lane.flights.empty() ? &lane : nullptr;
  }
  if (!direction.to_device) return &lanes.front();
  // Behind the other loads of its gate, so that one flag can speak for all of them.
  if (flight.copy.gate) {
    for (Lane& lane : lanes) {
      const bool same = std::any_of(lane.flights.begin(), lane.flights.end(), [&](const auto& other) {
        return other->copy.gate == flight.copy.gate;
      });
      if (!same) continue;
      const bool waits = lane.waits || !events_done;
      if (!waits || lane.num_commands + flight.num_commands <= kCommandsBehindWait) {
        return !events_done && &lane == &lanes.back() ? nullptr : &lane;
      }
      return nullptr;
    }
  }
  if (events_done) return &lanes.back();
  if (flight.num_commands > kCommandsBehindWait) return nullptr;
  for (Lane& lane : lanes) {
    if (&lane != &lanes.back() && lane.flights.empty()) return &lane;
  }
  return nullptr;
}

void CudaCopier::Queue(Direction& direction, Lane& lane, std::unique_ptr<Flight> flight, bool events_done) {
  const Clock::time_point start = Clock::now();
  if (lane.flights.empty()) {
    lane.waits = false;
    lane.num_commands = 0;
  }
  bool good = !flight->described ||
              kernel_path_->QueueDescriptors(flight->copy.blocks, *flight->described, lane.stream, &flight->error);
  if (!events_done) {
    lane.waits = true;
    for (uint64_t event : *flight->copy.wait_events) {
      good = good && cuda_->StreamWaitEvent(lane.stream, event, &flight->error);
    }
  }
  good = good && QueueLayers(*flight, lane.stream);
  if (!good && flight->copy.gate) flight->copy.gate->Fail();
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
  const DeviceCopy& copy = flight.copy;
  const CopiedBlocks& blocks = copy.blocks;
  const bool by_layer = blocks.to_device && copy.gate;
  const int layers = copy.layer_end - copy.layer_begin;
  // The first layer goes alone: a forward waits for it.
  const int layers_min = by_layer ? std::max(1, (layers + kGroupsMax - 3) / (kGroupsMax - 1)) : layers;
  for (int begin = copy.layer_begin; begin < copy.layer_end;) {
    if (copy.cancelled->load()) return true;
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
      if (!copy.gate->Queued(layer, stream, &flight.error)) return false;
    }
    begin = end;
  }
  return blocks.to_device || !copy.gate || copy.gate->Queued(0, stream, &flight.error);
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
      End(*ended);
    }
    for (const auto& flight : lane.flights) OpenGateIfLate(*flight);
  }
}

void CudaCopier::OpenGateIfLate(Flight& flight) {
  if (flight.late || !flight.copy.gate || Clock::now() - flight.since < kLate) return;
  flight.late = true;
  if (flight.error.empty()) flight.error = "the copy has not ended after 30 s, and nobody waited for it any longer";
  flight.copy.gate->Fail();
}

void CudaCopier::End(Flight& flight) {
  const DeviceCopy& copy = flight.copy;
  const OpStatus status = !flight.error.empty()      ? OpStatus::kFailed
                          : copy.cancelled->load() ? OpStatus::kCancelled
                                                   : OpStatus::kDone;
  if (status == OpStatus::kDone && copy.blocks.to_device && copy.gate) {
    for (int layer = copy.layer_begin; layer < copy.layer_end; ++layer) copy.gate->Arrive(layer);
  }
  copy.on_end(status, flight.error);
}

}  // namespace flexkv
