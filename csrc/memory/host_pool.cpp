#include "memory/host_pool.hpp"

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>

#include "cuda/cuda_driver.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older kernels answer EINVAL and fault lazily
#endif

#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1U
#endif

namespace flexkv {

namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr auto kPinTurnInterval = std::chrono::milliseconds(5);

// Held by the one process of this user that pins memory at the moment: a name that only one socket can have.
// It goes with the process, whatever becomes of that, and leaves no file behind.
class PinTurn {
 public:
  PinTurn() : socket_(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)) {}
  PinTurn(const PinTurn&) = delete;
  // False while somebody else has it. Where there are no such names (no network namespace), everybody has it.
  bool Take() {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    const std::string name = "sglang-flexkv-pins-" + std::to_string(getuid());
    std::memcpy(address.sun_path + 1, name.data(), name.size());
    const socklen_t size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
    return socket_ < 0 || bind(socket_, reinterpret_cast<sockaddr*>(&address), size) == 0 ||
           errno != EADDRINUSE;
  }
  ~PinTurn() {
    if (socket_ >= 0) close(socket_);
  }

 private:
  const int socket_;
};

}  // namespace

HostPool::HostPool(size_t num_slots, size_t slot_bytes, int file)
    : num_slots_(num_slots), slot_bytes_(slot_bytes) {
  Require(slot_bytes > 0 && slot_bytes % kIoAlignment == 0, "slot_bytes must be a positive multiple of 4096");
  Require(num_slots > 0, "a host pool needs at least one slot");
  mapped_bytes_ = AlignUp(total_bytes(), kIoAlignment);
  // NORESERVE: the size was checked against the machine's memory; overcommit must not refuse it.
  const size_t reserved_bytes = mapped_bytes_ + kHugePageBytes;
  void* mem = mmap(nullptr, reserved_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mem == MAP_FAILED) {
    throw SystemError("cannot map " + std::to_string(mapped_bytes_) +
                      " bytes for the CPU tier: " + std::strerror(errno));
  }
  // From where a huge page can start.
  const uintptr_t start = reinterpret_cast<uintptr_t>(mem);
  const size_t before = AlignUp(start, kHugePageBytes) - start;
  base_ = static_cast<char*>(mem) + before;
  if (before > 0) munmap(mem, before);
  munmap(base_ + mapped_bytes_, reserved_bytes - before - mapped_bytes_);
  if (file != kOwnMemory) MapFile(file);
  // Fewer TLB misses and page faults where the system has huge pages; refusal costs nothing.
  (void)madvise(base_, mapped_bytes_, MADV_HUGEPAGE);
  // A forked child must not inherit (and copy on write) gigabytes that it never uses.
  (void)madvise(base_, mapped_bytes_, MADV_DONTFORK);
}

// Past the C library and Python: those that are built for one older than 2.27, as many are, do not have it.
int HostPool::MakeFile() {
  const long file = syscall(SYS_memfd_create, "sglang-flexkv", MFD_CLOEXEC);
  if (file < 0) throw SystemError(std::string("cannot make a file in memory: ") + std::strerror(errno));
  return static_cast<int>(file);
}

// In place of the memory of its own, which has nothing in it yet.
void HostPool::MapFile(int file) {
  struct stat found{};
  const bool has_room = fstat(file, &found) == 0 && (found.st_size >= static_cast<off_t>(mapped_bytes_) ||
                                                     ftruncate(file, static_cast<off_t>(mapped_bytes_)) == 0);
  if (!has_room || mmap(base_, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                        file, 0) == MAP_FAILED) {
    const int error = errno;
    munmap(base_, mapped_bytes_);
    throw SystemError("cannot map " + std::to_string(mapped_bytes_) +
                      " bytes of shared memory for the CPU tier: " + std::strerror(error));
  }
}

HostPool::~HostPool() {
  stop_.store(true);
  if (pinner_.joinable()) pinner_.join();
  if (cuda_) {
    const CudaContext context(*cuda_);
    for (size_t at = 0; at < pinned_bytes_.load(); at += kPinChunkBytes) {
      cuda_->HostUnregister(base_ + at);
    }
  }
  munmap(base_, mapped_bytes_);
}

void HostPool::StartPinning(std::shared_ptr<CudaDriver> cuda) {
  Require(!pinner_.joinable(), "pinning was started already");
  cuda_ = std::move(cuda);
  pinner_ = std::thread([this] { PinLoop(); });
}

void HostPool::PinLoop() {
  std::string ignored;
  bool lockable = !cuda_ || cuda_->MakeCurrent(&ignored);
  for (size_t at = 0; at < mapped_bytes_ && !stop_.load(); at += kPinChunkBytes) {
    const size_t bytes = std::min(kPinChunkBytes, mapped_bytes_ - at);
    // One process at a time, a chunk at a time: the pools of all ranks grow alike, and half of the time
    // nobody is in the driver for this.
    auto rest = std::chrono::steady_clock::duration::zero();
    {
      PinTurn turn;
      while (!turn.Take()) {
        if (stop_.load()) return;
        std::this_thread::sleep_for(kPinTurnInterval);
      }
      // Pages first: the driver would fault and clear them one after the other under locks that launches
      // need. Where the kernel is too old for this, pinning brings them, or their first use.
      const bool populated = madvise(base_ + at, bytes, MADV_POPULATE_WRITE) == 0;
      const auto start = std::chrono::steady_clock::now();
      if (lockable) {
        lockable = cuda_ ? cuda_->HostRegister(base_ + at, bytes) : mlock(base_ + at, bytes) == 0;
      }
      rest = std::chrono::steady_clock::now() - start;
      if (!populated && !lockable) return;
    }
    if (lockable) pinned_bytes_.fetch_add(bytes);
    populated_bytes_.fetch_add(bytes);
    if (cuda_ && lockable) std::this_thread::sleep_for(rest);
  }
}

}  // namespace flexkv
