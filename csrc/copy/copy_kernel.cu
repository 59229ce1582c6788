// The GPU's side of copy_kernel.hpp. scripts/build_kernels.sh makes copy_kernel_ptx.inc of it.
#include "copy/copy_kernel.hpp"

namespace flexkv {
namespace {

template <typename T>
struct Streaming {
  using Unit = T;
  static __device__ __forceinline__ T Load(uint64_t from) { return __ldcs(reinterpret_cast<const T*>(from)); }
  static __device__ __forceinline__ void Store(uint64_t to, T unit) {
    __stcs(reinterpret_cast<T*>(to), unit);
  }
};

}  // namespace
}  // namespace flexkv

#define FLEXKV_COPY_KERNEL(bytes, type)                                                             \
  extern "C" __global__ void __launch_bounds__(flexkv::kCopyThreads, flexkv::kCopyCtasPerProcessor) \
      flexkv_copy_##bytes(const flexkv::CopyGroup group) {                                          \
    flexkv::CopyAsThread<flexkv::Streaming<type>>(group, blockIdx.x * blockDim.x + threadIdx.x,     \
                                                  gridDim.x * blockDim.x);                          \
  }

FLEXKV_COPY_KERNEL(16, uint4)
FLEXKV_COPY_KERNEL(8, uint2)
FLEXKV_COPY_KERNEL(4, unsigned)
FLEXKV_COPY_KERNEL(1, unsigned char)
