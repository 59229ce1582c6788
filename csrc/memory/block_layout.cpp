#include "memory/block_layout.hpp"

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

namespace flexkv {

namespace {

// Appends `buffer` to `buffers` with rows of tokens_per_row tokens, a multiple of its own.
void AppendRows(std::vector<DeviceBuffer>& buffers, DeviceBuffer buffer, int64_t tokens_per_row) {
  const int64_t joined = tokens_per_row / buffer.tokens_per_row;
  const bool side_by_side = buffer.row_stride == buffer.row_bytes;
  const int64_t row_stride = buffer.row_stride;
  buffer.num_rows /= joined;
  buffer.row_stride *= joined;
  buffer.tokens_per_row = tokens_per_row;
  Require(buffer.num_rows > 0, "a device buffer is smaller than a row of another one");
  if (side_by_side) buffer.row_bytes *= joined;
  for (int64_t i = 0; i < (side_by_side ? 1 : joined); ++i) {
    buffers.push_back(buffer);
    buffer.base += static_cast<uint64_t>(row_stride);
  }
}

}  // namespace

BlockLayout::BlockLayout(std::vector<std::vector<DeviceBuffer>> layers, int64_t tokens_per_block)
    : tokens_per_block_(tokens_per_block) {
  Require(!layers.empty(), "a layout needs at least one layer");
  Require(tokens_per_block > 0, "a block needs tokens");
  for (const auto& buffers : layers) {
    Require(!buffers.empty(), "a layer needs at least one buffer");
    for (const DeviceBuffer& b : buffers) {
      Require(b.base != 0 && b.num_rows > 0 && b.row_bytes > 0 && b.row_stride >= b.row_bytes,
              "a device buffer needs an address, rows, and a stride of at least a row");
      Require(b.tokens_per_row > 0 && tokens_per_block % b.tokens_per_row == 0,
              "tokens_per_row must divide tokens_per_block");
      tokens_per_row_ = std::lcm(tokens_per_row_, b.tokens_per_row);
    }
  }
  num_rows_ = INT64_MAX;
  layer_offset_.push_back(0);
  for (const auto& buffers : layers) {
    std::vector<DeviceBuffer>& layer = layers_.emplace_back();
    for (const DeviceBuffer& b : buffers) AppendRows(layer, b, tokens_per_row_);
    size_t bytes = 0;
    for (const DeviceBuffer& b : layer) {
      num_rows_ = std::min(num_rows_, b.num_rows);
      bytes += static_cast<size_t>(b.row_bytes * rows_per_block());
    }
    layer_offset_.push_back(layer_offset_.back() + bytes);
  }
}

std::vector<int64_t> BlockLayout::FirstRows(const int64_t* token_slots, size_t count) const {
  std::vector<int64_t> first(count);
  const int64_t limit = num_token_slots();
  for (size_t b = 0; b < count; ++b) {
    const int64_t* slots = token_slots + b * static_cast<size_t>(tokens_per_block_);
    bool consecutive = slots[0] % tokens_per_row_ == 0;
    for (int64_t i = 0; i < tokens_per_block_; ++i) {
      if (slots[i] < 0 || slots[i] >= limit) {
        throw UsageError("token slot " + std::to_string(slots[i]) + " is outside the pool of " +
                         std::to_string(limit) + " slots");
      }
      consecutive = consecutive && slots[i] == slots[0] + i;
    }
    Require(consecutive || tokens_per_row_ == 1, "a pool laid out by page needs blocks of whole pages");
    first[b] = consecutive ? slots[0] / tokens_per_row_ : -1;
  }
  return first;
}

std::vector<Slice> SlicesOf(const BlockLayout& layout, size_t slot_bytes, size_t max) {
  const int layers = layout.num_layers();
  // Of very deep models several layers make one slice.
  const int layers_min = static_cast<int>((static_cast<size_t>(layers) + max - 1) / max);
  std::vector<Slice> slices;
  Slice slice;
  for (int layer = 0; layer < layers; ++layer) {
    slice.layer_end = layer + 1;
    const size_t end = layer + 1 == layers ? slot_bytes : layout.layer_offset(layer + 1);
    const bool cut = end % kIoAlignment == 0 && slice.layer_end - slice.layer_begin >= layers_min;
    if (!cut && layer + 1 < layers) continue;
    slice.bytes = end - slice.offset;
    slices.push_back(slice);
    slice = {end, 0, layer + 1, layer + 1};
  }
  return slices;
}

}  // namespace flexkv
