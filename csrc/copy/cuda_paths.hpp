// The two ways a copy takes between host slots and a device pool on a GPU. Both queue work on streams and never
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
  // Copies the layers of `count` blocks from the first on between their host slots and a buffer on the device,
  // which holds them one after the other and nothing else.
  bool QueueBuffer(const CopiedBlocks& blocks, size_t first, size_t count, int layer_begin, int layer_end,
                   uint64_t buffer, bool pinned, CopyStream& stream, std::string* error);
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

// By way of a buffer on the device, for pieces that are small: copy engines carry some layers of each block as one
// piece between its host slot and the buffer, and a kernel of ours (copy/copy_kernel.hpp) copies them between the
// buffer and the pool. The kernel takes a thirtieth of the time that the link takes. One that reads the host's memory
// itself is as fast, but keeps processors for all that time: on an H100 attention then took 1.7 times as long.
//
// The engines work on the next part while the kernel works on the last: they have a stream each.
class KernelPath {
 public:
  // Where a copy's descriptors are: in a ring of pinned memory, and at the same place on the device.
  struct Descriptors {
    size_t at = 0;
    size_t listed_rows = 0;
  };

  // The streams of one direction, and the buffers that its copies go through in turn.
  class Route {
   public:
    Route(std::shared_ptr<CudaDriver> cuda, bool to_device);
    ~Route();
    Route(const Route&) = delete;
    Route& operator=(const Route&) = delete;

    // Both are urgent for loads: a forward waits for them, and for nobody's stores.
    CopyStream engines, kernels;
    // Where a copy through the buffers begins, and where it ends.
    CopyStream& first() { return to_device_ ? engines : kernels; }
    CopyStream& last() { return to_device_ ? kernels : engines; }

   private:
    friend class KernelPath;
    // When its streams have done what they were told.
    void FreeBuffers();
    struct Buffer {
      uint64_t address;
      StreamEvent left;  // behind what used it last
    };
    const std::shared_ptr<CudaDriver> cuda_;
    const bool to_device_;
    std::vector<Buffer> buffers_;
    size_t next_ = 0;
  };

  // Sets itself up on a stream of `loads`, and waits for it. If that is not possible usable() is false, and note()
  // says why.
  KernelPath(std::shared_ptr<CudaDriver> cuda, const BlockLayout& layout, const HostPool& host,
             EnginePath& engines, Route& loads, Route& stores);
  ~KernelPath();
  KernelPath(const KernelPath&) = delete;
  KernelPath& operator=(const KernelPath&) = delete;

  bool usable() const { return kernel_ != nullptr; }
  const std::string& note() const { return note_; }
  // Whether it can ever move these blocks.
  bool Takes(const CopiedBlocks& blocks) const;
  // Describes the blocks to the kernel. Nothing where there is no room until others are released.
  std::optional<Descriptors> Describe(const CopiedBlocks& blocks);
  bool QueueDescriptors(const CopiedBlocks& blocks, const Descriptors& described, Route& route,
                        std::string* error);
  // From `layer_begin` on, as many layers as a block has so many bytes of, one at least, as far as a buffer holds
  // them.
  int EndOfPiece(int layer_begin, int layer_end, size_t bytes) const;
  // `pinned`: all host slots are. The event is behind all of it, on the route's last stream; nullptr on failure.
  StreamEvent Queue(const CopiedBlocks& blocks, const Descriptors& described, int layer_begin, int layer_end,
                    bool pinned, Route& route, std::string* error);
  void Release(const Descriptors& described);

 private:
  struct Span {
    size_t begin, end;
    bool released;
  };
  size_t WordsOf(const CopiedBlocks& blocks) const;
  bool SetUp(Route& loads, Route& stores);
  bool Launch(const CopiedBlocks& blocks, const Descriptors& described, size_t first, size_t count,
              int layer_begin, int layer_end, uint64_t buffer, CopyStream& stream, std::string* error);

  const std::shared_ptr<CudaDriver> cuda_;
  const BlockLayout& layout_;
  const HostPool& host_;
  EnginePath& engines_;
  std::string note_;
  void* module_ = nullptr;
  CudaDriver::Kernel kernel_ = nullptr;  // the one for unit_bytes_
  size_t unit_bytes_ = 1;
  bool whole_buffers_ = true;         // rows of every buffer are side by side
  bool layers_fit_ = true;            // each into a buffer
  std::vector<size_t> first_buffer_;  // of each layer, in the table
  uint64_t table_ = 0;                // CopyBuffer of every layer's buffers, on the device
  uint32_t* ring_ = nullptr;          // words, pinned
  uint64_t device_ring_ = 0;
  std::mutex mutex_;
  std::deque<Span> spans_;  // of the ring, in use, oldest first
};

}  // namespace flexkv
