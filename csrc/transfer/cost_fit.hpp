// What something costs that is paid for in two ways, learned from how long it took: seconds = a x + b y.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace flexkv {

class CostFit {
 public:
  // What is assumed before anything was seen: seconds per x and per y, both above 0.
  CostFit(double assumed_x_s, double assumed_y_s);
  // Thread-safe. What was seen long ago fades.
  void Observe(double x, double y, double seconds);
  double Seconds(double x, double y) const;
  size_t num_observed() const;

 private:
  const double assumed_x_s_, assumed_y_s_;
  mutable std::mutex mutex_;
  size_t num_observed_ = 0;
  // Sums of a least-squares fit of relative errors.
  double xx_ = 0, xy_ = 0, yy_ = 0, x_ = 0, y_ = 0;
};

// The steps in which a read goes that a forward waits for, as their ends in slices. The first layers come
// the sooner the less is read before them, while a forward that has some to compute can wait for larger
// steps: one slice, then twice as many each time, up to `per_read`. One that reads all at once has one step.
std::vector<uint32_t> StepsOfRead(size_t slices, size_t per_read);

// How many slices of a block to load from a lower tier at a time in such a read: as few as possible, but not
// so few that reading `blocks` blocks whose slices are this large would take noticeably longer. All of them
// means whole blocks. `cost` is per transfer and per byte.
size_t SlicesPerRead(const CostFit& cost, size_t blocks, const std::vector<size_t>& slice_bytes);

}  // namespace flexkv
