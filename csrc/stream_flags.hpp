// Words of pinned memory that a stream of the GPU writes and another one waits for: the order of copies and
// forwards without a host that waits. What an event cannot do, a word can: it can be waited for before the work
// that raises it has been queued, and the host can raise it, too.
//
// A word only ever grows (modulo 2^32). Each time a row of words is taken its value is one more than the last
// time, and all its words have reached that value when it is given back: a wait that is left over, on a stream
// that nobody here knows, ends then, and no wait of the next user ends too early.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace flexkv {

class CudaDriver;

class StreamFlags {
 public:
  struct Row {
    uint32_t* words = nullptr;  // nullptr: no memory was to be had, the host has to wait
    uint64_t address = 0;       // of the first word, as the device sees it
    uint32_t value = 0;         // a word that has reached it is raised
    int size = 0;
  };

  // nullptr with the reason in *note where streams cannot wait for memory: tried, not asked for, because
  // virtual GPUs say more than they keep. Needs a current context.
  static std::shared_ptr<StreamFlags> Make(std::shared_ptr<CudaDriver> cuda, std::string* note);
  // The memory stays: a stream may be about to look at it. It is a few KiB per engine.
  ~StreamFlags() = default;

  Row Take(int size);
  void GiveBack(const Row& row);

  static bool IsRaised(const Row& row, int at);
  static void Raise(const Row& row, int at);
  bool QueueRaise(const Row& row, int at, void* stream, std::string* error);
  bool QueueWait(const Row& row, int at, void* stream, std::string* error);

 private:
  explicit StreamFlags(std::shared_ptr<CudaDriver> cuda) : cuda_(std::move(cuda)) {}

  const std::shared_ptr<CudaDriver> cuda_;
  std::mutex mutex_;
  std::map<int, std::vector<Row>> free_;  // by size
  uint32_t* chunk_ = nullptr;             // what rows are cut from
  uint64_t chunk_address_ = 0;
  size_t chunk_left_ = 0;
};

}  // namespace flexkv
