// Finds the entries of a caller's blocks, one after the other: by their keys, or by their tokens, naming them on the way.
// Within a call of PrefixIndex, which has the lock.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/types.hpp"
#include "index/block_graph.hpp"
#include "index/token_hash.hpp"

namespace flexkv {

// Blocks of a caller: their keys and, where the index keeps tokens, what they must hold. Keys are
// chained: a key is followed by one that no other key precedes, and none comes twice. One that did
// would be taken for two when room is made.
struct BlockRun {
  const BlockKey* keys = nullptr;
  size_t count = 0;
  const TokenView* tokens = nullptr;  // of the same blocks; may be null
};

// A sequence of a caller, from its start: named and found by its tokens.
struct TokenRun {
  BlockKey name_space;  // who may share its blocks
  TokenView tokens;
  size_t count = 0;  // blocks
};

// Tells the policies of entries that were looked at, run by run.
class Toucher {
 public:
  Toucher(BlockGraph& graph, bool use) : graph_(graph), use_(use) {}
  ~Toucher() { Flush(); }
  void Add(uint32_t entry, uint32_t count = 1) {
    if (entry != first_ + count_) {
      Flush();
      first_ = entry;
    }
    count_ += count;
  }

 private:
  void Flush() {
    if (count_ > 0) graph_.Touch(first_, count_, use_);
    count_ = 0;
  }
  BlockGraph& graph_;
  bool use_;
  uint32_t first_ = 0;
  uint32_t count_ = 0;
};

// Finds the entries of a run of blocks, one after the other.
class Walk {
 public:
  Walk(BlockGraph& graph, const BlockRun& blocks) : graph_(graph), blocks_(blocks) {}

  void RequireFit() const {
    if (blocks_.tokens != nullptr) blocks_.tokens->RequireFit(blocks_.count);
  }

  uint32_t Next(size_t block) {
    const BlockKey& key = blocks_.keys[block];
    uint32_t entry = previous_ + 1;
    if (graph_.Is(entry, key)) {
      ahead_ = block;
    } else {
      // One miss is likely to be followed by more: their buckets are fetched while we wait for this.
      for (ahead_ = std::max(ahead_, block); ahead_ < std::min(block + KeyTable::kAhead, blocks_.count);
           ++ahead_) {
        graph_.Prefetch(blocks_.keys[ahead_]);
      }
      entry = graph_.Find(key);
    }
    if (entry != BlockGraph::kNil && blocks_.tokens != nullptr &&
        !graph_.HoldsTokens(entry, *blocks_.tokens, block)) {
      entry = BlockGraph::kNil;
    }
    previous_ = entry;
    return entry;
  }

 private:
  BlockGraph& graph_;
  const BlockRun blocks_;
  uint32_t previous_ = BlockGraph::kNil;
  size_t ahead_ = 0;
};

// Names the blocks of a whole sequence while it finds them. What is held is recognised by its tokens,
// and only what is not is hashed.
class TokenWalk {
 public:
  TokenWalk(BlockGraph& graph, const TokenRun& run, BlockKey* keys) : graph_(graph), run_(run), keys_(keys) {
    Require(run.tokens.per_block == graph.tokens_kept(), "this index keeps no tokens, or of other blocks");
  }

  void RequireFit() const { run_.tokens.RequireFit(run_.count); }

  uint32_t Next(size_t block) {
    uint32_t entry = previous_ + 1;
    if (graph_.Continues(entry, previous_, run_.tokens, block)) {
      keys_[block] = graph_.KeyOf(entry);
    } else {
      Name(block);
      entry = graph_.Find(keys_[block]);
      if (entry != BlockGraph::kNil && !graph_.HoldsTokens(entry, run_.tokens, block))
        entry = BlockGraph::kNil;
    }
    named_ = block + 1;
    previous_ = entry;
    return entry;
  }

  // Names the blocks that were not looked for. Needs no lock.
  void NameRest() {
    for (; named_ < run_.count; ++named_) Name(named_);
  }

 private:
  void Name(size_t block) {
    keys_[block] = HashBlock(block == 0 ? run_.name_space : keys_[block - 1], run_.tokens, block);
  }

  BlockGraph& graph_;
  const TokenRun run_;
  BlockKey* keys_;
  size_t named_ = 0;
  uint32_t previous_ = BlockGraph::kNil;
};

}  // namespace flexkv
