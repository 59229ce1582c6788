#include "cuda_paths.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "cuda/copy_kernel.hpp"
#include "types.hpp"

namespace flexkv {

namespace {

const char* const kKernelPtx =
#include "cuda/copy_kernel_ptx.inc"
    ;

// Copies of one call to the driver: enough that the call costs nothing per copy.
constexpr size_t kBatchMax = 1024;

// Descriptors of a copy are 4 bytes per block and 4 per block or row: room for half a million tokens on their
// way in pages of one token.
constexpr size_t kRingWords = size_t{1} << 20;

// How much of the GPU's processors a copy takes, as attention may lose no more: 3 of the 132 of an H100. That fills
// the link to the host (copy_kernel.hpp); more than 4 would take from attention and bring nothing.
constexpr int kProcessorPercent = 3;
constexpr int kCtasMax = 4;

constexpr uint64_t kMax32 = std::numeric_limits<uint32_t>::max();

}  // namespace

void CopiedBlocks::Summarize() {
  in_sequence = std::all_of(first_rows, first_rows + count, [](int64_t row) { return row >= 0; });
  last_host_slot = count > 0 ? *std::max_element(host_slots, host_slots + count) : 0;
}

CopiedBlocks CopiedBlocks::With(const CopiedBlocks& others) const {
  CopiedBlocks both = *this;
  both.count += others.count;
  both.in_sequence = in_sequence && others.in_sequence;
  both.last_host_slot = std::max(last_host_slot, others.last_host_slot);
  return both;
}

// ---- copy engine -------------------------------------------------------------------------------

EnginePath::EnginePath(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, const HostPool& host)
    : cuda_(std::move(cuda)), layout_(layout), host_(host) {
  ForEachPiece(nullptr, nullptr, 0, 0, layout_.num_layers(), [&](const Piece&) {
    ++num_pieces_;
    return true;
  });
  piece_bytes_ = layout_.block_bytes() / num_pieces_;
  for (int layer = 0; layer < layout_.num_layers(); ++layer) {
    num_row_pieces_ += layout_.buffers(layer).size() * static_cast<size_t>(layout_.rows_per_block());
  }
}

size_t EnginePath::pieces_per_block(bool rows_in_sequence) const {
  return rows_in_sequence ? num_pieces_ : num_row_pieces_;
}

// Calls take(piece) until it returns false. `rows` are the block's rows unless they follow first_row >= 0.
template <typename Take>
void EnginePath::ForEachPiece(char* slot, const int64_t* rows, int64_t first_row, int layer_begin, int layer_end,
                              Take take) const {
  Piece piece{slot + layout_.layer_offset(layer_begin), 0, 0};
  for (int layer = layer_begin; layer < layer_end; ++layer) {
    for (const DeviceBuffer& buffer : layout_.buffers(layer)) {
      const bool whole = first_row >= 0 && buffer.row_stride == buffer.row_bytes;
      const int64_t pieces = whole ? 1 : layout_.rows_per_block();
      const size_t bytes =
          static_cast<size_t>(buffer.row_bytes * (whole ? layout_.rows_per_block() : 1));
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t row = first_row >= 0 ? first_row + i : rows[i];
        const uint64_t device = buffer.base + static_cast<uint64_t>(row * buffer.row_stride);
        // The host's side is one run of bytes, so what follows on the device follows here, too.
        if (piece.bytes > 0 && device == piece.device + piece.bytes) {
          piece.bytes += bytes;
          continue;
        }
        if (piece.bytes > 0 && !take(piece)) return;
        piece = {piece.host + piece.bytes, device, bytes};
      }
    }
  }
  take(piece);
}

bool EnginePath::Queue(const CopiedBlocks& blocks, int layer_begin, int layer_end, bool pinned, void* stream,
                       std::string* error) {
  const size_t per_block = static_cast<size_t>(layout_.tokens_per_block());
  std::vector<Piece> pieces;
  pieces.reserve(std::min(kBatchMax, blocks.count * num_pieces_));
  bool good = true;
  for (size_t b = 0; b < blocks.count && good; ++b) {
    ForEachPiece(host_.Slot(blocks.host_slots[b]), blocks.token_slots + b * per_block, blocks.first_rows[b],
                 layer_begin, layer_end, [&](Piece piece) {
                   // The driver refuses a copy that spans two registrations.
                   while (piece.bytes > 0 && good) {
                     const size_t at = static_cast<size_t>(piece.host - host_.base());
                     const size_t in_chunk = HostPool::kPinChunkBytes - at % HostPool::kPinChunkBytes;
                     const size_t bytes = std::min(piece.bytes, in_chunk);
                     pieces.push_back({piece.host, piece.device, bytes});
                     piece = {piece.host + bytes, piece.device + bytes, piece.bytes - bytes};
                     if (pieces.size() == kBatchMax) good = Flush(pieces, blocks.to_device, pinned, stream, error);
                   }
                   return good;
                 });
  }
  return good && Flush(pieces, blocks.to_device, pinned, stream, error);
}

bool EnginePath::Flush(std::vector<Piece>& pieces, bool to_device, bool pinned, void* stream, std::string* error) {
  if (pinned && pieces.size() > 1 && cuda_->has_batch_copies()) {
    std::vector<uint64_t> from(pieces.size()), to(pieces.size());
    std::vector<size_t> sizes(pieces.size());
    for (size_t i = 0; i < pieces.size(); ++i) {
      from[i] = reinterpret_cast<uint64_t>(pieces[i].host);
      to[i] = pieces[i].device;
      sizes[i] = pieces[i].bytes;
    }
    if (!to_device) from.swap(to);
    if (cuda_->CopyBatch(to.data(), from.data(), sizes.data(), pieces.size(), stream, error)) {
      pieces.clear();
      return true;
    }
    if (!error->empty()) return false;
  }
  for (const Piece& piece : pieces) {
    if (!(to_device ? cuda_->CopyToDevice(piece.device, piece.host, piece.bytes, stream, error)
                    : cuda_->CopyToHost(piece.host, piece.device, piece.bytes, stream, error))) {
      return false;
    }
  }
  pieces.clear();
  return true;
}

// ---- kernel ------------------------------------------------------------------------------------

KernelPath::KernelPath(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, const HostPool& host,
                       void* stream)
    : cuda_(std::move(cuda)), layout_(layout), host_(host) {
  if (!SetUp(stream)) kernel_ = nullptr;
}

KernelPath::~KernelPath() {
  if (module_ != nullptr) cuda_->UnloadModule(module_);
  if (table_ != 0) cuda_->FreeDevice(table_);
  if (device_ring_ != 0) cuda_->FreeDevice(device_ring_);
  if (ring_ != nullptr) cuda_->FreePinned(ring_);
}

bool KernelPath::SetUp(void* stream) {
  if (!cuda_->same_host_addresses()) {
    note_ = "pinned memory has other addresses on this device";
    return false;
  }
  std::vector<CopyBuffer> table;
  uint64_t bits = reinterpret_cast<uint64_t>(host_.base()) | host_.slot_bytes();
  for (int layer = 0; layer < layout_.num_layers(); ++layer) {
    uint64_t offset = layout_.layer_offset(layer);
    first_buffer_.push_back(table.size());
    for (const DeviceBuffer& buffer : layout_.buffers(layer)) {
      const uint64_t bytes = static_cast<uint64_t>(buffer.row_bytes);
      const uint64_t stride = static_cast<uint64_t>(buffer.row_stride);
      if (static_cast<uint64_t>(buffer.num_rows) > kMax32 || layout_.block_bytes() > kMax32) {
        note_ = "the pool has more rows, or a block more bytes, than 32 bits count";
        return false;
      }
      table.push_back({buffer.base, stride, offset, bytes});
      bits |= buffer.base | stride | offset | bytes;
      offset += bytes * static_cast<uint64_t>(layout_.rows_per_block());
    }
  }
  first_buffer_.push_back(table.size());
  const char* name = nullptr;
  for (const auto& [unit, kernel] : {std::pair<size_t, const char*>{16, "flexkv_copy_16"},
                                     {8, "flexkv_copy_8"},
                                     {4, "flexkv_copy_4"},
                                     {1, "flexkv_copy_1"}}) {
    unit_bytes_ = unit;
    name = kernel;
    if (bits % unit == 0) break;
  }
  ctas_ = static_cast<unsigned>(std::clamp(cuda_->num_multiprocessors() * kProcessorPercent / 100, 1, kCtasMax));
  ring_ = static_cast<uint32_t*>(cuda_->AllocatePinned(kRingWords * sizeof(uint32_t)));
  if (ring_ == nullptr) {
    note_ = "no pinned memory for the kernel's descriptors";
    return false;
  }
  const size_t table_bytes = table.size() * sizeof(CopyBuffer);
  device_ring_ = cuda_->AllocateDevice(kRingWords * sizeof(uint32_t), &note_);
  table_ = device_ring_ != 0 ? cuda_->AllocateDevice(table_bytes, &note_) : 0;
  module_ = table_ != 0 ? cuda_->LoadModule(kKernelPtx, &note_) : nullptr;
  kernel_ = module_ != nullptr ? cuda_->FindKernel(module_, name, &note_) : nullptr;
  return kernel_ != nullptr && cuda_->CopyToDevice(table_, table.data(), table_bytes, stream, &note_) &&
         cuda_->Synchronize(stream, &note_);
}

size_t KernelPath::WordsOf(const CopiedBlocks& blocks) const {
  const size_t rows = blocks.in_sequence ? 1 : static_cast<size_t>(layout_.rows_per_block());
  return blocks.count * (1 + rows);
}

int KernelPath::LayersAtOnce(const CopiedBlocks& blocks, int layer, int layer_end) const {
  const uint64_t bytes_max = kMax32 / blocks.count * unit_bytes_;
  int end = layer;
  while (end < layer_end &&
         layout_.layer_offset(end) + layout_.layer_bytes(end) - layout_.layer_offset(layer) <= bytes_max) {
    ++end;
  }
  return end - layer;
}

bool KernelPath::Takes(const CopiedBlocks& blocks) const {
  if (!usable() || WordsOf(blocks) > kRingWords) return false;
  for (int layer = 0; layer < layout_.num_layers(); ++layer) {
    if (LayersAtOnce(blocks, layer, layer + 1) == 0) return false;
  }
  return true;
}

std::optional<KernelPath::Descriptors> KernelPath::Describe(const CopiedBlocks& blocks) {
  const size_t words = WordsOf(blocks);
  size_t at = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  if (!spans_.empty()) {
    const size_t tail = spans_.front().begin, head = spans_.back().end;
    const bool wrapped = head <= tail;
    if (wrapped ? tail - head >= words : kRingWords - head >= words) {
      at = head;
    } else if (wrapped || tail < words) {
      return std::nullopt;
    }
  }
  spans_.push_back({at, at + words, false});
  lock.unlock();
  Descriptors described{at, blocks.in_sequence ? 0 : static_cast<size_t>(layout_.rows_per_block())};
  uint32_t* out = ring_ + at;
  for (size_t b = 0; b < blocks.count; ++b) *out++ = static_cast<uint32_t>(blocks.host_slots[b]);
  for (size_t b = 0; b < blocks.count; ++b) {
    if (described.listed_rows == 0) {
      *out++ = static_cast<uint32_t>(blocks.first_rows[b]);
      continue;
    }
    // Blocks whose rows do not follow one another exist in pools with a token per row only: rows are tokens.
    const int64_t* tokens = blocks.token_slots + b * described.listed_rows;
    out = std::transform(tokens, tokens + described.listed_rows, out,
                         [](int64_t token) { return static_cast<uint32_t>(token); });
  }
  return described;
}

bool KernelPath::QueueDescriptors(const CopiedBlocks& blocks, const Descriptors& described, void* stream,
                                  std::string* error) {
  // Copied once: the kernel would fetch them over the link again and again, each time before it knows an address.
  const size_t words = blocks.count * (1 + std::max<size_t>(1, described.listed_rows));
  return cuda_->CopyToDevice(device_ring_ + described.at * sizeof(uint32_t), ring_ + described.at,
                             words * sizeof(uint32_t), stream, error);
}

bool KernelPath::Queue(const CopiedBlocks& blocks, const Descriptors& described, int layer_begin, int layer_end,
                       void* stream, std::string* error) {
  const uint64_t slots = device_ring_ + described.at * sizeof(uint32_t);
  const size_t bytes = layout_.layer_offset(layer_end - 1) + layout_.layer_bytes(layer_end - 1) -
                       layout_.layer_offset(layer_begin);
  CopyGroup group{};
  group.buffers = reinterpret_cast<const CopyBuffer*>(table_) + first_buffer_[layer_begin];
  group.slots = reinterpret_cast<const uint32_t*>(slots);
  group.rows = group.slots + blocks.count;
  group.host = reinterpret_cast<uint64_t>(host_.base());
  group.slot_bytes = host_.slot_bytes();
  group.offset = layout_.layer_offset(layer_begin);
  group.num_buffers = static_cast<uint32_t>(first_buffer_[layer_end] - first_buffer_[layer_begin]);
  group.num_blocks = static_cast<uint32_t>(blocks.count);
  group.units_per_block = static_cast<uint32_t>(bytes / unit_bytes_);
  group.listed_rows = static_cast<uint32_t>(described.listed_rows);
  group.to_device = blocks.to_device;
  const uint64_t units = uint64_t{group.num_blocks} * group.units_per_block;
  const uint64_t ctas = (units + kCopyThreads * kUnitsInFlight - 1) / (kCopyThreads * kUnitsInFlight);
  return cuda_->Launch(kernel_, static_cast<unsigned>(std::min<uint64_t>(ctas_, ctas)), kCopyThreads, &group, stream,
                       error);
}

void KernelPath::Release(const Descriptors& described) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Span& span : spans_) span.released = span.released || span.begin == described.at;
  while (!spans_.empty() && spans_.front().released) spans_.pop_front();
}

}  // namespace flexkv
