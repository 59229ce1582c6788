// From which size on copy engines reach their speed, on this machine: measured when it starts.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/cuda_driver.hpp"
#include "cuda/cuda_stream.hpp"

namespace flexkv {

// What pieces are measured. Where they are on the device has no order.
struct MeasuredPieces {
  bool to_device;
  bool in_host_order;  // one after the other in the host's memory, as layers of a block are; or in no order
  double slower_max;   // than large ones they may be, as a factor
};

// Copies pieces of several sizes, for some milliseconds in all, and returns the smallest with which copy engines are
// nearly as fast as with large ones. 0 if something failed, with the reason in *note.
size_t MeasureEnginePieceBytes(CudaDriver& cuda, EventPool& timed, CopyStream& stream,
                               const MeasuredPieces& pieces, std::string* note);

}  // namespace flexkv
