// What the SSD tier's files look like: see docs/ssd-format.md. Pure functions over bytes: nothing here
// does I/O, and nothing here trusts what it is given.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/types.hpp"
#include "memory/block_layout.hpp"

namespace flexkv {

constexpr uint32_t kSsdFormatVersion = 1;
constexpr size_t kSsdPage = kIoAlignment;             // superblocks, journal header, frames start on pages
constexpr uint64_t kSlotsOffset = uint64_t{1} << 20;  // of slot 0; aligned for every disk and RAID
constexpr size_t kFramePayloadMax = size_t{1} << 20;
constexpr size_t kLabelMax = 1024;

// Two copies lie on the first two pages of the slot file; the one with the higher sequence counts.
struct Superblock {
  uint64_t sequence = 0;
  BlockKey generation;  // changes when the contents are given up; a journal must have the same
  BlockKey name_space;  // of the keys
  uint64_t num_slots = 0;
  std::vector<uint32_t> slice_bytes;  // of a slot, multiples of a page
  bool keep = true;                   // false: the contents must not outlive the process that wrote them
  std::string label;                  // for people
  uint64_t slot_bytes() const {
    uint64_t sum = 0;
    for (uint32_t bytes : slice_bytes) sum += bytes;
    return sum;
  }
};

enum class Decoded { kOk, kBlank, kForeign, kOtherVersion, kDamaged };

// `page` has kSsdPage bytes. kBlank: all zero. kForeign: not written by us. kOtherVersion: ours, but
// of a version that this code does not know (in *version). kDamaged: ours, with a bad checksum.
void EncodeSuperblock(const Superblock& superblock, char* page);
Decoded DecodeSuperblock(const char* page, Superblock* superblock, uint32_t* version);

struct JournalHeader {
  BlockKey generation;
  BlockKey name_space;
  uint32_t num_slices = 0;
};
void EncodeJournalHeader(const JournalHeader& header, char* page);
Decoded DecodeJournalHeader(const char* page, JournalHeader* header, uint32_t* version);

enum class RecordKind : uint32_t { kStored = 1, kDropped = 2 };

// Followed by one uint64 checksum per slice.
struct Record {
  BlockKey key;
  BlockKey parent;  // zero: none
  uint64_t sequence = 0;
  uint32_t slot = 0;
  RecordKind kind = RecordKind::kStored;
};
static_assert(sizeof(Record) == 48, "records lie on disk as they are in memory");

inline size_t RecordBytes(size_t num_slices) { return sizeof(Record) + num_slices * sizeof(uint64_t); }

// Adds a frame to `out`: its header, its records, zeros up to the next page.
void AppendFrame(std::string* out, const BlockKey& generation, uint64_t number, const std::string& records,
                 size_t num_slices);

struct FrameView {
  uint64_t number = 0;
  size_t count = 0;  // records
  const char* records = nullptr;
  size_t bytes = 0;  // of the frame with its padding
};
// Reads the frame that starts at `data`, which holds `available` bytes. False unless all of it is
// there, intact, and of this generation.
bool DecodeFrame(const char* data, size_t available, const JournalHeader& journal, FrameView* frame);

// The checksum a slice of a block must have. It covers which block and which slice it is: the right
// bytes in the wrong place are wrong.
uint64_t SliceChecksum(const BlockKey& key, const BlockKey& generation, uint32_t slice, const void* data,
                       size_t bytes);

}  // namespace flexkv
