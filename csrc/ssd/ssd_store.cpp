#include "ssd/ssd_store.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <random>

namespace flexkv {

namespace {

// The journal is read through a window of this size, which holds several of the largest frames.
constexpr size_t kWindowBytes = 8 * kFramePayloadMax;
// The journal file grows in steps: a commit rarely has to wait for the file system's allocation.
constexpr uint64_t kJournalStep = uint64_t{4} << 20;
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

struct PageBuffer {
  explicit PageBuffer(size_t pages)
      : data(static_cast<char*>(std::aligned_alloc(kSsdPage, pages * kSsdPage)), std::free) {
    std::memset(data.get(), 0, pages * kSsdPage);
  }
  std::unique_ptr<char, void (*)(void*)> data;
};

uint64_t NumSlices(const Superblock& superblock) { return superblock.slice_bytes.size(); }

// Slots that the file has all bytes of. Beyond its end there is nothing to serve, and what the header
// says must not make us take memory that the file does not account for.
uint64_t SlotsWithin(const Superblock& superblock, int64_t file_bytes) {
  if (file_bytes < static_cast<int64_t>(kSlotsOffset)) return 0;
  const uint64_t room = (static_cast<uint64_t>(file_bytes) - kSlotsOffset) / superblock.slot_bytes();
  return std::min(superblock.num_slots, room);
}

void Allocate(SsdImage* image, uint64_t num_slots) {
  image->entries.assign(num_slots, {});
  // Zero pages until they are touched: an empty store takes no memory for its checksums.
  image->checksums.reset(static_cast<uint64_t*>(
      std::calloc(std::max<uint64_t>(1, num_slots * NumSlices(image->superblock)), sizeof(uint64_t))));
  if (!image->checksums) throw SystemError("no memory for the checksums of the SSD tier");
  image->num_live = 0;
}

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
  std::memcpy(image->checksums.get() + record.slot * slices, data + sizeof record,
              slices * sizeof(uint64_t));
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
      const size_t wanted = std::min<uint64_t>(window.size() - have, static_cast<uint64_t>(size) - base - have);
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

[[noreturn]] void Throw(const std::string& path, const std::string& what, int error) {
  throw DiskError(path, what, error);
}

std::string Mismatch(Decoded decoded, uint32_t version) {
  if (decoded == Decoded::kForeign) return "is not a file of sglang-flexkv";
  return "has format version " + std::to_string(version) + ", this program knows version " +
         std::to_string(kSsdFormatVersion);
}

}  // namespace

// ---- one directory -----------------------------------------------------------------------------

SsdImage SsdShard::Load(Disk& disk, int slots_fd, int journal_fd, const std::string& name) {
  SsdImage image;
  const int64_t size = disk.Size(slots_fd);
  if (size < 0) Throw(name, "cannot be read", static_cast<int>(size));
  if (size == 0) return image;
  PageBuffer pages(2);
  const size_t head = std::min<uint64_t>(2 * kSsdPage, static_cast<uint64_t>(size) / kSsdPage * kSsdPage);
  if (const int error = head == 0 ? 0 : disk.ReadAll(slots_fd, pages.data.get(), head, 0); error < 0) {
    Throw(name, "cannot be read", error);
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
    Throw(name, "its journal cannot be read", error);
  } else if (const Decoded decoded = DecodeJournalHeader(page.data.get(), &header, &version);
             decoded == Decoded::kOtherVersion) {
    throw MismatchError("the journal of " + name + " " + Mismatch(decoded, version));
  } else if (decoded == Decoded::kOk && header.generation == image.superblock.generation &&
             header.name_space == image.superblock.name_space &&
             header.num_slices == NumSlices(image.superblock)) {
    Allocate(&image, SlotsWithin(image.superblock, size));
    if (const int failed = Replay(disk, journal_fd, header, &image); failed < 0) {
      Throw(name, "its journal cannot be read", failed);
    }
    for (SsdEntry& entry : image.entries) {
      if (entry.key == BlockKey{}) entry = {};
      image.num_live += entry.sequence != 0;
    }
  }
  return image;
}

SsdShard::SsdShard(std::shared_ptr<Disk> disk, SsdPaths paths, const SsdStoreOptions& options)
    : disk_(std::move(disk)), paths_(std::move(paths)), options_(options) {
  try {
    PageBuffer page(1);
    OpenSlots();
    const int64_t error = WithoutDirectIfRefused(
        [&] { return slots_fd_ < 0 ? slots_fd_ : disk_->Read(slots_fd_, page.data.get(), kSsdPage, 0); });
    if (slots_fd_ < 0) Throw(paths_.slots, "cannot be opened", slots_fd_);
    if (error < 0) Throw(paths_.slots, "cannot be read", static_cast<int>(error));
    journal_fd_ = disk_->Open(paths_.journal, O_RDWR);
    if (journal_fd_ < 0 && journal_fd_ != -ENOENT) Throw(paths_.journal, "cannot be opened", journal_fd_);

    try {
      image_ = Load(*disk_, slots_fd_, journal_fd_, paths_.slots);
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
    } catch (const MismatchError& error) {
      if (!options_.fresh_on_mismatch) throw;
      fresh_ = error.what();
      image_ = {};
    }
    superblock_sequence_ = image_.superblock.sequence;
    journal_end_ = image_.journal_end;
    next_frame_ = image_.next_frame;
  } catch (...) {
    if (slots_fd_ >= 0) disk_->Close(slots_fd_);
    if (journal_fd_ >= 0) disk_->Close(journal_fd_);
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
  if (journal_fd_ >= 0) disk_->Close(journal_fd_);
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
  image_.superblock = {0, RandomId(), options_.name_space, num_slots, options_.slice_bytes, true,
                       options_.label};
  Allocate(&image_, num_slots);
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
    Allocate(&resized, num_slots);
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
    if (const int error = Compact(image_.superblock); error < 0) Throw(paths_.journal, "cannot be rewritten", error);
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
  const std::string fresh = paths_.journal + ".new";
  const int fd = disk_->Open(fresh, O_RDWR | O_CREAT | O_TRUNC);
  if (fd < 0) return fd;
  PageBuffer page(1);
  EncodeJournalHeader({superblock.generation, superblock.name_space,
                       static_cast<uint32_t>(NumSlices(superblock))},
                      page.data.get());
  int error = disk_->WriteAll(fd, page.data.get(), kSsdPage, 0);
  if (error == 0) error = disk_->Persist(fd);
  if (error == 0) error = disk_->Rename(fresh, paths_.journal);
  if (error == 0) error = disk_->PersistDirectory(paths_.directory);
  if (error < 0) {
    disk_->Close(fd);
    return error;
  }
  if (journal_fd_ >= 0) disk_->Close(journal_fd_);
  journal_fd_ = fd;
  journal_end_ = kSsdPage;
  next_frame_ = 1;
  return 0;
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
  stats->journal_bytes += journal_end_;
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
    if (error == 0 && journal_end_ > 2 * live_bytes + kJournalSlack) error = Compact(superblock);
    lock.lock();
    if (error == 0) {
      durable_ = ticket;
    } else {
      error_ = "the journal in " + paths_.directory + " cannot be written: " +
               (error == -ENOENT ? "its files were removed" : Reason(error));
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
      AppendFrame(&frames, superblock.generation, next_frame_++, records, slices);
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
  int error = disk_->Links(slots_fd_);
  if (error == 0 || disk_->Links(journal_fd_) == 0) return -ENOENT;
  error = disk_->Persist(slots_fd_);
  const uint64_t end = journal_end_ + frames.size();
  if (error == 0 && end / kJournalStep != journal_end_ / kJournalStep) {
    bool by_writing = false;
    error = disk_->TakeSpace(journal_fd_, AlignUp(end + 1, kJournalStep), &by_writing);
  }
  if (error == 0) error = disk_->WriteAll(journal_fd_, frames.data(), frames.size(), journal_end_);
  if (error == 0) error = disk_->Persist(journal_fd_);
  std::lock_guard<std::mutex> lock(mutex_);
  if (error == 0) {
    journal_end_ = end;
    commits_++;
    num_durable_ += stored;
  }
  return error < 0 ? error : 0;
}

// Writes a journal of what the slots hold now, and puts it in the place of the old one. Entries are
// taken in pieces while others change: a change that comes after its piece has a record that follows.
int SsdShard::Compact(const Superblock& superblock) {
  const std::string path = paths_.journal + ".new";
  const int fd = disk_->Open(path, O_RDWR | O_CREAT | O_TRUNC);
  if (fd < 0) return fd;
  const size_t slices = NumSlices(superblock);
  const size_t per_frame = kFramePayloadMax / RecordBytes(slices);
  PageBuffer page(1);
  EncodeJournalHeader({superblock.generation, superblock.name_space,
                       static_cast<uint32_t>(slices)},
                      page.data.get());
  int error = disk_->WriteAll(fd, page.data.get(), kSsdPage, 0);
  uint64_t end = kSsdPage, number = 1;
  std::string records, frame;
  const uint32_t count = static_cast<uint32_t>(image_.entries.size());
  for (uint32_t slot = 0; slot < count && error == 0;) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (size_t n = 0; n < per_frame && slot < count; ++slot) {
        if (image_.entries[slot].sequence == 0) continue;
        AppendRecord(&records, slot, RecordKind::kStored, image_.entries[slot].sequence);
        ++n;
      }
    }
    if (records.empty()) continue;
    frame.clear();
    AppendFrame(&frame, superblock.generation, number++, records, slices);
    records.clear();
    error = disk_->WriteAll(fd, frame.data(), frame.size(), end);
    end += frame.size();
  }
  if (error == 0) error = disk_->Persist(slots_fd_);
  if (error == 0) error = disk_->Persist(fd);
  if (error == 0) error = disk_->Rename(path, paths_.journal);
  if (error == 0) error = disk_->PersistDirectory(paths_.directory);
  if (error < 0) {
    disk_->Close(fd);
    return error;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  disk_->Close(journal_fd_);
  journal_fd_ = fd;
  journal_end_ = end;
  next_frame_ = number;
  compactions_++;
  return 0;
}

// ---- all directories ---------------------------------------------------------------------------

SsdStore::SsdStore(SsdStoreOptions options, std::shared_ptr<Disk> disk)
    : options_(std::move(options)), disk_(std::move(disk)) {
  Require(!options_.shards.empty() && options_.num_slots > 0, "the SSD tier needs a directory and a slot");
  for (uint32_t bytes : options_.slice_bytes) slot_bytes_ += bytes;
  const uint64_t per_shard = (options_.num_slots + options_.shards.size() - 1) / options_.shards.size();
  for (const SsdPaths& paths : options_.shards) {
    shards_.push_back(std::make_unique<SsdShard>(disk_, paths, options_));
  }
  // All are looked at before the first is changed.
  for (auto& shard : shards_) shard->Start(per_shard);
  struct Found {
    uint64_t sequence;
    int64_t slot;
  };
  std::vector<Found> found;
  for (size_t i = 0; i < shards_.size(); ++i) {
    const std::vector<SsdEntry>& entries = shards_[i]->entries();
    for (size_t local = 0; local < entries.size(); ++local) {
      const uint64_t slot = local * shards_.size() + i;
      if (entries[local].sequence == 0 || slot >= options_.num_slots) continue;
      found.push_back({entries[local].sequence, static_cast<int64_t>(slot)});
    }
    sequence_ = std::max(sequence_, shards_[i]->last_sequence());
  }
  std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) { return a.sequence < b.sequence; });
  recovered_.keys.reserve(found.size());
  recovered_.parents.reserve(found.size());
  recovered_.slots.reserve(found.size());
  for (const Found& each : found) {
    const Place place = At(each.slot);
    const SsdEntry& entry = place.shard->entries()[place.slot];
    recovered_.keys.push_back(entry.key);
    recovered_.parents.push_back(entry.parent);
    recovered_.slots.push_back(each.slot);
  }
}

void SsdStore::CheckSlots(const int64_t* slots, size_t count) const {
  for (size_t i = 0; i < count; ++i) {
    Require(slots[i] >= 0 && static_cast<uint64_t>(slots[i]) < options_.num_slots, "SSD slot out of range");
  }
}

void SsdStore::Publish(const BlockKey* keys, const BlockKey* parents, const int64_t* slots, size_t count) {
  CheckSlots(slots, count);
  std::lock_guard<std::mutex> lock(sequence_mutex_);
  for (size_t i = 0; i < count; ++i) {
    const Place place = At(slots[i]);
    place.shard->Publish(keys[i], parents[i], place.slot, ++sequence_);
  }
}

void SsdStore::Drop(const int64_t* slots, size_t count) {
  CheckSlots(slots, count);
  std::lock_guard<std::mutex> lock(sequence_mutex_);
  for (size_t i = 0; i < count; ++i) {
    const Place place = At(slots[i]);
    place.shard->Drop(place.slot, ++sequence_);
  }
}

bool SsdStore::Sync(double timeout_s) {
  bool synced = true;
  for (auto& shard : shards_) synced = shard->Sync(timeout_s) && synced;
  return synced;
}

void SsdStore::Clear(bool keep) {
  for (auto& shard : shards_) shard->Clear(keep);
}

std::string SsdStore::error() const {
  for (auto& shard : shards_) {
    if (std::string error = shard->error(); !error.empty()) return error;
  }
  return "";
}

std::string SsdStore::notes() const {
  std::string notes;
  for (auto& shard : shards_) {
    if (!shard->note().empty()) notes += (notes.empty() ? "" : "\n") + shard->note();
    if (!shard->direct()) {
      notes += (notes.empty() ? "" : "\n") + shard->paths().directory +
               " does not support O_DIRECT, or not in pages of 4 KiB; the SSD tier goes through the page "
               "cache there";
    }
    if (shard->by_writing()) {
      notes += (notes.empty() ? "" : "\n") + shard->paths().directory +
               " does not support fallocate; the SSD tier's space was reserved by writing zeros there";
    }
  }
  return notes;
}

SsdStoreStats SsdStore::Stats() const {
  SsdStoreStats stats;
  for (auto& shard : shards_) shard->AddStats(&stats);
  return stats;
}

// ---- offline -----------------------------------------------------------------------------------

SsdReader::SsdReader(const std::string& slots, const std::string& journal) {
  slots_fd_ = disk_.Open(slots, O_RDONLY);
  if (slots_fd_ < 0) Throw(slots, "cannot be opened", slots_fd_);
  journal_fd_ = disk_.Open(journal, O_RDONLY);
  try {
    image_ = SsdShard::Load(disk_, slots_fd_, journal_fd_, slots);
  } catch (...) {
    disk_.Close(slots_fd_);
    if (journal_fd_ >= 0) disk_.Close(journal_fd_);
    throw;
  }
}

SsdReader::~SsdReader() {
  disk_.Close(slots_fd_);
  if (journal_fd_ >= 0) disk_.Close(journal_fd_);
}

std::vector<uint32_t> SsdReader::Verify(const std::vector<uint32_t>& slots) {
  std::vector<uint32_t> bad;
  const uint64_t bytes = image_.superblock.slot_bytes();
  const uint64_t slices = NumSlices(image_.superblock);
  std::vector<char> data(bytes);
  for (uint32_t slot : slots) {
    Require(slot < image_.entries.size(), "no such slot");
    bool good = disk_.ReadAll(slots_fd_, data.data(), bytes, kSlotsOffset + slot * bytes) == 0;
    size_t at = 0;
    for (uint32_t slice = 0; slice < slices && good; ++slice) {
      const uint32_t length = image_.superblock.slice_bytes[slice];
      good = image_.checksums[slot * slices + slice] ==
             SliceChecksum(image_.entries[slot].key, image_.superblock.generation, slice, data.data() + at,
                           length);
      at += length;
    }
    if (!good) bad.push_back(slot);
  }
  return bad;
}

}  // namespace flexkv
