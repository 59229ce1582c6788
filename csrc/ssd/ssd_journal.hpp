// The journal file of one directory: which block each slot holds, frame after frame.
//
// It is appended to, and put in the place of the old one as a whole where a generation begins or too much of it is
// out of date. Knows files and frames; what the records say, and when they are written, is SsdShard's business.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "ssd/disk.hpp"
#include "ssd/ssd_format.hpp"
#include "ssd/ssd_image.hpp"

namespace flexkv {

// Used by one thread at a time, but for bytes(). Calls return 0, or -errno.
class SsdJournal {
 public:
  SsdJournal(std::shared_ptr<Disk> disk, SsdPaths paths);
  ~SsdJournal();
  SsdJournal(const SsdJournal&) = delete;
  SsdJournal& operator=(const SsdJournal&) = delete;

  int Open();
  int fd() const { return fd_; }  // negative: there is none
  // Goes on behind what was found in it.
  void Continue(const SsdImage& image);

  // Adds a frame of these records to `frames`, which are to be appended before any other.
  void AddFrame(const BlockKey& generation, const std::string& records, size_t num_slices,
                std::string* frames);
  int Append(const std::string& frames);
  // Names that still lead to the file.
  int Links() { return disk_->Links(fd_); }

  // Puts another journal in the place of the one there is. `next_records` gives the records of its frames, one frame
  // after the other, and none at the end. `persist_data` comes before the journal can be found: it speaks of data
  // that is there.
  int Replace(const Superblock& superblock, const std::function<std::string()>& next_records,
              const std::function<int()>& persist_data);

  uint64_t bytes() const { return end_; }

 private:
  const std::shared_ptr<Disk> disk_;
  const SsdPaths paths_;
  int fd_ = -1;
  uint64_t next_frame_ = 1;
  std::atomic<uint64_t> end_{kSsdPage};  // where the next frame goes
};

}  // namespace flexkv
