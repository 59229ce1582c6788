// A stand-in for libcuda.so.1 in which tests run the engine's CUDA path on a CPU. It keeps what the real one
// promises and no more. Streams run late, and share hardware queues: what is in one queue runs in the order
// in which it came, so a stream may stand behind another one's wait. One lock is held for as long as a call
// takes, and some calls take until the device has nothing left to do: the first launch of a kernel, which
// loads it; giving memory back. A full queue makes the caller wait, too, and so does a copy of memory that is
// not pinned. Copies in a batch have no order.
//
// What the real one punishes with wrong bytes, a broken context or a lost graph is noted as a violation: kernels
// or streams that touch memory which is not theirs, copies from or to memory that is gone, events that are
// gone, calls in another context than their stream's, calls that lose the graph that somebody captures.
//
// There are several devices. They have numbers, and handles that are others.
//
//     g++ -std=c++20 -shared -fPIC -Icsrc csrc/testing/fake_cuda.cpp -o libcuda.so.1 -pthread
//
// FAKE_CUDA=11 leaves out what CUDA 12.8 brought, =12 what CUDA 13 brought.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "copy/copy_kernel.hpp"

#ifndef FAKE_CUDA
#define FAKE_CUDA 13
#endif

namespace {

constexpr int kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201, kInvalidPtx = 218;
constexpr int kNotFound = 500, kNotReady = 600, kIllegalAddress = 700, kCaptureUnsupported = 900;
constexpr int kDevices = 8, kFirstHandle = 100, kRelaxed = 2;
constexpr size_t kQueueMax = 1024, kPageBytes = 4096;
constexpr int kProcessors = 132;
constexpr double kKernelBytesPerUs = 1e6;
// What a device has room for beside kernels that fill it.
constexpr unsigned kCtasMax = 4 * kProcessors, kThreadsMax = 128;

enum class Kind { kDevice, kPinned };
struct Region {
  size_t bytes;
  Kind kind;
};

struct Stream;
struct Command {
  Stream* stream;
  bool moves;  // bytes, where others wait or tell each other something
  std::function<void()> run;
};

// What streams are mapped to.
struct Queue {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Command> commands;
  bool running = false;
  Stream* moving = nullptr;  // the stream whose command moves bytes at the moment
};

// The primary one of a device.
struct Context {
  int uses = 0;
};

struct Stream {
  Queue* queue = nullptr;
  void* context = nullptr;  // in which it was created; nullptr: in none, by a test
  size_t unfinished = 0;    // its commands, under the queue's mutex
  uint64_t lost = 0;        // the device's life in which it was lost, under the queue's mutex
  double model_us = 0;      // a GPU's time when it has done what it did, touched by the queue's thread alone
};

struct Event {
  bool timed = false;
  void* context = nullptr;  // as a stream's
  std::atomic<bool> gone{false};
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0, reached = 0;
  double model_us = 0;
};

// All that the "device" knows. Never freed: threads of a test that hangs may still look at it.
struct Device {
  std::recursive_mutex lock;  // what the real one calls the context's
  std::mutex mutex;
  std::map<uint64_t, Region> regions;
  std::map<std::string, std::pair<int64_t, int>> faults;  // call -> how many calls from now, with what code
  std::map<std::string, int64_t> calls;
  std::map<int, int> attributes{{16, kProcessors}};
  Context contexts[kDevices];
  std::atomic<bool> captures{false};  // some thread, and no other one may disturb it
  int64_t registrations_when_timed =
      0;  // that had begun when somebody last asked for the time between events
  std::vector<std::string> violations;
  std::vector<uint64_t> trace;  // of what streams did, see fake_trace
  std::atomic<int> broken{0};
  std::atomic<uint64_t> life{1};
  std::mt19937 random{1};
  int delay_us_max = 0;
  std::vector<Queue*> queues;
  size_t num_queues = 32, next_queue = 0;
  std::set<const void*> loaded_kernels;
  // How long a GPU would take, for events that are asked for the time between them: a piece for a copy
  // engine, and the bytes of both paths.
  std::atomic<double> piece_us{2};
  std::chrono::milliseconds registration{0};  // takes so long
  std::chrono::steady_clock::time_point registered;
  static constexpr double engine_bytes_per_us = 55e3;

  // The region that holds these bytes whole; nullptr if none does.
  const Region* Find(uint64_t address, size_t bytes, uint64_t* begin = nullptr) {
    auto it = regions.upper_bound(address);
    if (it == regions.begin()) return nullptr;
    --it;
    if (address + bytes > it->first + it->second.bytes) return nullptr;
    if (begin != nullptr) *begin = it->first;
    return &it->second;
  }
  bool Touches(uint64_t address, size_t bytes) {
    auto it = regions.lower_bound(address + bytes);
    return it != regions.begin() && std::prev(it)->first + std::prev(it)->second.bytes > address;
  }
  void Violation(const std::string& what) {
    std::lock_guard<std::mutex> lock(mutex);
    violations.push_back(what);
    broken.store(kIllegalAddress);
  }
  void Trace(uint64_t what) {
    std::lock_guard<std::mutex> lock(mutex);
    trace.push_back(what);
  }
  int Delay() {
    std::lock_guard<std::mutex> lock(mutex);
    return delay_us_max > 0 ? static_cast<int>(random() % static_cast<unsigned>(delay_us_max + 1)) : 0;
  }
};

Device& device() {
  static Device* const the_device = new Device();
  return *the_device;
}

// Of the calling thread, the current one last.
thread_local std::vector<void*> contexts;
thread_local int capture_mode = 0;

void* Current() { return contexts.empty() ? nullptr : contexts.back(); }

Context* OfHandle(int handle) {
  const int number = handle - kFirstHandle;
  return number >= 0 && number < kDevices ? &device().contexts[number] : nullptr;
}

void RunQueue(Queue* queue);

Queue* NextQueue() {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  while (d.queues.size() < d.num_queues) {
    d.queues.push_back(new Queue());
    std::thread(RunQueue, d.queues.back()).detach();
  }
  return d.queues[d.next_queue++ % d.num_queues];
}

// Returns when the device has nothing left to do.
void Drain() {
  std::vector<Queue*> queues;
  {
    std::lock_guard<std::mutex> lock(device().mutex);
    queues = device().queues;
  }
  for (Queue* queue : queues) {
    std::unique_lock<std::mutex> lock(queue->mutex);
    queue->changed.wait(lock, [&] { return queue->commands.empty() && !queue->running; });
  }
}

// What a call returns before it does anything: an injected fault, or what broke the context.
int Enter(const char* call) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  ++d.calls[call];
  auto fault = d.faults.find(call);
  if (fault != d.faults.end()) {
    auto& [left, code] = fault->second;
    if (left < 0 || left-- == 0) return code;
  }
  return d.broken.load();
}

#define ENTER()                                            \
  std::lock_guard<std::recursive_mutex> in(device().lock); \
  if (const int code = Enter(__func__); code != 0) return code

// A call that needs a context, whatever it is about.
int InAContext(const char* call) {
  if (Current() != nullptr) return 0;
  device().Violation(std::string(call) + " without a context");
  return kInvalidContext;
}

// A call about a stream or an event, which is made in the context that this was created in.
template <typename Owned>
int InContextOf(const char* call, const Owned* owned) {
  if (owned->context == nullptr || owned->context == Current()) return 0;
  device().Violation(std::string(call) + " in another context than that of what it is about");
  return kInvalidContext;
}

// One that might belong into a graph that is being captured, so that it is lost.
int BesideCaptures(const char* call) {
  if (!device().captures.load() || capture_mode == kRelaxed) return 0;
  device().Violation(std::string(call) + " while a graph is captured");
  return kCaptureUnsupported;
}

int NotGone(const char* call, const Event* event) {
  if (!event->gone.load()) return 0;
  device().Violation(std::string(call) + " of an event that is gone");
  return kInvalidValue;
}

#define REQUIRE(rule, ...) \
  if (const int code = rule(__func__ __VA_OPT__(, ) __VA_ARGS__); code != 0) return code

void RunQueue(Queue* queue) {
  std::unique_lock<std::mutex> lock(queue->mutex);
  for (;;) {
    queue->changed.wait(lock, [&] { return !queue->commands.empty(); });
    Command command = std::move(queue->commands.front());
    queue->commands.pop_front();
    queue->running = true;
    const bool runs = !command.moves || command.stream->lost != device().life.load();
    if (runs && command.moves) queue->moving = command.stream;
    lock.unlock();
    if (const int delay = device().Delay(); delay > 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(delay));
    }
    if (runs) command.run();
    command.run = nullptr;
    lock.lock();
    queue->running = false;
    queue->moving = nullptr;
    --command.stream->unfinished;
    queue->changed.notify_all();
  }
}

enum class Does { kMove, kTell };

void Push(void* handle, Does what, std::function<void()> command) {
  Stream* stream = static_cast<Stream*>(handle);
  Queue* queue = stream->queue;
  std::unique_lock<std::mutex> lock(queue->mutex);
  queue->changed.wait(lock, [&] { return queue->commands.size() < kQueueMax; });
  queue->commands.push_back({stream, what == Does::kMove, std::move(command)});
  ++stream->unfinished;
  queue->changed.notify_all();
}

void Join(void* handle) {
  Stream* stream = static_cast<Stream*>(handle);
  std::unique_lock<std::mutex> lock(stream->queue->mutex);
  stream->queue->changed.wait(lock, [&] { return stream->unfinished == 0; });
}

// A stream that cannot even be asked whether it has come to its end is one of a device that is lost: it
// touches nothing any more.
void Lose(void* handle) {
  Stream* stream = static_cast<Stream*>(handle);
  std::unique_lock<std::mutex> lock(stream->queue->mutex);
  stream->lost = device().life.load();
  stream->queue->changed.wait(lock, [&] { return stream->queue->moving != stream; });
}

bool Idle(void* handle) {
  Stream* stream = static_cast<Stream*>(handle);
  std::lock_guard<std::mutex> lock(stream->queue->mutex);
  return stream->unfinished == 0;
}

void CopyNow(uint64_t to, uint64_t from, uint64_t device_side, size_t bytes) {
  Device& d = device();
  bool good;
  {
    std::lock_guard<std::mutex> lock(d.mutex);
    uint64_t begin = 0;
    const Region* region = d.Find(device_side, bytes, &begin);
    good = region != nullptr && region->kind == Kind::kDevice;
    if (to == device_side) d.trace.push_back(begin);
  }
  if (!good) {
    d.Violation("a copy ran from or to device memory that is not there");
    return;
  }
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
}

int Copy(uint64_t to, uint64_t from, uint64_t device_side, uint64_t host_side, size_t bytes, void* stream) {
  Device& d = device();
  bool pinned;
  {
    std::lock_guard<std::mutex> lock(d.mutex);
    const Region* on_device = d.Find(device_side, bytes);
    if (bytes == 0 || on_device == nullptr || on_device->kind != Kind::kDevice) return kInvalidValue;
    pinned = d.Find(host_side, bytes) != nullptr;
    if (!pinned && d.Touches(host_side, bytes)) return kInvalidValue;  // part of it is registered, or two are
  }
  Push(stream, Does::kMove, [=] {
    if (pinned) {
      std::lock_guard<std::mutex> lock(device().mutex);
      if (device().Find(host_side, bytes) == nullptr) {
        device().violations.push_back("a copy ran from or to host memory that is not pinned any more");
      }
    }
    CopyNow(to, from, device_side, bytes);
    static_cast<Stream*>(stream)->model_us +=
        device().piece_us + static_cast<double>(bytes) / device().engine_bytes_per_us;
  });
  if (!pinned) Join(stream);
  return 0;
}

void Record(Event* event, void* stream) {
  uint64_t number;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    number = ++event->recorded;
  }
  Push(stream, Does::kTell, [=] {
    if (!event->timed) device().Trace(0);
    std::lock_guard<std::mutex> lock(event->mutex);
    event->reached = std::max(event->reached, number);
    event->model_us = static_cast<Stream*>(stream)->model_us;
    event->changed.notify_all();
  });
}

uint64_t Address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// Accesses of the kernel, each of them looked up.
template <typename T>
struct Checked {
  using Unit = T;
  // What the last one was in, for as long as a kernel runs.
  static inline thread_local uint64_t begin, end;

  static void Begin() { begin = end = 0; }
  // Whether memory can be touched there. Here most of the time of a test goes.
  static bool Check(uint64_t address) {
    if (address >= begin && address + sizeof(T) <= end && address % sizeof(T) == 0) return true;
    return LookUp(address);
  }
  static bool LookUp(uint64_t address) {
    Device& d = device();
    if (address % sizeof(T) != 0) d.Violation("a kernel's access is not aligned");
    {
      std::lock_guard<std::mutex> lock(d.mutex);
      const Region* region = d.Find(address, sizeof(T), &begin);
      // It may touch pinned memory, but would keep processors for as long as the link takes.
      end = region != nullptr && region->kind == Kind::kDevice ? begin + region->bytes : 0;
    }
    if (end == 0) d.Violation("a kernel touched memory that is not on the device");
    return d.broken.load() == 0;
  }
  static T Load(uint64_t from) {
    T unit{};
    if (Check(from)) std::memcpy(&unit, reinterpret_cast<const void*>(from), sizeof unit);
    return unit;
  }
  static void Store(uint64_t to, T unit) {
    if (Check(to)) std::memcpy(reinterpret_cast<void*>(to), &unit, sizeof unit);
  }
};

struct Unit16 {
  uint64_t low, high;
};

template <typename T>
void RunKernel(const flexkv::CopyGroup& group, uint32_t num_threads) {
  const uint32_t num_buffers = group.runs_per_block / group.runs_per_buffer;
  for (uint32_t buffer = 0; group.to_pool != 0 && buffer < num_buffers; ++buffer) {
    device().Trace(group.buffers[buffer].base);
  }
  Checked<T>::Begin();
  for (uint32_t thread = 0; thread < num_threads && device().broken.load() == 0; ++thread) {
    flexkv::CopyAsThread<Checked<T>>(group, thread, num_threads);
  }
}

using Kernel = void (*)(const flexkv::CopyGroup&, uint32_t);
const std::map<std::string, Kernel> kKernels{{"flexkv_copy_16", RunKernel<Unit16>},
                                             {"flexkv_copy_8", RunKernel<uint64_t>},
                                             {"flexkv_copy_4", RunKernel<uint32_t>},
                                             {"flexkv_copy_1", RunKernel<uint8_t>}};

void* Map(size_t bytes, Kind kind) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::lock_guard<std::mutex> lock(device().mutex);
  device().regions[Address(memory)] = {bytes, kind};
  return memory;
}

int Forget(uint64_t address, bool unmap) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  auto it = d.regions.find(address);
  if (it == d.regions.end()) return kInvalidValue;
  if (unmap) munmap(reinterpret_cast<void*>(address), it->second.bytes);
  d.regions.erase(it);
  return 0;
}

}  // namespace

extern "C" {

// ---- what tests ask for ------------------------------------------------------------------------

// No faults, no violations, nothing lost, counters at 0. Streams take up to delay_us_max before each command.
void fake_reset(unsigned seed, int delay_us_max) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  d.faults.clear();
  d.calls.clear();
  d.violations.clear();
  d.captures.store(false);
  d.registrations_when_timed = 0;
  d.trace.clear();
  d.broken.store(0);
  ++d.life;
  d.attributes = {{16, kProcessors}};
  d.random.seed(seed);
  d.delay_us_max = delay_us_max;
  d.piece_us = 2;
  d.num_queues = 32;
  d.registration = {};
}

// A registration of memory takes so long, and as long nobody may begin another one: launches wait meanwhile.
void fake_registration(int ms) {
  std::lock_guard<std::mutex> lock(device().mutex);
  device().registration = std::chrono::milliseconds(ms);
  device().registered = {};  // the one before took no time, and asks for no rest
}

// A thread captures a graph from now on, or none does.
void fake_capture(int on) { device().captures.store(on != 0); }

// How many registrations of memory had begun when somebody last asked for the time between two events.
int64_t fake_registrations_when_timed() {
  std::lock_guard<std::mutex> lock(device().mutex);
  return device().registrations_when_timed;
}

// Who uses a device's primary context.
int fake_uses_of_device(int number) {
  std::lock_guard<std::mutex> lock(device().mutex);
  return device().contexts[number].uses;
}

// Streams that are created from now on share so many hardware queues.
void fake_queues(int count) {
  std::lock_guard<std::mutex> lock(device().mutex);
  device().num_queues = static_cast<size_t>(count);
}

// What a piece costs a copy engine, as events measure it.
void fake_speeds(double piece_us) {
  std::lock_guard<std::mutex> lock(device().mutex);
  device().piece_us = piece_us;
}

// A forward's launch of a kernel that nobody has launched before.
void fake_first_launch(void* stream) {
  std::lock_guard<std::recursive_mutex> in(device().lock);
  Drain();
  Push(stream, Does::kTell, [] {});
}

// Holds a stream up until the word is no longer 0.
void fake_hold(void* stream, const uint32_t* word) {
  Push(stream, Does::kTell, [=] {
    const auto start = std::chrono::steady_clock::now();
    while (std::atomic_ref<const uint32_t>(*word).load() == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    const std::chrono::duration<double, std::micro> held_up = std::chrono::steady_clock::now() - start;
    static_cast<Stream*>(stream)->model_us += held_up.count();
  });
}

// Lets it go on. What the caller did before comes before what the stream does then.
void fake_let_go(uint32_t* word) { std::atomic_ref<uint32_t>(*word).store(1); }

// The call fails with this code when it has been made `after` more times; < 0: from now on always.
void fake_fail(const char* call, int64_t after, int code) {
  std::lock_guard<std::mutex> lock(device().mutex);
  device().faults[call] = {after, code};
}

void fake_forget_calls() {
  std::lock_guard<std::mutex> lock(device().mutex);
  device().calls.clear();
}

int64_t fake_calls(const char* call) {
  std::lock_guard<std::mutex> lock(device().mutex);
  return device().calls[call];
}

// What streams have done since the last fake_reset, in order, up to `size` of it: the beginning of each piece
// of the device's memory that a copy wrote to, and 0 for an event that others wait for. Returns how much it
// was.
size_t fake_trace(uint64_t* out, size_t size) {
  std::lock_guard<std::mutex> lock(device().mutex);
  std::copy_n(device().trace.begin(), std::min(size, device().trace.size()), out);
  return device().trace.size();
}

void fake_attribute(int attribute, int value) {
  std::lock_guard<std::mutex> lock(device().mutex);
  device().attributes[attribute] = value;
}

int fake_violations(char* out, size_t size) {
  std::lock_guard<std::mutex> lock(device().mutex);
  std::string all;
  for (const std::string& violation : device().violations) all += violation + "\n";
  std::snprintf(out, size, "%s", all.c_str());
  return static_cast<int>(device().violations.size());
}

// Memory of the caller's that plays the device's from now on, until it is unregistered.
void fake_adopt(uint64_t address, size_t bytes) {
  std::lock_guard<std::mutex> lock(device().mutex);
  device().regions[address] = {bytes, Kind::kDevice};
}

// A caller that no injected fault meets.
int fake_is_idle(void* handle) { return Idle(handle); }

void* fake_record(void* stream) {
  Event* event = new Event();
  event->timed = true;
  Record(event, stream);
  return event;
}

// What a forward does: reads and writes the device's memory in stream order.
void fake_read(void* stream, void* to, uint64_t from, size_t bytes) {
  Push(stream, Does::kMove, [=] { CopyNow(Address(to), from, from, bytes); });
}

void fake_write(void* stream, uint64_t to, const void* from, size_t bytes) {
  const char* begin = static_cast<const char*>(from);
  auto held = std::make_shared<std::vector<char>>(begin, begin + bytes);
  Push(stream, Does::kMove, [=] { CopyNow(to, Address(held->data()), to, held->size()); });
}

void fake_fill(void* stream, uint64_t to, int value, size_t bytes) {
  Push(stream, Does::kMove, [=] { std::memset(reinterpret_cast<void*>(to), value, bytes); });
}

// ---- the driver --------------------------------------------------------------------------------

int cuInit(unsigned) {
  ENTER();
  return 0;
}

int cuGetErrorName(int code, const char** name) {
  static const std::map<int, const char*> kNames{{kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
                                                 {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"}};
  const auto it = kNames.find(code);
  *name = it != kNames.end() ? it->second : "CUDA_ERROR_INJECTED";
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int handle) {
  ENTER();
  if (OfHandle(handle) == nullptr) return kInvalidDevice;
  std::lock_guard<std::mutex> lock(device().mutex);
  *value = device().attributes[attribute];
  return 0;
}

int cuDeviceGet(int* handle, int number) {
  ENTER();
  *handle = kFirstHandle + number;
  return number >= 0 && number < kDevices ? 0 : kInvalidDevice;
}

int cuDevicePrimaryCtxRetain(void** context, int handle) {
  ENTER();
  Context* primary = OfHandle(handle);
  if (primary == nullptr) return kInvalidDevice;
  std::lock_guard<std::mutex> lock(device().mutex);
  ++primary->uses;
  *context = primary;
  return 0;
}

int cuDevicePrimaryCtxRelease_v2(int handle) {
  Context* primary = OfHandle(handle);
  if (primary == nullptr) return kInvalidDevice;
  std::lock_guard<std::mutex> lock(device().mutex);
  --primary->uses;
  return 0;
}

int cuCtxSetCurrent(void* context) {
  ENTER();
  if (!contexts.empty()) contexts.pop_back();
  if (context != nullptr) contexts.push_back(context);
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = Current();
  return 0;
}

int cuCtxPushCurrent_v2(void* context) {
  ENTER();
  contexts.push_back(context);
  return 0;
}

int cuCtxPopCurrent_v2(void** context) {
  cuCtxGetCurrent(context);
  if (!contexts.empty()) contexts.pop_back();
  return 0;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER();
  std::swap(*mode, capture_mode);
  return 0;
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  ENTER();
  REQUIRE(InAContext);
  *least = 0;
  *greatest = -5;
  return 0;
}

int cuStreamCreateWithPriority(void** out, unsigned, int) {
  ENTER();
  REQUIRE(BesideCaptures);
  Stream* stream = new Stream();
  stream->context = Current();
  stream->queue = NextQueue();
  *out = stream;
  return 0;
}

int cuStreamDestroy_v2(void* stream) {
  Join(stream);
  delete static_cast<Stream*>(stream);
  return 0;
}

int cuStreamQuery(void* stream) {
  std::lock_guard<std::recursive_mutex> in(device().lock);
  if (const int code = Enter(__func__); code != 0) {
    Lose(stream);
    return code;
  }
  REQUIRE(BesideCaptures);
  REQUIRE(InContextOf, static_cast<Stream*>(stream));
  return Idle(stream) ? 0 : kNotReady;
}

int cuStreamSynchronize(void* stream) {
  ENTER();
  REQUIRE(BesideCaptures);
  REQUIRE(InContextOf, static_cast<Stream*>(stream));
  Join(stream);
  return device().broken.load();
}

int cuEventCreate(void** out, unsigned flags) {
  ENTER();
  REQUIRE(InAContext);
  Event* event = new Event();
  event->timed = (flags & 2) == 0;
  event->context = Current();
  *out = event;
  return 0;
}

// A stream may be at the very end of telling it: events are kept.
int cuEventDestroy_v2(void* event) {
  static_cast<Event*>(event)->gone.store(true);
  return 0;
}

int cuEventRecord(void* handle, void* stream) {
  ENTER();
  REQUIRE(NotGone, static_cast<Event*>(handle));
  REQUIRE(InContextOf, static_cast<Event*>(handle));
  REQUIRE(InContextOf, static_cast<Stream*>(stream));
  Record(static_cast<Event*>(handle), stream);
  return 0;
}

int cuEventQuery(void* handle) {
  ENTER();
  REQUIRE(BesideCaptures);
  Event* event = static_cast<Event*>(handle);
  REQUIRE(NotGone, event);
  REQUIRE(InContextOf, event);
  std::lock_guard<std::mutex> lock(event->mutex);
  return event->reached >= event->recorded ? 0 : kNotReady;
}

int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
  ENTER();
  {
    std::lock_guard<std::mutex> lock(device().mutex);
    device().registrations_when_timed = device().calls["cuMemHostRegister_v2"];
  }
  double model_us[2];
  for (int i = 0; i < 2; ++i) {
    Event* event = static_cast<Event*>(i == 0 ? from : to);
    REQUIRE(NotGone, event);
    std::lock_guard<std::mutex> lock(event->mutex);
    if (!event->timed || event->recorded == 0) return kInvalidValue;
    if (event->reached < event->recorded) return kNotReady;
    model_us[i] = event->model_us;
  }
  *milliseconds = static_cast<float>((model_us[1] - model_us[0]) / 1e3);
  return 0;
}

int cuStreamWaitEvent(void* stream, void* handle, unsigned) {
  ENTER();
  Event* event = static_cast<Event*>(handle);  // of any context
  REQUIRE(NotGone, event);
  REQUIRE(InContextOf, static_cast<Stream*>(stream));
  uint64_t number;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    number = event->recorded;
  }
  Push(stream, Does::kTell, [=] {
    std::unique_lock<std::mutex> lock(event->mutex);
    event->changed.wait(lock, [&] { return event->reached >= number; });
    double& now_us = static_cast<Stream*>(stream)->model_us;
    now_us = std::max(now_us, event->model_us);
  });
  return 0;
}

// What the engine does without: for programs that ask what becomes of a stream that waits for a word.
int cuStreamWaitValue32_v2(void* stream, uint64_t address, uint32_t value, unsigned) {
  ENTER();
  Push(stream, Does::kTell, [=] {
    const std::atomic_ref<uint32_t> word(*reinterpret_cast<uint32_t*>(address));
    while (static_cast<int32_t>(word.load() - value) < 0)
      std::this_thread::sleep_for(std::chrono::microseconds(20));
  });
  return 0;
}

int cuStreamWriteValue32_v2(void* stream, uint64_t address, uint32_t value, unsigned) {
  ENTER();
  Push(stream, Does::kTell,
       [=] { std::atomic_ref<uint32_t>(*reinterpret_cast<uint32_t*>(address)).store(value); });
  return 0;
}

#if FAKE_CUDA >= 12
struct CopyAttributes {
  int source_order;
  int locations[4];
  unsigned flags;
};

static int CopyBatch(uint64_t* to, uint64_t* from, size_t* sizes, size_t count, CopyAttributes* attributes,
                     size_t* first, size_t num_attributes, void* stream) {
  if (count == 0 || num_attributes != 1 || first[0] != 0 || attributes[0].source_order != 1)
    return kInvalidValue;
  if (stream == nullptr) return kInvalidValue;  // the default one is not for batches
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = i;
  {
    std::lock_guard<std::mutex> lock(device().mutex);
    std::shuffle(order.begin(), order.end(), device().random);
  }
  for (size_t i : order) {
    bool to_device;
    {
      std::lock_guard<std::mutex> lock(device().mutex);
      const Region* region = device().Find(to[i], sizes[i]);
      to_device = region != nullptr && region->kind == Kind::kDevice;
    }
    const int code = to_device ? Copy(to[i], from[i], to[i], from[i], sizes[i], stream)
                               : Copy(to[i], from[i], from[i], to[i], sizes[i], stream);
    if (code != 0) return code;
  }
  return 0;
}

int cuMemcpyBatchAsync(uint64_t* to, uint64_t* from, size_t* sizes, size_t count, CopyAttributes* attributes,
                       size_t* first, size_t num_attributes, size_t* failed_at, void* stream) {
  ENTER();
  REQUIRE(InContextOf, static_cast<Stream*>(stream));
  if (failed_at == nullptr) return kInvalidValue;
  return CopyBatch(to, from, sizes, count, attributes, first, num_attributes, stream);
}
#endif

#if FAKE_CUDA >= 13
int cuMemcpyBatchAsync_v2(uint64_t* to, uint64_t* from, size_t* sizes, size_t count,
                          CopyAttributes* attributes, size_t* first, size_t num_attributes, void* stream) {
  ENTER();
  REQUIRE(InContextOf, static_cast<Stream*>(stream));
  return CopyBatch(to, from, sizes, count, attributes, first, num_attributes, stream);
}
#endif

int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  ENTER();
  REQUIRE(InContextOf, static_cast<Stream*>(stream));
  return Copy(to, Address(from), to, Address(from), bytes, stream);
}

int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  ENTER();
  REQUIRE(InContextOf, static_cast<Stream*>(stream));
  return Copy(Address(to), from, from, Address(to), bytes, stream);
}

// The real one brings pages that are not there, one by one, and nobody else gets anything done meanwhile.
int cuMemHostRegister_v2(void* memory, size_t bytes, unsigned) {
  ENTER();
  REQUIRE(InAContext);
  REQUIRE(BesideCaptures);
  Device& d = device();
  std::vector<unsigned char> pages(bytes / kPageBytes);
  const bool all_there = mincore(memory, bytes, pages.data()) == 0 &&
                         std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; });
  const bool rested = std::chrono::steady_clock::now() - d.registered >= d.registration;
  std::this_thread::sleep_for(d.registration);
  d.registered = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(d.mutex);
  if (!all_there) d.violations.push_back("memory was registered before it had pages");
  if (!rested) d.violations.push_back("memory was registered without a rest for others");
  if (d.Touches(Address(memory), bytes)) return kInvalidValue;
  d.regions[Address(memory)] = {bytes, Kind::kPinned};
  return 0;
}

int cuMemHostUnregister(void* memory) {
  ENTER();
  REQUIRE(BesideCaptures);
  return Forget(Address(memory), false);
}

int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  ENTER();
  REQUIRE(BesideCaptures);
  *memory = Map(bytes, Kind::kPinned);
  return 0;
}

int cuMemFreeHost(void* memory) {
  std::lock_guard<std::recursive_mutex> in(device().lock);
  REQUIRE(BesideCaptures);
  Drain();
  return Forget(Address(memory), true);
}

int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  ENTER();
  REQUIRE(BesideCaptures);
  *address = Address(Map(bytes, Kind::kDevice));
  return 0;
}

int cuMemFree_v2(uint64_t address) {
  std::lock_guard<std::recursive_mutex> in(device().lock);
  REQUIRE(BesideCaptures);
  Drain();
  return Forget(address, true);
}

int cuModuleLoadData(void** module, const void* image) {
  ENTER();
  REQUIRE(InAContext);
  REQUIRE(BesideCaptures);
  const char* ptx = static_cast<const char*>(image);
  if (std::strstr(ptx, ".version 7.0") == nullptr) return kInvalidPtx;
  *module = const_cast<char*>(ptx);
  return 0;
}

int cuModuleUnload(void*) { return 0; }

int cuModuleGetFunction(void** function, void* module, const char* name) {
  ENTER();
  const auto it = kKernels.find(name);
  if (it == kKernels.end() ||
      std::strstr(static_cast<const char*>(module), (std::string(".entry ") + name).c_str()) == nullptr) {
    return kNotFound;
  }
  *function = reinterpret_cast<void*>(it->second);
  return 0;
}

int cuLaunchKernel(void* function, unsigned ctas, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned, void* stream, void** arguments, void**) {
  ENTER();
  REQUIRE(InContextOf, static_cast<Stream*>(stream));
  const flexkv::CopyGroup group = *static_cast<const flexkv::CopyGroup*>(arguments[0]);
  bool loaded;
  {
    std::lock_guard<std::mutex> lock(device().mutex);
    loaded = !device().loaded_kernels.insert(function).second;
  }
  if (!loaded) Drain();
  if (ctas > kCtasMax || threads > kThreadsMax)
    device().Violation("a copy takes room that other kernels need");
  Push(stream, Does::kMove, [=] {
    reinterpret_cast<Kernel>(function)(group, ctas * threads);
    double bytes = 0;
    for (uint32_t run = 0; run < group.num_runs && device().broken.load() == 0; ++run) {
      bytes += flexkv::PlaceOfRun(group, run).bytes;
    }
    static_cast<Stream*>(stream)->model_us += bytes / kKernelBytesPerUs;
  });
  return 0;
}

}  // extern "C"
