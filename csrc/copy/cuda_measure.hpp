// From which size on copy engines reach their speed, on this machine: measured when it starts.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "cuda/cuda_driver.hpp"

namespace flexkv {

// Bytes from which on pieces are large enough for copy engines.
struct EnginePieces {
  size_t loads = 0;   // that go by copy engines alone
  size_t stores = 0;  // the same
  size_t buffer = 0;  // between the host and a buffer on the device
  std::string note;   // in words
};

// Copies pieces of several sizes, for some tens of milliseconds in all. What cannot be measured is assumed.
// Nothing else should use the link or the driver meanwhile. Throws SystemError if the device gives not even a
// stream.
EnginePieces MeasureEnginePieces(const std::shared_ptr<CudaDriver>& cuda);

}  // namespace flexkv
