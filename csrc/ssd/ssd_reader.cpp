#include "ssd/ssd_reader.hpp"

#include <fcntl.h>

namespace flexkv {

SsdReader::SsdReader(const std::string& slots, const std::string& journal) {
  slots_fd_ = disk_.Open(slots, O_RDONLY);
  if (slots_fd_ < 0) throw DiskError(slots, "cannot be opened", slots_fd_);
  journal_fd_ = disk_.Open(journal, O_RDONLY);
  try {
    image_ = LoadImage(disk_, slots_fd_, journal_fd_, slots);
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
      good = image_.checksums[slot * slices + slice] == SliceChecksum(image_.entries[slot].key,
                                                                      image_.superblock.generation, slice,
                                                                      data.data() + at, length);
      at += length;
    }
    if (!good) bad.push_back(slot);
  }
  return bad;
}

}  // namespace flexkv
