// The control plane's parts against std::set, std::map and sorted vectors, and
// the index under many threads. No framework: a check that fails says where and
// aborts.
//
//     test_control_plane [--seconds S] [--seed N]
//     test_control_plane --plant check | overflow | undefined | race: a fault
//     that must be noticed
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "index/bit_tree.hpp"
#include "index/bucket_queue.hpp"
#include "index/growing_array.hpp"
#include "index/key_table.hpp"
#include "index/mempool.hpp"
#include "index/prefix_index.hpp"
#include "index/token_hash.hpp"

using namespace flexkv;

namespace {

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

using Rng = std::mt19937_64;

size_t Below(Rng& rng, size_t bound) { return std::uniform_int_distribution<size_t>(0, bound - 1)(rng); }
bool Chance(Rng& rng, double probability) { return std::bernoulli_distribution(probability)(rng); }

// ---- BitTree and Mempool ----

void CheckSame(const BitTree& tree, const std::set<size_t>& model, size_t size, Rng& rng) {
  CHECK(tree.empty() == model.empty());
  if (!model.empty()) CHECK(tree.Lowest() == *model.begin());
  const size_t any = Below(rng, size);
  CHECK(tree.Contains(any) == (model.count(any) != 0));
  for (const size_t from : {any, size - 1, size_t{0}, any / 64 * 64 + 63}) {
    const auto found = model.lower_bound(from);
    CHECK(tree.LowestFrom(from) == (found == model.end() ? SIZE_MAX : *found));
  }
}

void TestBitTree(Rng& rng) {
  // Around the sizes at which a word fills up, and a level is added.
  for (const size_t size : {1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 262143, 262144, 262145}) {
    for (const bool full : {false, true}) {
      BitTree tree(size, full);
      std::set<size_t> model;
      for (size_t i = 0; full && i < size; ++i) model.insert(model.end(), i);
      CheckSame(tree, model, size, rng);
      for (int step = 0; step < 2000; ++step) {
        // Mostly few members, so that words become empty and full again.
        const size_t number = Chance(rng, 0.5) ? Below(rng, size) : Below(rng, std::min<size_t>(size, 130));
        if (Chance(rng, 0.45)) {
          tree.Insert(number);
          model.insert(number);
        } else if (Chance(rng, 0.9)) {
          tree.Erase(number);
          model.erase(number);
        } else {
          size_t count = Below(rng, std::min<size_t>(model.size(), 300) + 1);
          if (Chance(rng, 0.02)) count = model.size();
          std::vector<size_t> taken;
          tree.TakeLowest(count, [&](size_t first, size_t length) {
            for (size_t i = 0; i < length; ++i) taken.push_back(first + i);
          });
          CHECK(taken.size() == count);
          for (const size_t one : taken) {
            CHECK(one == *model.begin());
            model.erase(model.begin());
          }
        }
        CheckSame(tree, model, size, rng);
      }
    }
  }
}

void TestMempool(Rng& rng) {
  for (const uint32_t num_slots : {0u, 1u, 63u, 64u, 65u, 128u, 1000u, 4096u}) {
    Mempool pool(num_slots);
    std::set<SlotId> free, used;
    for (uint32_t i = 0; i < num_slots; ++i) free.insert(static_cast<SlotId>(i));
    for (int step = 0; step < 3000; ++step) {
      const size_t kind = Below(rng, 4);
      if (kind == 0 && !free.empty()) {
        const SlotId slot = pool.Allocate();
        CHECK(slot == *free.begin());
        free.erase(slot);
        used.insert(slot);
      } else if (kind == 1) {
        std::vector<SlotId> slots;
        pool.Allocate(Below(rng, std::min<size_t>(free.size(), 100) + 1), &slots);
        for (const SlotId slot : slots) {
          CHECK(slot == *free.begin());
          free.erase(slot);
          used.insert(slot);
        }
      } else if (kind == 2 && !free.empty()) {
        const SlotId slot = *std::next(free.begin(), static_cast<std::ptrdiff_t>(Below(rng, free.size())));
        pool.Take(slot);
        free.erase(slot);
        used.insert(slot);
      } else {
        for (size_t n = Below(rng, 100); n > 0 && !used.empty(); --n) {
          const SlotId slot = *std::next(used.begin(), static_cast<std::ptrdiff_t>(Below(rng, used.size())));
          pool.Free(slot);
          used.erase(slot);
          free.insert(slot);
        }
      }
      CHECK(pool.num_slots() == num_slots);
      CHECK(pool.num_free() == free.size());
      if (num_slots > 0) {
        const SlotId any = static_cast<SlotId>(Below(rng, num_slots));
        CHECK(pool.IsFree(any) == (free.count(any) != 0));
      }
    }
  }
}

// ---- BucketQueue ----

// A queue beside a plain list in order of arrival.
class QueuePair {
 public:
  explicit QueuePair(GrowingArray<QueueLink>* links) : queue(links) {}

  void Insert(uint32_t entry, uint64_t priority) {
    if (model.empty()) span_max = highest = 0;
    queue.Insert(entry, priority);
    model.push_back({entry, priority});
    highest = std::max(highest, priority);
    span_max = std::max(span_max, highest - LowestPriority());
    CheckFront();
  }
  void Erase(size_t position) {
    queue.Erase(model[position].entry);
    model.erase(model.begin() + static_cast<std::ptrdiff_t>(position));
    CheckFront();
  }
  size_t Place(uint32_t entry) const {
    for (size_t i = 0; i < model.size(); ++i) {
      if (model[i].entry == entry) return i;
    }
    CHECK(false);
    return 0;
  }
  uint64_t LowestPriority() const {
    uint64_t lowest = UINT64_MAX;
    for (const Item& item : model) lowest = std::min(lowest, item.priority);
    return lowest;
  }

  // What the header promises: an entry is at most a thousandth of the span away
  // from its place.
  void CheckFront() const {
    CHECK(queue.size() == model.size());
    const uint32_t front = queue.Front();
    CHECK((front == BucketQueue::kNone) == model.empty());
    if (model.empty()) return;
    CHECK(model[Place(front)].priority - LowestPriority() <= span_max / 1000);
  }

  void CheckAll() const {
    const std::vector<uint32_t> entries = queue.Entries();
    CHECK(entries.size() == model.size());
    std::map<uint32_t, uint64_t> left;
    for (const Item& item : model) CHECK(left.emplace(item.entry, item.priority).second);
    uint64_t above = 0;
    for (const uint32_t entry : entries) {
      const auto found = left.find(entry);
      CHECK(found != left.end());
      CHECK(above <= found->second + span_max / 1000);
      above = std::max(above, found->second);
      left.erase(found);
    }
    if (span_max >= 2000) return;
    // Buckets are one priority wide: exact, and the first to come is the first
    // to go.
    std::vector<Item> sorted = model;
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const Item& a, const Item& b) { return a.priority < b.priority; });
    for (size_t i = 0; i < sorted.size(); ++i) CHECK(sorted[i].entry == entries[i]);
  }

  struct Item {
    uint32_t entry;
    uint64_t priority;
  };
  BucketQueue queue;
  std::vector<Item> model;
  uint64_t highest = 0;   // since it was last empty
  uint64_t span_max = 0;  // since then, too
};

// Priorities as clocks of every pace make them: the window moves, both ways, and then it widens.
void TestBucketQueue(Rng& rng) {
  constexpr uint32_t kEntries = 400;
  for (const uint64_t pace : {1ull, 3ull, 50ull, 2047ull, 2048ull, 5000ull, 1000000ull, 1ull << 40}) {
    GrowingArray<QueueLink> links;
    links.Reserve(kEntries);
    QueuePair pair(&links);
    uint64_t now = Chance(rng, 0.5) ? 0 : Below(rng, 1u << 20);
    std::vector<uint32_t> spare(kEntries);
    for (uint32_t i = 0; i < kEntries; ++i) spare[i] = i;
    for (int step = 0; step < 6000; ++step) {
      now += Chance(rng, 0.3) ? Below(rng, pace + 1) : 0;
      // Nearly empty now and then, and once empty: the queue starts anew.
      const double grow = step % 1500 < 700 ? 0.7 : 0.3;
      if (!spare.empty() && (pair.model.empty() || Chance(rng, grow))) {
        const size_t at = Below(rng, spare.size());
        uint64_t priority = now;
        if (Chance(rng, 0.2)) priority = Below(rng, now + 1);  // of one that was held for long
        if (Chance(rng, 0.1)) priority = now - std::min(now, Below(rng, 3 * pace));
        pair.Insert(spare[at], priority);
        spare.erase(spare.begin() + static_cast<std::ptrdiff_t>(at));
      } else if (!pair.model.empty()) {
        const size_t position = Chance(rng, 0.5) ? Below(rng, pair.model.size())  // from the middle
                                                 : pair.Place(pair.queue.Front());
        spare.push_back(pair.model[position].entry);
        pair.Erase(position);
      }
      if (step % 50 == 0) pair.CheckAll();
    }
    while (!pair.model.empty()) pair.Erase(pair.Place(pair.queue.Front()));
    pair.CheckAll();
  }
}

// Queues that share links do not touch each other's lists.
void TestBucketQueuesShareLinks(Rng& rng) {
  constexpr uint32_t kEntries = 200;
  GrowingArray<QueueLink> links;
  links.Reserve(kEntries);
  std::vector<QueuePair> pairs;
  pairs.reserve(5);
  for (int i = 0; i < 5; ++i) pairs.emplace_back(&links);
  std::vector<int> home(kEntries, -1);
  for (int step = 0; step < 8000; ++step) {
    const uint32_t entry = static_cast<uint32_t>(Below(rng, kEntries));
    if (home[entry] < 0) {
      home[entry] = static_cast<int>(Below(rng, pairs.size()));
      pairs[static_cast<size_t>(home[entry])].Insert(entry, Below(rng, 900));
    } else {
      QueuePair& pair = pairs[static_cast<size_t>(home[entry])];
      pair.Erase(pair.Place(entry));
      home[entry] = -1;
    }
    if (step % 100 == 0) {
      for (const QueuePair& pair : pairs) pair.CheckAll();
    }
  }
}

// ---- KeyTable ----

// A key whose home in a table is anywhere, or nearly the last bucket: runs then
// wrap around.
BlockKey MakeKey(Rng& rng, bool clustered) {
  for (;;) {
    const BlockKey key{rng(), rng()};
    const uint32_t tag = static_cast<uint32_t>((BlockKeyHash()(key) * 0xD6E8FEB86659FD93ull) >> 32);
    if (!clustered || tag > UINT32_MAX - (UINT32_MAX >> 5) || tag < (UINT32_MAX >> 6)) return key;
  }
}

void TestKeyTable(Rng& rng) {
  for (const size_t expected : {0, 1, 40, 41, 42, 100, 1000}) {
    for (const bool clustered : {false, true}) {
      constexpr uint32_t kIds = 1500;
      KeyTable table(expected);
      std::vector<BlockKey> keys(kIds);  // by id
      std::map<uint32_t, BlockKey> model;
      std::vector<uint32_t> spare(kIds);
      for (uint32_t i = 0; i < kIds; ++i) spare[i] = i;
      for (int step = 0; step < 12000; ++step) {
        // Fill it beyond what was expected, then empty it, and again.
        const bool insert = Chance(rng, step / 2000 % 2 == 0 ? 0.8 : 0.25);
        if (insert && !spare.empty()) {
          const uint32_t id = spare.back();
          const BlockKey key = MakeKey(rng, clustered);
          CHECK(table.Find(key, keys.data()) == KeyTable::kNone);
          CHECK(table.FindOrInsert(key, id, keys.data()) == KeyTable::kNone);
          keys[id] = key;
          spare.pop_back();
          model[id] = key;
          CHECK(table.FindOrInsert(key, UINT32_MAX - 2, keys.data()) == id);
        } else if (!model.empty()) {
          auto victim = model.lower_bound(static_cast<uint32_t>(Below(rng, kIds)));
          if (victim == model.end()) victim = model.begin();
          CHECK(!table.Erase(victim->second, UINT32_MAX - 2));
          CHECK(table.Erase(victim->second, victim->first));
          CHECK(!table.Erase(victim->second, victim->first));
          CHECK(table.Find(victim->second, keys.data()) == KeyTable::kNone);
          keys[victim->first] = BlockKey{};
          spare.push_back(victim->first);
          model.erase(victim);
        }
        CHECK(table.size() == model.size());
        if (step % 64 == 0) {
          for (const auto& [id, key] : model) CHECK(table.Find(key, keys.data()) == id);
        }
      }
    }
  }
}

// Keys get consecutive entries up to the first that has one, which is named.
void TestKeyTableInsertsRuns(Rng& rng) {
  for (const size_t count : {1, 15, 16, 17, 100}) {
    KeyTable table(1);
    std::vector<BlockKey> keys(2 * count + 1), added;
    for (size_t i = 0; i < count; ++i) added.push_back(MakeKey(rng, false));
    uint32_t found;
    CHECK(table.InsertNew(added.data(), count, 0, keys.data(), &found) == count);
    for (uint32_t id = 0; id < count; ++id)
      CHECK(keys[id] == added[id] && table.Find(added[id], keys.data()) == id);
    const size_t known = Below(rng, count);  // comes again behind so many new ones
    std::vector<BlockKey> more;
    for (size_t i = 0; i < count; ++i) more.push_back(i == known ? added[i] : MakeKey(rng, false));
    const uint32_t first = static_cast<uint32_t>(count);
    CHECK(table.InsertNew(more.data(), count, first, keys.data(), &found) == known);
    CHECK(found == known);
    for (uint32_t i = 0; i < known; ++i) CHECK(table.Find(more[i], keys.data()) == first + i);
    CHECK(table.size() == count + known);
  }
}

// Two keys of one tag and different bytes: the array of keys decides.
void TestKeyTableWithEqualTags() {
  // BlockKeyHash folds the halves: lo ^ (hi * odd) is the same for these.
  constexpr uint64_t kFold = 0x9E3779B97F4A7C15ull;
  std::vector<BlockKey> keys;
  for (uint64_t hi = 0; hi < 200; ++hi) keys.push_back({12345 ^ (hi * kFold), hi});
  KeyTable table(1);
  for (uint32_t id = 0; id < keys.size(); ++id) {
    CHECK(table.FindOrInsert(keys[id], id, keys.data()) == KeyTable::kNone);
  }
  for (uint32_t id = 0; id < keys.size(); id += 2) table.Erase(keys[id], id);
  for (uint32_t id = 0; id < keys.size(); ++id) {
    CHECK(table.Find(keys[id], keys.data()) == (id % 2 == 0 ? KeyTable::kNone : id));
  }
}

// What was reserved is there: no insertion grows the table.
void TestKeyTableReserves(Rng& rng) {
  KeyTable table(0);
  table.Reserve(5000);
  const size_t bytes = table.memory_bytes();
  std::vector<BlockKey> keys;
  for (uint32_t id = 0; id < 5000; ++id) {
    keys.push_back(MakeKey(rng, false));
    CHECK(table.FindOrInsert(keys[id], id, keys.data()) == KeyTable::kNone);
  }
  CHECK(table.memory_bytes() == bytes);
}

// ---- GrowingArray ----

void TestGrowingArray(Rng& rng) {
  GrowingArray<uint64_t> array;
  size_t size = 0;
  while (size < 3'000'000) {
    const size_t grown = size + 1 + Below(rng, size / 2 + 1000);
    array.Reserve(grown, Chance(rng, 0.3));
    // What was there is still there, and what is new is zero.
    for (size_t i = 0; i < size; i += 1 + size / 5000) CHECK(array[i] == i * 31 + 7);
    for (size_t i = size; i < grown; ++i) {
      CHECK(array[i] == 0);
      array[i] = i * 31 + 7;
    }
    size = grown;
    array.Reserve(size / 2);  // never smaller
  }
  for (size_t i = 0; i < size; ++i) CHECK(array[i] == i * 31 + 7);
}

// ---- The index under many threads ----

// Blocks of the test: a tree, block n after block n / 3. Tokens of block n are
// all n.
constexpr size_t kTreeBlocks = 300;
constexpr size_t kTokens = 8;
constexpr size_t kTiers = 3;

struct Tree {
  explicit Tree(const BlockKey& name_space) : space(name_space) {
    for (size_t n = 0; n <= kTreeBlocks; ++n) tokens.insert(tokens.end(), kTokens, static_cast<int32_t>(n));
    const TokenView view{tokens.data(), false, kTokens};
    keys.resize(kTreeBlocks + 1);
    for (size_t n = 1; n <= kTreeBlocks; ++n) {
      keys[n] = HashBlock(n / 3 == 0 ? space : keys[n / 3], view, n);
    }
  }
  std::vector<size_t> Path(size_t leaf) const {
    std::vector<size_t> path;
    for (; leaf > 0; leaf /= 3) path.insert(path.begin(), leaf);
    return path;
  }
  BlockKey space;
  std::vector<int32_t> tokens;
  std::vector<BlockKey> keys;
};

// What one thread does to the index, at random; it keeps what it holds to
// itself.
class Client {
 public:
  Client(PrefixIndex& index, const Tree& tree, uint64_t seed, std::atomic<uint32_t>* owners, uint64_t number)
      : index_(index), tree_(tree), rng_(seed), owners_(owners), next_number_(number << 32) {}

  void Step() {
    const std::vector<size_t> path = tree_.Path(1 + Below(rng_, kTreeBlocks));
    const size_t skip = Below(rng_, 3) == 0 ? Below(rng_, path.size()) : 0;
    std::vector<BlockKey> keys;
    std::vector<int32_t> tokens;
    for (size_t i = skip; i < path.size(); ++i) {
      keys.push_back(tree_.keys[path[i]]);
      tokens.insert(tokens.end(), kTokens, static_cast<int32_t>(path[i]));
    }
    const TokenView view{tokens.data(), false, kTokens};
    const BlockRun blocks{keys.data(), keys.size(), Chance(rng_, 0.5) ? &view : nullptr};
    const Tier tier{static_cast<uint8_t>(Below(rng_, kTiers))};
    const size_t kind = Below(rng_, 100);
    std::vector<uint8_t> tiers(keys.size());
    std::vector<SlotId> slots(keys.size());
    std::vector<BlockKey> names(keys.size());
    if (kind < 5) {
      num_watched_ += index_.Watch(keys.data(), keys.size(), next_number_);
      next_number_ += keys.size();
    } else if (kind < 15) {
      index_.Match(blocks, tiers.data());
    } else if (kind < 20) {
      if (skip == 0) {
        index_.MatchTokens({tree_.space, view, keys.size()}, names.data(), tiers.data());
        CHECK(names == keys);
      }
    } else if (kind < 40) {
      size_t found = 0;
      uint64_t lease;
      if (skip == 0 && Chance(rng_, 0.5)) {
        lease = index_.AcquireTokens({tree_.space, view, keys.size()}, Chance(rng_, 0.5), names.data(),
                                     tiers.data(), slots.data(), &found);
      } else {
        lease = index_.Acquire(blocks, Chance(rng_, 0.5) ? std::optional<Tier>(tier) : std::nullopt,
                               Chance(rng_, 0.5), tiers.data(), slots.data(), &found);
      }
      CHECK((lease != 0) == (found != 0));
      if (lease != 0) leases_.push_back(lease);
      // Under a lease a slot holds what it is said to hold: nobody writes
      // there.
      for (size_t i = 0; i < found; ++i) {
        CHECK(Owner(static_cast<Tier>(tiers[i]), slots[i]).load() == path[skip + i]);
      }
    } else if (kind < 60) {
      Release();
    } else if (kind < 80) {
      Reserve(tier, path, skip, blocks);
    } else if (kind < 92) {
      EndTransaction();
    } else if (kind < 95) {
      index_.Invalidate(tier, keys.data(), keys.size());
    } else if (kind < 98) {
      index_.Evict(tier, Below(rng_, 4));
    } else {
      const TierStats stats = index_.Stats(tier);
      CHECK(stats.free + stats.ready + stats.writing <= stats.slots);
      if (Chance(rng_, 0.02)) index_.InvalidateTier(tier);
      if (Chance(rng_, 0.05)) CHECK(index_.CheckIntegrity() == "");
      if (Chance(rng_, 0.05)) {
        std::vector<BlockKey> all, parents;
        CHECK(index_.Blocks(tier, &all, &parents, &slots) == all.size());
      }
    }
    if (leases_.size() > 4) Release();
    if (transactions_.size() > 2) EndTransaction();
  }

  size_t num_watched() const { return num_watched_; }

  void GiveBack() {
    while (!leases_.empty()) Release();
    while (!transactions_.empty()) EndTransaction();
  }

 private:
  struct Transaction {
    uint64_t id;
    Tier tier;
    std::vector<size_t> blocks;
    std::vector<SlotId> slots;
  };

  std::atomic<uint32_t>& Owner(Tier tier, SlotId slot) {
    return owners_[static_cast<size_t>(slot) * kTiers + static_cast<size_t>(tier)];
  }

  void Reserve(Tier tier, const std::vector<size_t>& path, size_t skip, const BlockRun& blocks) {
    const BlockKey* parent = skip > 0 && Chance(rng_, 0.8) ? &tree_.keys[path[skip - 1]] : nullptr;
    const uint8_t importance = Chance(rng_, 0.2) ? kImportanceMax : 0;
    std::vector<uint32_t> positions;
    std::vector<SlotId> slots;
    const Purpose purpose{importance, Chance(rng_, 0.2), Chance(rng_, 0.3)};
    const auto id = index_.Reserve(tier, parent, blocks, purpose, &positions, &slots);
    if (!id.has_value() || *id == 0) return;
    Transaction txn{*id, tier, {}, slots};
    for (size_t i = 0; i < positions.size(); ++i) {
      txn.blocks.push_back(path[skip + positions[i]]);
      // Now it is ours alone to write.
      Owner(tier, slots[i]).store(static_cast<uint32_t>(kTreeBlocks + 1));
    }
    transactions_.push_back(std::move(txn));
  }

  void Release() {
    if (leases_.empty()) return;
    std::swap(leases_[Below(rng_, leases_.size())], leases_.back());
    CHECK(index_.Release(leases_.back()));
    leases_.pop_back();
  }

  void EndTransaction() {
    if (transactions_.empty()) return;
    std::swap(transactions_[Below(rng_, transactions_.size())], transactions_.back());
    const Transaction txn = std::move(transactions_.back());
    transactions_.pop_back();
    if (Chance(rng_, 0.2)) {
      CHECK(index_.Writer(txn.tier, tree_.keys[txn.blocks[Below(rng_, txn.blocks.size())]]) == txn.id);
    }
    for (size_t i = 0; i < txn.slots.size(); ++i) {
      CHECK(Owner(txn.tier, txn.slots[i]).load() == kTreeBlocks + 1);
      Owner(txn.tier, txn.slots[i]).store(static_cast<uint32_t>(txn.blocks[i]));
    }
    if (Chance(rng_, 0.2)) {
      CHECK(index_.Abort(txn.id));
      return;
    }
    std::vector<uint8_t> ok(txn.blocks.size());
    for (uint8_t& one : ok) one = Chance(rng_, 0.9);
    const size_t wanted = static_cast<size_t>(std::count(ok.begin(), ok.end(), 1));
    CHECK(index_.Commit(txn.id, ok.data(), ok.size()) == wanted);
  }

  PrefixIndex& index_;
  const Tree& tree_;
  Rng rng_;
  std::atomic<uint32_t>* owners_;  // which block each slot holds, as far as anybody may know
  std::vector<uint64_t> leases_;
  std::vector<Transaction> transactions_;
  uint64_t next_number_;  // of blocks that it watches; no other client has it
  size_t num_watched_ = 0;
};

// Believes what the index tells of watched blocks.
class Watcher {
 public:
  void Take(const std::vector<Sighting>& sightings) {
    for (const Sighting& seen : sightings) {
      const uint8_t bit = static_cast<uint8_t>(1u << static_cast<int>(seen.tier));
      uint8_t& tiers = tiers_[seen.number];
      switch (seen.what) {
        case Sight::kCame:
          CHECK((tiers & bit) == 0);
          tiers |= bit;
          break;
        case Sight::kWent:
          CHECK((tiers & bit) != 0);
          tiers = static_cast<uint8_t>(tiers & ~bit);
          break;
        case Sight::kForgotten:
          CHECK(tiers == 0);
          tiers_.erase(seen.number);
          ++num_forgotten_;
      }
    }
  }
  size_t num_forgotten() const { return num_forgotten_; }

 private:
  std::map<uint64_t, uint8_t> tiers_;  // of each block, as bits
  size_t num_forgotten_ = 0;
};

void TestIndexUnderThreads(Rng& rng, EvictionPolicyKind policy, double seconds) {
  constexpr uint32_t kSlots[kTiers] = {40, 90, 60};
  PrefixIndex index({{kSlots[0], policy}, {kSlots[1], policy}, {kSlots[2], policy}}, kTokens, true, true);
  const Tree tree({1, 2});
  std::vector<std::atomic<uint32_t>> owners(kSlots[1] * kTiers);
  std::vector<Client> clients;
  for (uint64_t i = 1; i <= 4; ++i) clients.emplace_back(index, tree, rng(), owners.data(), i);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::vector<std::thread> threads;
  for (Client& client : clients) {
    threads.emplace_back([&client, end] {
      while (std::chrono::steady_clock::now() < end) {
        for (int i = 0; i < 50; ++i) client.Step();
      }
    });
  }
  Watcher watcher;
  while (std::chrono::steady_clock::now() < end) watcher.Take(index.TakeSightings());
  for (std::thread& thread : threads) thread.join();
  CHECK(index.CheckIntegrity() == "");
  for (Client& client : clients) client.GiveBack();
  CHECK(index.CheckIntegrity() == "");
  CHECK(index.num_leases() == 0);
  CHECK(index.num_transactions() == 0);
  for (uint8_t t = 0; t < kTiers; ++t) {
    const Tier tier{t};
    CHECK(index.Stats(tier).pinned == 0);
    CHECK(index.Stats(tier).writing == 0);
    CHECK(index.Stats(tier).evicted > 0);
    index.InvalidateTier(tier);
    CHECK(index.Stats(tier).free == index.Stats(tier).slots);
  }
  CHECK(index.num_entries() == 0);
  CHECK(index.CheckIntegrity() == "");
  watcher.Take(index.TakeSightings());
  size_t num_watched = 0;
  for (const Client& client : clients) num_watched += client.num_watched();
  CHECK(num_watched > 0);
  CHECK(watcher.num_forgotten() == num_watched);
}

// ---- Faults on purpose: what is quiet about these says nothing by being quiet
// ----

[[gnu::noinline]] void Plant(const std::string& fault) {
  // Not known when this is compiled.
  const size_t one = fault.size() / std::max<size_t>(1, fault.size());
  if (fault == "check") {
    CHECK(one == 2);
  } else if (fault == "overflow") {
    std::vector<char> bytes(one);
    std::printf("%d\n", bytes.data()[2 * one]);
  } else if (fault == "undefined") {
    std::printf("%d\n", INT32_MAX + static_cast<int>(one));
  } else if (fault == "race") {
    size_t shared = 0;
    std::thread other([&] { shared += one; });
    shared += one;
    other.join();
    std::printf("%zu\n", shared);
  }
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 10;
  uint64_t seed = 1;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--seconds") seconds = std::atof(argv[i + 1]);
    if (name == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    if (name == "--plant") {
      Plant(argv[i + 1]);
      return 0;
    }
  }
  Rng rng(seed);
  TestBitTree(rng);
  TestMempool(rng);
  TestBucketQueue(rng);
  TestBucketQueuesShareLinks(rng);
  TestKeyTable(rng);
  TestKeyTableInsertsRuns(rng);
  TestKeyTableWithEqualTags();
  TestKeyTableReserves(rng);
  TestGrowingArray(rng);
  const auto last = EvictionPolicyKind::kFifo;  // of the enum
  const double each = seconds / (static_cast<double>(last) + 1);
  for (int kind = 0; kind <= static_cast<int>(last); ++kind) {
    TestIndexUnderThreads(rng, static_cast<EvictionPolicyKind>(kind), each);
  }
  std::puts("control plane: no findings");
}
