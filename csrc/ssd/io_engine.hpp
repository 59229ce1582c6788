// How bytes get to and from the SSD tier's files. Two engines behind one interface: io_uring, and a
// pool of threads for kernels and containers that refuse io_uring. Both finish short transfers, both
// report every failure; neither ever says done for bytes that did not move.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/types.hpp"

namespace flexkv {

// Where the engine of threads sends its transfers.
class FileCalls {
 public:
  virtual ~FileCalls() = default;
  // As pread and pwrite, but a failure is -errno.
  virtual int64_t Read(int fd, void* data, size_t bytes, uint64_t offset) = 0;
  virtual int64_t Write(int fd, const void* data, size_t bytes, uint64_t offset) = 0;
};

// One transfer. Belongs to the engine from Submit until Reap returns it, and so does its memory.
struct Io {
  bool write = false;
  int fd = -1;
  uint64_t offset = 0;
  char* data = nullptr;
  uint32_t bytes = 0;
  int error = 0;      // out: 0, or an errno; ENODATA when the file ends early
  uint32_t done = 0;  // bytes moved so far; the engine's
  void* owner = nullptr;
  uint32_t tag = 0;  // the owner's
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;
  virtual const char* name() const = 0;
  virtual int depth() const = 0;

  // One thread at a time calls the following.

  // Starts transfers, all of them with as few system calls as possible. At most depth() may be in
  // flight.
  virtual void Submit(Io* const* ios, size_t count) = 0;
  // Takes what has ended. Waits for the first, for Wake, or until the time is up.
  virtual void Reap(std::vector<Io*>* ended, double timeout_s) = 0;
  // Asks that a transfer in flight ends early. It is reaped as usual, with ECANCELED if the kernel
  // could still stop it; until then its memory is in use.
  virtual void Cancel(Io* io) = 0;
  // Tells that transfers on this file and to this memory will follow. Speeds them up, no more:
  // returns whether it does.
  virtual bool RegisterFile(int fd) = 0;
  virtual bool RegisterMemory(char* base, size_t bytes) = 0;

  // From any thread: ends a Reap that waits.
  virtual void Wake() = 0;
};

enum class IoEngineKind { kAuto, kIoUring, kThreads };

// kAuto takes io_uring where the kernel allows it and threads elsewhere (with the reason in *note).
// Threads go through `calls`, the ring goes to the kernel. Throws SystemError if kIoUring is asked for
// and refused.
std::unique_ptr<IoEngine> MakeIoEngine(IoEngineKind kind, int depth, FileCalls* calls, std::string* note);

}  // namespace flexkv
