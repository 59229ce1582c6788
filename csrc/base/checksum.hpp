// XXH3 of a slice or of a record. Runs in the I/O threads: several times faster than any disk.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flexkv {

// 64 bits of XXH3 over `bytes` bytes. Equal seeds and bytes give equal values on every machine.
uint64_t Checksum(const void* data, size_t bytes, uint64_t seed = 0);

}  // namespace flexkv
