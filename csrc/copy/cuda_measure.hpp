// How large a piece has to be so that the copy engines are the better way, on this machine: measured when it starts.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "copy/cuda_paths.hpp"

namespace flexkv {

// Loads pieces of several sizes both ways, some milliseconds in all, and returns the size from which on the copy
// engines are about as fast as the kernel, or faster: they take nothing from the GPU's processors. That the kernel
// runs once here means besides that its first launch, which loads it, is not one that a forward waits for. 0 if
// something failed, with the reason in *note.
size_t MeasureEnginePieceBytes(CudaDriver& cuda, const KernelPath& kernel, EventPool& timed,
                               CopyStream& stream, std::string* note);

}  // namespace flexkv
