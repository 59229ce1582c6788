#include "index/token_hash.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

namespace flexkv {

namespace {

constexpr uint8_t kNoDigit = 0xff;

constexpr std::array<uint8_t, 256> HexDigits() {
  std::array<uint8_t, 256> values{};
  for (auto& value : values) value = kNoDigit;
  for (uint8_t i = 0; i < 10; ++i) values['0' + i] = i;
  for (uint8_t i = 0; i < 6; ++i) values['a' + i] = values['A' + i] = 10 + i;
  return values;
}

constexpr std::array<uint8_t, 256> kHexDigits = HexDigits();

}  // namespace

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

void TokenView::Copy(size_t block, size_t count, int32_t* out) const {
  if (!wide) {
    std::memcpy(out, static_cast<const int32_t*>(data) + block * per_block,
                count * per_block * sizeof(int32_t));
    return;
  }
  const int64_t* ids = static_cast<const int64_t*>(data) + block * per_block;
  for (size_t i = 0; i < count * per_block; ++i) out[i] = static_cast<int32_t>(ids[i]);
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
  const size_t bytes = tokens.per_block * sizeof(int32_t);
  // The tokens by themselves first: that does not wait for the parent, so it overlaps with naming it.
  XXH128_hash_t link[2];
  if (!tokens.wide) {
    link[1] = XXH3_128bits(static_cast<const char*>(tokens.data) + block * bytes, bytes);
  } else {
    constexpr size_t kStackTokens = 256;
    int32_t narrow[kStackTokens];
    std::vector<int32_t> large(tokens.per_block > kStackTokens ? tokens.per_block : 0);
    int32_t* ids = large.empty() ? narrow : large.data();
    tokens.Copy(block, 1, ids);
    link[1] = XXH3_128bits(ids, bytes);
  }
  link[0] = {parent.lo, parent.hi};
  const XXH128_hash_t hash = XXH3_128bits(link, sizeof link);
  return {hash.low64, hash.high64};
}

BlockKey KeyOfPageHash(std::string_view hex, const BlockKey& name_space) {
  std::array<uint8_t, sizeof(BlockKey)> bytes;
  uint8_t seen = 0;
  if (hex.size() >= 2 * bytes.size()) {
    for (size_t i = 0; i < bytes.size(); ++i) {
      const uint8_t high = kHexDigits[static_cast<uint8_t>(hex[2 * i])];
      const uint8_t low = kHexDigits[static_cast<uint8_t>(hex[2 * i + 1])];
      seen |= high | low;
      bytes[i] = static_cast<uint8_t>(high << 4 | low);
    }
  }
  if (hex.size() < 2 * bytes.size() || seen >= 16) {
    throw UsageError("the hash of a page begins with 32 hexadecimal digits, unlike '" + std::string(hex) +
                     "'");
  }
  BlockKey key;
  std::memcpy(&key, bytes.data(), sizeof key);
  return {key.lo ^ name_space.lo, key.hi ^ name_space.hi};
}

}  // namespace flexkv
