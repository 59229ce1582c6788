// What a value in a remote store looks like: a page with a header, then the block as it lies in a host slot, or
// compressed. Both are one contiguous range for the store; in memory they are two. Pure functions over bytes: nothing
// here does I/O, and nothing here trusts what it is given. docs/remote.md has the format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/types.hpp"
#include "remote/compression.hpp"

namespace flexkv {

constexpr uint32_t kValueVersion = 1;
constexpr size_t kValueHeaderBytes =
    kIoAlignment;  // so that what follows it in a file is aligned for O_DIRECT

// What every value of a tier has in common.
struct ValueShape {
  BlockKey name_space;                // of the keys; a value of another one is not ours
  std::vector<size_t> slice_offsets;  // within a host slot, one more than slices; the last is its size
};

// Writes the header of the block at `body`, kValueHeaderBytes, to `page`.
void EncodeValueHeader(const ValueShape& shape, const BlockKey& key, const char* body, char* page);

// Compresses the block at `body` to `to`, which has room for as many bytes, and makes the header at `page`,
// EncodeValueHeader's, say so. Returns how many bytes are to be stored behind it, whole pages; 0: they would
// not be fewer, and nothing is changed.
size_t CompressValue(const ValueShape& shape, const BlockKey& key, Compression how, const char* body,
                     char* page, char* to);

// Makes the block at `body` of what came there behind `page`, `bytes` of it. What keeps it from being the block
// that was stored under this key; empty: nothing does.
std::string RestoreValue(const ValueShape& shape, const BlockKey& key, const char* page, char* body,
                         size_t bytes);

}  // namespace flexkv
