// Copies between host slots and CPU memory that plays the device, in the calling thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "memory/block_layout.hpp"

namespace flexkv {

// Memory is fast where it is read and written in runs of about so many bytes. So blocks with less per layer
// are copied several layers at a time.
constexpr size_t kCopyRunBytes = 4096;

// One block of a copy. `token_slots` are its own, `first_row` is what FirstRows said.
struct BlockCopy {
  char* host = nullptr;
  const int64_t* token_slots = nullptr;
  int64_t first_row = 0;
};

// Copies layers [layer_begin, layer_end) of blocks between host slots and CPU memory that plays the device.
// Fastest with blocks in the order of their rows. FenceCopies() has to come before anyone is told of the
// bytes; one for many blocks, because each waits for all stores to drain.
void CopyLayersCpu(const BlockLayout& layout, int layer_begin, int layer_end,
                   std::span<const BlockCopy> blocks, bool to_device);
void FenceCopies();

// memcpy that bypasses the cache on the way out: what is copied here is read next by another
// thread, a disk or much later, and pulling the destination into the cache first would cost a third
// of the bandwidth.
// `way` is one of StreamWays(), by default the best.
void StreamCopy(char* dst, const char* src, size_t bytes, size_t way = 0);
// The ways to do that which this processor has, the best first.
std::vector<std::string> StreamWays();

}  // namespace flexkv
