// From which size on copy engines reach their speed, on this machine: measured when it starts.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/cuda_driver.hpp"
#include "cuda/cuda_stream.hpp"

namespace flexkv {

// Loads pieces of several sizes, some milliseconds in all, and returns the smallest with which the copy engines are
// about as fast as with large ones. 0 if something failed, with the reason in *note.
size_t MeasureEnginePieceBytes(CudaDriver& cuda, EventPool& timed, CopyStream& stream, std::string* note);

}  // namespace flexkv
