// How bytes get to and from the SSD tier's files. Two engines behind one interface: io_uring, and a
// pool of threads for kernels and containers that refuse io_uring. Both finish short transfers, both
// report every failure; neither ever says done for bytes that did not move.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "types.hpp"

namespace flexkv {

struct IoRequest {
  int fd = -1;
  uint64_t offset = 0;
  char* data = nullptr;
  uint32_t bytes = 0;
  int error = 0;  // out: 0, or an errno; ENODATA when the file ends early
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;
  // Does all requests, `depth` of them at a time, and returns when the last one has ended.
  // One caller at a time.
  virtual void Run(std::vector<IoRequest>& requests, bool write) = 0;
  virtual const char* name() const = 0;
};

enum class IoEngineKind { kAuto, kIoUring, kThreads };

// kAuto takes io_uring where the kernel allows it and threads elsewhere (with the reason in *note).
// Throws SystemError if kIoUring is asked for and refused.
std::unique_ptr<IoEngine> MakeIoEngine(IoEngineKind kind, int depth, std::string* note);

}  // namespace flexkv
