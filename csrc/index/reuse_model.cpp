#include "index/reuse_model.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace flexkv {
namespace {

constexpr double kGain = 3.0;           // bonus of a mean class, in mean reuse ages
constexpr double kSizeDamp = 0.5;       // a tier that outlasts reuses has less to decide
constexpr double kCountHalfLife = 8.0;  // of uses, in mean reuse ages
constexpr double kDecay = 0.995;        // of all statistics, per refresh
constexpr double kRefreshShare = 0.25;  // of the capacity: ticks between refreshes
constexpr double kPriorTrials = 100.0;  // blocks a class needs to be taken for something of its own
constexpr double kHorizon = 24.0;       // capacities: a later use says nothing about keeping
constexpr double kDeadBand = 0.5;       // standard errors that count as no evidence
constexpr double kSmallTier = 300.0;    // blocks: in a tier of some dozen prompts more is needed
constexpr double kCountSteps = 48.0;    // of a count's code per doubling
constexpr double kCountClassEnds[] = {1.0001, 1.5, 2, 3, 5};
// Until a tier has seen something itself: what was seen on other traces, worth so many blocks.
constexpr double kInitialTrials = 500.0;
constexpr double kInitialTrialsShare = 0.5;  // of the capacity, at most
constexpr double kInitialReuse = 0.3;
constexpr double kInitialRatio[] = {0.75, 1.15, 1.3, 1.5, 1.8, 2.2};

constexpr size_t kGhostsMin = 65536;
constexpr size_t kGhostsShare = 16;  // of the capacity of a tier that is much larger than that
constexpr size_t kGhostsPerSet = 4;
constexpr uint64_t kAgeUnits = 1 << 14;  // of the time for which a ghost's age is told apart

}  // namespace

ReuseModel::ReuseModel(uint32_t capacity, uint32_t deep)
    : capacity_(std::max(1u, capacity)), deep_(deep), horizon_(static_cast<uint64_t>(kHorizon * capacity_)) {
  const double initial = std::min(kInitialTrials, kInitialTrialsShare * capacity_);
  for (int kind = 0; kind < kKinds; ++kind) {
    trials_[kind] = initial;
    reuses_[kind] = initial * kInitialReuse * kInitialRatio[kind / 2];
  }
  for (int code = 0; code < 256; ++code) {
    for (const double end : kCountClassEnds) count_classes_[code] += std::exp2(code / kCountSteps) > end;
  }
  const size_t ghosts = std::max(kGhostsMin, capacity / kGhostsShare);
  ghosts_.resize(ghosts / kGhostsPerSet);
  age_unit_ = std::max<uint64_t>(1, std::max<uint64_t>(horizon_, 2 * ghosts) / kAgeUnits);
}

const ReuseModel::Ghost* ReuseModel::FindGhost(const BlockKey& key) const {
  if (!any_ghost_) return nullptr;
  const GhostSet& set = ghosts_[SetOfKey(key, ghosts_.size())];
  const int way = WayOf(set, FingerprintOfKey(key));
  return way == kWays ? nullptr : &set.ghosts[way];
}

uint64_t ReuseModel::AgeOf(const Ghost& ghost) const {
  // 16 bits of a coarse clock: right as long as a ghost is not older than 4 * kAgeUnits.
  return static_cast<uint16_t>(clock_ / age_unit_ - ghost.last) * age_unit_;
}

uint8_t ReuseModel::Fade(uint8_t count, uint64_t age) const {
  const double ages = reuse_age_ > 0 ? static_cast<double>(age) / (kCountHalfLife * reuse_age_) : 0;
  const double uses = 1 + std::exp2(count / kCountSteps) * std::exp2(-ages);
  return static_cast<uint8_t>(std::min(255.0, std::round(std::log2(uses) * kCountSteps)));
}

void ReuseModel::BeginRequest() {
  previous_kind_ = -1;
  if (clock_ < next_refresh_) return;
  next_refresh_ = clock_ + static_cast<uint64_t>(std::max(1.0, kRefreshShare * capacity_));
  Refresh();
}

ReuseModel::Past ReuseModel::ArriveAgain(const BlockKey& key, uint32_t depth, bool staging) {
  const Ghost* ghost = FindGhost(key);
  if (ghost == nullptr) return Classify(0, depth);
  const uint64_t age = AgeOf(*ghost);
  if (staging) return {clock_ - std::min(clock_, age), ghost->count, ghost->kind};
  CountReuse(ghost->kind, age, depth);
  return Classify(Faded(ghost->count, age), depth);
}

ReuseModel::Past ReuseModel::Preview(const BlockKey& key, uint32_t depth) const {
  const Ghost* ghost = FindGhost(key);
  const uint8_t count = ghost == nullptr ? 0 : Faded(ghost->count, AgeOf(*ghost));
  return {clock_, count, KindOf(count, depth)};
}

void ReuseModel::Leave(const BlockKey& key, const Past& past) {
  GhostSet& set = ghosts_[SetOfKey(key, ghosts_.size())];
  const uint32_t fingerprint = FingerprintOfKey(key);
  const int way = std::min(WayOf(set, fingerprint), kWays - 1);  // the oldest goes
  std::move_backward(set.fingerprints, set.fingerprints + way, set.fingerprints + way + 1);
  std::move_backward(set.ghosts, set.ghosts + way, set.ghosts + way + 1);
  set.fingerprints[0] = fingerprint;
  set.ghosts[0] = {static_cast<uint16_t>(past.last / age_unit_), past.count, past.kind};
  any_ghost_ = true;
}

void ReuseModel::Refresh() {
  for (int kind = 0; kind < kKinds; ++kind) {
    trials_[kind] += static_cast<double>(std::exchange(new_trials_[kind], 0));
    reuses_[kind] += static_cast<double>(std::exchange(new_reuses_[kind], 0));
    runs_[kind] += static_cast<double>(std::exchange(new_runs_[kind], 0));
  }
  age_sum_ += static_cast<double>(std::exchange(new_age_sum_, 0));
  age_count_ += static_cast<double>(std::exchange(new_age_count_, 0));
  if (age_count_ < 1) return;
  double reuses = 0, trials = 0;
  for (int kind = 0; kind < kKinds; ++kind) {
    reuses += reuses_[kind];
    trials += trials_[kind];
  }
  reuse_age_ = std::max(1.0, age_sum_ / age_count_);
  faded_age_ = UINT64_MAX;
  const double mean = reuses / trials;
  const double weight = kGain * reuse_age_ / (1 + kSizeDamp * capacity_ / reuse_age_);
  const double caution = kDeadBand * (1 + std::pow(kSmallTier / capacity_, 2));
  for (int kind = 0; kind < kKinds; ++kind) {
    double above = (reuses_[kind] + kPriorTrials * mean) / (trials_[kind] + kPriorTrials) - mean;
    const double error = caution * std::sqrt(std::max(0.0, mean * (1 - mean)) / (runs_[kind] + 1));
    above = above > 0 ? std::max(0.0, above - error) : std::min(0.0, above + error);
    bonus_[kind] = static_cast<uint64_t>(std::max(0.0, weight * (1 + above / mean)));
    trials_[kind] *= kDecay;
    reuses_[kind] *= kDecay;
    runs_[kind] *= kDecay;
  }
  age_sum_ *= kDecay;
  age_count_ *= kDecay;
}

}  // namespace flexkv
