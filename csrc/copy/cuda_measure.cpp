#include "copy/cuda_measure.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace flexkv {

namespace {

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

// The seconds that the best of some rounds took; 0 on failure. `ahead` is queued before each of them.
template <typename Queue, typename QueueCopy>
double BestOf(CudaDriver& cuda, EventPool& timed, CopyStream& stream, Queue ahead, QueueCopy queue,
              std::string* error) {
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    if (!ahead()) return 0;
    const StreamEvent start = timed.Record(stream.get(), error);
    if (start == nullptr || !queue()) return 0;
    const StreamEvent end = timed.Record(stream.get(), error);
    if (end == nullptr || !cuda.Synchronize(stream.get(), error)) return 0;
    const double seconds = cuda.SecondsBetween(start.get(), end.get());
    if (seconds <= 0) return 0;
    best = best == 0 ? seconds : std::min(best, seconds);
  }
  return best;
}

}  // namespace

size_t MeasureEnginePieceBytes(CudaDriver& cuda, EventPool& timed, CopyStream& stream,
                               const MeasuredPieces& pieces, std::string* note) {
  const Scratch scratch(cuda);
  if (!scratch.good()) {
    *note = "no memory to measure with";
    return 0;
  }
  const auto copy = [&](uint64_t to, uint64_t from, size_t bytes) {
    return pieces.to_device
               ? cuda.CopyToDevice(to, reinterpret_cast<const void*>(from), bytes, stream.get(), note)
               : cuda.CopyToHost(reinterpret_cast<void*>(to), from, bytes, stream.get(), note);
  };
  const uint64_t host = reinterpret_cast<uint64_t>(scratch.host()), device = scratch.device();
  const auto copy_all = [&] {
    stream.MakeRoom(1);
    return pieces.to_device ? copy(device, host, kBytes) : copy(host, device, kBytes);
  };
  const auto nothing = [] { return true; };
  const double all_s = BestOf(cuda, timed, stream, nothing, copy_all, note);
  const int num_ahead = all_s > 0 ? static_cast<int>(std::min(kAheadMax, std::ceil(kAheadS / all_s))) : 0;
  const auto ahead = [&] {
    bool good = true;
    for (int i = 0; i < num_ahead && good; ++i) good = copy_all();
    return good;
  };
  size_t smallest = kLargestPiece;
  double large_s = 0;
  for (size_t piece = kLargestPiece; piece >= kSmallestPiece; piece /= 2) {
    const size_t count = kBytes / piece;
    const auto queue = [&] {
      stream.MakeRoom(count);
      std::vector<uint64_t> from(count), to(count);
      std::vector<size_t> sizes(count, piece);
      for (size_t i = 0; i < count; ++i) {
        // Neighbours on both sides would be one piece.
        const size_t mixed = (i * 5 + 3) % count;
        from[i] = host + (pieces.in_host_order ? i : mixed) * piece;
        to[i] = device + (pieces.in_host_order ? mixed : i) * piece;
      }
      if (!pieces.to_device) from.swap(to);
      if (cuda.has_batch_copies() &&
          cuda.CopyBatch(to.data(), from.data(), sizes.data(), count, stream.get(), note)) {
        return true;
      }
      bool good = note->empty();
      for (size_t i = 0; i < count && good; ++i) good = copy(to[i], from[i], piece);
      return good;
    };
    const double seconds = BestOf(cuda, timed, stream, ahead, queue, note);
    if (seconds == 0) {
      if (note->empty()) *note = "a copy took no time";
      return 0;
    }
    if (large_s == 0) large_s = seconds;
    if (seconds > large_s * pieces.slower_max) break;
    smallest = piece;
  }
  return smallest;
}

}  // namespace flexkv
