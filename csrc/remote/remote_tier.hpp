// A remote store as those see it who move blocks: transfers, cut into calls that the threads of a store's
// client take, make and settle. The client knows names and pieces of memory, and nothing of transfers; what
// it brings is compared here with what was stored before anybody sees it.
//
// A call is over when it is settled, and not before: its host slots stay those of its transfer, however late
// the client is, so nothing else is ever written where it may still write.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "remote/remote_value.hpp"
#include "tier/lower_tier.hpp"

namespace flexkv {

class RemoteTier : public LowerTier {
 public:
  // `refold` is what the keys of transfers are XORed with to be those of the store. `num_slots` are places that
  // the index remembers blocks of the store by; nothing lies in them. A call moves `call_bytes` at most, and at
  // least one block. `engine_name` is the store's, for people.
  RemoteTier(BlockKey name_space, BlockKey refold, uint64_t num_slots, size_t call_bytes,
             std::string engine_name);
  ~RemoteTier() override { Detach(); }

  void Attach(const Above& above) override;
  void Detach() override;
  uint64_t num_slots() const override { return num_slots_; }
  void Start(TierTransfer* transfer) override;
  void Wake() override { changed_.notify_all(); }
  double oldest_s() const override;
  std::string engine_name() const override { return engine_name_; }

  // ---- for the threads of the store's client ----

  struct Work {
    TierTransfer* transfer = nullptr;
    size_t next = 0;     // block that nobody has taken yet
    size_t unended = 0;  // blocks that were taken and not settled, and those that nobody has taken
  };
  // Some blocks of one transfer, in order.
  class Call {
   public:
    bool store() const { return store_; }
    size_t size() const { return keys_.size(); }
    const BlockKey& name_space() const { return shape_.name_space; }
    const std::vector<BlockKey>& keys() const { return keys_; }
    // Of each block the two pieces of memory that are its value.
    char* header(size_t i) const { return headers_.get() + i * kValueHeaderBytes; }
    char* body(size_t i) const { return bodies_[i]; }
    // Of a load there is room for so much behind a header, and less may come.
    size_t body_bytes(size_t i) const { return body_bytes_[i]; }
    // Of a store: from now on the body of this block is a compressed one, if that is smaller. It is another
    // piece of memory then.
    void Compress(size_t i, Compression how);
    const HostPool& host() const { return *host_; }

   private:
    friend class RemoteTier;
    struct Free {
      void operator()(char* memory) const { std::free(memory); }
    };
    ValueShape shape_;
    bool store_ = false;
    std::list<Work>::iterator work_;
    std::vector<uint32_t> blocks_;
    std::vector<BlockKey> keys_;
    std::vector<char*> bodies_;
    std::vector<size_t> body_bytes_;
    std::vector<std::unique_ptr<char, Free>> compressed_;
    std::unique_ptr<char, Free> headers_;  // on whole pages, for O_DIRECT
    std::shared_ptr<HostPool> host_;
    double start_s_ = 0;
    std::vector<bool> verified_;
    bool settled_ = false;
  };

  // The next call, whose headers are made if it stores; null if none comes within the time. Whoever waits here
  // also ends what was cancelled, of both kinds: all others may hang in their calls.
  std::shared_ptr<Call> Take(bool store, double timeout_s);
  // Compares what a load calls kGood, of which so many bytes came, header included, with what was stored, and
  // expands what is compressed. Returns the outcomes with those that are not that as kCorrupt, and why the
  // first one is not (else empty).
  std::pair<std::vector<BlockOutcome>, std::string> Verify(Call* call, std::vector<BlockOutcome> outcomes,
                                                           const std::vector<size_t>& sizes);
  // Says how each block of a call ended, once; of a load kGood is only what was verified. The transfer may be
  // gone when it returns.
  void Settle(Call* call, const std::vector<BlockOutcome>& outcomes, const std::string& why);

  // Values are of this namespace from now on; calls that were taken before keep theirs.
  void set_name_space(BlockKey name_space);

 private:
  std::list<Work>& QueueOf(bool store) { return store ? stores_ : loads_; }
  // Drops what nobody needs any more, and takes what has ended off the queues. Called with the mutex held;
  // the transfers it returns are to be ended without it.
  std::vector<TierTransfer*> DropGivenUp();

  const BlockKey refold_;
  const uint64_t num_slots_;
  const size_t call_bytes_;
  const std::string engine_name_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Above above_;
  BlockKey name_space_;
  bool attached_ = false;
  std::list<Work> loads_, stores_;
  std::list<Call*> running_;  // taken and not settled, oldest first
};

}  // namespace flexkv
