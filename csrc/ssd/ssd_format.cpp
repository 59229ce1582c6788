#include "ssd/ssd_format.hpp"

#include <algorithm>
#include <bit>

#include "base/checksum.hpp"

namespace flexkv {

static_assert(std::endian::native == std::endian::little, "the files are little-endian");

namespace {

constexpr char kSuperblockMagic[8] = {'F', 'L', 'E', 'X', 'K', 'V', 'S', 'L'};
constexpr char kJournalMagic[8] = {'F', 'L', 'E', 'X', 'K', 'V', 'J', 'R'};
constexpr uint32_t kFrameMagic = 0x4652564B;  // "KVRF"

// Every page that is a header starts like this and ends with the checksum of what is before it. The
// place of version and magic is the same in all versions for ever.
struct PagePrefix {
  char magic[8];
  uint32_t version;
  uint32_t reserved;
};

struct SuperblockBody {
  PagePrefix prefix;
  uint64_t sequence;
  BlockKey generation;
  BlockKey name_space;
  uint64_t num_slots;
  uint32_t num_slices;
  uint32_t keep;
  uint32_t label_bytes;
  uint32_t reserved;
  uint32_t slice_bytes[kSlicesMax];
  char label[kLabelMax];
};
static_assert(sizeof(SuperblockBody) + sizeof(uint64_t) <= kSsdPage);

struct JournalBody {
  PagePrefix prefix;
  BlockKey generation;
  BlockKey name_space;
  uint32_t num_slices;
  uint32_t reserved;
};

struct FrameHeader {
  uint32_t magic;
  uint32_t record_bytes;
  uint32_t count;
  uint32_t reserved;
  uint64_t number;
  BlockKey generation;
  uint64_t payload_checksum;
  uint64_t header_checksum;  // of everything before it
};
static_assert(sizeof(FrameHeader) == 56);

// Fills a page: the body, zeros, and the checksum of both.
template <typename Body>
void Seal(const Body& body, char* page) {
  std::memset(page, 0, kSsdPage);
  std::memcpy(page, &body, sizeof body);
  const uint64_t sum = Checksum(page, kSsdPage - sizeof(uint64_t));
  std::memcpy(page + kSsdPage - sizeof sum, &sum, sizeof sum);
}

Decoded Open(const char* page, const char* magic, uint32_t* version) {
  PagePrefix prefix;
  std::memcpy(&prefix, page, sizeof prefix);
  if (std::memcmp(prefix.magic, magic, sizeof prefix.magic) != 0) {
    const bool blank = std::all_of(page, page + kSsdPage, [](char c) { return c == 0; });
    return blank ? Decoded::kBlank : Decoded::kForeign;
  }
  uint64_t sum;
  std::memcpy(&sum, page + kSsdPage - sizeof sum, sizeof sum);
  const bool intact = sum == Checksum(page, kSsdPage - sizeof sum);
  *version = prefix.version;
  // A version that is not ours may have its checksum elsewhere.
  if (prefix.version != kSsdFormatVersion) return Decoded::kOtherVersion;
  return intact ? Decoded::kOk : Decoded::kDamaged;
}

PagePrefix MakePrefix(const char* magic) {
  PagePrefix prefix{};
  std::memcpy(prefix.magic, magic, sizeof prefix.magic);
  prefix.version = kSsdFormatVersion;
  return prefix;
}

}  // namespace

void EncodeSuperblock(const Superblock& superblock, char* page) {
  Require(!superblock.slice_bytes.empty() && superblock.slice_bytes.size() <= kSlicesMax,
          "a slot has 1 to 256 slices");
  SuperblockBody body{};
  body.prefix = MakePrefix(kSuperblockMagic);
  body.sequence = superblock.sequence;
  body.generation = superblock.generation;
  body.name_space = superblock.name_space;
  body.num_slots = superblock.num_slots;
  body.num_slices = static_cast<uint32_t>(superblock.slice_bytes.size());
  body.keep = superblock.keep;
  body.label_bytes = static_cast<uint32_t>(std::min(superblock.label.size(), kLabelMax));
  std::copy(superblock.slice_bytes.begin(), superblock.slice_bytes.end(), body.slice_bytes);
  std::memcpy(body.label, superblock.label.data(), body.label_bytes);
  Seal(body, page);
}

Decoded DecodeSuperblock(const char* page, Superblock* superblock, uint32_t* version) {
  const Decoded decoded = Open(page, kSuperblockMagic, version);
  if (decoded != Decoded::kOk) return decoded;
  SuperblockBody body;
  std::memcpy(&body, page, sizeof body);
  if (body.num_slices == 0 || body.num_slices > kSlicesMax || body.label_bytes > kLabelMax ||
      body.num_slots > static_cast<uint64_t>(INT32_MAX) || body.sequence == 0) {
    return Decoded::kDamaged;
  }
  for (uint32_t i = 0; i < body.num_slices; ++i) {
    if (body.slice_bytes[i] == 0 || body.slice_bytes[i] % kSsdPage != 0) return Decoded::kDamaged;
  }
  superblock->sequence = body.sequence;
  superblock->generation = body.generation;
  superblock->name_space = body.name_space;
  superblock->num_slots = body.num_slots;
  superblock->slice_bytes.assign(body.slice_bytes, body.slice_bytes + body.num_slices);
  superblock->keep = body.keep != 0;
  superblock->label.assign(body.label, body.label_bytes);
  return Decoded::kOk;
}

void EncodeJournalHeader(const JournalHeader& header, char* page) {
  JournalBody body{};
  body.prefix = MakePrefix(kJournalMagic);
  body.generation = header.generation;
  body.name_space = header.name_space;
  body.num_slices = header.num_slices;
  Seal(body, page);
}

Decoded DecodeJournalHeader(const char* page, JournalHeader* header, uint32_t* version) {
  const Decoded decoded = Open(page, kJournalMagic, version);
  if (decoded != Decoded::kOk) return decoded;
  JournalBody body;
  std::memcpy(&body, page, sizeof body);
  if (body.num_slices == 0 || body.num_slices > kSlicesMax) return Decoded::kDamaged;
  *header = {body.generation, body.name_space, body.num_slices};
  return Decoded::kOk;
}

void AppendFrame(std::string* out, const BlockKey& generation, uint64_t number, const std::string& records,
                 size_t num_slices) {
  Require(
      !records.empty() && records.size() <= kFramePayloadMax && records.size() % RecordBytes(num_slices) == 0,
      "a frame holds whole records, at least one and at most 1 MiB of them");
  FrameHeader header{};
  header.magic = kFrameMagic;
  header.record_bytes = static_cast<uint32_t>(RecordBytes(num_slices));
  header.count = static_cast<uint32_t>(records.size() / header.record_bytes);
  header.number = number;
  header.generation = generation;
  header.payload_checksum = Checksum(records.data(), records.size());
  header.header_checksum = Checksum(&header, offsetof(FrameHeader, header_checksum));
  const size_t begin = out->size();
  out->resize(begin + AlignUp(sizeof header + records.size(), kSsdPage));
  std::memcpy(out->data() + begin, &header, sizeof header);
  std::memcpy(out->data() + begin + sizeof header, records.data(), records.size());
}

bool DecodeFrame(const char* data, size_t available, const JournalHeader& journal, FrameView* frame) {
  FrameHeader header;
  if (available < sizeof header) return false;
  std::memcpy(&header, data, sizeof header);
  if (header.magic != kFrameMagic || !(header.generation == journal.generation) ||
      header.header_checksum != Checksum(&header, offsetof(FrameHeader, header_checksum)) ||
      header.record_bytes != RecordBytes(journal.num_slices)) {
    return false;
  }
  const uint64_t payload = static_cast<uint64_t>(header.count) * header.record_bytes;
  if (payload == 0 || payload > kFramePayloadMax || sizeof header + payload > available) return false;
  if (header.payload_checksum != Checksum(data + sizeof header, payload)) return false;
  frame->number = header.number;
  frame->count = header.count;
  frame->records = data + sizeof header;
  frame->bytes = AlignUp(sizeof header + payload, kSsdPage);
  return true;
}

uint64_t SliceChecksum(const BlockKey& key, const BlockKey& generation, uint32_t slice, const void* data,
                       size_t bytes) {
  const uint64_t identity[4] = {key.lo, key.hi, generation.lo, generation.hi + slice};
  return Checksum(data, bytes, Checksum(identity, sizeof identity));
}

}  // namespace flexkv
