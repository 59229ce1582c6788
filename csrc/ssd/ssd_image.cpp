#include "ssd/ssd_image.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace flexkv {

namespace {

// The journal is read through a window of this size, which holds several of the largest frames.
constexpr size_t kWindowBytes = 8 * kFramePayloadMax;

// Applies one record. A slot goes to the record with the highest sequence.
void Apply(SsdImage* image, const char* data) {
  Record record;
  std::memcpy(&record, data, sizeof record);
  image->records++;
  image->last_sequence = std::max(image->last_sequence, record.sequence);
  if (record.slot >= image->entries.size() || record.sequence == 0) return;
  SsdEntry& entry = image->entries[record.slot];
  if (record.sequence <= entry.sequence) return;
  // Of a dropped block the sequence is kept until the end of the replay: it outranks older records.
  entry = {record.kind == RecordKind::kStored ? record.key : BlockKey{}, record.parent, record.sequence};
  const uint64_t slices = NumSlices(image->superblock);
  std::memcpy(image->checksums.get() + record.slot * slices, data + sizeof record, slices * sizeof(uint64_t));
}

int Replay(Disk& disk, int fd, const JournalHeader& header, SsdImage* image) {
  const int64_t size = disk.Size(fd);
  if (size < 0) return static_cast<int>(size);
  const uint64_t behind_header = static_cast<uint64_t>(size) - std::min<uint64_t>(size, kSsdPage);
  std::vector<char> window(std::min<uint64_t>(kWindowBytes, behind_header));
  uint64_t base = kSsdPage;  // file offset of the window
  size_t have = 0, at = 0;
  uint64_t last_frame = 0, damaged_since = 0;
  bool damaged = false;
  for (;;) {
    if (have - at < kFramePayloadMax + kSsdPage && base + have < static_cast<uint64_t>(size)) {
      std::memmove(window.data(), window.data() + at, have - at);
      base += at;
      have -= at;
      at = 0;
      const size_t wanted =
          std::min<uint64_t>(window.size() - have, static_cast<uint64_t>(size) - base - have);
      const int error = disk.ReadAll(fd, window.data() + have, wanted, base + have);
      if (error < 0) return error;
      have += wanted;
    }
    if (at >= have) break;
    FrameView frame;
    // A frame that is older than one before it was left there by somebody who copied files around.
    if (DecodeFrame(window.data() + at, have - at, header, &frame) && frame.number > last_frame) {
      for (size_t i = 0; i < frame.count; ++i) {
        Apply(image, frame.records + i * RecordBytes(header.num_slices));
      }
      last_frame = frame.number;
      image->frames++;
      if (damaged) image->damaged_bytes += base + at - damaged_since;
      damaged = false;
      at = std::min(at + frame.bytes, have);
      image->journal_end = base + at;
    } else {
      // The end, or a damaged frame: what follows may still be good.
      if (!damaged) damaged_since = base + at;
      damaged = true;
      at = std::min(at + kSsdPage, have);
    }
  }
  // A file that was cut in the middle of a page: the next frame starts on one.
  image->journal_end = AlignUp(image->journal_end, kSsdPage);
  image->next_frame = last_frame + 1;
  return 0;
}

std::string Mismatch(Decoded decoded, uint32_t version) {
  if (decoded == Decoded::kForeign) return "is not a file of sglang-flexkv";
  return "has format version " + std::to_string(version) + ", this program knows version " +
         std::to_string(kSsdFormatVersion);
}

}  // namespace

PageBuffer::PageBuffer(size_t pages)
    : data(static_cast<char*>(std::aligned_alloc(kSsdPage, pages * kSsdPage)), std::free) {
  std::memset(data.get(), 0, pages * kSsdPage);
}

uint64_t SlotsWithin(const Superblock& superblock, int64_t file_bytes) {
  if (file_bytes < static_cast<int64_t>(kSlotsOffset)) return 0;
  const uint64_t room = (static_cast<uint64_t>(file_bytes) - kSlotsOffset) / superblock.slot_bytes();
  return std::min(superblock.num_slots, room);
}

void AllocateSlots(SsdImage* image, uint64_t num_slots) {
  image->entries.assign(num_slots, {});
  // Zero pages until they are touched: an empty store takes no memory for its checksums.
  image->checksums.reset(static_cast<uint64_t*>(
      std::calloc(std::max<uint64_t>(1, num_slots * NumSlices(image->superblock)), sizeof(uint64_t))));
  if (!image->checksums) throw SystemError("no memory for the checksums of the SSD tier");
  image->num_live = 0;
}

SsdImage LoadImage(Disk& disk, int slots_fd, int journal_fd, const std::string& name) {
  SsdImage image;
  const int64_t size = disk.Size(slots_fd);
  if (size < 0) throw DiskError(name, "cannot be read", static_cast<int>(size));
  if (size == 0) return image;
  PageBuffer pages(2);
  const size_t head = std::min<uint64_t>(2 * kSsdPage, static_cast<uint64_t>(size) / kSsdPage * kSsdPage);
  if (const int error = head == 0 ? 0 : disk.ReadAll(slots_fd, pages.data.get(), head, 0); error < 0) {
    throw DiskError(name, "cannot be read", error);
  }
  if (static_cast<uint64_t>(size) < kSsdPage) throw MismatchError(name + " is not a file of sglang-flexkv");
  bool ours = false, foreign = false;
  for (size_t copy = 0; copy < 2; ++copy) {
    Superblock superblock;
    uint32_t version = 0;
    const Decoded decoded = DecodeSuperblock(pages.data.get() + copy * kSsdPage, &superblock, &version);
    if (decoded == Decoded::kOtherVersion) throw MismatchError(name + " " + Mismatch(decoded, version));
    ours |= decoded == Decoded::kOk || decoded == Decoded::kDamaged;
    foreign |= decoded == Decoded::kForeign;
    if (decoded == Decoded::kOk && superblock.sequence > image.superblock.sequence) {
      image.superblock = std::move(superblock);
    }
  }
  // Next to a copy of ours what looks foreign is a damaged copy.
  if (foreign && !ours) throw MismatchError(name + " " + Mismatch(Decoded::kForeign, 0));
  if (image.superblock.sequence == 0 || journal_fd < 0) return image;

  PageBuffer page(1);
  const int error = disk.ReadAll(journal_fd, page.data.get(), kSsdPage, 0);
  JournalHeader header;
  uint32_t version = 0;
  if (error == -ENODATA) {
    // Shorter than its header: cut off, nothing to replay.
  } else if (error < 0) {
    throw DiskError(name, "its journal cannot be read", error);
  } else if (const Decoded decoded = DecodeJournalHeader(page.data.get(), &header, &version);
             decoded == Decoded::kOtherVersion) {
    throw MismatchError("the journal of " + name + " " + Mismatch(decoded, version));
  } else if (decoded == Decoded::kOk && header.generation == image.superblock.generation &&
             header.name_space == image.superblock.name_space &&
             header.num_slices == NumSlices(image.superblock)) {
    AllocateSlots(&image, SlotsWithin(image.superblock, size));
    if (const int failed = Replay(disk, journal_fd, header, &image); failed < 0) {
      throw DiskError(name, "its journal cannot be read", failed);
    }
    for (SsdEntry& entry : image.entries) {
      if (entry.key == BlockKey{}) entry = {};
      image.num_live += entry.sequence != 0;
    }
  }
  return image;
}

}  // namespace flexkv
