// The calls of the CUDA driver that the engine needs, looked up at run time: one build serves machines with any
// CUDA version and with none.
//
// Calls that return bool, or take *error, say in *error what failed; they never throw. All of them may be made
// from any thread whose current context is this one (MakeCurrent, CudaContext).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace flexkv {

class CudaDriver {
 public:
  using Stream = void*;
  using Event = void*;
  using Kernel = void*;
  enum class State { kPending, kDone, kFailed };

  static constexpr const char* kLibrary = "libcuda.so.1";

  // Loads the driver and takes the primary context of a device, which is the one that PyTorch uses. `device` is its
  // number, as PyTorch counts. Throws SystemError with the reason if that is not possible. `library` is for tests,
  // which bring a stand-in.
  static std::shared_ptr<CudaDriver> Load(int device, const std::string& library = kLibrary);
  ~CudaDriver();

  // Every thread of ours that uses the driver makes the context current first. What it does from then on does not
  // disturb a CUDA graph that another thread captures.
  bool MakeCurrent(std::string* error);

  int num_multiprocessors() const { return num_multiprocessors_; }
  bool has_batch_copies() const { return batch_copies_.load(std::memory_order_relaxed); }

  // Throws SystemError. An urgent stream's work goes before that of others.
  Stream CreateStream(bool urgent);
  void DestroyStream(Stream stream);
  bool StreamWaitEvent(Stream stream, uint64_t event, std::string* error);
  State QueryStream(Stream stream, std::string* error);
  bool Synchronize(Stream stream, std::string* error);

  // nullptr on failure. Only timed events can be asked for the time between them; others cost less to wait for.
  Event CreateEvent(bool timed, std::string* error);
  void DestroyEvent(Event event);
  bool RecordEvent(Event event, Stream stream, std::string* error);
  State QueryEvent(Event event, std::string* error);
  // Seconds between two timed events that have happened; 0 if they cannot be asked.
  double SecondsBetween(Event start, Event end);

  bool CopyToDevice(uint64_t dst, const void* src, size_t bytes, Stream stream, std::string* error);
  bool CopyToHost(void* dst, uint64_t src, size_t bytes, Stream stream, std::string* error);
  // Many copies in one call, in any order among themselves. Without has_batch_copies it is an error. A driver
  // that has the call and does not support it here ends has_batch_copies and returns false without an error.
  bool CopyBatch(uint64_t* dsts, uint64_t* srcs, size_t* sizes, size_t count, Stream stream,
                 std::string* error);

  // Registers memory for DMA and for access by kernels.
  bool HostRegister(void* ptr, size_t bytes);
  void HostUnregister(void* ptr);
  // Pinned memory; nullptr on failure.
  void* AllocatePinned(size_t bytes);
  void FreePinned(void* pinned);
  uint64_t AllocateDevice(size_t bytes, std::string* error);
  void FreeDevice(uint64_t memory);

  // nullptr on failure. Modules stay loaded until the driver goes.
  void* LoadModule(const char* ptx, std::string* error);
  void UnloadModule(void* module);
  Kernel FindKernel(void* module, const char* name, std::string* error);
  // `argument` is copied before the call returns.
  bool Launch(Kernel kernel, unsigned ctas, unsigned threads, void* argument, Stream stream,
              std::string* error);

 private:
  friend class CudaContext;
  CudaDriver() = default;
  bool Ok(int code, const char* what, std::string* error);
  State StateOf(int code, const char* what, std::string* error);

  void* library_ = nullptr;
  void* context_ = nullptr;
  int device_ = 0;  // the driver's handle
  int num_multiprocessors_ = 1;
  std::atomic<bool> batch_copies_{false};

  // Of the version of cuMemcpyBatchAsync that came with CUDA 12.8; CUDA 13 dropped an argument.
  struct CopyAttributes {
    int source_order;
    int source_location[2];
    int destination_location[2];
    unsigned flags;
  };
  static_assert(sizeof(CopyAttributes) == 24, "CUmemcpyAttributes of cuda.h");

  int (*set_current_)(void*) = nullptr;
  int (*push_context_)(void*) = nullptr;
  int (*pop_context_)(void**) = nullptr;
  int (*exchange_capture_mode_)(int*) = nullptr;
  int (*priority_range_)(int*, int*) = nullptr;
  int (*stream_create_)(void**, unsigned, int) = nullptr;
  int (*stream_destroy_)(void*) = nullptr;
  int (*stream_wait_event_)(void*, void*, unsigned) = nullptr;
  int (*stream_query_)(void*) = nullptr;
  int (*stream_synchronize_)(void*) = nullptr;
  int (*event_create_)(void**, unsigned) = nullptr;
  int (*event_destroy_)(void*) = nullptr;
  int (*event_record_)(void*, void*) = nullptr;
  int (*event_query_)(void*) = nullptr;
  int (*event_elapsed_)(float*, void*, void*) = nullptr;
  int (*copy_htod_)(uint64_t, const void*, size_t, void*) = nullptr;
  int (*copy_dtoh_)(void*, uint64_t, size_t, void*) = nullptr;
  int (*copy_batch_)(uint64_t*, uint64_t*, size_t*, size_t, CopyAttributes*, size_t*, size_t,
                     void*) = nullptr;
  int (*copy_batch_12_)(uint64_t*, uint64_t*, size_t*, size_t, CopyAttributes*, size_t*, size_t, size_t*,
                        void*) = nullptr;
  int (*host_register_)(void*, size_t, unsigned) = nullptr;
  int (*host_unregister_)(void*) = nullptr;
  int (*host_alloc_)(void**, size_t, unsigned) = nullptr;
  int (*host_free_)(void*) = nullptr;
  int (*device_alloc_)(uint64_t*, size_t) = nullptr;
  int (*device_free_)(uint64_t) = nullptr;
  int (*module_load_)(void**, const void*) = nullptr;
  int (*module_unload_)(void*) = nullptr;
  int (*module_function_)(void**, void*, const char*) = nullptr;
  int (*launch_)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                 void**) = nullptr;
  int (*primary_release_)(int) = nullptr;
  int (*error_name_)(int, const char**) = nullptr;
};

// Makes the driver's context current on somebody else's thread, for as long as it lives.
class CudaContext {
 public:
  explicit CudaContext(CudaDriver& cuda) : cuda_(cuda), pushed_(cuda.push_context_(cuda.context_) == 0) {}
  ~CudaContext() {
    void* popped = nullptr;
    if (pushed_) cuda_.pop_context_(&popped);
  }
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

 private:
  CudaDriver& cuda_;
  const bool pushed_;
};

}  // namespace flexkv
