#include "ssd/ssd_journal.hpp"

#include <fcntl.h>

#include <utility>

namespace flexkv {

namespace {

// The file grows in steps: a commit rarely has to wait for the file system's allocation.
constexpr uint64_t kJournalStep = uint64_t{4} << 20;

}  // namespace

SsdJournal::SsdJournal(std::shared_ptr<Disk> disk, SsdPaths paths)
    : disk_(std::move(disk)), paths_(std::move(paths)) {}

SsdJournal::~SsdJournal() {
  if (fd_ >= 0) disk_->Close(fd_);
}

int SsdJournal::Open() {
  fd_ = disk_->Open(paths_.journal, O_RDWR);
  return fd_ < 0 ? fd_ : 0;
}

void SsdJournal::Continue(const SsdImage& image) {
  end_ = image.journal_end;
  next_frame_ = image.next_frame;
}

void SsdJournal::AddFrame(const BlockKey& generation, const std::string& records, size_t num_slices,
                          std::string* frames) {
  AppendFrame(frames, generation, next_frame_++, records, num_slices);
}

int SsdJournal::Append(const std::string& frames) {
  const uint64_t end = end_ + frames.size();
  int error = 0;
  if (end / kJournalStep != end_ / kJournalStep) {
    bool by_writing = false;
    error = disk_->TakeSpace(fd_, AlignUp(end + 1, kJournalStep), &by_writing);
  }
  if (error == 0) error = disk_->WriteAll(fd_, frames.data(), frames.size(), end_);
  if (error == 0) error = disk_->Persist(fd_);
  if (error == 0) end_ = end;
  return error < 0 ? error : 0;
}

int SsdJournal::Replace(const Superblock& superblock, const std::function<std::string()>& next_records,
                        const std::function<int()>& persist_data) {
  const std::string path = paths_.journal + ".new";
  const int fd = disk_->Open(path, O_RDWR | O_CREAT | O_TRUNC);
  if (fd < 0) return fd;
  const size_t slices = NumSlices(superblock);
  PageBuffer page(1);
  EncodeJournalHeader({superblock.generation, superblock.name_space, static_cast<uint32_t>(slices)},
                      page.data.get());
  int error = disk_->WriteAll(fd, page.data.get(), kSsdPage, 0);
  uint64_t end = kSsdPage, number = 1;
  while (error == 0) {
    const std::string records = next_records();
    if (records.empty()) break;
    std::string frame;
    AppendFrame(&frame, superblock.generation, number++, records, slices);
    error = disk_->WriteAll(fd, frame.data(), frame.size(), end);
    end += frame.size();
  }
  if (error == 0) error = persist_data();
  if (error == 0) error = disk_->Persist(fd);
  if (error == 0) error = disk_->Rename(path, paths_.journal);
  if (error == 0) error = disk_->PersistDirectory(paths_.directory);
  if (error < 0) {
    disk_->Close(fd);
    return error;
  }
  if (fd_ >= 0) disk_->Close(fd_);
  fd_ = fd;
  end_ = end;
  next_frame_ = number;
  return 0;
}

}  // namespace flexkv
