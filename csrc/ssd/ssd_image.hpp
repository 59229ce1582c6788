// What the files of one directory of the SSD tier hold, as a start finds it: the superblock, which slots hold which
// blocks, their checksums. Reading it is recovery: the journal is replayed, what is damaged is passed over, and
// nothing is changed or believed without its checksum.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "base/types.hpp"
#include "ssd/disk.hpp"
#include "ssd/ssd_format.hpp"

namespace flexkv {

// The files are not ours to use: another format, version, model. Nothing was changed.
class MismatchError : public SystemError {
 public:
  using SystemError::SystemError;
};

struct SsdPaths {
  std::string directory;
  std::string slots;
  std::string journal;
};

struct SsdEntry {
  BlockKey key;
  BlockKey parent;
  uint64_t sequence = 0;  // 0: the slot holds nothing
};

// What is in the files of one shard.
struct SsdImage {
  Superblock superblock;
  std::vector<SsdEntry> entries;  // per slot that lies within the file
  std::unique_ptr<uint64_t[], void (*)(void*)> checksums{nullptr, std::free};  // [slot][slice]
  uint64_t num_live = 0;
  uint64_t journal_end = kSsdPage;  // where the next frame goes
  uint64_t next_frame = 1;
  uint64_t frames = 0;
  uint64_t records = 0;
  uint64_t last_sequence = 0;
  uint64_t damaged_bytes = 0;  // of the journal, in front of its last good frame
};

inline uint64_t NumSlices(const Superblock& superblock) { return superblock.slice_bytes.size(); }

// Slots that the file has all bytes of. Beyond its end there is nothing to serve, and what the header
// says must not make us take memory that the file does not account for.
uint64_t SlotsWithin(const Superblock& superblock, int64_t file_bytes);

// Makes room for so many slots, all of them empty. Throws SystemError without the memory.
void AllocateSlots(SsdImage* image, uint64_t num_slots);

// Reads what a pair of files holds, without changing it. `journal_fd` < 0: none. Throws
// MismatchError if they are not ours, SystemError if they cannot be read.
SsdImage LoadImage(Disk& disk, int slots_fd, int journal_fd, const std::string& name);

// Zeroed memory for O_DIRECT.
struct PageBuffer {
  explicit PageBuffer(size_t pages);
  std::unique_ptr<char, void (*)(void*)> data;
};

}  // namespace flexkv
