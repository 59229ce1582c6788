#include "reuse_model.hpp"

#include <algorithm>
#include <cmath>

namespace flexkv {
namespace {

constexpr double kGain = 3.0;            // bonus of a mean class, in mean reuse ages
constexpr double kSizeDamp = 0.5;        // a tier that outlasts reuses has less to decide
constexpr double kCountHalfLife = 8.0;   // of uses, in mean reuse ages
constexpr double kDecay = 0.995;         // of all statistics, per refresh
constexpr double kRefreshShare = 0.25;   // of the capacity: ticks between refreshes
constexpr double kPriorTrials = 100.0;   // blocks a class needs to be taken for something of its own
constexpr double kHorizon = 24.0;        // capacities: a later use says nothing about keeping
constexpr double kDeadBand = 0.5;        // standard errors that count as no evidence
constexpr double kSmallTier = 300.0;     // blocks: in a tier of some dozen prompts more is needed
constexpr double kCountSteps = 48.0;     // of a count's code per doubling
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
    : capacity_(std::max(1u, capacity)), deep_(deep) {
  const double initial = std::min(kInitialTrials, kInitialTrialsShare * capacity_);
  for (int kind = 0; kind < kKinds; ++kind) {
    trials_[kind] = initial;
    reuses_[kind] = initial * kInitialReuse * kInitialRatio[kind / 2];
  }
  const size_t ghosts = std::max(kGhostsMin, capacity / kGhostsShare);
  ghosts_.resize(ghosts / kGhostsPerSet);
  const double horizon = std::max(kHorizon * capacity_, 2.0 * static_cast<double>(ghosts));
  age_unit_ = std::max<uint64_t>(1, static_cast<uint64_t>(horizon) / kAgeUnits);
}

uint32_t ReuseModel::Fingerprint(const BlockKey& key) {
  const uint32_t low = static_cast<uint32_t>(key.lo);
  return low != 0 ? low : 1;
}

const ReuseModel::GhostSet& ReuseModel::SetOf(const BlockKey& key) const {
  return ghosts_[((key.hi >> 32) * ghosts_.size()) >> 32];
}

const ReuseModel::Ghost* ReuseModel::FindGhost(const BlockKey& key) const {
  if (!any_ghost_) return nullptr;
  for (const Ghost& ghost : SetOf(key).ways) {
    if (ghost.fingerprint == Fingerprint(key)) return &ghost;
  }
  return nullptr;
}

uint64_t ReuseModel::AgeOf(const Ghost& ghost) const {
  // 16 bits of a coarse clock: right as long as a ghost is not older than 4 * kAgeUnits.
  return static_cast<uint16_t>(clock_ / age_unit_ - ghost.last) * age_unit_;
}

uint8_t ReuseModel::Faded(uint8_t count, uint64_t age) const {
  if (age != faded_age_ || count != faded_from_) {
    const double uses = std::exp2(count / kCountSteps);
    const double fading = reuse_age_ > 0 ? std::exp2(-static_cast<double>(age) / (kCountHalfLife * reuse_age_)) : 1;
    faded_to_ = static_cast<uint8_t>(std::min(255.0, std::round(std::log2(1 + uses * fading) * kCountSteps)));
    faded_from_ = count;
    faded_age_ = age;
  }
  return faded_to_;
}

uint8_t ReuseModel::KindOf(uint8_t count, uint32_t depth) const {
  static const auto kClasses = [] {
    std::array<uint8_t, 256> classes{};
    for (int code = 0; code < 256; ++code) {
      const double uses = std::exp2(code / kCountSteps);
      for (const double end : kCountClassEnds) classes[code] += uses > end;
    }
    return classes;
  }();
  return static_cast<uint8_t>(2 * kClasses[count] + (depth >= deep_));
}

ReuseModel::Past ReuseModel::Classify(uint8_t count, uint32_t depth) {
  const uint8_t kind = KindOf(count, depth);
  // The start of all prompts is used by everybody and tells nothing about anybody.
  if (depth > 0) {
    trials_[kind]++;
    if (kind != previous_kind_) runs_[kind]++;
    previous_kind_ = kind;
  }
  return {clock_, count, kind};
}

void ReuseModel::CountReuse(uint8_t kind, uint64_t age, uint32_t depth) {
  if (depth == 0 || static_cast<double>(age) > kHorizon * capacity_) return;
  reuses_[kind]++;
  age_sum_ += static_cast<double>(age);
  age_count_++;
}

void ReuseModel::BeginRequest() {
  previous_kind_ = -1;
  if (clock_ < next_refresh_) return;
  next_refresh_ = clock_ + static_cast<uint64_t>(std::max(1.0, kRefreshShare * capacity_));
  Refresh();
}

ReuseModel::Past ReuseModel::Arrive(const BlockKey& key, uint32_t depth, bool staging) {
  const Ghost* ghost = FindGhost(key);
  Past past;
  if (ghost == nullptr) {
    past = Classify(0, depth);
  } else if (staging) {
    past = {clock_ - std::min(clock_, AgeOf(*ghost)), ghost->count, ghost->kind};
  } else {
    CountReuse(ghost->kind, AgeOf(*ghost), depth);
    past = Classify(Faded(ghost->count, AgeOf(*ghost)), depth);
  }
  ++clock_;
  return past;
}

ReuseModel::Past ReuseModel::Preview(const BlockKey& key, uint32_t depth) const {
  const Ghost* ghost = FindGhost(key);
  const uint8_t count = ghost == nullptr ? 0 : Faded(ghost->count, AgeOf(*ghost));
  return {clock_, count, KindOf(count, depth)};
}

ReuseModel::Past ReuseModel::Use(const Past& past, uint32_t depth) {
  const uint64_t age = clock_ - past.last;
  CountReuse(past.kind, age, depth);
  return Classify(Faded(past.count, age), depth);
}

void ReuseModel::Leave(const BlockKey& key, const Past& past) {
  GhostSet& set = ghosts_[static_cast<size_t>(&SetOf(key) - ghosts_.data())];
  Ghost* const end = set.ways + kWays;
  Ghost* way = std::find_if(set.ways, end, [&](const Ghost& g) { return g.fingerprint == Fingerprint(key); });
  if (way == end) way = end - 1;  // the oldest goes
  any_ghost_ = true;
  std::move_backward(set.ways, way, way + 1);
  set.ways[0] = {Fingerprint(key), static_cast<uint16_t>(past.last / age_unit_), past.count, past.kind};
}

void ReuseModel::Refresh() {
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
