#include "read_cost.hpp"

#include <algorithm>

namespace flexkv {

namespace {
// What is assumed before anything was measured: an NVMe disk of the slower kind.
constexpr double kPriorTransferS = 10e-6, kPriorMibS = 1.0 / 2000;
constexpr double kFade = 0.9;
// Reads of one size alone do not tell the two costs apart. Then both are taken to be as much larger than
// assumed, and a little of that stays in the fit always.
constexpr double kDamping = 0.003;
// Reading in pieces may take so much longer than reading whole blocks: what it gains is at most the
// overlap of all but one piece.
constexpr double kSlowerMax = 1.08;
// A step this short gains nothing that a wake-up does not cost.
constexpr double kStepS = 200e-6;
constexpr double kMib = 1 << 20;
}  // namespace

void ReadCost::Observe(uint64_t transfers, uint64_t bytes, double seconds) {
  if (seconds <= 0 || transfers == 0 || bytes == 0) return;
  // Shares of the time that the assumed costs explain: short and long reads count alike.
  const double t = kPriorTransferS * static_cast<double>(transfers) / seconds;
  const double m = kPriorMibS * static_cast<double>(bytes) / kMib / seconds;
  std::lock_guard<std::mutex> lock(mutex_);
  for (double* sum : {&tt_, &tm_, &mm_, &t_, &m_}) *sum *= kFade;
  tt_ += t * t;
  tm_ += t * m;
  mm_ += m * m;
  t_ += t;
  m_ += m;
}

ReadCost::Costs ReadCost::Fit() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (tt_ == 0) return {kPriorTransferS, kPriorMibS};
  // How many times the assumed costs: both alike, then each by itself.
  const double both = (t_ + m_) / (tt_ + 2 * tm_ + mm_);
  const double tt = tt_ * (1 + kDamping), mm = mm_ * (1 + kDamping);
  const double t = t_ + kDamping * tt_ * both, m = m_ + kDamping * mm_ * both;
  const double determinant = tt * mm - tm_ * tm_;  // positive: damped
  double transfer = (t * mm - m * tm_) / determinant, mib = (m * tt - t * tm_) / determinant;
  if (transfer < 0) {
    transfer = 0;
    mib = m / mm;
  } else if (mib < 0) {
    transfer = t / tt;
    mib = 0;
  }
  return {kPriorTransferS * transfer, kPriorMibS * mib};
}

double ReadCost::Seconds(uint64_t transfers, uint64_t bytes) const {
  const Costs costs = Fit();
  return costs.per_transfer_s * static_cast<double>(transfers) +
         costs.per_mib_s * static_cast<double>(bytes) / kMib;
}

size_t ReadCost::SlicesPerRead(size_t blocks, const std::vector<size_t>& slice_bytes) const {
  const size_t slices = slice_bytes.size();
  uint64_t bytes = 0;
  for (size_t each : slice_bytes) bytes += each;
  bytes *= blocks;
  const double whole_s = Seconds(blocks, bytes);
  for (size_t per_read = 1; per_read < slices; per_read *= 2) {
    const size_t steps = (slices + per_read - 1) / per_read;
    const double seconds = Seconds(blocks * steps, bytes);
    if (seconds <= kSlowerMax * whole_s && seconds >= kStepS * static_cast<double>(steps)) return per_read;
  }
  return slices;
}

}  // namespace flexkv
