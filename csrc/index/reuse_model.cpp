#include "index/reuse_model.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

namespace flexkv {
namespace {

// How long evidence lasts, in blocks that are used or come: at least as many, or capacities.
constexpr double kWindowMin = 100'000;
constexpr double kWindowCapacities = 5;
constexpr double kRefreshes = 50;  // per window
// Before a tier has seen anything: blocks that are used again in any octave of age alike.
constexpr double kPriorBlocks = 20;
constexpr double kPriorReuse = 0.9;
// What all blocks together did, as if so many of each class had done it.
constexpr double kPooledBlocks = 100;
// How much of a worth is in doubt, as the logarithm of a factor: per square of the evidence that a window has
// more than there is, in parts of what there is; and at most.
constexpr double kDoubt = 0.04;
constexpr double kDoubtMax = 0.8;
// Neighbouring cells know about each other: times that a cell gets a quarter of each neighbour. Two
// blocks in three are counted within half an octave then.
constexpr int kSmoothing = 12;

constexpr size_t kGhostsMin = 32768;
constexpr size_t kGhostsShare = 16;  // of the capacity of a tier that is much larger than that
constexpr size_t kGhostsPerSet = 4;

template <typename Histogram>
void Smooth(Histogram* histogram) {
  constexpr size_t kLast = std::tuple_size_v<Histogram> - 1;
  for (int pass = 0; pass < kSmoothing; ++pass) {
    const Histogram old = *histogram;
    (*histogram)[0] = (3 * old[0] + old[1]) / 4;
    for (size_t i = 1; i < kLast; ++i) (*histogram)[i] = (old[i - 1] + 2 * old[i] + old[i + 1]) / 4;
    (*histogram)[kLast] = (old[kLast - 1] + 3 * old[kLast]) / 4;
  }
}

}  // namespace

ReuseModel::ReuseModel(uint32_t capacity)
    : window_(std::max(kWindowMin, kWindowCapacities * static_cast<double>(capacity))) {
  ghosts_.resize(std::max(kGhostsMin, capacity / kGhostsShare) / kGhostsPerSet);
  for (int cell = 0; cell <= kCells; ++cell) {
    cell_begin_[cell] = std::exp2(static_cast<double>(cell) / kCellsPerOctave) - 1;
  }
  Refresh();
}

const ReuseModel::Ghost* ReuseModel::FindGhost(const BlockKey& key) const {
  if (!any_ghost_) return nullptr;
  const GhostSet& set = ghosts_[SetOfKey(key, ghosts_.size())];
  const int way = WayOf(set, FingerprintOfKey(key));
  return way == kWays ? nullptr : &set.ghosts[way];
}

ReuseModel::Past ReuseModel::PastOf(const Ghost& ghost) const {
  return {{static_cast<uint32_t>(ghost.last * kGhostUnit) & kTimeMask, ClassOf(ghost.uses)},
          static_cast<uint8_t>(ghost.uses)};
}

ReuseModel::Past ReuseModel::Arrive(const BlockKey& key, bool staging) {
  const Ghost* ghost = FindGhost(key);
  if (ghost == nullptr) return Enter(0);
  const Past past = PastOf(*ghost);
  return staging ? past : Use(past);
}

ReuseModel::Past ReuseModel::Preview(const BlockKey& key) const {
  const Ghost* ghost = FindGhost(key);
  return Now(ghost == nullptr ? 0 : ghost->uses + 1);
}

void ReuseModel::Leave(const BlockKey& key, const Past& past) {
  GhostSet& set = ghosts_[SetOfKey(key, ghosts_.size())];
  const uint32_t fingerprint = FingerprintOfKey(key);
  const int way = std::min(WayOf(set, fingerprint), kWays - 1);  // the oldest goes
  std::move_backward(set.fingerprints, set.fingerprints + way, set.fingerprints + way + 1);
  std::move_backward(set.ghosts, set.ghosts + way, set.ghosts + way + 1);
  set.fingerprints[0] = fingerprint;
  set.ghosts[0] = {static_cast<uint32_t>(past.standing.last / kGhostUnit), past.uses};
  any_ghost_ = true;
}

ReuseModel::Histogram ReuseModel::Worths(Histogram hits, double blocks) const {
  blocks = std::max(blocks, std::accumulate(hits.begin(), hits.end(), 0.0));
  Smooth(&hits);
  // Points of a curve, one per end of a cell: time that a block takes up if it stays till then or its
  // next use (x), and the hits of that (y). What is best from a point on is the steepest line to a
  // later point: an edge of the curve's upper hull, which is built from the end.
  double x[kCells + 1], y[kCells + 1];
  int hull[kCells + 1];
  x[0] = y[0] = 0;
  for (int cell = 0; cell < kCells; ++cell) {
    const double width = cell_begin_[cell + 1] - cell_begin_[cell];
    y[cell + 1] = y[cell] + hits[cell];
    x[cell + 1] = x[cell] + width * std::max(blocks - y[cell] - hits[cell] / 2, 1e-9);
  }
  auto slope = [&](int from, int to) { return (y[to] - y[from]) / (x[to] - x[from]); };
  Histogram worths;
  int top = 0;
  hull[0] = kCells;
  for (int cell = kCells; cell-- > 0;) {
    while (top > 0 && slope(cell, hull[top]) <= slope(hull[top], hull[top - 1])) --top;
    worths[cell] = slope(cell, hull[top]);
    hull[++top] = cell;
  }
  return worths;
}

void ReuseModel::Refresh() {
  constexpr double kPriorPerCell = kPriorBlocks * kPriorReuse / kCells;
  Histogram pooled;
  pooled.fill(kPriorPerCell);
  double pooled_entered = kPriorBlocks;
  for (int kind = 0; kind < kClasses; ++kind) {
    pooled_entered += entered_[kind];
    for (int cell = 0; cell < kCells; ++cell) pooled[cell] += reused_[kind][cell];
  }
  // Worths are moved, by the factor that is in doubt at most, to where recency alone decides: one curve
  // for all classes, which does not rise with age.
  const double missing = std::max(0.0, window_ / pooled_entered - 1);
  const double factor = std::exp(std::min(kDoubtMax, kDoubt * missing * missing));
  Histogram recency = Worths(pooled, pooled_entered);
  for (int cell = 1; cell < kCells; ++cell) {
    recency[cell] = std::clamp(recency[cell - 1], recency[cell] / factor, recency[cell] * factor);
  }
  const double decay = std::exp(-1 / kRefreshes);
  for (int kind = 0; kind < kClasses; ++kind) {
    Histogram hits = reused_[kind];
    for (int cell = 0; cell < kCells; ++cell) hits[cell] += kPooledBlocks * pooled[cell] / pooled_entered;
    const Histogram worths = Worths(hits, entered_[kind] + kPooledBlocks);
    for (int cell = 0; cell < kCells; ++cell) {
      worth_[kind][cell] =
          static_cast<float>(std::clamp(recency[cell], worths[cell] / factor, worths[cell] * factor));
    }
    entered_[kind] *= decay;
    for (double& count : reused_[kind]) count *= decay;
  }
  next_refresh_ = clock_ + static_cast<uint64_t>(window_ / kRefreshes);
}

std::string ReuseModel::Check() const {
  for (const auto& of_class : worth_) {
    for (const float worth : of_class) {
      if (!(worth > 0 && std::isfinite(worth))) return "a worth that is no number above zero";
    }
  }
  for (const GhostSet& set : ghosts_) {
    for (int way = 0; way < kWays; ++way) {
      const uint32_t fingerprint = set.fingerprints[way];
      if (fingerprint != 0 && WayOf(set, fingerprint) != way) return "a ghost is there twice";
    }
  }
  return "";
}

}  // namespace flexkv
