// The few calls of the CUDA driver that the engine needs, looked up at run time: one build serves
// machines with any CUDA version and with none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace flexkv {

class CudaDriver {
 public:
  using Stream = void*;

  // Loads libcuda.so.1 and takes the primary context of `device` (the one PyTorch uses). Throws
  // SystemError with the reason if that is not possible.
  static std::shared_ptr<CudaDriver> Load(int device);
  ~CudaDriver();

  // Every thread that uses the driver makes the context current first.
  void MakeCurrent();
  Stream CreateStream();
  void DestroyStream(Stream stream);
  // False on failure, with the reason in *error.
  bool CopyToDevice(uint64_t dst, const void* src, size_t bytes, Stream stream, std::string* error);
  bool CopyToHost(void* dst, uint64_t src, size_t bytes, Stream stream, std::string* error);
  bool StreamWaitEvent(Stream stream, uint64_t event, std::string* error);
  bool Synchronize(Stream stream, std::string* error);
  bool HostRegister(void* ptr, size_t bytes);
  void HostUnregister(void* ptr);

 private:
  CudaDriver() = default;
  bool Ok(int code, const char* what, std::string* error);

  void* library_ = nullptr;
  void* context_ = nullptr;
  int device_ = 0;
  int (*set_current_)(void*) = nullptr;
  int (*stream_create_)(void**, unsigned) = nullptr;
  int (*stream_destroy_)(void*) = nullptr;
  int (*stream_wait_event_)(void*, void*, unsigned) = nullptr;
  int (*stream_synchronize_)(void*) = nullptr;
  int (*copy_htod_)(uint64_t, const void*, size_t, void*) = nullptr;
  int (*copy_dtoh_)(void*, uint64_t, size_t, void*) = nullptr;
  int (*host_register_)(void*, size_t, unsigned) = nullptr;
  int (*host_unregister_)(void*) = nullptr;
  int (*primary_release_)(int) = nullptr;
  int (*error_name_)(int, const char**) = nullptr;
};

}  // namespace flexkv
