// The system calls under the SSD tier, behind one interface, so that tests can put faults and power
// loss under the code that runs in production.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "io_engine.hpp"

namespace flexkv {

// The real disk. All calls return a value >= 0, or -errno.
class Disk {
 public:
  virtual ~Disk() = default;
  virtual int Open(const std::string& path, int flags);
  virtual void Close(int fd);
  virtual int64_t Read(int fd, void* data, size_t bytes, uint64_t offset);
  virtual int64_t Write(int fd, const void* data, size_t bytes, uint64_t offset);
  virtual int Sync(int fd);                                // the file's data, as fdatasync
  virtual int Reserve(int fd, uint64_t bytes);             // as posix_fallocate from 0
  virtual int Truncate(int fd, uint64_t bytes);
  virtual int64_t Size(int fd);
  virtual int Rename(const std::string& from, const std::string& to);
  virtual int SyncDirectory(const std::string& path);
  // Names that still lead to the file: 0 when somebody removed it under us.
  virtual int Links(int fd);
  // An engine for bulk transfers on files that were opened here; see MakeIoEngine.
  virtual std::unique_ptr<IoEngine> MakeEngine(IoEngineKind kind, int depth, std::string* note);

  // Whole transfers: go on after short ones. ENODATA when the file ends early.
  int ReadAll(int fd, void* data, size_t bytes, uint64_t offset);
  int WriteAll(int fd, const void* data, size_t bytes, uint64_t offset);
};

}  // namespace flexkv
