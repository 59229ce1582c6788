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

// Of a buffer on the device, 0.3 ms on a fast link. While a kernel waits for attention's to leave it a processor, copy
// engines fill the other ones: attention over a long context takes that long and more for a wave of its CTAs.
// Nobody's forward waits for stores.
constexpr size_t kBufferBytes = size_t{16} << 20;
constexpr size_t kLoadBuffers = 4, kStoreBuffers = 2;

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

bool EnginePath::QueueBuffer(const CopiedBlocks& blocks, size_t first, size_t count, int layer_begin,
                             int layer_end, uint64_t buffer, bool pinned, CopyStream& stream,
                             std::string* error) {
  const size_t offset = layout_.layer_offset(layer_begin);
  const size_t bytes = layout_.layers_bytes(layer_begin, layer_end);
  Batch batch{stream, blocks.to_device, pinned, error};
  Piece piece{nullptr, buffer, 0};
  for (size_t i = 0; i < count; ++i) {
    char* host = host_.Slot(blocks.host_slots[first + i]) + offset;
    // Whole blocks in slots that follow one another are one piece.
    if (piece.bytes > 0 && host != piece.host + piece.bytes) {
      if (!Add(batch, piece)) return false;
      piece = {host, piece.device + piece.bytes, 0};
    }
    if (piece.bytes == 0) piece.host = host;
    piece.bytes += bytes;
  }
  return Add(batch, piece) && Flush(batch);
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

KernelPath::Route::Route(std::shared_ptr<CudaDriver> cuda, bool to_device)
    : engines(cuda, to_device), kernels(cuda, to_device), cuda_(std::move(cuda)), to_device_(to_device) {}

KernelPath::Route::~Route() { FreeBuffers(); }

void KernelPath::Route::FreeBuffers() {
  std::string ignored;
  for (CopyStream* stream : {&engines, &kernels}) cuda_->Synchronize(stream->get(), &ignored);
  for (const Buffer& buffer : buffers_) cuda_->FreeDevice(buffer.address);
  buffers_.clear();
}

KernelPath::KernelPath(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, const HostPool& host,
                       EnginePath& engines, Route& loads, Route& stores)
    : cuda_(std::move(cuda)), layout_(layout), host_(host), engines_(engines) {
  if (SetUp(loads, stores)) return;
  kernel_ = nullptr;
  for (Route* route : {&loads, &stores}) route->FreeBuffers();
}

KernelPath::~KernelPath() {
  if (module_ != nullptr) cuda_->UnloadModule(module_);
  if (table_ != 0) cuda_->FreeDevice(table_);
  if (device_ring_ != 0) cuda_->FreeDevice(device_ring_);
  if (ring_ != nullptr) cuda_->FreePinned(ring_);
}

bool KernelPath::SetUp(Route& loads, Route& stores) {
  std::vector<CopyBuffer> table;
  uint64_t bits = 0;
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
  for (int layer = 0; layer < layout_.num_layers(); ++layer) {
    layers_fit_ = layers_fit_ && layout_.layer_bytes(layer) <= kBufferBytes;
  }
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
  device_ring_ = cuda_->AllocateDevice(kRingWords * sizeof(uint32_t), &note_);
  table_ = device_ring_ != 0 ? cuda_->AllocateDevice(table_bytes, &note_) : 0;
  bool room = table_ != 0;
  for (auto [route, count] : {std::pair<Route*, size_t>{&loads, kLoadBuffers}, {&stores, kStoreBuffers}}) {
    for (size_t i = 0; i < count && room; ++i) {
      const uint64_t address = cuda_->AllocateDevice(kBufferBytes, &note_);
      room = address != 0;
      if (room) route->buffers_.push_back({address, nullptr});
    }
  }
  module_ = room ? cuda_->LoadModule(kKernelPtx, &note_) : nullptr;
  kernel_ = module_ != nullptr ? cuda_->FindKernel(module_, name, &note_) : nullptr;
  // The first launch, which loads the kernel, is not one that a forward waits for: it moves nothing.
  CopyGroup nothing{};
  nothing.runs_per_block = nothing.runs_per_buffer = 1;
  const CudaDriver::Stream stream = loads.kernels.get();
  return kernel_ != nullptr && cuda_->CopyToDevice(table_, table.data(), table_bytes, stream, &note_) &&
         cuda_->Launch(kernel_, 1, kCopyThreads, &nothing, stream, &note_) &&
         cuda_->Synchronize(stream, &note_);
}

size_t KernelPath::WordsOf(const CopiedBlocks& blocks) const {
  const size_t rows = blocks.in_sequence ? 1 : static_cast<size_t>(layout_.rows_per_block());
  return blocks.count * rows;
}

bool KernelPath::Takes(const CopiedBlocks& blocks) const {
  const uint64_t rows = first_buffer_.back() * static_cast<uint64_t>(layout_.rows_per_block());
  return usable() && WordsOf(blocks) <= kRingWords && rows * blocks.count < kRunsMax && layers_fit_;
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

bool KernelPath::QueueDescriptors(const CopiedBlocks& blocks, const Descriptors& described, Route& route,
                                  std::string* error) {
  // Copied once: the kernel would fetch them over the link again and again, each time before it knows an address.
  const size_t words = blocks.count * std::max<size_t>(1, described.listed_rows);
  route.kernels.MakeRoom(1);
  return cuda_->CopyToDevice(device_ring_ + described.at * sizeof(uint32_t), ring_ + described.at,
                             words * sizeof(uint32_t), route.kernels.get(), error);
}

int KernelPath::EndOfPiece(int layer_begin, int layer_end, size_t bytes) const {
  int end = layer_begin + 1;
  while (end < layer_end && layout_.layers_bytes(layer_begin, end) < bytes &&
         layout_.layers_bytes(layer_begin, end + 1) <= kBufferBytes) {
    ++end;
  }
  return end;
}

StreamEvent KernelPath::Queue(const CopiedBlocks& blocks, const Descriptors& described, int layer_begin,
                              int layer_end, bool pinned, Route& route, std::string* error) {
  const size_t count_max = kBufferBytes / layout_.layers_bytes(layer_begin, layer_end);
  StreamEvent left;
  for (size_t first = 0; first < blocks.count; first += count_max) {
    const size_t count = std::min(blocks.count - first, count_max);
    Route::Buffer& buffer = route.buffers_[route.next_++ % route.buffers_.size()];
    const auto engines = [&] {
      return engines_.QueueBuffer(blocks, first, count, layer_begin, layer_end, buffer.address, pinned,
                                  route.engines, error);
    };
    const auto kernel = [&] {
      return Launch(blocks, described, first, count, layer_begin, layer_end, buffer.address, route.kernels,
                    error);
    };
    if (buffer.left && !route.first().WaitFor(buffer.left, error)) return nullptr;
    if (!(blocks.to_device ? engines() : kernel())) return nullptr;
    const StreamEvent between = route.first().Record(error);
    if (!between || !route.last().WaitFor(between, error)) return nullptr;
    if (!(blocks.to_device ? kernel() : engines())) return nullptr;
    left = route.last().Record(error);
    if (!left) return nullptr;
    buffer.left = left;
  }
  return left;
}

bool KernelPath::Launch(const CopiedBlocks& blocks, const Descriptors& described, size_t first, size_t count,
                        int layer_begin, int layer_end, uint64_t buffer, CopyStream& stream,
                        std::string* error) {
  const size_t rows_per_block = static_cast<size_t>(layout_.rows_per_block());
  const bool by_row = described.listed_rows != 0 || !whole_buffers_;
  uint64_t run_bytes = 0;
  for (int layer = layer_begin; layer < layer_end; ++layer) {
    for (const DeviceBuffer& rows : layout_.buffers(layer)) {
      run_bytes = std::max(run_bytes, static_cast<uint64_t>(rows.row_bytes) * (by_row ? 1 : rows_per_block));
    }
  }
  const uint32_t* rows = reinterpret_cast<const uint32_t*>(device_ring_ + described.at * sizeof(uint32_t));
  CopyGroup group{};
  group.buffers = reinterpret_cast<const CopyBuffer*>(table_) + first_buffer_[layer_begin];
  group.rows = rows + first * std::max<size_t>(1, described.listed_rows);
  group.base = buffer - layout_.layer_offset(layer_begin);
  group.stride = layout_.layers_bytes(layer_begin, layer_end);
  group.runs_per_buffer = static_cast<uint32_t>(by_row ? rows_per_block : 1);
  group.runs_per_block =
      group.runs_per_buffer * static_cast<uint32_t>(first_buffer_[layer_end] - first_buffer_[layer_begin]);
  group.num_runs = static_cast<uint32_t>(count) * group.runs_per_block;
  group.rows_per_run = static_cast<uint32_t>(by_row ? 1 : rows_per_block);
  group.listed_rows = static_cast<uint32_t>(described.listed_rows);
  while (group.team_log2 < kTeamLog2Max && uint64_t{1} << group.team_log2 < run_bytes / unit_bytes_) {
    ++group.team_log2;
  }
  group.to_pool = blocks.to_device;
  const uint64_t threads = uint64_t{group.num_runs} << group.team_log2;
  const uint64_t ctas_max =
      uint64_t{kCopyCtasOfProcessor} * static_cast<uint64_t>(cuda_->num_multiprocessors());
  const uint64_t ctas = std::min(ctas_max, (threads + kCopyThreads - 1) / kCopyThreads);
  stream.MakeRoom(1);
  return cuda_->Launch(kernel_, static_cast<unsigned>(ctas), kCopyThreads, &group, stream.get(), error);
}

void KernelPath::Release(const Descriptors& described) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Span& span : spans_) span.released = span.released || span.begin == described.at;
  while (!spans_.empty() && spans_.front().released) spans_.pop_front();
}

}  // namespace flexkv
