#include "base/checksum.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace flexkv {

#if defined(__x86_64__)
// The same function, compiled for AVX2 in a file of its own: the extension must also load on
// processors without it.
uint64_t ChecksumAvx2(const void* data, size_t bytes, uint64_t seed);
#endif

uint64_t Checksum(const void* data, size_t bytes, uint64_t seed) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) return ChecksumAvx2(data, bytes, seed);
#endif
  return XXH3_64bits_withSeed(data, bytes, seed);
}

}  // namespace flexkv
