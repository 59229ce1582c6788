// What is compressed of a block of KV, which is floating-point numbers: their exponents. Signs and mantissas
// are noise, and stay as they are; exponents are few, and some far more frequent than others. Pure functions
// over bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flexkv {

// How a block is stored, in the flags of its value.
enum class Compression : uint32_t {
  kNone = 0,
  // Each number is rotated left by one, so that its exponent is in the highest byte. First all lowest bytes,
  // then all of the next, and the highest ones in a Huffman code.
  kWords16 = 1,
  kWords32 = 2,
};

// Of numbers of so many bytes; kNone if nothing is known to shrink them.
Compression CompressionOf(size_t number_bytes);

// Returns how many bytes were written to `to`; 0: there is no room, which is less than `bytes`.
size_t CompressBlock(Compression how, const char* block, size_t bytes, char* to, size_t room);
// Whether `from`, with room for kHuffmanSlack bytes behind it, is a block of exactly `bytes`, however it came
// about. `block` is not within `from`.
bool ExpandBlock(Compression how, const char* from, size_t stored_bytes, char* block, size_t bytes);

// What compressing a block brings and costs here and now, in seconds of a core.
struct CompressionTrial {
  size_t stored_bytes = 0;  // those of the block if it does not shrink
  double compress_s = 0, expand_s = 0;
};
CompressionTrial TryCompression(Compression how, const char* block, size_t bytes);

}  // namespace flexkv
