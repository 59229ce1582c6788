// What a fuzz target shares with its driver, and with the other targets.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace flexkv {

// Plants a wrong expectation, so that the driver can show that a broken invariant ends the run.
inline bool fuzz_self_test = false;

// Inputs that lead deep.
std::vector<std::string> FuzzSeeds();

inline void Check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "broken invariant: %s\n", what);
  std::abort();
}

// Takes values from the input, zeros when it has come to its end.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  size_t left() const { return size_; }
  template <typename T>
  T Take() {
    T value{};
    const size_t bytes = std::min(size_, sizeof value);
    std::memcpy(&value, data_, bytes);
    data_ += bytes;
    size_ -= bytes;
    return value;
  }
  uint8_t Byte() { return Take<uint8_t>(); }
  // Mostly small, so that things meet; now and then anything.
  uint64_t Number() {
    const uint8_t byte = Byte();
    return byte < 0xF0 ? byte : Take<uint64_t>();
  }
  std::string Bytes(size_t bytes) {
    bytes = std::min(bytes, size_);
    std::string taken(reinterpret_cast<const char*>(data_), bytes);
    data_ += bytes;
    size_ -= bytes;
    return taken;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

}  // namespace flexkv
