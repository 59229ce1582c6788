#include "ssd/io_engine.hpp"

#include <linux/io_uring.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace flexkv {

namespace {

// The ring is driven with plain system calls: three of them are all that is used, and so the
// extension neither needs liburing to build nor to run.
int RingSetup(unsigned entries, io_uring_params* params) {
  return static_cast<int>(syscall(__NR_io_uring_setup, entries, params));
}
int RingEnter(int fd, unsigned submit, unsigned wait, unsigned flags, void* arg, size_t size) {
  return static_cast<int>(syscall(__NR_io_uring_enter, fd, submit, wait, flags, arg, size));
}
int RingRegister(int fd, unsigned opcode, const void* arg, unsigned count) {
  return static_cast<int>(syscall(__NR_io_uring_register, fd, opcode, arg, count));
}

template <typename T>
T* At(void* base, size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

// Takes in what one attempt moved. True if the transfer has to go on.
bool Advance(Io* io, int64_t moved) {
  if (moved < 0) {
    if (moved == -EINTR || moved == -EAGAIN) return true;
    io->error = static_cast<int>(-moved);
    return false;
  }
  if (moved == 0) {
    io->error = ENODATA;
    return false;
  }
  io->done += static_cast<uint32_t>(moved);
  return io->done < io->bytes;
}

class UringEngine final : public IoEngine {
 public:
  explicit UringEngine(int depth) : depth_(depth) {
    io_uring_params params{};
    // Two more than transfers: one that waits for Wake, one for a cancellation.
    ring_fd_ = RingSetup(static_cast<unsigned>(depth) + 2, &params);
    if (ring_fd_ < 0) {
      throw SystemError(std::string("the kernel refuses io_uring: ") + std::strerror(errno));
    }
    constexpr unsigned kNeeded = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_EXT_ARG | IORING_FEAT_NODROP;
    if ((params.features & kNeeded) != kNeeded) {
      close(ring_fd_);
      throw SystemError("io_uring of this kernel is too old (needs Linux 5.11)");
    }
    ring_bytes_ = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                   params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    sqe_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    ring_ = mmap(nullptr, ring_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_fd_,
                 IORING_OFF_SQ_RING);
    void* sqes = mmap(nullptr, sqe_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_fd_,
                      IORING_OFF_SQES);
    wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ring_ == MAP_FAILED || sqes == MAP_FAILED || wake_fd_ < 0) {
      const std::string why = std::strerror(errno);
      if (ring_ != MAP_FAILED) munmap(ring_, ring_bytes_);
      if (sqes != MAP_FAILED) munmap(sqes, sqe_bytes_);
      if (wake_fd_ >= 0) close(wake_fd_);
      close(ring_fd_);
      throw SystemError("cannot map the io_uring queues: " + why);
    }
    sqes_ = static_cast<io_uring_sqe*>(sqes);
    sq_entries_ = params.sq_entries;
    sq_head_ = At<unsigned>(ring_, params.sq_off.head);
    sq_tail_ = At<unsigned>(ring_, params.sq_off.tail);
    sq_mask_ = *At<unsigned>(ring_, params.sq_off.ring_mask);
    sq_array_ = At<unsigned>(ring_, params.sq_off.array);
    cq_head_ = At<unsigned>(ring_, params.cq_off.head);
    cq_tail_ = At<unsigned>(ring_, params.cq_off.tail);
    cq_mask_ = *At<unsigned>(ring_, params.cq_off.ring_mask);
    cqes_ = At<io_uring_cqe>(ring_, params.cq_off.cqes);
  }

  ~UringEngine() override {
    munmap(sqes_, sqe_bytes_);
    munmap(ring_, ring_bytes_);
    close(ring_fd_);
    close(wake_fd_);
  }

  const char* name() const override { return "io_uring"; }
  int depth() const override { return depth_; }

  void Submit(Io* const* ios, size_t count) override {
    for (size_t i = 0; i < count; ++i) Queue(ios[i]);
    Enter(0, 0);
  }

  void Reap(std::vector<Io*>* ended, double timeout_s) override {
    const size_t before = ended->size();
    woken_ = false;
    Collect(ended);
    // A Wake that is taken in here is news to the caller: waiting for the next one would lose it.
    if (woken_ || !again_.empty() || ended->size() > before || !refused_.empty()) timeout_s = 0;
    for (Io* io : again_) Queue(io);
    again_.clear();
    if (!wake_armed_) ArmWake();
    Enter(timeout_s > 0 ? 1 : 0, timeout_s);
    Collect(ended);
    ended->insert(ended->end(), refused_.begin(), refused_.end());
    refused_.clear();
  }

  void Cancel(Io* io) override {
    if (io_uring_sqe* sqe = NextSqe()) {
      sqe->opcode = IORING_OP_ASYNC_CANCEL;
      sqe->addr = reinterpret_cast<uint64_t>(io);
      sqe->user_data = kCancelTag;
      Enter(0, 0);
    }
  }

  bool RegisterFile(int fd) override {
    if (registered_fd_ >= 0) RingRegister(ring_fd_, IORING_UNREGISTER_FILES, nullptr, 0);
    registered_fd_ = RingRegister(ring_fd_, IORING_REGISTER_FILES, &fd, 1) == 0 ? fd : -1;
    return registered_fd_ >= 0;
  }

  bool RegisterMemory(char* base, size_t bytes) override {
    if (buffers_.empty()) {
      io_uring_rsrc_register table{};
      table.nr = kBuffersMax;
      table.flags = IORING_RSRC_REGISTER_SPARSE;
      if (RingRegister(ring_fd_, IORING_REGISTER_BUFFERS2, &table, sizeof table) < 0) return false;
    }
    if (buffers_.size() == kBuffersMax || (!buffers_.empty() && base < End(buffers_.back()))) return false;
    const iovec buffer{base, bytes};
    io_uring_rsrc_update2 update{};
    update.offset = static_cast<unsigned>(buffers_.size());
    update.data = reinterpret_cast<uint64_t>(&buffer);
    update.nr = 1;
    if (RingRegister(ring_fd_, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update) < 0) return false;
    buffers_.push_back(buffer);
    return true;
  }

  void Wake() override {
    const uint64_t one = 1;
    (void)!write(wake_fd_, &one, sizeof one);
  }

 private:
  static constexpr uint64_t kWakeTag = 1, kCancelTag = 2;  // no pointer has these values
  static constexpr unsigned kBuffersMax = 16384;           // the kernel's own limit

  static char* End(const iovec& buffer) { return static_cast<char*>(buffer.iov_base) + buffer.iov_len; }

  io_uring_sqe* NextSqe() {
    const unsigned head = std::atomic_ref<unsigned>(*sq_head_).load(std::memory_order_acquire);
    const unsigned tail = *sq_tail_;
    if (tail - head == sq_entries_) return nullptr;
    const unsigned slot = tail & sq_mask_;
    sqes_[slot] = io_uring_sqe{};
    sq_array_[slot] = slot;
    std::atomic_ref<unsigned>(*sq_tail_).store(tail + 1, std::memory_order_release);
    ++queued_;
    return &sqes_[slot];
  }

  void Queue(Io* io) {
    io_uring_sqe* sqe = NextSqe();
    Require(sqe != nullptr, "more transfers were submitted than the ring is deep");
    char* data = io->data + io->done;
    const uint32_t bytes = io->bytes - io->done;
    const int buffer = BufferOf(data, bytes);
    if (buffer >= 0) {
      sqe->opcode = io->write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
      sqe->buf_index = static_cast<uint16_t>(buffer);
    } else {
      sqe->opcode = io->write ? IORING_OP_WRITE : IORING_OP_READ;
    }
    sqe->fd = io->fd;
    if (io->fd == registered_fd_) {
      sqe->fd = 0;
      sqe->flags = IOSQE_FIXED_FILE;
    }
    sqe->off = io->offset + io->done;
    sqe->addr = reinterpret_cast<uint64_t>(data);
    sqe->len = bytes;
    sqe->user_data = reinterpret_cast<uint64_t>(io);
  }

  int BufferOf(char* data, uint32_t bytes) const {
    auto it = std::upper_bound(buffers_.begin(), buffers_.end(), data, [](char* at, const iovec& buffer) {
      return at < static_cast<char*>(buffer.iov_base);
    });
    if (it == buffers_.begin()) return -1;
    --it;
    return data + bytes <= End(*it) ? static_cast<int>(it - buffers_.begin()) : -1;
  }

  void ArmWake() {
    if (io_uring_sqe* sqe = NextSqe()) {
      sqe->opcode = IORING_OP_POLL_ADD;
      sqe->fd = wake_fd_;
      sqe->poll32_events = POLLIN;
      sqe->user_data = kWakeTag;
      wake_armed_ = true;
    }
  }

  void Enter(unsigned wait, double timeout_s) {
    __kernel_timespec ts{};
    io_uring_getevents_arg arg{};
    ts.tv_sec = static_cast<long long>(timeout_s);
    ts.tv_nsec = static_cast<long long>((timeout_s - static_cast<double>(ts.tv_sec)) * 1e9);
    arg.ts = reinterpret_cast<uint64_t>(&ts);
    if (queued_ == 0 && wait == 0) return;
    const unsigned flags = wait > 0 ? IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG : 0u;
    const int entered =
        RingEnter(ring_fd_, queued_, wait, flags, wait > 0 ? &arg : nullptr, wait > 0 ? sizeof arg : 0);
    if (entered >= 0) {
      queued_ -= std::min(queued_, static_cast<unsigned>(entered));
      return;
    }
    // ETIME: everything was submitted, nothing ended in time. The others: try again with the next call.
    if (errno == ETIME) queued_ = 0;
    if (errno == ETIME || errno == EINTR || errno == EAGAIN || errno == EBUSY) return;
    // The kernel takes nothing any more. What it has not seen fails here; what it has is still its own.
    const int error = errno;
    for (; queued_ > 0; --queued_) {
      const unsigned tail = *sq_tail_ - 1;
      const uint64_t tag = sqes_[tail & sq_mask_].user_data;
      std::atomic_ref<unsigned>(*sq_tail_).store(tail, std::memory_order_release);
      if (tag == kWakeTag) wake_armed_ = false;
      if (tag == kWakeTag || tag == kCancelTag) continue;
      Io* io = reinterpret_cast<Io*>(tag);
      io->error = error;
      refused_.push_back(io);
    }
  }

  // True if Wake was called.
  bool Collect(std::vector<Io*>* ended) {
    bool woken = false;
    unsigned head = *cq_head_;
    const unsigned tail = std::atomic_ref<unsigned>(*cq_tail_).load(std::memory_order_acquire);
    for (; head != tail; ++head) {
      const io_uring_cqe& cqe = cqes_[head & cq_mask_];
      if (cqe.user_data == kWakeTag) {
        uint64_t count;
        (void)!read(wake_fd_, &count, sizeof count);
        wake_armed_ = false;
        woken_ = true;
      } else if (cqe.user_data != kCancelTag) {
        Io* io = reinterpret_cast<Io*>(cqe.user_data);
        (Advance(io, cqe.res) ? again_ : *ended).push_back(io);
      }
    }
    std::atomic_ref<unsigned>(*cq_head_).store(head, std::memory_order_release);
    return woken;
  }

  const int depth_;
  int ring_fd_ = -1, wake_fd_ = -1, registered_fd_ = -1;
  void* ring_ = nullptr;
  size_t ring_bytes_ = 0, sqe_bytes_ = 0;
  io_uring_sqe* sqes_ = nullptr;
  unsigned *sq_head_ = nullptr, *sq_tail_ = nullptr, *sq_array_ = nullptr;
  unsigned *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_entries_ = 0, sq_mask_ = 0, cq_mask_ = 0;
  io_uring_cqe* cqes_ = nullptr;
  unsigned queued_ = 0;  // entries that the kernel has not been told of
  bool wake_armed_ = false;
  bool woken_ = false;          // since the last Reap began
  std::vector<iovec> buffers_;  // registered, by address
  std::vector<Io*> again_;      // short transfers that go on
  std::vector<Io*> refused_;    // failed before they started
};

class ThreadEngine final : public IoEngine {
 public:
  ThreadEngine(int depth, FileCalls* calls) : calls_(calls) {
    for (int i = 0; i < depth; ++i) threads_.emplace_back([this] { Work(); });
  }

  ~ThreadEngine() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  const char* name() const override { return "threads"; }
  int depth() const override { return static_cast<int>(threads_.size()); }

  void Submit(Io* const* ios, size_t count) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.insert(queue_.end(), ios, ios + count);
    }
    count == 1 ? work_.notify_one() : work_.notify_all();
  }

  void Reap(std::vector<Io*>* ended, double timeout_s) override {
    std::unique_lock<std::mutex> lock(mutex_);
    if (timeout_s > 0) {
      reap_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                     [this] { return woken_ || !ended_.empty(); });
    }
    woken_ = false;
    ended->insert(ended->end(), ended_.begin(), ended_.end());
    ended_.clear();
  }

  void Cancel(Io* io) override {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = std::find(queue_.begin(), queue_.end(), io);
    if (it == queue_.end()) return;  // a thread is in its system call
    queue_.erase(it);
    io->error = ECANCELED;
    ended_.push_back(io);
  }

  bool RegisterFile(int) override { return false; }
  bool RegisterMemory(char*, size_t) override { return false; }

  void Wake() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      woken_ = true;
    }
    reap_.notify_one();
  }

 private:
  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (stop_) return;
      Io* io = queue_.front();
      queue_.pop_front();
      lock.unlock();
      int64_t moved;
      do {
        char* data = io->data + io->done;
        const uint32_t left = io->bytes - io->done;
        moved = io->write ? calls_->Write(io->fd, data, left, io->offset + io->done)
                          : calls_->Read(io->fd, data, left, io->offset + io->done);
      } while (Advance(io, moved));
      lock.lock();
      ended_.push_back(io);
      reap_.notify_one();
    }
  }

  FileCalls* const calls_;
  std::mutex mutex_;
  std::condition_variable work_, reap_;
  std::vector<std::thread> threads_;
  std::deque<Io*> queue_;
  std::vector<Io*> ended_;
  bool woken_ = false, stop_ = false;
};

}  // namespace

std::unique_ptr<IoEngine> MakeIoEngine(IoEngineKind kind, int depth, FileCalls* calls, std::string* note) {
  Require(depth > 0 && depth <= 4096, "I/O depth must be between 1 and 4096");
  if (kind != IoEngineKind::kThreads) {
    try {
      return std::make_unique<UringEngine>(depth);
    } catch (const SystemError& error) {
      if (kind == IoEngineKind::kIoUring) throw;
      *note = error.what();
    }
  }
  // Threads cost more than ring entries; beyond a few dozen they only queue in the kernel.
  return std::make_unique<ThreadEngine>(std::min(depth, 32), calls);
}

}  // namespace flexkv
