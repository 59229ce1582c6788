// The system calls under the SSD tier, behind one interface, so that tests can put faults and power
// loss under the code that runs in production.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/types.hpp"
#include "ssd/io_engine.hpp"

namespace flexkv {

// A call on a file failed. what() is all a user has to know but for the remedy.
class DiskError : public SystemError {
 public:
  // `error`: an errno, or its negative. The message is "<path>: <what>: <reason>".
  DiskError(const std::string& path, const std::string& what, int error);

  const std::string& path() const { return path_; }
  int error() const { return error_; }

 private:
  std::string path_;
  int error_;
};

// The real disk. All calls return a value >= 0, or -errno.
class Disk : public FileCalls {
 public:
  virtual int Open(const std::string& path, int flags);
  virtual void Close(int fd);
  int64_t Read(int fd, void* data, size_t bytes, uint64_t offset) override;
  int64_t Write(int fd, const void* data, size_t bytes, uint64_t offset) override;
  virtual int Sync(int fd);                     // the file's data, as fdatasync
  virtual int Reserve(int fd, uint64_t bytes);  // as fallocate from 0
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

  // What not every file system can do.

  // Reserve; where there is no such thing, writes zeros where the file has no space yet and sets
  // *by_writing. What the file holds stays as it is. Nobody else may use the file meanwhile, which must
  // be open for reading, too; `bytes` is a multiple of kIoAlignment, for O_DIRECT.
  int TakeSpace(int fd, uint64_t bytes, bool* by_writing);
  // Sync and SyncDirectory; where there is no such thing, nothing: then a power failure may take what
  // was written, and the checksums find that out.
  int Persist(int fd);
  int PersistDirectory(const std::string& path);

 private:
  int FillHoles(int fd, uint64_t bytes, bool* by_writing);
};

}  // namespace flexkv
