// Looks at the files of one directory that no server uses: for inspecting and verifying them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ssd/disk.hpp"
#include "ssd/ssd_image.hpp"

namespace flexkv {

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
