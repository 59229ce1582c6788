#include "cuda/cuda_driver.hpp"

#include <dlfcn.h>

#include "base/types.hpp"

namespace flexkv {

namespace {
// Values of cuda.h, where each has the name in the comment.
constexpr unsigned kStreamNonBlocking = 1;         // CU_STREAM_NON_BLOCKING
constexpr unsigned kEventDefault = 0;              // CU_EVENT_DEFAULT
constexpr unsigned kEventDisableTiming = 2;        // CU_EVENT_DISABLE_TIMING
constexpr unsigned kHostPortable = 1;              // CU_MEMHOST{REGISTER,ALLOC}_PORTABLE
constexpr unsigned kHostDeviceMap = 2;             // CU_MEMHOST{REGISTER,ALLOC}_DEVICEMAP
constexpr int kSourceInStreamOrder = 1;            // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
constexpr unsigned kPreferOverlapWithCompute = 1;  // CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
constexpr int kMultiprocessorCount = 16;           // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kCaptureModeRelaxed = 2;             // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr int kErrorNotReady = 600;                // CUDA_ERROR_NOT_READY
constexpr int kErrorNotSupported = 801;            // CUDA_ERROR_NOT_SUPPORTED

template <typename Fn>
bool Find(void* library, const char* name, Fn* out) {
  *out = reinterpret_cast<Fn>(dlsym(library, name));
  return *out != nullptr;
}

template <typename Fn>
void Resolve(void* library, const char* name, Fn* out) {
  if (!Find(library, name, out)) throw SystemError(std::string("the CUDA driver has no ") + name);
}
}  // namespace

std::shared_ptr<CudaDriver> CudaDriver::Load(int device, const std::string& library) {
  std::shared_ptr<CudaDriver> d(new CudaDriver());
  d->library_ = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (d->library_ == nullptr) {
    throw SystemError(std::string("cannot load the CUDA driver: ") + dlerror());
  }
  int (*init)(unsigned) = nullptr;
  int (*get)(int*, int) = nullptr;
  int (*retain)(void**, int) = nullptr;
  int (*attribute)(int*, int, int) = nullptr;
  Resolve(d->library_, "cuInit", &init);
  Resolve(d->library_, "cuDeviceGet", &get);
  Resolve(d->library_, "cuDevicePrimaryCtxRetain", &retain);
  Resolve(d->library_, "cuDeviceGetAttribute", &attribute);
  Resolve(d->library_, "cuDevicePrimaryCtxRelease_v2", &d->primary_release_);
  Resolve(d->library_, "cuCtxSetCurrent", &d->set_current_);
  Resolve(d->library_, "cuCtxPushCurrent_v2", &d->push_context_);
  Resolve(d->library_, "cuCtxPopCurrent_v2", &d->pop_context_);
  Resolve(d->library_, "cuThreadExchangeStreamCaptureMode", &d->exchange_capture_mode_);
  Resolve(d->library_, "cuCtxGetStreamPriorityRange", &d->priority_range_);
  Resolve(d->library_, "cuStreamCreateWithPriority", &d->stream_create_);
  Resolve(d->library_, "cuStreamDestroy_v2", &d->stream_destroy_);
  Resolve(d->library_, "cuStreamWaitEvent", &d->stream_wait_event_);
  Resolve(d->library_, "cuStreamQuery", &d->stream_query_);
  Resolve(d->library_, "cuStreamSynchronize", &d->stream_synchronize_);
  Resolve(d->library_, "cuEventCreate", &d->event_create_);
  Resolve(d->library_, "cuEventDestroy_v2", &d->event_destroy_);
  Resolve(d->library_, "cuEventRecord", &d->event_record_);
  Resolve(d->library_, "cuEventQuery", &d->event_query_);
  Resolve(d->library_, "cuEventElapsedTime", &d->event_elapsed_);
  Resolve(d->library_, "cuMemcpyHtoDAsync_v2", &d->copy_htod_);
  Resolve(d->library_, "cuMemcpyDtoHAsync_v2", &d->copy_dtoh_);
  Resolve(d->library_, "cuMemHostRegister_v2", &d->host_register_);
  Resolve(d->library_, "cuMemHostUnregister", &d->host_unregister_);
  Resolve(d->library_, "cuMemHostAlloc", &d->host_alloc_);
  Resolve(d->library_, "cuMemFreeHost", &d->host_free_);
  Resolve(d->library_, "cuMemAlloc_v2", &d->device_alloc_);
  Resolve(d->library_, "cuMemFree_v2", &d->device_free_);
  Resolve(d->library_, "cuModuleLoadData", &d->module_load_);
  Resolve(d->library_, "cuModuleUnload", &d->module_unload_);
  Resolve(d->library_, "cuModuleGetFunction", &d->module_function_);
  Resolve(d->library_, "cuLaunchKernel", &d->launch_);
  Resolve(d->library_, "cuGetErrorName", &d->error_name_);
  // What a driver may lack. A symbol keeps its arguments for good: cuMemcpyBatchAsync is that of CUDA 12.8 in
  // later drivers, too, where _v2 is the one without the index of the copy that failed.
  d->batch_copies_.store(Find(d->library_, "cuMemcpyBatchAsync_v2", &d->copy_batch_) ||
                         Find(d->library_, "cuMemcpyBatchAsync", &d->copy_batch_12_));
  std::string error;
  if (!d->Ok(init(0), "cuInit", &error) || !d->Ok(get(&d->device_, device), "cuDeviceGet", &error) ||
      !d->Ok(retain(&d->context_, d->device_), "cuDevicePrimaryCtxRetain", &error)) {
    throw SystemError(error);
  }
  int value = 0;
  if (attribute(&value, kMultiprocessorCount, d->device_) == 0) d->num_multiprocessors_ = value;
  return d;
}

CudaDriver::~CudaDriver() {
  // The library stays loaded: PyTorch uses it too, and unloading a driver is asking for trouble.
  if (context_ != nullptr) primary_release_(device_);
}

bool CudaDriver::Ok(int code, const char* what, std::string* error) {
  if (code == 0) return true;
  const char* name = nullptr;
  error_name_(code, &name);
  *error = std::string(what) + " failed: " + (name != nullptr ? name : std::to_string(code));
  return false;
}

CudaDriver::State CudaDriver::StateOf(int code, const char* what, std::string* error) {
  if (code == kErrorNotReady) return State::kPending;
  return Ok(code, what, error) ? State::kDone : State::kFailed;
}

bool CudaDriver::MakeCurrent(std::string* error) {
  // While any thread captures a graph, the driver refuses others what could belong into it (to ask for an
  // event, to register memory), and the graph is lost. Nothing of ours ever belongs into one.
  int mode = kCaptureModeRelaxed;
  return Ok(set_current_(context_), "cuCtxSetCurrent", error) &&
         Ok(exchange_capture_mode_(&mode), "cuThreadExchangeStreamCaptureMode", error);
}

CudaDriver::Stream CudaDriver::CreateStream(bool urgent) {
  void* stream = nullptr;
  std::string error;
  int least = 0, greatest = 0;
  if (!Ok(priority_range_(&least, &greatest), "cuCtxGetStreamPriorityRange", &error) ||
      !Ok(stream_create_(&stream, kStreamNonBlocking, urgent ? greatest : least),
          "cuStreamCreateWithPriority", &error)) {
    throw SystemError(error);
  }
  return stream;
}

void CudaDriver::DestroyStream(Stream stream) { stream_destroy_(stream); }

bool CudaDriver::StreamWaitEvent(Stream stream, uint64_t event, std::string* error) {
  return Ok(stream_wait_event_(stream, reinterpret_cast<void*>(event), 0), "cuStreamWaitEvent", error);
}

CudaDriver::State CudaDriver::QueryStream(Stream stream, std::string* error) {
  return StateOf(stream_query_(stream), "cuStreamQuery", error);
}

bool CudaDriver::Synchronize(Stream stream, std::string* error) {
  return Ok(stream_synchronize_(stream), "cuStreamSynchronize", error);
}

CudaDriver::Event CudaDriver::CreateEvent(bool timed, std::string* error) {
  void* event = nullptr;
  return Ok(event_create_(&event, timed ? kEventDefault : kEventDisableTiming), "cuEventCreate", error)
             ? event
             : nullptr;
}

void CudaDriver::DestroyEvent(Event event) { event_destroy_(event); }

bool CudaDriver::RecordEvent(Event event, Stream stream, std::string* error) {
  return Ok(event_record_(event, stream), "cuEventRecord", error);
}

CudaDriver::State CudaDriver::QueryEvent(Event event, std::string* error) {
  return StateOf(event_query_(event), "cuEventQuery", error);
}

double CudaDriver::SecondsBetween(Event start, Event end) {
  float milliseconds = 0;
  return event_elapsed_(&milliseconds, start, end) == 0 ? static_cast<double>(milliseconds) / 1e3 : 0;
}

bool CudaDriver::CopyToDevice(uint64_t dst, const void* src, size_t bytes, Stream stream,
                              std::string* error) {
  return Ok(copy_htod_(dst, src, bytes, stream), "cuMemcpyHtoDAsync", error);
}

bool CudaDriver::CopyToHost(void* dst, uint64_t src, size_t bytes, Stream stream, std::string* error) {
  return Ok(copy_dtoh_(dst, src, bytes, stream), "cuMemcpyDtoHAsync", error);
}

bool CudaDriver::CopyBatch(uint64_t* dsts, uint64_t* srcs, size_t* sizes, size_t count, Stream stream,
                           std::string* error) {
  CopyAttributes attributes{kSourceInStreamOrder, {0, 0}, {0, 0}, kPreferOverlapWithCompute};
  size_t first = 0, failed_at = 0;
  const int code = copy_batch_ != nullptr
                       ? copy_batch_(dsts, srcs, sizes, count, &attributes, &first, 1, stream)
                       : copy_batch_12_(dsts, srcs, sizes, count, &attributes, &first, 1, &failed_at, stream);
  if (code == kErrorNotSupported) {
    batch_copies_.store(false);
    return false;
  }
  return Ok(code, "cuMemcpyBatchAsync", error);
}

bool CudaDriver::HostRegister(void* ptr, size_t bytes) {
  return host_register_(ptr, bytes, kHostPortable | kHostDeviceMap) == 0;
}

void CudaDriver::HostUnregister(void* ptr) { host_unregister_(ptr); }

void* CudaDriver::AllocatePinned(size_t bytes) {
  void* memory = nullptr;
  return host_alloc_(&memory, bytes, kHostPortable | kHostDeviceMap) == 0 ? memory : nullptr;
}

void CudaDriver::FreePinned(void* pinned) { host_free_(pinned); }

uint64_t CudaDriver::AllocateDevice(size_t bytes, std::string* error) {
  uint64_t memory = 0;
  return Ok(device_alloc_(&memory, bytes), "cuMemAlloc", error) ? memory : 0;
}

void CudaDriver::FreeDevice(uint64_t memory) { device_free_(memory); }

void* CudaDriver::LoadModule(const char* ptx, std::string* error) {
  void* module = nullptr;
  return Ok(module_load_(&module, ptx), "cuModuleLoadData", error) ? module : nullptr;
}

void CudaDriver::UnloadModule(void* module) { module_unload_(module); }

CudaDriver::Kernel CudaDriver::FindKernel(void* module, const char* name, std::string* error) {
  void* kernel = nullptr;
  return Ok(module_function_(&kernel, module, name), "cuModuleGetFunction", error) ? kernel : nullptr;
}

bool CudaDriver::Launch(Kernel kernel, unsigned ctas, unsigned threads, void* argument, Stream stream,
                        std::string* error) {
  void* arguments[] = {argument};
  return Ok(launch_(kernel, ctas, 1, 1, threads, 1, 1, 0, stream, arguments, nullptr), "cuLaunchKernel",
            error);
}

}  // namespace flexkv
