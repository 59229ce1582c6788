// The two ways a copy takes between host slots and a device pool on a GPU. Both queue work on a stream and never
// wait for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "copy/copier.hpp"
#include "cuda/cuda_driver.hpp"
#include "cuda/cuda_stream.hpp"
#include "memory/block_layout.hpp"
#include "memory/host_pool.hpp"

namespace flexkv {

// The copy engines: no part of the GPU's processors, but a price per piece, so for pieces that are large enough
// (cuda_measure.hpp). What lies side by side in both places is one piece.
class EnginePath {
 public:
  EnginePath(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, const HostPool& host);

  // `pinned`: all host slots are. A copy of others waits for what is on the stream already.
  bool Queue(const CopiedBlocks& blocks, int layer_begin, int layer_end, bool pinned, CopyStream& stream,
             std::string* error);
  // Copies the layers of blocks from slots in the device's memory to their host slots: slot i, of the size of a
  // host slot, holds blocks.host_slots[first + i].
  bool QueueFromSlots(const CopiedBlocks& blocks, size_t first, size_t count, int layer_begin, int layer_end,
                      uint64_t slots, bool pinned, CopyStream& stream, std::string* error);
  // On average, of blocks whose rows follow one another, or do not.
  size_t piece_bytes(bool rows_in_sequence) const;

 private:
  struct Piece {
    char* host;
    uint64_t device;
    size_t bytes;
  };
  // Pieces of one call to Queue.
  struct Batch {
    CopyStream& stream;
    const bool to_device, pinned;
    std::string* const error;
    std::vector<Piece> pieces = {};
  };
  template <typename Take>
  void ForEachPiece(char* slot, const int64_t* rows, int64_t first_row, int layer_begin, int layer_end,
                    Take take) const;
  bool Add(Batch& batch, Piece piece);
  bool Flush(Batch& batch);

  const std::shared_ptr<CudaDriver> cuda_;
  const BlockLayout& layout_;
  const HostPool& host_;
  size_t num_pieces_ = 0;      // of a block in sequence
  size_t num_row_pieces_ = 0;  // of a block row by row
};

// A kernel of ours (copy/copy_kernel.hpp): one launch per group of layers whatever the size of pieces. It loads out of
// pinned memory. It never stores to the host: what is stored it gathers in slots on the device, from where the copy
// engines take whole blocks.
class KernelPath {
 public:
  // Where a copy's descriptors are: in a ring of pinned memory, and at the same place on the device.
  struct Descriptors {
    size_t at = 0;
    size_t listed_rows = 0;
  };

  // Sets itself up on `stream` and waits for it. If that is not possible usable() is false, and note() says why.
  KernelPath(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, const HostPool& host,
             CopyStream& stream);
  ~KernelPath();
  KernelPath(const KernelPath&) = delete;
  KernelPath& operator=(const KernelPath&) = delete;

  bool usable() const { return kernel_ != nullptr; }
  const std::string& note() const { return note_; }
  // For who measures it: units of so many bytes are what it moves.
  CudaDriver::Kernel kernel() const { return kernel_; }
  size_t unit_bytes() const { return unit_bytes_; }

  // Whether it can ever move these blocks, given that their host slots are pinned if they are loaded.
  bool Takes(const CopiedBlocks& blocks) const;
  // Describes the blocks to the kernel. Nothing where there is no room until others are released.
  std::optional<Descriptors> Describe(const CopiedBlocks& blocks);
  bool QueueDescriptors(const CopiedBlocks& blocks, const Descriptors& described, CopyStream& stream,
                        std::string* error);
  bool QueueLoad(const CopiedBlocks& blocks, const Descriptors& described, int layer_begin, int layer_end,
                 CopyStream& stream, std::string* error);
  // Gathers so many blocks from the first on, at most slots_on_device(), which may be divided by them.
  bool QueueGather(const CopiedBlocks& blocks, const Descriptors& described, size_t first, size_t count,
                   int layer_begin, int layer_end, CopyStream& stream, std::string* error);
  size_t slots_on_device() const { return num_slots_; }
  uint64_t address_of_slots() const { return slots_; }
  void Release(const Descriptors& described);

 private:
  struct Span {
    size_t begin, end;
    bool released;
  };
  size_t WordsOf(const CopiedBlocks& blocks) const;
  bool SetUp(CopyStream& stream);
  bool Launch(const CopiedBlocks& blocks, const Descriptors& described, size_t first, size_t count,
              int layer_begin, int layer_end, uint64_t base, CopyStream& stream, std::string* error);

  const std::shared_ptr<CudaDriver> cuda_;
  const BlockLayout& layout_;
  const HostPool& host_;
  std::string note_;
  void* module_ = nullptr;
  CudaDriver::Kernel kernel_ = nullptr;  // the one for unit_bytes_
  size_t unit_bytes_ = 1;
  bool whole_buffers_ = true;         // rows of every buffer are side by side
  std::vector<size_t> first_buffer_;  // of each layer, in the table
  uint64_t table_ = 0;                // CopyBuffer of every layer's buffers, on the device
  uint32_t* ring_ = nullptr;          // words, pinned
  uint64_t device_ring_ = 0;
  uint64_t slots_ = 0;  // what is stored on its way to the host
  size_t num_slots_ = 0;
  std::mutex mutex_;
  std::deque<Span> spans_;  // of the ring, in use, oldest first
};

}  // namespace flexkv
