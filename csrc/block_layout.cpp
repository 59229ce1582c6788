#include "block_layout.hpp"

#include <algorithm>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flexkv {

BlockLayout::BlockLayout(std::vector<std::vector<DeviceBuffer>> layers, int64_t tokens_per_block,
                         int64_t tokens_per_row)
    : layers_(std::move(layers)),
      tokens_per_block_(tokens_per_block),
      tokens_per_row_(tokens_per_row) {
  Require(!layers_.empty(), "a layout needs at least one layer");
  Require(tokens_per_block > 0 && tokens_per_row > 0 && tokens_per_block % tokens_per_row == 0,
          "tokens_per_row must divide tokens_per_block");
  num_rows_ = INT64_MAX;
  layer_offset_.push_back(0);
  for (const auto& buffers : layers_) {
    Require(!buffers.empty(), "a layer needs at least one buffer");
    size_t bytes = 0;
    for (const DeviceBuffer& b : buffers) {
      Require(b.base != 0 && b.num_rows > 0 && b.row_bytes > 0 && b.row_stride >= b.row_bytes,
              "a device buffer needs an address, rows, and a stride of at least a row");
      num_rows_ = std::min(num_rows_, b.num_rows);
      bytes += static_cast<size_t>(b.row_bytes * rows_per_block());
    }
    layer_offset_.push_back(layer_offset_.back() + bytes);
  }
}

std::vector<int64_t> BlockLayout::FirstRows(const int64_t* token_slots, size_t count) const {
  std::vector<int64_t> first(count);
  const int64_t limit = num_rows_ * tokens_per_row_;
  for (size_t b = 0; b < count; ++b) {
    const int64_t* slots = token_slots + b * static_cast<size_t>(tokens_per_block_);
    bool consecutive = slots[0] % tokens_per_row_ == 0;
    for (int64_t i = 0; i < tokens_per_block_; ++i) {
      if (slots[i] < 0 || slots[i] >= limit) {
        throw UsageError("token slot " + std::to_string(slots[i]) + " is outside the pool of " +
                         std::to_string(limit) + " slots");
      }
      consecutive = consecutive && slots[i] == slots[0] + i;
    }
    Require(consecutive || tokens_per_row_ == 1,
            "a pool laid out by page needs blocks of whole pages");
    first[b] = consecutive ? slots[0] / tokens_per_row_ : -1;
  }
  return first;
}

namespace {

#if defined(__x86_64__)
// Shorter pieces do not repay the detour past the cache.
constexpr size_t kStreamBytesMin = 256;

__attribute__((target("avx2"))) void StreamAvx2(char* dst, const char* src, size_t bytes) {
  // Whole cache lines only: a part of one that is written past the cache is a read and a write in memory.
  const size_t head = -reinterpret_cast<uintptr_t>(dst) & 63;
  if (head != 0) std::memcpy(dst, src, head);
  size_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i + 32), high);
  }
  if (i < bytes) std::memcpy(dst + i, src + i, bytes - i);
}
#endif

void CopyUnfenced(char* dst, const char* src, size_t bytes) {
#if defined(__x86_64__)
  static const bool kHasAvx2 = __builtin_cpu_supports("avx2");
  if (kHasAvx2 && bytes >= kStreamBytesMin) {
    StreamAvx2(dst, src, bytes);
    return;
  }
#endif
  std::memcpy(dst, src, bytes);
}

}  // namespace

void FenceCopies() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

void StreamCopy(char* dst, const char* src, size_t bytes) {
  CopyUnfenced(dst, src, bytes);
  FenceCopies();
}

std::vector<Slice> SlicesOf(const BlockLayout& layout, size_t slot_bytes, size_t max) {
  const int layers = layout.num_layers();
  // Of very deep models several layers make one slice.
  const int layers_min = static_cast<int>((static_cast<size_t>(layers) + max - 1) / max);
  std::vector<Slice> slices;
  Slice slice;
  for (int layer = 0; layer < layers; ++layer) {
    slice.layer_end = layer + 1;
    const size_t end = layer + 1 == layers ? slot_bytes : layout.layer_offset(layer + 1);
    const bool cut = end % kIoAlignment == 0 && slice.layer_end - slice.layer_begin >= layers_min;
    if (!cut && layer + 1 < layers) continue;
    slice.bytes = end - slice.offset;
    slices.push_back(slice);
    slice = {end, 0, layer + 1, layer + 1};
  }
  return slices;
}

void CopyLayersCpu(const BlockLayout& layout, int layer_begin, int layer_end, char* host_block,
                   const int64_t* token_slots, int64_t first_row, bool to_device) {
  char* host = host_block + layout.layer_offset(layer_begin);
  const int64_t rows = layout.rows_per_block();
  for (int layer = layer_begin; layer < layer_end; ++layer) {
    for (const DeviceBuffer& buffer : layout.buffers(layer)) {
      char* base = reinterpret_cast<char*>(buffer.base);
      auto copy = [&](int64_t row, int64_t count) {
        char* device = base + row * buffer.row_stride;
        const size_t bytes = static_cast<size_t>(count * buffer.row_bytes);
        if (to_device) {
          CopyUnfenced(device, host, bytes);
        } else {
          CopyUnfenced(host, device, bytes);
        }
        host += bytes;
      };
      if (first_row >= 0 && buffer.row_stride == buffer.row_bytes) {
        copy(first_row, rows);
      } else {
        for (int64_t i = 0; i < rows; ++i) copy(first_row >= 0 ? first_row + i : token_slots[i], 1);
      }
    }
  }
}

}  // namespace flexkv
