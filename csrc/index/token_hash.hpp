// Keys from token ids, for the library's path: XXH3-128 of the parent's key and the XXH3-128 of the
// block's tokens (32 bits each, little-endian).
//
// It is fast, not cryptographic: whoever looks a block up by such a key compares its tokens, too.
// SGLang hashes its pages itself, and its keys come from the names that it gives them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/types.hpp"

namespace flexkv {

// Token ids of some blocks, 32 or 64 bits each, where they lie in the caller's memory.
struct TokenView {
  const void* data = nullptr;
  bool wide = false;  // int64
  size_t per_block = 0;

  // Throws UsageError unless the tokens of all blocks fit in 32 bits, which everything else expects.
  void RequireFit(size_t blocks) const;
  void Copy(size_t block, size_t count, int32_t* out) const;
  bool Equal(size_t block, const int32_t* stored) const;
};

// Key of the block with these tokens after the block `parent`, or after the namespace's digest.
BlockKey HashBlock(const BlockKey& parent, const TokenView& tokens, size_t block);

// Key of a page that SGLang has hashed: the first 128 bits of the hash, folded with the namespace's
// digest. Throws UsageError unless `hex` begins with 32 hexadecimal digits.
BlockKey KeyOfPageHash(std::string_view hex, const BlockKey& name_space);

}  // namespace flexkv
