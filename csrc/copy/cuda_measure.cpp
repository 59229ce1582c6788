#include "copy/cuda_measure.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda/cuda_stream.hpp"

namespace flexkv {

namespace {

// Where it could not be measured.
constexpr size_t kAssumedBytes = size_t{256} << 10;
// How much slower than large pieces small ones may be; a load by copy engines alone more, as it takes nothing from what
// is computed meanwhile, and nothing is taken from it. On an H200 a GEMM loses a twentieth to loads through the buffer,
// and they lose a third to attention.
constexpr double kSlowerAlone = 1.25, kSlower = 1.1;

constexpr size_t kBytes = size_t{4} << 20;  // of a measurement: 80 us on a fast link
constexpr size_t kSmallestPiece = size_t{8} << 10, kLargestPiece = size_t{256} << 10;
constexpr int kRounds = 3;  // of which the best counts
// What is measured is queued behind so much else, as in the middle of a load: on a stream that has nothing to do the
// device would wait for the host, which takes longer to queue a small piece than the device to copy it.
constexpr double kAheadS = 300e-6;
constexpr double kAheadMax = 64;  // copies

// Memory for the measurements, given back with it.
class Scratch {
 public:
  explicit Scratch(CudaDriver& cuda) : cuda_(cuda) {
    std::string ignored;
    host_ = static_cast<char*>(cuda_.AllocatePinned(kBytes));
    device_ = host_ != nullptr ? cuda_.AllocateDevice(kBytes, &ignored) : 0;
  }
  ~Scratch() {
    if (device_ != 0) cuda_.FreeDevice(device_);
    if (host_ != nullptr) cuda_.FreePinned(host_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool good() const { return device_ != 0; }
  char* host() const { return host_; }
  uint64_t device() const { return device_; }

 private:
  CudaDriver& cuda_;
  char* host_ = nullptr;
  uint64_t device_ = 0;
};

// What pieces are measured. Where they are on the device has no order.
struct Kind {
  bool to_device;
  bool in_host_order;  // one after the other in the host's memory, as layers of a block are; or in no order
  double slower_max;   // than large ones they may be, as a factor
};

class Measurement {
 public:
  explicit Measurement(const std::shared_ptr<CudaDriver>& cuda)
      : cuda_(*cuda), timed_(std::make_shared<EventPool>(cuda, true)), stream_(cuda, true), scratch_(*cuda) {}

  // The smallest pieces with which copy engines are nearly as fast as with large ones.
  size_t SmallestGood(const Kind& kind) {
    if (!scratch_.good()) return Assumed("no memory to measure with");
    const auto copy_all = [&] {
      stream_.MakeRoom(1);
      return Copy(kind, 0, 0, kBytes);
    };
    const double all_s = BestOf([] { return true; }, copy_all);
    const int num_ahead = all_s > 0 ? static_cast<int>(std::min(kAheadMax, std::ceil(kAheadS / all_s))) : 0;
    const auto ahead = [&] {
      bool good = true;
      for (int i = 0; i < num_ahead && good; ++i) good = copy_all();
      return good;
    };
    size_t smallest = kLargestPiece;
    double large_s = 0;
    for (size_t piece = kLargestPiece; piece >= kSmallestPiece; piece /= 2) {
      const double seconds = BestOf(ahead, [&] { return CopyPieces(kind, piece); });
      if (seconds == 0) return Assumed(error_.empty() ? "a copy took no time" : error_);
      if (large_s == 0) large_s = seconds;
      if (seconds > large_s * kind.slower_max) break;
      smallest = piece;
    }
    return smallest;
  }

  // Why something was not measured; empty: all was.
  const std::string& problem() const { return problem_; }

 private:
  size_t Assumed(const std::string& why) {
    problem_ = why;
    error_.clear();
    return kAssumedBytes;
  }

  // The seconds that the best of some rounds took; 0 on failure. `ahead` is queued before each of them.
  template <typename Ahead, typename Queue>
  double BestOf(Ahead ahead, Queue queue) {
    double best = 0;
    for (int round = 0; round < kRounds; ++round) {
      if (!ahead()) return 0;
      const StreamEvent start = timed_->Record(stream_.get(), &error_);
      if (start == nullptr || !queue()) return 0;
      const StreamEvent end = timed_->Record(stream_.get(), &error_);
      if (end == nullptr || !cuda_.Synchronize(stream_.get(), &error_)) return 0;
      const double seconds = cuda_.SecondsBetween(start.get(), end.get());
      if (seconds <= 0) return 0;
      best = best == 0 ? seconds : std::min(best, seconds);
    }
    return best;
  }

  bool Copy(const Kind& kind, size_t host_at, size_t device_at, size_t bytes) {
    char* const host = scratch_.host() + host_at;
    const uint64_t device = scratch_.device() + device_at;
    return kind.to_device ? cuda_.CopyToDevice(device, host, bytes, stream_.get(), &error_)
                          : cuda_.CopyToHost(host, device, bytes, stream_.get(), &error_);
  }

  bool CopyPieces(const Kind& kind, size_t piece) {
    const size_t count = kBytes / piece;
    stream_.MakeRoom(count);
    std::vector<uint64_t> from(count), to(count);
    std::vector<size_t> sizes(count, piece), host_at(count), device_at(count);
    for (size_t i = 0; i < count; ++i) {
      // Neighbours on both sides would be one piece.
      const size_t mixed = (i * 5 + 3) % count;
      host_at[i] = (kind.in_host_order ? i : mixed) * piece;
      device_at[i] = (kind.in_host_order ? mixed : i) * piece;
      from[i] = reinterpret_cast<uint64_t>(scratch_.host()) + host_at[i];
      to[i] = scratch_.device() + device_at[i];
    }
    if (!kind.to_device) from.swap(to);
    if (cuda_.has_batch_copies()) {
      if (cuda_.CopyBatch(to.data(), from.data(), sizes.data(), count, stream_.get(), &error_)) return true;
      if (!error_.empty()) return false;
    }
    bool good = true;
    for (size_t i = 0; i < count && good; ++i) good = Copy(kind, host_at[i], device_at[i], piece);
    return good;
  }

  CudaDriver& cuda_;
  const std::shared_ptr<EventPool> timed_;
  CopyStream stream_;
  const Scratch scratch_;
  std::string error_, problem_;
};

}  // namespace

EnginePieces MeasureEnginePieces(const std::shared_ptr<CudaDriver>& cuda) {
  const CudaContext context(*cuda);
  Measurement measurement(cuda);
  EnginePieces pieces;
  pieces.loads = measurement.SmallestGood({true, true, kSlowerAlone});
  pieces.stores = measurement.SmallestGood({false, true, kSlower});
  pieces.buffer = measurement.SmallestGood({true, false, kSlower});
  const auto kib = [](size_t bytes) { return std::to_string(bytes >> 10) + " KiB"; };
  const std::string& problem = measurement.problem();
  pieces.note = "copy engines alone for loads of pieces from " + kib(pieces.loads) + " on, for stores from " +
                kib(pieces.stores) + " on (" + (problem.empty() ? "measured" : "not measured: " + problem) +
                ")";
  return pieces;
}

}  // namespace flexkv
