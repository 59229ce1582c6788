#include "cuda_driver.hpp"

#include <dlfcn.h>

#include "types.hpp"

namespace flexkv {

namespace {
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kHostRegisterPortable = 1;

template <typename Fn>
void Resolve(void* library, const char* name, Fn* out) {
  *out = reinterpret_cast<Fn>(dlsym(library, name));
  if (*out == nullptr) throw SystemError(std::string("the CUDA driver has no ") + name);
}
}  // namespace

std::shared_ptr<CudaDriver> CudaDriver::Load(int device) {
  std::shared_ptr<CudaDriver> d(new CudaDriver());
  d->library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (d->library_ == nullptr) {
    throw SystemError(std::string("cannot load the CUDA driver: ") + dlerror());
  }
  int (*init)(unsigned) = nullptr;
  int (*retain)(void**, int) = nullptr;
  Resolve(d->library_, "cuInit", &init);
  Resolve(d->library_, "cuDevicePrimaryCtxRetain", &retain);
  Resolve(d->library_, "cuDevicePrimaryCtxRelease_v2", &d->primary_release_);
  Resolve(d->library_, "cuCtxSetCurrent", &d->set_current_);
  Resolve(d->library_, "cuStreamCreate", &d->stream_create_);
  Resolve(d->library_, "cuStreamDestroy_v2", &d->stream_destroy_);
  Resolve(d->library_, "cuStreamWaitEvent", &d->stream_wait_event_);
  Resolve(d->library_, "cuStreamSynchronize", &d->stream_synchronize_);
  Resolve(d->library_, "cuMemcpyHtoDAsync_v2", &d->copy_htod_);
  Resolve(d->library_, "cuMemcpyDtoHAsync_v2", &d->copy_dtoh_);
  Resolve(d->library_, "cuMemHostRegister_v2", &d->host_register_);
  Resolve(d->library_, "cuMemHostUnregister", &d->host_unregister_);
  Resolve(d->library_, "cuGetErrorName", &d->error_name_);
  std::string error;
  if (!d->Ok(init(0), "cuInit", &error) ||
      !d->Ok(retain(&d->context_, device), "cuDevicePrimaryCtxRetain", &error)) {
    throw SystemError(error);
  }
  d->device_ = device;
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

void CudaDriver::MakeCurrent() {
  std::string error;
  if (!Ok(set_current_(context_), "cuCtxSetCurrent", &error)) throw SystemError(error);
}

CudaDriver::Stream CudaDriver::CreateStream() {
  void* stream = nullptr;
  std::string error;
  if (!Ok(stream_create_(&stream, kStreamNonBlocking), "cuStreamCreate", &error)) {
    throw SystemError(error);
  }
  return stream;
}

void CudaDriver::DestroyStream(Stream stream) { stream_destroy_(stream); }

bool CudaDriver::CopyToDevice(uint64_t dst, const void* src, size_t bytes, Stream stream,
                              std::string* error) {
  return Ok(copy_htod_(dst, src, bytes, stream), "cuMemcpyHtoDAsync", error);
}

bool CudaDriver::CopyToHost(void* dst, uint64_t src, size_t bytes, Stream stream,
                            std::string* error) {
  return Ok(copy_dtoh_(dst, src, bytes, stream), "cuMemcpyDtoHAsync", error);
}

bool CudaDriver::StreamWaitEvent(Stream stream, uint64_t event, std::string* error) {
  return Ok(stream_wait_event_(stream, reinterpret_cast<void*>(event), 0), "cuStreamWaitEvent",
            error);
}

bool CudaDriver::Synchronize(Stream stream, std::string* error) {
  return Ok(stream_synchronize_(stream), "cuStreamSynchronize", error);
}

bool CudaDriver::HostRegister(void* ptr, size_t bytes) {
  return set_current_(context_) == 0 && host_register_(ptr, bytes, kHostRegisterPortable) == 0;
}

void CudaDriver::HostUnregister(void* ptr) {
  if (set_current_(context_) == 0) host_unregister_(ptr);
}

}  // namespace flexkv
