#include "remote/remote_value.hpp"

#include <algorithm>
#include <cstring>

#include "base/checksum.hpp"

namespace flexkv {

namespace {

constexpr char kMagic[8] = {'F', 'L', 'E', 'X', 'K', 'V', 'A', 'L'};

// Lies at the start of a value; the sums of the slices follow it, then zeros, then the sum of all that.
// Little-endian, as everything this runs on is.
struct Fixed {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  BlockKey name_space;
  BlockKey key;
  uint64_t block_bytes;   // as it lies in a host slot
  uint64_t stored_bytes;  // as it lies behind the header
  uint32_t flags;         // of how it is stored; none is known yet
  uint32_t num_slices;
};
static_assert(sizeof(Fixed) == 72, "headers lie in stores as they are in memory");

constexpr size_t kSumAt = kValueHeaderBytes - sizeof(uint64_t);
constexpr size_t kSlicesAtMost = (kSumAt - sizeof(Fixed)) / sizeof(uint64_t);

Fixed FixedOf(const ValueShape& shape, const BlockKey& key) {
  Fixed fixed{};
  std::memcpy(fixed.magic, kMagic, sizeof kMagic);
  fixed.version = kValueVersion;
  fixed.header_bytes = kValueHeaderBytes;
  fixed.name_space = shape.name_space;
  fixed.key = key;
  fixed.block_bytes = fixed.stored_bytes = shape.slice_offsets.back();
  fixed.num_slices = static_cast<uint32_t>(shape.slice_offsets.size() - 1);
  return fixed;
}

// Covers whose it is, which block and which slice: the right bytes in the wrong place are wrong.
uint64_t SliceSum(const ValueShape& shape, const BlockKey& key, size_t slice, const char* body) {
  const uint64_t identity[] = {shape.name_space.lo, shape.name_space.hi, key.lo, key.hi, slice};
  const size_t begin = shape.slice_offsets[slice];
  return Checksum(body + begin, shape.slice_offsets[slice + 1] - begin, Checksum(identity, sizeof identity));
}

}  // namespace

void EncodeValueHeader(const ValueShape& shape, const BlockKey& key, const char* body, char* page) {
  const Fixed fixed = FixedOf(shape, key);
  Require(fixed.num_slices <= kSlicesAtMost, "a block has too many slices for the header of a value");
  std::memset(page, 0, kValueHeaderBytes);
  std::memcpy(page, &fixed, sizeof fixed);
  for (size_t slice = 0; slice < fixed.num_slices; ++slice) {
    const uint64_t sum = SliceSum(shape, key, slice, body);
    std::memcpy(page + sizeof fixed + slice * sizeof sum, &sum, sizeof sum);
  }
  const uint64_t sum = Checksum(page, kSumAt);
  std::memcpy(page + kSumAt, &sum, sizeof sum);
}

std::string WhyNotTheValue(const ValueShape& shape, const BlockKey& key, const char* page, const char* body) {
  Fixed fixed;
  std::memcpy(&fixed, page, sizeof fixed);
  if (std::memcmp(fixed.magic, kMagic, sizeof kMagic) != 0) return "it is no value of sglang-flexkv";
  if (fixed.version != kValueVersion) return "it has version " + std::to_string(fixed.version);
  uint64_t sum;
  std::memcpy(&sum, page + kSumAt, sizeof sum);
  if (sum != Checksum(page, kSumAt)) return "its header is damaged";
  const Fixed wanted = FixedOf(shape, key);
  if (!(fixed.name_space == wanted.name_space)) return "it is of another namespace";
  if (!(fixed.key == wanted.key)) return "it is another block";
  // The padding and every field that is left, so that nothing goes unread.
  if (std::memcmp(&fixed, &wanted, sizeof fixed) != 0) return "it has another shape";
  const char* sums = page + sizeof fixed;
  if (std::any_of(sums + wanted.num_slices * sizeof sum, page + kSumAt,
                  [](char byte) { return byte != 0; })) {
    return "its header holds more than it should";
  }
  for (size_t slice = 0; slice < wanted.num_slices; ++slice) {
    std::memcpy(&sum, sums + slice * sizeof sum, sizeof sum);
    if (sum != SliceSum(shape, key, slice, body)) return "its bytes are not those that were stored";
  }
  return "";
}

}  // namespace flexkv
