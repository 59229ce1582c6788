// What a read from the SSD tier costs, learned from reads that ran alone: so much per transfer and so
// much per byte. Decides how many slices of a block are read at a time when a forward waits for its
// first layers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace flexkv {

class ReadCost {
 public:
  // `transfers` reads of `bytes` bytes in all took `seconds`, and the disk did nothing else meanwhile.
  void Observe(uint64_t transfers, uint64_t bytes, double seconds);
  double Seconds(uint64_t transfers, uint64_t bytes) const;
  // How many slices to read at a time from `blocks` blocks whose slices are this large: as few as
  // possible, because the first layers come the sooner, but not so few that reading everything would
  // take noticeably longer. All of them means whole blocks.
  size_t SlicesPerRead(size_t blocks, const std::vector<size_t>& slice_bytes) const;

 private:
  struct Costs {
    double per_transfer_s, per_mib_s;
  };
  Costs Fit() const;

  mutable std::mutex mutex_;
  // Sums of a least-squares fit of relative errors; what is old fades.
  double tt_ = 0, tm_ = 0, mm_ = 0, t_ = 0, m_ = 0;
};

}  // namespace flexkv
