#include "ssd/ssd_shard.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

namespace flexkv {

namespace {

// A journal may carry this much that is out of date, beyond as much as it carries that is not.
constexpr uint64_t kJournalSlack = uint64_t{4} << 20;
// Records that are gathered for one commit before it starts early.
constexpr size_t kPendingMax = 4096;

std::string Reason(int error) { return std::strerror(error < 0 ? -error : error); }

BlockKey RandomId() {
  std::random_device random;
  auto word = [&] { return (static_cast<uint64_t>(random()) << 32) | random(); };
  return {word(), word() | 1};  // never zero
}

[[noreturn]] void Throw(const std::string& path, const std::string& what, int error) {
  throw DiskError(path, what, error);
}

}  // namespace

SsdShard::SsdShard(std::shared_ptr<Disk> disk, SsdPaths paths, const SsdStoreOptions& options)
    : disk_(std::move(disk)), paths_(std::move(paths)), options_(options), journal_(disk_, paths_) {
  try {
    PageBuffer page(1);
    OpenSlots();
    const int64_t error = WithoutDirectIfRefused(
        [&] { return slots_fd_ < 0 ? slots_fd_ : disk_->Read(slots_fd_, page.data.get(), kSsdPage, 0); });
    if (slots_fd_ < 0) Throw(paths_.slots, "cannot be opened", slots_fd_);
    if (error < 0) Throw(paths_.slots, "cannot be read", static_cast<int>(error));
    if (const int failed = journal_.Open(); failed < 0 && failed != -ENOENT) {
      Throw(paths_.journal, "cannot be opened", failed);
    }

    try {
      image_ = LoadImage(*disk_, slots_fd_, journal_.fd(), paths_.slots);
      const Superblock& found = image_.superblock;
      if (found.sequence != 0 && found.keep &&
          (!(found.name_space == options_.name_space) || found.slice_bytes != options_.slice_bytes)) {
        throw MismatchError(paths_.slots + " holds the cache of another model or setting (" + found.label +
                            ")");
      }
      if (found.sequence == 0) {
        if (disk_->Size(slots_fd_) > 0) fresh_ = "its header is damaged";
      } else if (!found.keep) {
        fresh_ = "its contents were computed with weights that only the process before had";
      } else if (SlotsWithin(found, disk_->Size(slots_fd_)) == 0 && found.num_slots > 0) {
        fresh_ = "its slots were cut off";
      } else if (image_.entries.empty() && found.num_slots > 0) {
        fresh_ = "its journal is missing, damaged, or belongs to other contents";
      }
    } catch (const MismatchError& mismatch) {
      if (!options_.fresh_on_mismatch) throw;
      fresh_ = mismatch.what();
      image_ = {};
    }
    superblock_sequence_ = image_.superblock.sequence;
    journal_.Continue(image_);
  } catch (...) {
    if (slots_fd_ >= 0) disk_->Close(slots_fd_);
    throw;
  }
}

void SsdShard::Start(uint64_t num_slots) {
  if (!fresh_.empty() || image_.entries.empty()) {
    if (!fresh_.empty()) note_ = paths_.directory + ": started empty: " + fresh_;
    Create(num_slots);
  } else {
    if (image_.damaged_bytes > 0) {
      note_ = paths_.directory + ": " + std::to_string(image_.damaged_bytes) +
              " damaged bytes of the journal skipped";
    }
    if (const uint64_t left = image_.entries.size(); left < image_.superblock.num_slots) {
      if (!note_.empty()) note_ += "\n";
      note_ += paths_.directory + ": the slot file was cut, what the last " +
               std::to_string(image_.superblock.num_slots - left) + " slots held is lost";
    }
    Resize(num_slots);
  }
  thread_ = std::thread([this] { JournalLoop(); });
}

SsdShard::~SsdShard() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  if (thread_.joinable()) thread_.join();
  disk_->Close(slots_fd_);
}

void SsdShard::OpenSlots() {
  if (slots_fd_ >= 0) disk_->Close(slots_fd_);
  slots_fd_ = disk_->Open(paths_.slots, O_RDWR | O_CREAT | (direct_ ? O_DIRECT : 0));
}

// Some file systems refuse O_DIRECT when the file is opened; others only when bytes are moved, or for disks
// whose sectors are larger than our pages. Only while nobody else uses the file, which is opened again.
int64_t SsdShard::WithoutDirectIfRefused(const std::function<int64_t()>& call) {
  int64_t error = call();
  if (error == -EINVAL && direct_) {
    direct_ = false;
    OpenSlots();
    error = slots_fd_ < 0 ? slots_fd_ : call();
  }
  return error;
}

void SsdShard::Reserve(uint64_t bytes) {
  const int64_t before = disk_->Size(slots_fd_);
  const int64_t error =
      WithoutDirectIfRefused([&] { return disk_->TakeSpace(slots_fd_, bytes, &by_writing_); });
  if (error == 0) return;
  // What it got before the disk was full is not ours to keep.
  if (before >= 0 && slots_fd_ >= 0) disk_->Truncate(slots_fd_, static_cast<uint64_t>(before));
  char what[64];
  std::snprintf(what, sizeof what, "cannot reserve %.2f GiB", static_cast<double>(bytes) / (1 << 30));
  Throw(paths_.slots, what, static_cast<int>(error));
}

void SsdShard::StartSuperblock() {
  const int64_t error = WithoutDirectIfRefused([&] { return WriteSuperblock(image_.superblock); });
  if (error < 0) Throw(paths_.slots, "cannot be written", static_cast<int>(error));
}

void SsdShard::Create(uint64_t num_slots) {
  image_ = {};
  image_.superblock = {0,    RandomId(),    options_.name_space, num_slots, options_.slice_bytes,
                       true, options_.label};
  AllocateSlots(&image_, num_slots);
  const uint64_t bytes = kSlotsOffset + num_slots * image_.superblock.slot_bytes();
  const int64_t size = disk_->Size(slots_fd_);
  if (size > static_cast<int64_t>(bytes)) {
    if (const int error = disk_->Truncate(slots_fd_, bytes); error < 0) {
      Throw(paths_.slots, "cannot be resized", error);
    }
  }
  Reserve(bytes);
  // The journal of the new generation first: until the superblock follows, the two do not match and
  // count as empty.
  if (const int error = StartJournal(image_.superblock); error < 0) {
    Throw(paths_.journal, "cannot be written", error);
  }
  StartSuperblock();
}

void SsdShard::Resize(uint64_t num_slots) {
  image_.superblock.label = options_.label;
  const uint64_t before = image_.entries.size();
  const bool was_cut = before < image_.superblock.num_slots;
  const uint64_t bytes = kSlotsOffset + num_slots * image_.superblock.slot_bytes();
  // Also where nothing changes: whoever copied the files may have made them sparse, or cut them.
  Reserve(bytes);
  if (num_slots != before || was_cut) {
    SsdImage resized;
    resized.superblock = image_.superblock;
    resized.superblock.num_slots = num_slots;
    AllocateSlots(&resized, num_slots);
    const uint64_t slices = NumSlices(image_.superblock);
    const uint64_t both = std::min(before, num_slots);
    std::copy_n(image_.entries.begin(), both, resized.entries.begin());
    std::copy_n(image_.checksums.get(), both * slices, resized.checksums.get());
    for (const SsdEntry& entry : resized.entries) resized.num_live += entry.sequence != 0;
    image_.superblock = resized.superblock;
    image_.entries = std::move(resized.entries);
    image_.checksums = std::move(resized.checksums);
    image_.num_live = resized.num_live;
  }
  // Slots that go must be gone from the journal before the file is cut, and those that were cut off must
  // not come back with zeros in them; damage is written away.
  if (num_slots < before || was_cut || image_.damaged_bytes > 0) {
    if (const int error = Compact(image_.superblock); error < 0)
      Throw(paths_.journal, "cannot be rewritten", error);
  }
  StartSuperblock();
  if (disk_->Size(slots_fd_) > static_cast<int64_t>(bytes)) {
    if (const int error = disk_->Truncate(slots_fd_, bytes); error < 0) {
      Throw(paths_.slots, "cannot be resized", error);
    }
  }
}

int SsdShard::WriteSuperblock(const Superblock& superblock) {
  PageBuffer page(1);
  Superblock next = superblock;
  // One after the other: at any moment one of the two copies is whole.
  for (uint64_t copy = 0; copy < 2; ++copy) {
    next.sequence = ++superblock_sequence_;
    EncodeSuperblock(next, page.data.get());
    int error = disk_->WriteAll(slots_fd_, page.data.get(), kSsdPage, copy * kSsdPage);
    if (error == 0) error = disk_->Persist(slots_fd_);
    if (error < 0) return error;
  }
  return 0;
}

// Puts a journal without records in the place of the one there is.
int SsdShard::StartJournal(const Superblock& superblock) {
  return journal_.Replace(superblock, [] { return std::string(); }, [] { return 0; });
}

void SsdShard::Retire(uint32_t slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  SsdEntry& entry = image_.entries[slot];
  image_.num_live -= entry.sequence != 0;
  entry = {};
}

void SsdShard::SetChecksum(const BlockKey& key, uint32_t slot, uint32_t slice, const void* data) {
  BlockKey generation;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    generation = image_.superblock.generation;
  }
  // No lock: the slot is retired and belongs to one writer.
  image_.checksums[slot * NumSlices(image_.superblock) + slice] =
      SliceChecksum(key, generation, slice, data, image_.superblock.slice_bytes[slice]);
}

bool SsdShard::Verify(const BlockKey& key, uint32_t slot, uint32_t slice, const void* data) const {
  uint64_t expected;
  BlockKey generation;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const SsdEntry& entry = image_.entries[slot];
    if (entry.sequence == 0 || !(entry.key == key)) return false;
    expected = image_.checksums[slot * NumSlices(image_.superblock) + slice];
    generation = image_.superblock.generation;
  }
  return expected == SliceChecksum(key, generation, slice, data, image_.superblock.slice_bytes[slice]);
}

void SsdShard::Publish(const BlockKey& key, const BlockKey& parent, uint32_t slot, uint64_t sequence) {
  std::lock_guard<std::mutex> lock(mutex_);
  SsdEntry& entry = image_.entries[slot];
  image_.num_live += entry.sequence == 0;
  entry = {key, parent, sequence};
  pending_.push_back({slot, RecordKind::kStored, sequence});
  published_++;
  num_published_++;
  if (pending_.size() == 1 || pending_.size() == kPendingMax) work_.notify_one();
}

void SsdShard::Drop(uint32_t slot, uint64_t sequence) {
  std::lock_guard<std::mutex> lock(mutex_);
  SsdEntry& entry = image_.entries[slot];
  image_.num_live -= entry.sequence != 0;
  entry = {};
  pending_.push_back({slot, RecordKind::kDropped, sequence});
  published_++;
  if (pending_.size() == 1) work_.notify_one();
}

bool SsdShard::Sync(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t ticket = published_;
  sync_waiters_++;
  work_.notify_one();
  done_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                 [&] { return durable_ >= ticket || !error_.empty(); });
  sync_waiters_--;
  return durable_ >= ticket;
}

void SsdShard::Clear(bool keep) {
  std::lock_guard<std::mutex> lock(mutex_);
  pending_.clear();
  std::fill(image_.entries.begin(), image_.entries.end(), SsdEntry{});
  image_.num_live = 0;
  image_.superblock.generation = RandomId();
  image_.superblock.keep = keep;
  clear_ = true;
  published_++;
  work_.notify_one();
}

std::string SsdShard::error() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void SsdShard::AddStats(SsdStoreStats* stats) const {
  std::lock_guard<std::mutex> lock(mutex_);
  stats->commits += commits_;
  stats->compactions += compactions_;
  stats->journal_bytes += journal_.bytes();
  stats->published += num_published_;
  stats->durable += num_durable_;
}

void SsdShard::AppendRecord(std::string* out, uint32_t slot, RecordKind kind, uint64_t sequence) const {
  const SsdEntry& entry = image_.entries[slot];
  Record record{entry.key, entry.parent, sequence, slot, kind};
  const uint64_t slices = NumSlices(image_.superblock);
  out->append(reinterpret_cast<const char*>(&record), sizeof record);
  out->append(reinterpret_cast<const char*>(image_.checksums.get() + slot * slices),
              slices * sizeof(uint64_t));
}

void SsdShard::JournalLoop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stop_ || clear_ || !pending_.empty(); });
    if (!error_.empty()) {  // the tier is on its way out: nothing is promised any more
      if (stop_) return;
      pending_.clear();
      clear_ = false;
      continue;
    }
    if (!clear_ && pending_.empty()) return;
    if (!clear_) {
      work_.wait_for(lock, std::chrono::duration<double>(options_.commit_interval_s), [this] {
        return stop_ || clear_ || sync_waiters_ > 0 || pending_.size() >= kPendingMax;
      });
    }
    const bool clear = std::exchange(clear_, false);
    const Superblock superblock = image_.superblock;
    std::vector<Pending> pending = std::exchange(pending_, {});
    const uint64_t ticket = published_;
    const uint64_t live_bytes = image_.num_live * RecordBytes(NumSlices(superblock));
    lock.unlock();
    int error = 0;
    // The journal of the new generation first: until the superblock follows, the two do not match and
    // count as empty.
    if (clear) error = StartJournal(superblock);
    if (clear && error == 0) error = WriteSuperblock(superblock);
    if (error == 0) error = Commit(superblock, pending);
    if (error == 0 && journal_.bytes() > 2 * live_bytes + kJournalSlack) error = Compact(superblock);
    lock.lock();
    if (error == 0) {
      durable_ = ticket;
    } else {
      error_ = "the journal in " + paths_.directory +
               " cannot be written: " + (error == -ENOENT ? "its files were removed" : Reason(error));
    }
    done_.notify_all();
  }
}

int SsdShard::Commit(const Superblock& superblock, const std::vector<Pending>& pending) {
  std::string frames, records;
  const size_t slices = NumSlices(superblock);
  const size_t per_frame = kFramePayloadMax / RecordBytes(slices);
  uint64_t stored = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // Cleared while we waited: these are records of a generation that is over.
    if (!(image_.superblock.generation == superblock.generation)) return 0;
    auto flush = [&] {
      if (records.empty()) return;
      journal_.AddFrame(superblock.generation, records, slices, &frames);
      records.clear();
    };
    for (const Pending& each : pending) {
      // A slot that has been taken over since then has a later record, or none.
      const bool current = image_.entries[each.slot].sequence == each.sequence;
      if (each.kind == RecordKind::kStored && !current) continue;
      stored += each.kind == RecordKind::kStored;
      AppendRecord(&records, each.slot, each.kind, each.sequence);
      if (records.size() >= per_frame * RecordBytes(slices)) flush();
    }
    flush();
  }
  // A file that nobody can find any more will not be there at the next start.
  if (disk_->Links(slots_fd_) == 0 || journal_.Links() == 0) return -ENOENT;
  int error = disk_->Persist(slots_fd_);
  if (error == 0) error = journal_.Append(frames);
  if (error < 0) return error;
  std::lock_guard<std::mutex> lock(mutex_);
  commits_++;
  num_durable_ += stored;
  return 0;
}

// Writes a journal of what the slots hold now, and puts it in the place of the old one. Entries are
// taken in pieces while others change: a change that comes after its piece has a record that follows.
int SsdShard::Compact(const Superblock& superblock) {
  const size_t per_frame = kFramePayloadMax / RecordBytes(NumSlices(superblock));
  const uint32_t count = static_cast<uint32_t>(image_.entries.size());
  uint32_t slot = 0;
  const int error = journal_.Replace(
      superblock,
      [&] {
        std::string records;
        std::lock_guard<std::mutex> lock(mutex_);
        for (size_t n = 0; n < per_frame && slot < count; ++slot) {
          if (image_.entries[slot].sequence == 0) continue;
          AppendRecord(&records, slot, RecordKind::kStored, image_.entries[slot].sequence);
          ++n;
        }
        return records;
      },
      [&] { return disk_->Persist(slots_fd_); });
  if (error < 0) return error;
  std::lock_guard<std::mutex> lock(mutex_);
  compactions_++;
  return 0;
}

}  // namespace flexkv
