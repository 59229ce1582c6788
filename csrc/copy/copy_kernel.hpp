// The copy kernel's text: one for nvcc, which makes the GPU's code of it, and for a C++ compiler, which
// makes the tests' code of it. What a test proves about the places of bytes holds on the GPU, too.
//
// The kernel moves one group of neighbouring layers of many blocks between the device pool's rows and a buffer on the
// device, where the group of each block is one run of bytes, one block after the other. Copy engines move those runs
// between the buffer and the host. What is contiguous on both sides is a run of the kernel's: one buffer of one layer of
// a block where the rows follow one another, else one row. A team of neighbouring threads, as many as the run has use
// for and 32 at most, finds out where the run is, once, and copies it in units of 16, 8, 4 or 1 bytes, the widest that
// every address and size of the pool is a multiple of.
//
// Its launches are short and wide: a GEMM or an attention whose CTAs fill the GPU takes as long as the processor that
// has the least time for it, so all of them give a little rather than few of them much. CTAs are small, as little of a
// processor is left there: 128 threads of 40 registers are a twelfth of one. Loads and stores are of the streaming
// kind: nothing is read twice, and what attention keeps in the caches is worth more.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FLEXKV_DEVICE __device__ __forceinline__
#define FLEXKV_UNROLL _Pragma("unroll")
#else
#define FLEXKV_DEVICE inline
#define FLEXKV_UNROLL
#endif

namespace flexkv {

constexpr uint32_t kCopyThreads = 128;          // of a CTA
constexpr uint32_t kCopyCtasOfProcessor = 4;    // of a launch, at most
constexpr uint32_t kCopyCtasPerProcessor = 12;  // fit, which leaves a thread 40 registers
constexpr uint32_t kUnitsInFlight = 4;          // loads of a thread before its first store
constexpr uint32_t kTeamLog2Max = 5;

// One buffer of one layer.
struct CopyBuffer {
  uint64_t base;  // address of row 0 on the device
  uint64_t row_stride;
  uint64_t offset;     // where the block's rows start in a block
  uint64_t row_bytes;  // below 4 GiB
};

// The kernel's argument.
struct CopyGroup {
  const CopyBuffer* buffers;  // of the group
  const uint32_t* rows;       // first row of each block in the pool; with listed_rows all of its rows
  uint64_t base;      // where the first block would begin in the buffer if all of its layers were there
  uint64_t stride;    // from one block to the next in the buffer
  uint32_t num_runs;  // of all blocks together, below 2^31
  uint32_t runs_per_block;
  uint32_t runs_per_buffer;  // of one block
  uint32_t rows_per_run;
  uint32_t listed_rows;  // rows listed per block; 0: the rows of each block follow one another
  uint32_t team_log2;    // threads of a team
  uint32_t to_pool;
};

struct CopyRun {
  uint64_t buffer;
  uint64_t pool;
  uint32_t bytes;
};

FLEXKV_DEVICE CopyRun PlaceOfRun(const CopyGroup& group, uint32_t run) {
  // 32 bits: a GPU divides them several times as fast.
  const uint32_t block = run / group.runs_per_block;
  const uint32_t in_block = run - block * group.runs_per_block;
  const uint32_t of_buffer = in_block / group.runs_per_buffer;
  const uint32_t row = in_block - of_buffer * group.runs_per_buffer;
  const CopyBuffer& buffer = group.buffers[of_buffer];
  const uint32_t bytes = static_cast<uint32_t>(buffer.row_bytes) * group.rows_per_run;
  const uint64_t pool_row = group.listed_rows != 0
                                ? uint64_t{group.rows[uint64_t{block} * group.listed_rows + row]}
                                : uint64_t{group.rows[block]} + row;
  return {group.base + block * group.stride + buffer.offset + uint64_t{row} * bytes,
          buffer.base + pool_row * buffer.row_stride, bytes};
}

// What one of num_threads threads does. Access says how a unit is loaded and stored.
template <typename Access>
FLEXKV_DEVICE void CopyAsThread(const CopyGroup& group, uint32_t thread, uint32_t num_threads) {
  using Unit = typename Access::Unit;
  const uint32_t lane = thread & ((1u << group.team_log2) - 1);
  for (uint32_t run = thread >> group.team_log2; run < group.num_runs;
       run += num_threads >> group.team_log2) {
    const CopyRun place = PlaceOfRun(group, run);
    const uint64_t from = group.to_pool != 0 ? place.buffer : place.pool;
    const uint64_t to = group.to_pool != 0 ? place.pool : place.buffer;
    const uint32_t num_units = place.bytes / static_cast<uint32_t>(sizeof(Unit));
    for (uint32_t first = lane; first < num_units; first += kUnitsInFlight << group.team_log2) {
      Unit held[kUnitsInFlight];
      FLEXKV_UNROLL
      for (uint32_t i = 0; i < kUnitsInFlight; ++i) {
        // Past the end the last unit is read once more: no branch comes between the loads.
        const uint32_t unit = first + (i << group.team_log2);
        held[i] = Access::Load(from + uint64_t{unit < num_units ? unit : num_units - 1} * sizeof(Unit));
      }
      FLEXKV_UNROLL
      for (uint32_t i = 0; i < kUnitsInFlight; ++i) {
        const uint32_t unit = first + (i << group.team_log2);
        if (unit < num_units) Access::Store(to + uint64_t{unit} * sizeof(Unit), held[i]);
      }
    }
  }
}

}  // namespace flexkv
