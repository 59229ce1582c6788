// Disks that fail, for tests to put under the code that runs in production: one that injects errors,
// stalls, short transfers and silent corruption, and one that loses power.
#pragma once

#include <sys/types.h>

#include <array>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "ssd/disk.hpp"

namespace flexkv {

// The real disk with faults, drawn from a seeded generator. Faults are switched on and off at any time
// and from any thread; a call that has drawn its fault keeps its error.
class FaultyDisk : public Disk {
 public:
  explicit FaultyDisk(uint64_t seed) : random_(seed) {}

  // From now on `operation` has a fault with this probability (0: none), after so many calls without one.
  //
  // "open", "read", "write", "sync" (files and directories), "reserve", "truncate", "rename": after
  // delay_s, fails with the errno `error`, or is done if that is 0. Reads and writes are direct calls as
  // well as the transfers of the engines.
  // "open_direct": opening with O_DIRECT. "direct": direct calls that read or write what was opened so.
  // "short": a read or write moves only a part, some multiple of 512 bytes.
  // "flip": a read returns one wrong bit.
  void SetFault(const std::string& operation, double probability, int error, double delay_s, uint64_t after);
  // Also ends the delays that calls are in: a disk that hangs is one with a delay that no test waits for.
  void ClearFaults();
  // Faults so far, per operation.
  std::map<std::string, uint64_t> Injected() const;

  int Open(const std::string& path, int flags) override;
  int64_t Read(int fd, void* data, size_t bytes, uint64_t offset) override;
  int64_t Write(int fd, const void* data, size_t bytes, uint64_t offset) override;
  int Sync(int fd) override;
  int Reserve(int fd, uint64_t bytes) override;
  int Truncate(int fd, uint64_t bytes) override;
  int Rename(const std::string& from, const std::string& to) override;
  int SyncDirectory(const std::string& path) override;
  std::unique_ptr<IoEngine> MakeEngine(IoEngineKind kind, int depth, std::string* note) override;

 private:
  class Engine;
  class ShortDisk;

  struct Fault {
    double probability = 0;
    int error = 0;
    double delay_s = 0;
    uint64_t after = 0;  // calls that have none
    uint64_t era = 0;    // that it was drawn in
  };

  // Whether ClearFaults was called since a fault was drawn.
  bool IsOver(const Fault& fault) const;
  // The fault of this call, all zero for none.
  Fault Draw(std::string_view operation);
  Fault DrawLocked(std::string_view operation);
  // Draws the fault of a direct call and waits for its delay. 0, or -errno.
  int Inject(std::string_view operation);
  // That of a read or write: also of "direct", if it is one.
  int InjectTransfer(std::string_view operation, int fd);
  // How much of so many bytes is to be moved.
  size_t Shorten(size_t bytes);
  void Flip(char* data, size_t bytes);

  mutable std::mutex mutex_;
  std::condition_variable cleared_;
  uint64_t era_ = 0;  // counts calls of ClearFaults
  std::mt19937_64 random_;
  std::map<std::string, Fault, std::less<>> faults_;
  std::map<std::string, uint64_t> injected_;
};

// The real disk, which knows what a power failure may take away: whatever was not synced. O_DIRECT is
// left out, so that any sector can be rewritten.
//
// Data is tracked in sectors. Changes of a file's size are taken for durable at once, and bytes between
// an old end and a new one were zero before they were written.
class PowerLossDisk : public Disk {
 public:
  ~PowerLossDisk() override;

  // Leaves the files as a power failure might: each sector with unsynced writes holds what was durable
  // or any of these writes, each sector for itself (lost, torn and reordered writes), and each unsynced
  // creation or rename is undone with probability 1/2, unless a later one that stays builds on it. The
  // machine is off from then on: every call fails with EIO. Returns how many sectors were not durable.
  uint64_t PowerFail(uint64_t seed);

  int Open(const std::string& path, int flags) override;
  void Close(int fd) override;
  int64_t Read(int fd, void* data, size_t bytes, uint64_t offset) override;
  int64_t Write(int fd, const void* data, size_t bytes, uint64_t offset) override;
  int Sync(int fd) override;
  int Reserve(int fd, uint64_t bytes) override;
  int Truncate(int fd, uint64_t bytes) override;
  int64_t Size(int fd) override;
  // Within one directory only.
  int Rename(const std::string& from, const std::string& to) override;
  int SyncDirectory(const std::string& path) override;
  int Links(int fd) override;
  // Always threads: the ring would write past this class.
  std::unique_ptr<IoEngine> MakeEngine(IoEngineKind kind, int depth, std::string* note) override;

 private:
  static constexpr size_t kSector = 512;

  struct Identity {
    dev_t device = 0;
    ino_t inode = 0;
    bool operator==(const Identity&) const = default;
  };

  struct Version {
    uint64_t time;  // of the write; 0 for what was durable
    std::array<char, kSector> data;
  };

  struct File {
    Identity identity;
    int opens = 0;
    // Our own, from the first write on: the file may be closed when the power fails. It also keeps the
    // inode from being given to another file as long as we remember this one.
    int fd = -1;
    std::map<uint64_t, std::vector<Version>> sectors;  // not durable; the oldest version is
  };

  struct DirectoryChange {
    uint64_t time;
    std::string directory;
    std::string from;  // "" for a creation
    std::string to;
    std::string undo;   // a link to the file that `to` led to before, "" if there was none
    Identity identity;  // of what `to` leads to since
    Identity replaced;  // of what it led to before
  };

  static bool Identify(const std::string& path, Identity* identity);
  static void Cut(File* file, uint64_t bytes);
  std::shared_ptr<File> Find(int fd);
  void ForgetFiles();

  std::mutex mutex_;
  bool off_ = false;
  uint64_t clock_ = 0;                        // counts writes and changes of directories
  std::vector<std::shared_ptr<File>> files_;  // in the order in which they were first opened
  std::map<int, std::shared_ptr<File>> open_;
  std::vector<DirectoryChange> changes_;  // not durable, oldest first
};

}  // namespace flexkv
