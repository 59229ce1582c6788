#include "token_hash.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstring>
#include <vector>

namespace flexkv {

void TokenView::RequireFit(size_t blocks) const {
  if (!wide) return;
  const int64_t* ids = static_cast<const int64_t*>(data);
  const size_t count = blocks * per_block;
  uint64_t lost = 0;
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {  // of a length that the compiler turns into vectors
    for (size_t k = 0; k < 8; ++k) lost |= static_cast<uint64_t>(ids[i + k] + 0x80000000ll);
  }
  for (; i < count; ++i) lost |= static_cast<uint64_t>(ids[i] + 0x80000000ll);
  Require(lost >> 32 == 0, "token ids must fit in 32 bits");
}

void TokenView::Copy(size_t block, int32_t* out) const {
  if (!wide) {
    std::memcpy(out, static_cast<const int32_t*>(data) + block * per_block, per_block * sizeof(int32_t));
    return;
  }
  const int64_t* ids = static_cast<const int64_t*>(data) + block * per_block;
  for (size_t i = 0; i < per_block; ++i) out[i] = static_cast<int32_t>(ids[i]);
}

bool TokenView::Equal(size_t block, const int32_t* stored) const {
  if (!wide) {
    return std::memcmp(static_cast<const int32_t*>(data) + block * per_block, stored,
                       per_block * sizeof(int32_t)) == 0;
  }
  const int64_t* ids = static_cast<const int64_t*>(data) + block * per_block;
  uint64_t different = 0;
  size_t i = 0;
  for (; i + 8 <= per_block; i += 8) {  // of a length that the compiler turns into vectors
    for (size_t k = 0; k < 8; ++k) different |= static_cast<uint64_t>(ids[i + k] ^ stored[i + k]);
  }
  for (; i < per_block; ++i) different |= static_cast<uint64_t>(ids[i] ^ stored[i]);
  return different == 0;
}

BlockKey HashBlock(const BlockKey& parent, const TokenView& tokens, size_t block) {
  // Parent and tokens in one piece: on the stack as long as a block is not very large.
  constexpr size_t kStackTokens = 256;
  struct {
    BlockKey parent;
    int32_t tokens[kStackTokens];
  } small;
  std::vector<int32_t> large;
  void* input = &small;
  if (tokens.per_block > kStackTokens) {
    large.resize(sizeof(BlockKey) / sizeof(int32_t) + tokens.per_block);
    input = large.data();
  }
  std::memcpy(input, &parent, sizeof(parent));
  tokens.Copy(block, reinterpret_cast<int32_t*>(static_cast<char*>(input) + sizeof(parent)));
  const XXH128_hash_t hash =
      XXH3_128bits(input, sizeof(BlockKey) + tokens.per_block * sizeof(int32_t));
  return {hash.low64, hash.high64};
}

}  // namespace flexkv
