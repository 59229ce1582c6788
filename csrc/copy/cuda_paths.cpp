#include "copy/cuda_paths.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/types.hpp"
#include "copy/copy_kernel.hpp"

namespace flexkv {

namespace {

const char* const kKernelPtx =
#include "copy/copy_kernel_ptx.inc"
    ;

// Copies of one call to the driver: enough that the call costs little per copy, a part of what its queue holds.
constexpr size_t kBatchMax = 128;

// Descriptors of a copy are 4 bytes per block and 4 per block or row: room for half a million tokens on their
// way in pages of one token.
constexpr size_t kRingWords = size_t{1} << 20;

// Room on the device for blocks that are being stored: gathering them takes a fraction of the time that the link
// takes, so there is no need for a second one.
constexpr size_t kSlotsBytes = size_t{16} << 20;

constexpr uint64_t kRunsMax = uint64_t{1} << 31;
constexpr uint64_t kMax32 = std::numeric_limits<uint32_t>::max();

}  // namespace

// ---- copy engine -------------------------------------------------------------------------------

EnginePath::EnginePath(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, const HostPool& host)
    : cuda_(std::move(cuda)), layout_(layout), host_(host) {
  ForEachPiece(nullptr, nullptr, 0, 0, layout_.num_layers(), [&](const Piece&) {
    ++num_pieces_;
    return true;
  });
  for (int layer = 0; layer < layout_.num_layers(); ++layer) {
    num_row_pieces_ += layout_.buffers(layer).size() * static_cast<size_t>(layout_.rows_per_block());
  }
}

size_t EnginePath::piece_bytes(bool rows_in_sequence) const {
  return layout_.block_bytes() / (rows_in_sequence ? num_pieces_ : num_row_pieces_);
}

// Calls take(piece) until it returns false. `rows` are the block's rows unless they follow first_row >= 0.
template <typename Take>
void EnginePath::ForEachPiece(char* slot, const int64_t* rows, int64_t first_row, int layer_begin,
                              int layer_end, Take take) const {
  Piece piece{slot + layout_.layer_offset(layer_begin), 0, 0};
  for (int layer = layer_begin; layer < layer_end; ++layer) {
    for (const DeviceBuffer& buffer : layout_.buffers(layer)) {
      const bool whole = first_row >= 0 && buffer.row_stride == buffer.row_bytes;
      const int64_t pieces = whole ? 1 : layout_.rows_per_block();
      const size_t bytes = static_cast<size_t>(buffer.row_bytes * (whole ? layout_.rows_per_block() : 1));
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

bool EnginePath::Queue(const CopiedBlocks& blocks, int layer_begin, int layer_end, bool pinned,
                       CopyStream& stream, std::string* error) {
  const size_t per_block = static_cast<size_t>(layout_.tokens_per_block());
  Batch batch{stream, blocks.to_device, pinned, error};
  bool good = true;
  for (size_t b = 0; b < blocks.count && good; ++b) {
    ForEachPiece(host_.Slot(blocks.host_slots[b]), blocks.token_slots + b * per_block, blocks.first_rows[b],
                 layer_begin, layer_end, [&](const Piece& piece) { return good = Add(batch, piece); });
  }
  return good && Flush(batch);
}

bool EnginePath::QueueFromSlots(const CopiedBlocks& blocks, size_t first, size_t count, int layer_begin,
                                int layer_end, uint64_t slots, bool pinned, CopyStream& stream,
                                std::string* error) {
  const size_t offset = layout_.layer_offset(layer_begin);
  const size_t bytes = layout_.layer_offset(layer_end - 1) + layout_.layer_bytes(layer_end - 1) - offset;
  Batch batch{stream, false, pinned, error};
  for (size_t i = 0; i < count; ++i) {
    if (!Add(batch, {host_.Slot(blocks.host_slots[first + i]) + offset,
                     slots + i * host_.slot_bytes() + offset, bytes})) {
      return false;
    }
  }
  return Flush(batch);
}

bool EnginePath::Add(Batch& batch, Piece piece) {
  // The driver refuses a copy that spans two registrations.
  while (piece.bytes > 0) {
    const size_t at = static_cast<size_t>(piece.host - host_.base());
    const size_t in_chunk = HostPool::kPinChunkBytes - at % HostPool::kPinChunkBytes;
    const size_t bytes = std::min(piece.bytes, in_chunk);
    batch.pieces.push_back({piece.host, piece.device, bytes});
    piece = {piece.host + bytes, piece.device + bytes, piece.bytes - bytes};
    if (batch.pieces.size() == kBatchMax && !Flush(batch)) return false;
  }
  return true;
}

bool EnginePath::Flush(Batch& batch) {
  std::vector<Piece>& pieces = batch.pieces;
  if (pieces.empty()) return true;
  batch.stream.MakeRoom(pieces.size());
  if (batch.pinned && pieces.size() > 1 && cuda_->has_batch_copies()) {
    std::vector<uint64_t> from(pieces.size()), to(pieces.size());
    std::vector<size_t> sizes(pieces.size());
    for (size_t i = 0; i < pieces.size(); ++i) {
      from[i] = reinterpret_cast<uint64_t>(pieces[i].host);
      to[i] = pieces[i].device;
      sizes[i] = pieces[i].bytes;
    }
    if (!batch.to_device) from.swap(to);
    if (cuda_->CopyBatch(to.data(), from.data(), sizes.data(), pieces.size(), batch.stream.get(),
                         batch.error)) {
      pieces.clear();
      return true;
    }
    if (!batch.error->empty()) return false;
  }
  for (const Piece& piece : pieces) {
    if (!(batch.to_device
              ? cuda_->CopyToDevice(piece.device, piece.host, piece.bytes, batch.stream.get(), batch.error)
              : cuda_->CopyToHost(piece.host, piece.device, piece.bytes, batch.stream.get(), batch.error))) {
      return false;
    }
  }
  pieces.clear();
  return true;
}

// ---- kernel ------------------------------------------------------------------------------------

KernelPath::KernelPath(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, const HostPool& host,
                       CopyStream& stream)
    : cuda_(std::move(cuda)), layout_(layout), host_(host) {
  if (!SetUp(stream)) kernel_ = nullptr;
}

KernelPath::~KernelPath() {
  if (module_ != nullptr) cuda_->UnloadModule(module_);
  if (table_ != 0) cuda_->FreeDevice(table_);
  if (device_ring_ != 0) cuda_->FreeDevice(device_ring_);
  if (slots_ != 0) cuda_->FreeDevice(slots_);
  if (ring_ != nullptr) cuda_->FreePinned(ring_);
}

bool KernelPath::SetUp(CopyStream& stream) {
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
      whole_buffers_ = whole_buffers_ && stride == bytes;
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
  ring_ = static_cast<uint32_t*>(cuda_->AllocatePinned(kRingWords * sizeof(uint32_t)));
  if (ring_ == nullptr) {
    note_ = "no pinned memory for the kernel's descriptors";
    return false;
  }
  const size_t table_bytes = table.size() * sizeof(CopyBuffer);
  num_slots_ = std::max<size_t>(1, kSlotsBytes / host_.slot_bytes());
  device_ring_ = cuda_->AllocateDevice(kRingWords * sizeof(uint32_t), &note_);
  table_ = device_ring_ != 0 ? cuda_->AllocateDevice(table_bytes, &note_) : 0;
  slots_ = table_ != 0 ? cuda_->AllocateDevice(num_slots_ * host_.slot_bytes(), &note_) : 0;
  module_ = slots_ != 0 ? cuda_->LoadModule(kKernelPtx, &note_) : nullptr;
  kernel_ = module_ != nullptr ? cuda_->FindKernel(module_, name, &note_) : nullptr;
  return kernel_ != nullptr && cuda_->CopyToDevice(table_, table.data(), table_bytes, stream.get(), &note_) &&
         cuda_->Synchronize(stream.get(), &note_);
}

size_t KernelPath::WordsOf(const CopiedBlocks& blocks) const {
  const size_t rows = blocks.in_sequence ? 1 : static_cast<size_t>(layout_.rows_per_block());
  return blocks.count * (1 + rows);
}

bool KernelPath::Takes(const CopiedBlocks& blocks) const {
  const uint64_t rows = first_buffer_.back() * static_cast<uint64_t>(layout_.rows_per_block());
  return usable() && WordsOf(blocks) <= kRingWords && rows * blocks.count < kRunsMax;
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
  for (size_t b = 0; b < blocks.count; ++b) {
    *out++ =
        static_cast<uint32_t>(blocks.to_device ? static_cast<size_t>(blocks.host_slots[b]) : b % num_slots_);
  }
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

bool KernelPath::QueueDescriptors(const CopiedBlocks& blocks, const Descriptors& described,
                                  CopyStream& stream, std::string* error) {
  // Copied once: the kernel would fetch them over the link again and again, each time before it knows an address.
  const size_t words = blocks.count * (1 + std::max<size_t>(1, described.listed_rows));
  stream.MakeRoom(1);
  return cuda_->CopyToDevice(device_ring_ + described.at * sizeof(uint32_t), ring_ + described.at,
                             words * sizeof(uint32_t), stream.get(), error);
}

bool KernelPath::QueueLoad(const CopiedBlocks& blocks, const Descriptors& described, int layer_begin,
                           int layer_end, CopyStream& stream, std::string* error) {
  return Launch(blocks, described, 0, blocks.count, layer_begin, layer_end,
                reinterpret_cast<uint64_t>(host_.base()), stream, error);
}

bool KernelPath::QueueGather(const CopiedBlocks& blocks, const Descriptors& described, size_t first,
                             size_t count, int layer_begin, int layer_end, CopyStream& stream,
                             std::string* error) {
  return Launch(blocks, described, first, count, layer_begin, layer_end, slots_, stream, error);
}

bool KernelPath::Launch(const CopiedBlocks& blocks, const Descriptors& described, size_t first, size_t count,
                        int layer_begin, int layer_end, uint64_t base, CopyStream& stream,
                        std::string* error) {
  const size_t rows_per_block = static_cast<size_t>(layout_.rows_per_block());
  const bool by_row = described.listed_rows != 0 || !whole_buffers_;
  uint64_t run_bytes = 0;
  for (int layer = layer_begin; layer < layer_end; ++layer) {
    for (const DeviceBuffer& buffer : layout_.buffers(layer)) {
      run_bytes =
          std::max(run_bytes, static_cast<uint64_t>(buffer.row_bytes) * (by_row ? 1 : rows_per_block));
    }
  }
  const uint32_t* slots = reinterpret_cast<const uint32_t*>(device_ring_ + described.at * sizeof(uint32_t));
  CopyGroup group{};
  group.buffers = reinterpret_cast<const CopyBuffer*>(table_) + first_buffer_[layer_begin];
  group.slots = slots + first;
  group.rows = slots + blocks.count + first * std::max<size_t>(1, described.listed_rows);
  group.base = base;
  group.slot_bytes = host_.slot_bytes();
  group.runs_per_buffer = static_cast<uint32_t>(by_row ? rows_per_block : 1);
  group.runs_per_block =
      group.runs_per_buffer * static_cast<uint32_t>(first_buffer_[layer_end] - first_buffer_[layer_begin]);
  group.num_runs = static_cast<uint32_t>(count) * group.runs_per_block;
  group.rows_per_run = static_cast<uint32_t>(by_row ? 1 : rows_per_block);
  group.listed_rows = static_cast<uint32_t>(described.listed_rows);
  while (group.team_log2 < kTeamLog2Max && uint64_t{1} << group.team_log2 < run_bytes / unit_bytes_) {
    ++group.team_log2;
  }
  group.to_device = blocks.to_device;
  const uint64_t threads = uint64_t{group.num_runs} << group.team_log2;
  const uint64_t ctas = std::min<uint64_t>(kCopyCtas, (threads + kCopyThreads - 1) / kCopyThreads);
  stream.MakeRoom(1);
  return cuda_->Launch(kernel_, static_cast<unsigned>(ctas), kCopyThreads, &group, stream.get(), error);
}

void KernelPath::Release(const Descriptors& described) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Span& span : spans_) span.released = span.released || span.begin == described.at;
  while (!spans_.empty() && spans_.front().released) spans_.pop_front();
}

}  // namespace flexkv
