#include "transfer/cost_fit.hpp"

#include <algorithm>

#include "base/types.hpp"

namespace flexkv {

namespace {
constexpr double kFade = 0.9;
// What was seen may not tell the two costs apart. Then both are taken to be as much larger than assumed,
// and a little of that stays in the fit always.
constexpr double kDamping = 0.003;
// Reading in pieces may take so much longer than reading whole blocks: what it gains is at most the
// overlap of all but one piece.
constexpr double kSlowerMax = 1.08;
// A step this short gains nothing that a wake-up does not cost.
constexpr double kStepS = 200e-6;
}  // namespace

CostFit::CostFit(double assumed_x_s, double assumed_y_s)
    : assumed_x_s_(assumed_x_s), assumed_y_s_(assumed_y_s) {
  Require(assumed_x_s > 0 && assumed_y_s > 0, "assumed costs must be above 0");
}

void CostFit::Observe(double x, double y, double seconds) {
  if (!(x > 0 && y > 0 && seconds > 0)) return;
  // Shares of the time that the assumed costs explain: short and long observations count alike.
  x *= assumed_x_s_ / seconds;
  y *= assumed_y_s_ / seconds;
  std::lock_guard<std::mutex> lock(mutex_);
  ++num_observed_;
  for (double* sum : {&xx_, &xy_, &yy_, &x_, &y_}) *sum *= kFade;
  xx_ += x * x;
  xy_ += x * y;
  yy_ += y * y;
  x_ += x;
  y_ += y;
}

double CostFit::Seconds(double x, double y) const {
  double times_x = 1, times_y = 1;  // the assumed costs
  std::lock_guard<std::mutex> lock(mutex_);
  if (num_observed_ > 0) {
    const double both = (x_ + y_) / (xx_ + 2 * xy_ + yy_);
    const double xx = xx_ * (1 + kDamping), yy = yy_ * (1 + kDamping);
    const double sum_x = x_ + kDamping * xx_ * both, sum_y = y_ + kDamping * yy_ * both;
    const double determinant = xx * yy - xy_ * xy_;  // positive: damped
    times_x = (sum_x * yy - sum_y * xy_) / determinant;
    times_y = (sum_y * xx - sum_x * xy_) / determinant;
    if (times_x < 0) {
      times_x = 0;
      times_y = sum_y / yy;
    } else if (times_y < 0) {
      times_x = sum_x / xx;
      times_y = 0;
    }
  }
  return times_x * assumed_x_s_ * x + times_y * assumed_y_s_ * y;
}

size_t CostFit::num_observed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_observed_;
}

std::vector<uint32_t> StepsOfRead(size_t slices, size_t per_read) {
  Require(per_read > 0, "a step has at least one slice");
  std::vector<uint32_t> ends;
  size_t step = per_read < slices ? 1 : slices;
  for (size_t end = 0; end < slices; step = std::min(2 * step, per_read)) {
    end = std::min(end + step, slices);
    ends.push_back(static_cast<uint32_t>(end));
  }
  return ends;
}

size_t SlicesPerRead(const CostFit& cost, size_t blocks, const std::vector<size_t>& slice_bytes) {
  const size_t slices = slice_bytes.size();
  double bytes = 0;
  for (size_t each : slice_bytes) bytes += static_cast<double>(each * blocks);
  const double whole_s = cost.Seconds(static_cast<double>(blocks), bytes);
  for (size_t per_read = 1; per_read < slices; per_read *= 2) {
    const size_t steps = StepsOfRead(slices, per_read).size();
    const double seconds = cost.Seconds(static_cast<double>(blocks * steps), bytes);
    if (seconds <= kSlowerMax * whole_s && seconds >= kStepS * static_cast<double>(steps)) return per_read;
  }
  return slices;
}

}  // namespace flexkv
