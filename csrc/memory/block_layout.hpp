// Where a block's bytes are on both sides of a copy.
//
// Device side (LAYERWISE): some buffers per layer (K and V, or MLA's latent; scales, index keys, a draft model's
// KV), each a matrix of rows. A row holds one token, or a whole page where the buffer is laid out by page.
// Layers need not have the same number of buffers, nor buffers the same number of tokens per row.
// Host side (BLOCKWISE): one slot per block, [layer][buffer][row in block][row bytes], so one layer
// of a block is contiguous and a whole block is one I/O.
#pragma once

#include <cstdint>
#include <vector>

#include "base/types.hpp"

namespace flexkv {

struct DeviceBuffer {
  uint64_t base = 0;  // address of row 0, on the CPU or on the GPU
  int64_t num_rows = 0;
  int64_t row_bytes = 0;   // bytes of a row that are copied
  int64_t row_stride = 0;  // bytes from one row to the next
  int64_t tokens_per_row = 1;
};

class BlockLayout {
 public:
  // layers[l] lists the buffers of layer l. Their tokens_per_row divide tokens_per_block.
  //
  // Whoever copies sees rows of one number of tokens, tokens_per_row(): the smallest that holds whole rows of every
  // buffer. What has shorter rows has so many of them made one; where they are not side by side, the first ones of
  // all such rows make a buffer, the second ones another, and so on.
  BlockLayout(std::vector<std::vector<DeviceBuffer>> layers, int64_t tokens_per_block);

  int num_layers() const { return static_cast<int>(layers_.size()); }
  int64_t tokens_per_block() const { return tokens_per_block_; }
  int64_t tokens_per_row() const { return tokens_per_row_; }
  int64_t num_token_slots() const { return num_rows_ * tokens_per_row_; }
  int64_t rows_per_block() const { return tokens_per_block_ / tokens_per_row_; }
  const std::vector<DeviceBuffer>& buffers(int layer) const { return layers_[layer]; }
  // Offset and size of a layer within a block. The offset after the last one is block_bytes().
  size_t layer_offset(int layer) const { return layer_offset_[layer]; }
  size_t layer_bytes(int layer) const { return layers_bytes(layer, layer + 1); }
  size_t layers_bytes(int begin, int end) const { return layer_offset_[end] - layer_offset_[begin]; }
  size_t block_bytes() const { return layer_offset_.back(); }

  // First row of each block for the token slots of `count` blocks (count * tokens_per_block values).
  // A block whose rows are not consecutive gets -1: it is copied row by row.
  // Throws UsageError for a slot outside the pool.
  std::vector<int64_t> FirstRows(const int64_t* token_slots, size_t count) const;

 private:
  std::vector<std::vector<DeviceBuffer>> layers_;
  std::vector<size_t> layer_offset_;
  int64_t tokens_per_block_;
  int64_t tokens_per_row_ = 1;
  int64_t num_rows_ = 0;
};

// A piece of a slot that a lower tier moves and verifies by itself: one layer, or as few
// neighbouring layers as fill whole pages.
struct Slice {
  size_t offset = 0;
  size_t bytes = 0;  // a multiple of kIoAlignment; the last slice takes the slot's padding
  int layer_begin = 0;
  int layer_end = 0;
};
// Slices of a slot, at most; the SSD tier's format has room for so many.
constexpr size_t kSlicesMax = 256;
// At most `max` slices that cover a slot.
std::vector<Slice> SlicesOf(const BlockLayout& layout, size_t slot_bytes, size_t max);

}  // namespace flexkv
