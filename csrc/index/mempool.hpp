// Which slots of a tier are free. Low slots first: a tier that is never full touches only the memory
// it uses, and what is stored together lies together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "base/types.hpp"
#include "index/bit_tree.hpp"

namespace flexkv {

class Mempool {
 public:
  // All slots are free.
  explicit Mempool(uint32_t num_slots)
      : num_slots_(num_slots), num_free_(num_slots), free_(num_slots, true) {}

  // Takes the lowest free slot; there must be one.
  SlotId Allocate() {
    const SlotId slot = static_cast<SlotId>(free_.Lowest());
    Take(slot);
    return slot;
  }
  // Takes the lowest `count` free slots; there must be as many.
  void Allocate(size_t count, std::vector<SlotId>* slots) {
    num_free_ -= static_cast<uint32_t>(count);
    slots->reserve(slots->size() + count);
    free_.TakeLowest(count, [&](size_t first, size_t length) {
      slots->resize(slots->size() + length);
      std::iota(slots->end() - static_cast<std::ptrdiff_t>(length), slots->end(), static_cast<SlotId>(first));
    });
  }
  // Takes a certain free slot.
  void Take(SlotId slot) {
    --num_free_;
    free_.Erase(static_cast<size_t>(slot));
  }
  void Free(SlotId slot) {
    ++num_free_;
    free_.Insert(static_cast<size_t>(slot));
  }

  bool IsFree(SlotId slot) const { return free_.Contains(static_cast<size_t>(slot)); }
  uint32_t num_slots() const { return num_slots_; }
  uint32_t num_free() const { return num_free_; }
  size_t memory_bytes() const { return free_.memory_bytes(); }

 private:
  uint32_t num_slots_;
  uint32_t num_free_;
  BitTree free_;
};

}  // namespace flexkv
