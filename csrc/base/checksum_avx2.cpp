// Compiled with AVX2 enabled, and called only where the processor has it.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstddef>
#include <cstdint>

namespace flexkv {

uint64_t ChecksumAvx2(const void* data, size_t bytes, uint64_t seed) {
  return XXH3_64bits_withSeed(data, bytes, seed);
}

}  // namespace flexkv
