// What the SSD tier's slots hold, in memory and on disk: checksums, the journal, recovery.
//
// One shard per directory, each complete in itself: a slot file and the journal of that file. Slot s of
// the tier is slot s / num_shards of shard s % num_shards. The bytes themselves are moved by SsdLane.
//
// Order on disk: data, then the record that says so. Records are gathered for a moment and written
// together behind a sync of the data (group commit), so a record that is found after a power failure
// speaks of data that is there. Whatever else happened to the data, the checksums tell.
//
// Locking: one mutex per shard, held for memory operations only. Its journal thread does all I/O on
// the journal.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
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
  std::vector<SsdEntry> entries;       // per slot that lies within the file
  std::unique_ptr<uint64_t[], void (*)(void*)> checksums{nullptr, std::free};  // [slot][slice]
  uint64_t num_live = 0;
  uint64_t journal_end = kSsdPage;     // where the next frame goes
  uint64_t next_frame = 1;
  uint64_t frames = 0;
  uint64_t records = 0;
  uint64_t last_sequence = 0;
  uint64_t damaged_bytes = 0;          // of the journal, in front of its last good frame
};

struct SsdStoreOptions {
  std::vector<SsdPaths> shards;
  BlockKey name_space;
  uint64_t num_slots = 0;                // over all shards
  std::vector<uint32_t> slice_bytes;     // of a slot
  std::string label;
  bool fresh_on_mismatch = false;        // give up files of another format or namespace
  double commit_interval_s = 0.1;        // records wait so long for company
};

// Blocks that were found, least recently written first.
struct Recovered {
  std::vector<BlockKey> keys, parents;
  std::vector<int64_t> slots;
};

struct SsdStoreStats {
  uint64_t commits = 0;
  uint64_t compactions = 0;
  uint64_t journal_bytes = 0;
  uint64_t published = 0;
  uint64_t durable = 0;    // published and synced
};

class SsdShard {
 public:
  // Reads what a pair of files holds, without changing it. `journal_fd` < 0: none. Throws
  // MismatchError if they are not ours, SystemError if they cannot be read.
  static SsdImage Load(Disk& disk, int slots_fd, int journal_fd, const std::string& name);

  // Opens and loads the files without changing them, but for creating an empty slot file.
  SsdShard(std::shared_ptr<Disk> disk, SsdPaths paths, const SsdStoreOptions& options);
  ~SsdShard();

  // Makes them fit, and goes to work. To be called once, before everything that follows.
  void Start(uint64_t num_slots);

  int fd() const { return slots_fd_; }
  bool direct() const { return direct_; }
  bool by_writing() const { return by_writing_; }  // how space was reserved
  const std::string& note() const { return note_; }
  const SsdPaths& paths() const { return paths_; }

  void Retire(uint32_t slot);
  void SetChecksum(const BlockKey& key, uint32_t slot, uint32_t slice, const void* data);
  bool Verify(const BlockKey& key, uint32_t slot, uint32_t slice, const void* data) const;
  void Publish(const BlockKey& key, const BlockKey& parent, uint32_t slot, uint64_t sequence);
  void Drop(uint32_t slot, uint64_t sequence);
  // Waits until all that was published is on disk. False if it cannot be, or the time is up.
  bool Sync(double timeout_s);
  // Forgets everything, at once for this process. The journal thread makes it durable, before anything
  // that is published later; Sync waits for it.
  void Clear(bool keep);
  std::string error() const;
  void AddStats(SsdStoreStats* stats) const;
  const std::vector<SsdEntry>& entries() const { return image_.entries; }
  uint64_t last_sequence() const { return image_.last_sequence; }

 private:
  struct Pending {
    uint32_t slot;
    RecordKind kind;
    uint64_t sequence;
  };

  void OpenSlots();
  int64_t WithoutDirectIfRefused(const std::function<int64_t()>& call);
  void Reserve(uint64_t bytes);
  void StartSuperblock();
  void Create(uint64_t num_slots);
  void Resize(uint64_t num_slots);
  int WriteSuperblock(const Superblock& superblock);
  int StartJournal(const Superblock& superblock);
  int Commit(const Superblock& superblock, const std::vector<Pending>& pending);
  int Compact(const Superblock& superblock);
  void AppendRecord(std::string* out, uint32_t slot, RecordKind kind, uint64_t sequence) const;
  void JournalLoop();

  const std::shared_ptr<Disk> disk_;
  const SsdPaths paths_;
  const SsdStoreOptions options_;
  int slots_fd_ = -1;
  // The journal thread's own, once it runs.
  int journal_fd_ = -1;
  uint64_t superblock_sequence_ = 0;
  uint64_t next_frame_ = 1;
  std::atomic<uint64_t> journal_end_{kSsdPage};
  bool direct_ = true, by_writing_ = false;
  std::string fresh_;  // why what was found is not used, "" if it is
  std::string note_;

  mutable std::mutex mutex_;
  std::condition_variable work_, done_;
  SsdImage image_;
  std::vector<Pending> pending_;
  uint64_t published_ = 0, durable_ = 0;  // tickets
  uint64_t commits_ = 0, compactions_ = 0, num_published_ = 0, num_durable_ = 0;
  int sync_waiters_ = 0;
  bool clear_ = false, stop_ = false;
  std::string error_;
  std::thread thread_;
};

class SsdStore {
 public:
  // Opens or creates the files and replays the journals. Throws MismatchError, or SystemError with the
  // reason (a DiskError where a call failed).
  SsdStore(SsdStoreOptions options, std::shared_ptr<Disk> disk);

  Recovered TakeRecovered() { return std::exchange(recovered_, {}); }

  struct Place {
    SsdShard* shard;
    uint32_t slot;
  };
  Place At(int64_t slot) const {
    const size_t count = shards_.size();
    return {shards_[static_cast<size_t>(slot) % count].get(),
            static_cast<uint32_t>(static_cast<size_t>(slot) / count)};
  }
  size_t num_shards() const { return shards_.size(); }
  SsdShard& shard(size_t index) const { return *shards_[index]; }
  uint64_t num_slots() const { return options_.num_slots; }
  uint64_t slot_bytes() const { return slot_bytes_; }
  const std::vector<uint32_t>& slice_bytes() const { return options_.slice_bytes; }
  const std::shared_ptr<Disk>& disk() const { return disk_; }

  // Makes blocks whose data was written known to the next process. Parents: zero for none.
  void Publish(const BlockKey* keys, const BlockKey* parents, const int64_t* slots, size_t count);
  void Drop(const int64_t* slots, size_t count);
  bool Sync(double timeout_s);
  // Forgets everything; with keep = false also what will be stored from now on, at the next start.
  void Clear(bool keep);
  // Why a journal cannot be written any more, "" while all is well.
  std::string error() const;
  // Remarks of the opening, one per line: started fresh because ..., damage skipped.
  std::string notes() const;
  SsdStoreStats Stats() const;

 private:
  void CheckSlots(const int64_t* slots, size_t count) const;

  const SsdStoreOptions options_;
  const std::shared_ptr<Disk> disk_;
  uint64_t slot_bytes_ = 0;
  std::vector<std::unique_ptr<SsdShard>> shards_;
  Recovered recovered_;
  std::mutex sequence_mutex_;
  uint64_t sequence_ = 0;
};

// Looks at the files of one shard that no server uses: for inspecting and verifying them.
class SsdReader {
 public:
  // Throws MismatchError, or SystemError if they cannot be read. Files that are ours and hold nothing
  // that can be replayed give an image without entries.
  SsdReader(const std::string& slots, const std::string& journal);
  ~SsdReader();
  SsdReader(const SsdReader&) = delete;
  SsdReader& operator=(const SsdReader&) = delete;

  const SsdImage& image() const { return image_; }
  // Reads blocks and returns which of them are not what was written, or cannot be read.
  std::vector<uint32_t> Verify(const std::vector<uint32_t>& slots);

 private:
  Disk disk_;
  int slots_fd_ = -1, journal_fd_ = -1;
  SsdImage image_;
};

}  // namespace flexkv
