// What the slots of one directory of the SSD tier hold, in memory and on disk: one slot file and its journal,
// complete in itself. The bytes themselves are moved by SsdLane.
//
// Order on disk: data, then the record that says so. Records are gathered for a moment and written
// together behind a sync of the data (group commit), so a record that is found after a power failure
// speaks of data that is there. Whatever else happened to the data, the checksums tell.
//
// Locking: one mutex, held for memory operations only. The journal thread does all I/O on the journal.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/types.hpp"
#include "ssd/disk.hpp"
#include "ssd/ssd_format.hpp"
#include "ssd/ssd_image.hpp"
#include "ssd/ssd_journal.hpp"

namespace flexkv {

struct SsdStoreOptions {
  std::vector<SsdPaths> shards;
  BlockKey name_space;
  uint64_t num_slots = 0;             // over all shards
  std::vector<uint32_t> slice_bytes;  // of a slot
  std::string label;
  bool fresh_on_mismatch = false;  // give up files of another format or namespace
  double commit_interval_s = 0.1;  // records wait so long for company
};

struct SsdStoreStats {
  uint64_t commits = 0;
  uint64_t compactions = 0;
  uint64_t journal_bytes = 0;
  uint64_t published = 0;
  uint64_t durable = 0;  // published and synced
};

class SsdShard {
 public:
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
  SsdJournal journal_;
  uint64_t superblock_sequence_ = 0;
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

}  // namespace flexkv
