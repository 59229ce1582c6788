// An array that grows without copying its elements: pages are moved, not bytes, and pages that were
// never touched cost nothing. Elements start as zeros, and a growth never makes a caller wait for
// the copying of millions of them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <new>
#include <type_traits>

#include "base/types.hpp"

namespace flexkv {

template <typename T>
class GrowingArray {
  static_assert(std::is_trivially_copyable_v<T>, "elements are moved as pages");

 public:
  GrowingArray() = default;
  ~GrowingArray() {
    if (data_ != nullptr) munmap(data_, capacity_ * sizeof(T));
  }
  GrowingArray(const GrowingArray&) = delete;
  GrowingArray& operator=(const GrowingArray&) = delete;

  // Makes room for `count` elements in all; throws std::bad_alloc. `populate`: with pages that are
  // there already, so that nobody waits for the kernel later.
  void Reserve(size_t count, bool populate = false) {
    if (count > capacity_) Grow(std::max({count, capacity_ + capacity_ / 2, kPage / sizeof(T) + 1}));
    // Where the kernel cannot do it ahead, it does it at the first touch.
    if (populate && count > 0) madvise(data_, count * sizeof(T), MADV_POPULATE_WRITE);
  }

  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  static constexpr size_t kPage = 4096, kHugePage = 2 << 20;

  void Grow(size_t capacity) {
    // Lookups are scattered: with small pages each of them would also miss the TLB. Huge pages are moved whole
    // only from one border of huge pages to another: elsewhere the kernel breaks them up.
    const size_t bytes = capacity * sizeof(T);
    void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* const grown = reinterpret_cast<char*>(AlignUp(reinterpret_cast<size_t>(mapped), kHugePage));
    const size_t before = static_cast<size_t>(grown - static_cast<char*>(mapped));
    if (before > 0) munmap(mapped, before);
    munmap(grown + AlignUp(bytes, kPage), kHugePage - before);
    if (data_ != nullptr &&
        mremap(data_, capacity_ * sizeof(T), bytes, MREMAP_MAYMOVE | MREMAP_FIXED, grown) == MAP_FAILED) {
      munmap(grown, bytes);
      throw std::bad_alloc();
    }
    madvise(grown, bytes, MADV_HUGEPAGE);
    data_ = reinterpret_cast<T*>(grown);
    capacity_ = capacity;
  }

  T* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace flexkv
