#include "remote/remote_value.hpp"

#include <algorithm>
#include <cstring>
#include <memory>

#include "base/checksum.hpp"
#include "remote/huffman.hpp"

namespace flexkv {

namespace {

constexpr char kMagic[8] = {'F', 'L', 'E', 'X', 'K', 'V', 'A', 'L'};

// Lies at the start of a value; the sums of the slices follow it, and, if the block is compressed, one of what
// is stored of it; then zeros, then the sum of all that.
// Little-endian, as everything this runs on is.
struct Fixed {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  BlockKey name_space;
  BlockKey key;
  uint64_t block_bytes;   // as it lies in a host slot
  uint64_t stored_bytes;  // as it lies behind the header
  uint32_t flags;         // how it is stored: a Compression
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

// Covers whose it is, which block and which part: the right bytes in the wrong place are wrong.
uint64_t PartSum(const ValueShape& shape, const BlockKey& key, size_t part, const char* begin, size_t bytes) {
  const uint64_t identity[] = {shape.name_space.lo, shape.name_space.hi, key.lo, key.hi, part};
  return Checksum(begin, bytes, Checksum(identity, sizeof identity));
}

uint64_t SliceSum(const ValueShape& shape, const BlockKey& key, size_t slice, const char* body) {
  const size_t begin = shape.slice_offsets[slice];
  return PartSum(shape, key, slice, body + begin, shape.slice_offsets[slice + 1] - begin);
}

// What is stored of a block that is compressed counts as the part behind its slices.
uint64_t StoredSum(const ValueShape& shape, const BlockKey& key, const char* stored, size_t bytes) {
  return PartSum(shape, key, shape.slice_offsets.size() - 1, stored, bytes);
}

char* SumOfPart(char* page, size_t part) { return page + sizeof(Fixed) + part * sizeof(uint64_t); }

void Seal(char* page) {
  const uint64_t sum = Checksum(page, kSumAt);
  std::memcpy(page + kSumAt, &sum, sizeof sum);
}

}  // namespace

void EncodeValueHeader(const ValueShape& shape, const BlockKey& key, const char* body, char* page) {
  const Fixed fixed = FixedOf(shape, key);
  Require(fixed.num_slices < kSlicesAtMost, "a block has too many slices for the header of a value");
  std::memset(page, 0, kValueHeaderBytes);
  std::memcpy(page, &fixed, sizeof fixed);
  for (size_t slice = 0; slice < fixed.num_slices; ++slice) {
    const uint64_t sum = SliceSum(shape, key, slice, body);
    std::memcpy(SumOfPart(page, slice), &sum, sizeof sum);
  }
  Seal(page);
}

size_t CompressValue(const ValueShape& shape, const BlockKey& key, Compression how, const char* body,
                     char* page, char* to) {
  Fixed fixed = FixedOf(shape, key);
  if (fixed.block_bytes <= kIoAlignment) return 0;
  fixed.stored_bytes = CompressBlock(how, body, fixed.block_bytes, to, fixed.block_bytes - kIoAlignment);
  if (fixed.stored_bytes == 0) return 0;
  fixed.flags = static_cast<uint32_t>(how);
  const size_t bytes = AlignUp(fixed.stored_bytes, kIoAlignment);
  std::memset(to + fixed.stored_bytes, 0, bytes - fixed.stored_bytes);
  std::memcpy(page, &fixed, sizeof fixed);
  const uint64_t sum = StoredSum(shape, key, to, bytes);
  std::memcpy(SumOfPart(page, fixed.num_slices), &sum, sizeof sum);
  Seal(page);
  return bytes;
}

std::string RestoreValue(const ValueShape& shape, const BlockKey& key, const char* page, char* body,
                         size_t bytes) {
  Fixed fixed;
  std::memcpy(&fixed, page, sizeof fixed);
  if (std::memcmp(fixed.magic, kMagic, sizeof kMagic) != 0) return "it is no value of sglang-flexkv";
  if (fixed.version != kValueVersion) return "it has version " + std::to_string(fixed.version);
  uint64_t sum;
  std::memcpy(&sum, page + kSumAt, sizeof sum);
  if (sum != Checksum(page, kSumAt)) return "its header is damaged";
  Fixed wanted = FixedOf(shape, key);
  if (!(fixed.name_space == wanted.name_space)) return "it is of another namespace";
  if (!(fixed.key == wanted.key)) return "it is another block";
  const auto how = static_cast<Compression>(fixed.flags);
  const bool compressed = how == Compression::kWords16 || how == Compression::kWords32;
  if (compressed && fixed.stored_bytes < wanted.block_bytes) {
    wanted.flags = fixed.flags;
    wanted.stored_bytes = fixed.stored_bytes;
  }
  // The padding and every field that is left, so that nothing goes unread.
  if (std::memcmp(&fixed, &wanted, sizeof fixed) != 0) return "it has another shape";
  if (bytes != AlignUp(wanted.stored_bytes, kIoAlignment)) return "it has another size than was stored";
  const char* sums = page + sizeof fixed;
  if (std::any_of(sums + (wanted.num_slices + compressed) * sizeof sum, page + kSumAt,
                  [](char byte) { return byte != 0; })) {
    return "its header holds more than it should";
  }
  if (compressed) {
    std::memcpy(&sum, sums + wanted.num_slices * sizeof sum, sizeof sum);
    if (sum != StoredSum(shape, key, body, bytes)) return "its bytes are not those that were stored";
    const std::unique_ptr<char[]> stored(new char[wanted.stored_bytes + kHuffmanSlack]);
    std::memcpy(stored.get(), body, wanted.stored_bytes);
    if (!ExpandBlock(how, stored.get(), wanted.stored_bytes, body, wanted.block_bytes)) {
      return "it cannot be expanded";
    }
  }
  for (size_t slice = 0; slice < wanted.num_slices; ++slice) {
    std::memcpy(&sum, sums + slice * sizeof sum, sizeof sum);
    if (sum != SliceSum(shape, key, slice, body)) return "its bytes are not those that were stored";
  }
  return "";
}

}  // namespace flexkv
