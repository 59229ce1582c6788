#include "copy/copier.hpp"

#include <algorithm>

namespace flexkv {

void CopiedBlocks::Summarize() {
  in_sequence = std::all_of(first_rows, first_rows + count, [](int64_t row) { return row >= 0; });
  last_host_slot = count > 0 ? *std::max_element(host_slots, host_slots + count) : 0;
}

CopiedBlocks CopiedBlocks::With(const CopiedBlocks& others) const {
  CopiedBlocks both = *this;
  both.count += others.count;
  both.in_sequence = in_sequence && others.in_sequence;
  both.last_host_slot = std::max(last_host_slot, others.last_host_slot);
  return both;
}

}  // namespace flexkv
