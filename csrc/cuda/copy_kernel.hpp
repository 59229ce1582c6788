// The copy kernel's text: one for nvcc, which makes the GPU's code of it, and for a C++ compiler, which
// makes the tests' code of it. What a test proves about the places of bytes holds on the GPU, too.
//
// The kernel moves one group of neighbouring layers of many blocks. In a host slot the group is one run
// of bytes; on the device it is rows of several buffers. The run is cut into units of 16, 8, 4 or 1 bytes,
// the widest that every address and size of the pool is a multiple of, and units are dealt to threads
// in turn: neighbouring threads touch neighbouring bytes, whatever the size of a row.
//
// How many bytes are in flight decides the speed: a link of B bytes/s and a delay of T needs B * T of
// them on their way. PCIe Gen5 x16 carries about 55 GB/s, and a GPU's read of host memory takes 1 to
// 2 us, so 55 to 110 KB. A thread has kUnitsInFlight loads of 16 bytes out before it stores the first:
// 64 KiB per CTA of kCopyThreads. Three CTAs (see CudaCopier) make 192 KiB, which leaves room for warps
// that are storing. Loads and stores are of the streaming kind: nothing is read twice, and what
// attention keeps in the caches is worth more.
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

constexpr uint32_t kCopyThreads = 512;  // of a CTA
constexpr uint32_t kUnitsInFlight = 8;  // loads of a thread before its first store

// One buffer of one layer.
struct CopyBuffer {
  uint64_t base;        // address of row 0 on the device
  uint64_t row_stride;
  uint64_t offset;      // where the block's rows start in a host slot
  uint64_t row_bytes;   // below 4 GiB
};

// The kernel's argument.
struct CopyGroup {
  const CopyBuffer* buffers;   // of the group, in the order of their offsets
  const uint32_t* slots;       // host slot of each block
  const uint32_t* rows;        // first row of each block on the device; with listed_rows all of its rows
  uint64_t host;               // address of slot 0, as the device sees it
  uint64_t slot_bytes;
  uint64_t offset;             // of the group in a slot
  uint32_t num_buffers;
  uint32_t num_blocks;
  uint32_t units_per_block;    // num_blocks * units_per_block is below 2^32
  uint32_t listed_rows;        // rows listed per block; 0: the rows of each block follow one another
  uint32_t to_device;
};

struct UnitPlace {
  uint64_t host;
  uint64_t device;
};

FLEXKV_DEVICE UnitPlace PlaceOfUnit(const CopyGroup& group, uint32_t unit, uint32_t unit_bytes) {
  const uint32_t block = unit / group.units_per_block;
  const uint64_t at = group.offset + uint64_t{unit - block * group.units_per_block} * unit_bytes;
  // The last buffer that starts at or before `at`.
  uint32_t low = 0, high = group.num_buffers;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (group.buffers[middle].offset <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const CopyBuffer& buffer = group.buffers[low];
  // 32 bits: a GPU divides them several times as fast.
  const uint32_t in_buffer = static_cast<uint32_t>(at - buffer.offset);
  const uint32_t row_bytes = static_cast<uint32_t>(buffer.row_bytes);
  const uint32_t row_of_block = in_buffer / row_bytes;
  const uint32_t in_row = in_buffer - row_of_block * row_bytes;
  const uint64_t row = group.listed_rows != 0
                           ? uint64_t{group.rows[uint64_t{block} * group.listed_rows + row_of_block]}
                           : uint64_t{group.rows[block]} + row_of_block;
  return {group.host + group.slots[block] * group.slot_bytes + at,
          buffer.base + row * buffer.row_stride + in_row};
}

// What one of num_threads threads does. Access says how a unit is loaded and stored.
template <typename Access>
FLEXKV_DEVICE void CopyAsThread(const CopyGroup& group, uint32_t thread, uint32_t num_threads) {
  using Unit = typename Access::Unit;
  const uint64_t num_units = uint64_t{group.num_blocks} * group.units_per_block;
  for (uint64_t first = thread; first < num_units; first += uint64_t{num_threads} * kUnitsInFlight) {
    Unit held[kUnitsInFlight];
    uint64_t to[kUnitsInFlight];
    FLEXKV_UNROLL
    for (uint32_t i = 0; i < kUnitsInFlight; ++i) {
      // Past the end the last unit is read once more: no branch comes between the loads.
      const uint64_t unit = first + uint64_t{i} * num_threads;
      const UnitPlace place = PlaceOfUnit(
          group, static_cast<uint32_t>(unit < num_units ? unit : num_units - 1), sizeof(Unit));
      to[i] = group.to_device != 0 ? place.device : place.host;
      held[i] = Access::Load(group.to_device != 0 ? place.host : place.device);
    }
    FLEXKV_UNROLL
    for (uint32_t i = 0; i < kUnitsInFlight; ++i) {
      if (first + uint64_t{i} * num_threads < num_units) Access::Store(to[i], held[i]);
    }
  }
}

}  // namespace flexkv
