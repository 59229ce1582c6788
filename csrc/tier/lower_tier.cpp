#include "tier/lower_tier.hpp"

#include <utility>

namespace flexkv {

void TierTransfer::Begin(size_t num_parts) {
  outcome.assign(num_blocks, BlockOutcome::kGood);
  step_left_ = std::vector<std::atomic<size_t>>(num_steps());
  for (auto& blocks : step_left_) blocks.store(num_blocks);
  parts_left_.store(num_parts);
}

void TierTransfer::Land(uint32_t step, uint32_t block) {
  if (on_block) on_block(step, block);
  if (step_left_[step].fetch_sub(1) == 1 && on_step) on_step(step);
}

void TierTransfer::Spoil(uint32_t block, BlockOutcome how, const std::string& why) {
  if (!why.empty()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (error.empty()) error = why;
  }
  if (!Good(block)) return;
  outcome[block] = how;
  count_[static_cast<int>(how)]++;
}

void TierTransfer::End() {
  if (parts_left_.fetch_sub(1) != 1) return;
  const auto ended = std::move(on_end);
  ended();  // the transfer may be gone when it returns
}

}  // namespace flexkv
