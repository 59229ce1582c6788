#include "copy/cpu_copy.hpp"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flexkv {

namespace {

// A load fetches at least so many blocks ahead. The processor's own prefetcher follows from there; what it
// cannot know is where the next block is.
constexpr size_t kPrefetchBlocks = 2;

// Into the second cache: the first one's few line buffers are what streamed stores need at the same time.
// Never faults. Inlined always: GCC takes a function that does nothing but prefetch for one without effect,
// and drops the call.
[[gnu::always_inline]] inline void Prefetch(const char* source, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(source + at, 0, 2);
}

// Shorter pieces do not repay the detour past the cache.
constexpr size_t kStreamBytesMin = 256;

// Copies the whole cache lines, past the cache, and returns their bytes. `dst` is the start of a line.
using StreamLines = size_t (*)(char* dst, const char* src, size_t bytes);

#if defined(__x86_64__)
__attribute__((target("avx2"))) size_t StreamLinesAvx2(char* dst, const char* src, size_t bytes) {
  size_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i + 32), high);
  }
  return i;
}

// Where one store fills a line, no half of one waits for the other.
__attribute__((target("avx512f"))) size_t StreamLinesAvx512(char* dst, const char* src, size_t bytes) {
  size_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), _mm512_loadu_si512(src + i));
  }
  return i;
}
#endif

struct Way {
  std::string name;
  StreamLines lines;  // null: memcpy
};

// What this processor can do, the best first. memcpy is always the last.
const std::vector<Way>& Ways() {
  static const std::vector<Way> kWays = [] {
    std::vector<Way> ways;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) ways.push_back({"avx512", StreamLinesAvx512});
    if (__builtin_cpu_supports("avx2")) ways.push_back({"avx2", StreamLinesAvx2});
#endif
    ways.push_back({"memcpy", nullptr});
    return ways;
  }();
  return kWays;
}

void CopyUnfenced(char* dst, const char* src, size_t bytes, StreamLines lines) {
  if (lines != nullptr && bytes >= kStreamBytesMin) {
    // Whole cache lines only: a part of one that is written past the cache is a read and a write in memory.
    const size_t head = -reinterpret_cast<uintptr_t>(dst) & 63;
    if (head != 0) std::memcpy(dst, src, head);
    const size_t done = head + lines(dst + head, src + head, bytes - head);
    if (done < bytes) std::memcpy(dst + done, src + done, bytes - done);
    return;
  }
  std::memcpy(dst, src, bytes);
}

// What one block has in one buffer of the pool.
void CopyBuffer(const DeviceBuffer& buffer, int64_t rows, const BlockCopy& block, char* host, bool to_device,
                StreamLines lines) {
  auto copy = [&](int64_t row, int64_t count) {
    char* device = reinterpret_cast<char*>(buffer.base) + row * buffer.row_stride;
    const size_t bytes = static_cast<size_t>(count * buffer.row_bytes);
    if (to_device) {
      CopyUnfenced(device, host, bytes, lines);
    } else {
      CopyUnfenced(host, device, bytes, lines);
    }
    host += bytes;
  };
  if (block.first_row >= 0 && buffer.row_stride == buffer.row_bytes) {
    copy(block.first_row, rows);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      copy(block.first_row >= 0 ? block.first_row + i : block.token_slots[i], 1);
    }
  }
}

}  // namespace

void FenceCopies() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

std::vector<std::string> StreamWays() {
  std::vector<std::string> names;
  for (const Way& way : Ways()) names.push_back(way.name);
  return names;
}

void StreamCopy(char* dst, const char* src, size_t bytes, size_t way) {
  Require(way < Ways().size(), "this processor has fewer ways to copy");
  CopyUnfenced(dst, src, bytes, Ways()[way].lines);
  FenceCopies();
}

void CopyLayersCpu(const BlockLayout& layout, int layer_begin, int layer_end,
                   std::span<const BlockCopy> blocks, bool to_device) {
  const int64_t rows = layout.rows_per_block();
  // Several streams at a time can be read at full speed, but not written: writes have to be in runs. So a
  // store finishes a block before the next one. A load takes as many blocks, neighbours in the pool, as make a
  // run of a buffer before it goes on to the next buffer; what it reads meanwhile is a tile of runs both ways,
  // and stays in the second cache.
  const size_t buffer_bytes = layout.layer_bytes(layer_begin) / layout.buffers(layer_begin).size();
  const size_t tile = to_device ? std::max<size_t>(1, kCopyRunBytes / buffer_bytes) : 1;
  const size_t ahead = std::max(tile, kPrefetchBlocks);
  const StreamLines lines = Ways().front().lines;
  for (size_t first = 0; first < blocks.size(); first += tile) {
    const size_t last = std::min(first + tile, blocks.size());
    size_t offset = layout.layer_offset(layer_begin);
    for (int layer = layer_begin; layer < layer_end; ++layer) {
      for (const DeviceBuffer& buffer : layout.buffers(layer)) {
        const size_t bytes = static_cast<size_t>(rows * buffer.row_bytes);
        for (size_t b = first; b < last; ++b) {
          if (to_device && b + ahead < blocks.size()) {
            Prefetch(blocks[b + ahead].host + offset, std::min(bytes, kCopyRunBytes));
          }
          CopyBuffer(buffer, rows, blocks[b], blocks[b].host + offset, to_device, lines);
        }
        offset += bytes;
      }
    }
  }
}

}  // namespace flexkv
