#include "copy/cuda_measure.hpp"

#include <algorithm>
#include <vector>

#include "copy/copy_kernel.hpp"

namespace flexkv {

namespace {

constexpr size_t kBytes = size_t{4} << 20;  // of a measurement: 80 us on a fast link
constexpr size_t kSmallestPiece = size_t{8} << 10, kLargestPiece = size_t{256} << 10;
constexpr int kRounds = 3;  // of which the best counts
// The copy engines may be so much slower and are preferred still.
constexpr double kSlowerMax = 1.05;
// What tells the kernel where the pieces are: a buffer, then a slot and a row for each.
constexpr size_t kWordsAt = sizeof(CopyBuffer);
constexpr size_t kDescriptionBytes = kWordsAt + 2 * (kBytes / kSmallestPiece) * sizeof(uint32_t);

// Memory for the measurements, given back with it.
class Scratch {
 public:
  explicit Scratch(CudaDriver& cuda) : cuda_(cuda) {
    std::string ignored;
    host_ = static_cast<char*>(cuda_.AllocatePinned(kBytes + kDescriptionBytes));
    device_ = host_ != nullptr ? cuda_.AllocateDevice(kBytes + kDescriptionBytes, &ignored) : 0;
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

// The seconds that the best of some rounds took; 0 on failure.
template <typename QueueCopy>
double BestOf(CudaDriver& cuda, EventPool& timed, CopyStream& stream, QueueCopy queue, std::string* error) {
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
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

size_t MeasureEnginePieceBytes(CudaDriver& cuda, const KernelPath& kernel, EventPool& timed,
                               CopyStream& stream, std::string* note) {
  const Scratch scratch(cuda);
  if (!scratch.good()) {
    *note = "no memory to measure with";
    return 0;
  }
  const uint64_t description = scratch.device() + kBytes;
  size_t threshold = 2 * kLargestPiece;
  for (size_t piece = kLargestPiece; piece >= kSmallestPiece; piece /= 2) {
    const uint32_t count = static_cast<uint32_t>(kBytes / piece);
    // Neighbours on neither side, or they would be one piece.
    const auto host_slot = [&](uint32_t i) { return (i * 5 + 3) % count; };
    const double engine_s = BestOf(
        cuda, timed, stream,
        [&] {
          stream.MakeRoom(count);
          std::vector<uint64_t> from(count), to(count);
          std::vector<size_t> sizes(count, piece);
          for (uint32_t i = 0; i < count; ++i) {
            from[i] = reinterpret_cast<uint64_t>(scratch.host()) + host_slot(i) * piece;
            to[i] = scratch.device() + i * piece;
          }
          if (cuda.has_batch_copies() &&
              cuda.CopyBatch(to.data(), from.data(), sizes.data(), count, stream.get(), note)) {
            return true;
          }
          bool good = note->empty();
          for (uint32_t i = 0; i < count && good; ++i) {
            good =
                cuda.CopyToDevice(to[i], reinterpret_cast<const void*>(from[i]), piece, stream.get(), note);
          }
          return good;
        },
        note);
    const CopyBuffer buffer{scratch.device(), piece, 0, piece};
    std::memcpy(scratch.host() + kBytes, &buffer, sizeof buffer);
    uint32_t* words = reinterpret_cast<uint32_t*>(scratch.host() + kBytes + kWordsAt);
    for (uint32_t i = 0; i < count; ++i) {
      words[i] = host_slot(i);
      words[count + i] = i;
    }
    if (!cuda.CopyToDevice(description, scratch.host() + kBytes, kDescriptionBytes, stream.get(), note))
      return 0;
    CopyGroup group{};
    group.buffers = reinterpret_cast<const CopyBuffer*>(description);
    group.slots = reinterpret_cast<const uint32_t*>(description + kWordsAt);
    group.rows = group.slots + count;
    group.base = reinterpret_cast<uint64_t>(scratch.host());
    group.slot_bytes = piece;
    group.num_runs = count;
    group.runs_per_block = group.runs_per_buffer = group.rows_per_run = 1;
    group.team_log2 = kTeamLog2Max;
    group.to_device = 1;
    const uint32_t ctas = std::min(kCopyCtas, (count << kTeamLog2Max) / kCopyThreads);
    const double kernel_s = BestOf(
        cuda, timed, stream,
        [&] { return cuda.Launch(kernel.kernel(), ctas, kCopyThreads, &group, stream.get(), note); }, note);
    if (engine_s == 0 || kernel_s == 0) {
      if (note->empty()) *note = "a copy took no time";
      return 0;
    }
    if (engine_s > kernel_s * kSlowerMax) break;
    threshold = piece;
  }
  return threshold;
}

}  // namespace flexkv
