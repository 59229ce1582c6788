// What the index applies later: long runs of new blocks (see prefix_index.hpp).
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>

#include "index/prefix_index.hpp"

namespace flexkv {
namespace {

// Blocks that wait at most. A call that cannot do without them settles them first: well under a
// millisecond, no more than to store them at once would have taken.
constexpr size_t kDeferredMax = 16384;
// Blocks that the index's thread settles at a time: a few microseconds, for which a call may have to wait.
constexpr size_t kSlice = 64;
// Lookups are made so many blocks ahead of the one that needs them.
constexpr size_t kAhead = 16;
// A call that stored blocks is often followed by one that publishes them, which is cheap until they are
// settled, so the thread lets some time pass.
constexpr std::chrono::microseconds kGrace{200};
// For which the thread leaves the mutex to those who want it.
constexpr std::chrono::microseconds kPause{10};

}  // namespace

bool PrefixIndex::MayDefer(size_t count) const {
  return deferred_min_ > 0 && count >= deferred_min_ && num_deferred_ + count <= kDeferredMax;
}

// Whether these blocks are new and can wait as well: nothing that is left to do of earlier calls has to
// be done for them.
bool PrefixIndex::MayFollowDeferred(const TierState& state, const BlockRun& blocks) const {
  return MayDefer(blocks.count) && state.pool.num_free() >= blocks.count && AreNew(blocks.keys, blocks.count);
}

uint32_t PrefixIndex::FindDeferred(const BlockKey& key) const {
  for (const Deferred& deferred : deferred_) {
    for (const Run& run : deferred.runs) {
      const BlockKey* first = &keys_[run.first];
      const BlockKey* found = std::find(first, first + run.count, key);
      if (found != first + run.count) return run.first + static_cast<uint32_t>(found - first);
    }
  }
  return kNil;
}

uint32_t PrefixIndex::FindOrCreateParent(const BlockKey& key) {
  const uint32_t deferred = FindDeferred(key);
  return deferred != kNil ? deferred : FindOrCreate(key);
}

// Makes sure that nothing of it can fail: memory for entries and table (and a parent), and the thread.
void PrefixIndex::PrepareToDefer(size_t count) {
  const size_t entries = end_ + count + 1;
  if (entries > reserved_) ReserveEntries(std::max(entries, end_ + end_ / size_t{2}), false);
  table_.Reserve(num_entries_ + count + 1);
  if (!settler_.joinable()) settler_ = std::thread([this] { SettleInBackground(); });
}

// Gives the blocks from the `first` on entries of which only keys and tokens are written, and slots.
void PrefixIndex::Defer(const BlockRun& blocks, size_t first, const Purpose& purpose, uint32_t previous,
                        bool first_of_call, Transaction* txn) {
  Deferred& deferred = deferred_.emplace_back();
  deferred.txn = next_id_;
  deferred.tier = txn->tier;
  deferred.importance = purpose.importance;
  deferred.staging = purpose.staging;
  deferred.first_of_call = first_of_call;
  deferred.previous = previous;
  deferred.slots = std::move(fresh_slots_);
  if (previous == kNil) roots_.Add(blocks.keys[first]);
  for (size_t at = first; at < blocks.count;) {
    Run run = TakeEntries(blocks.count - at);
    run.tier = txn->tier;
    std::copy_n(blocks.keys + at, run.count, &keys_[run.first]);
    if (blocks.tokens != nullptr) {
      KeepTokens(run.first, *blocks.tokens, at, run.count);
    } else if (tokens_kept_ > 0) {
      std::fill_n(&has_tokens_[run.first], run.count, uint8_t{0});
    }
    deferred.runs.push_back(run);
    at += run.count;
  }
  txn->runs.insert(txn->runs.end(), deferred.runs.begin(), deferred.runs.end());
  num_deferred_ += deferred.slots.size();
}

// Publishes a transaction whose blocks all wait, and came last. False: it has to be done in full.
bool PrefixIndex::CommitDeferred(uint64_t id, const Transaction& txn) {
  if (deferred_.empty()) return false;
  Deferred& last = deferred_.back();
  if (last.txn != id || last.num_settled > 0 || last.slots.size() != txn.count) return false;
  last.committed = true;
  TierState& state = Of(txn.tier);
  const uint32_t count = static_cast<uint32_t>(txn.count);
  state.count[static_cast<int>(State::kWriting)] -= count;
  state.count[static_cast<int>(State::kReady)] += count;
  state.pinned -= count;
  return true;
}

// Settles some of the blocks that have waited longest; returns how many.
size_t PrefixIndex::SettleSome(size_t count_max) {
  Deferred& deferred = deferred_.front();
  const bool begins = deferred.num_settled == 0;
  if (begins && deferred.first_of_call) Tick();
  const Run& run = deferred.runs[deferred.run];
  const uint32_t first = run.first + deferred.run_settled;
  const uint32_t count =
      static_cast<uint32_t>(std::min<size_t>(count_max, run.count - deferred.run_settled));
  const BlockKey* keys = &keys_[first];
  for (uint32_t i = 0; i < count; ++i) {
    if (i + kAhead < count) table_.Prefetch(keys[i + kAhead]);
    // Of a key that is there already, against the promise, the first entry stays the one to be found.
    table_.FindOrInsert(keys[i], first + i, keys_.data());
  }
  const bool last = deferred.num_settled + count == deferred.slots.size();
  WriteNew({first, count, deferred.tier}, &deferred.slots[deferred.num_settled],
           deferred.committed ? Residency::kPublished : Residency::kWritten, deferred.importance,
           deferred.previous, !begins, !last);
  Of(deferred.tier).policy->Store(first, count, keys, deferred.staging);
  deferred.previous = first + count - 1;
  deferred.num_settled += count;
  deferred.run_settled += count;
  num_deferred_ -= count;
  if (deferred.run_settled == run.count) {
    ++deferred.run;
    deferred.run_settled = 0;
  }
  if (last) {
    UpdateEvictable(deferred.previous, deferred.tier);
    deferred_.pop_front();
  }
  return count;
}

size_t PrefixIndex::SettleDeferred() {
  size_t settled = 0;
  while (!deferred_.empty()) settled += SettleSome(SIZE_MAX);
  return settled;
}

size_t PrefixIndex::Settle() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return SettleAll();
}

void PrefixIndex::SettleInBackground() {
  // On a machine without a core to spare it must not take that of the caller who woke it.
  const sched_param none{};
  pthread_setschedparam(pthread_self(), SCHED_BATCH, &none);
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    deferred_changed_.wait(lock, [&] { return stopping_ || !deferred_.empty(); });
    deferred_changed_.wait_for(lock, kGrace, [&] { return stopping_; });
    while (!stopping_ && !deferred_.empty()) {
      SettleSome(kSlice);
      lock.unlock();
      while (num_waiting_ > 0) std::this_thread::sleep_for(kPause);
      lock.lock();
    }
    if (stopping_) return;
  }
}

}  // namespace flexkv
