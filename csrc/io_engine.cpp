#include "io_engine.hpp"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace flexkv {

namespace {

// The ring is driven with plain system calls: three of them are all that is used, and so the
// extension neither needs liburing to build nor to run.
int RingSetup(unsigned entries, io_uring_params* params) {
  return static_cast<int>(syscall(__NR_io_uring_setup, entries, params));
}
int RingEnter(int fd, unsigned submit, unsigned wait, unsigned flags) {
  return static_cast<int>(syscall(__NR_io_uring_enter, fd, submit, wait, flags, nullptr, 0));
}

template <typename T>
T* At(void* base, size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

// Continues a request after `moved` bytes, or ends it. True if it has to be submitted again.
bool Advance(IoRequest& request, uint32_t* done, int64_t moved) {
  if (moved < 0) {
    if (moved == -EINTR || moved == -EAGAIN) return true;
    request.error = static_cast<int>(-moved);
    return false;
  }
  if (moved == 0) {
    request.error = ENODATA;
    return false;
  }
  *done += static_cast<uint32_t>(moved);
  return *done < request.bytes;
}

class UringEngine final : public IoEngine {
 public:
  explicit UringEngine(int depth) : depth_(static_cast<unsigned>(depth)) {
    io_uring_params params{};
    ring_fd_ = RingSetup(depth_, &params);
    if (ring_fd_ < 0) {
      throw SystemError(std::string("the kernel refuses io_uring: ") + std::strerror(errno));
    }
    if ((params.features & IORING_FEAT_SINGLE_MMAP) == 0) {
      close(ring_fd_);
      throw SystemError("io_uring of this kernel is too old (needs Linux 5.6)");
    }
    depth_ = params.sq_entries;
    ring_bytes_ = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                   params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    sqe_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    ring_ = mmap(nullptr, ring_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_fd_,
                 IORING_OFF_SQ_RING);
    void* sqes = mmap(nullptr, sqe_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                      ring_fd_, IORING_OFF_SQES);
    if (ring_ == MAP_FAILED || sqes == MAP_FAILED) {
      if (ring_ != MAP_FAILED) munmap(ring_, ring_bytes_);
      close(ring_fd_);
      throw SystemError(std::string("cannot map the io_uring queues: ") + std::strerror(errno));
    }
    sqes_ = static_cast<io_uring_sqe*>(sqes);
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
  }

  const char* name() const override { return "io_uring"; }

  void Run(std::vector<IoRequest>& requests, bool write) override {
    std::vector<uint32_t> done(requests.size(), 0);
    std::vector<size_t> again;  // short transfers that go on
    size_t next = 0, ended = 0;
    unsigned in_flight = 0, queued = 0;
    while (ended < requests.size()) {
      while (in_flight < depth_ && (next < requests.size() || !again.empty())) {
        size_t id;
        if (!again.empty()) {
          id = again.back();
          again.pop_back();
        } else {
          id = next++;
        }
        Queue(requests[id], id, done[id], write);
        ++in_flight;
        ++queued;
      }
      const int entered = RingEnter(ring_fd_, queued, in_flight > 0 ? 1 : 0, IORING_ENTER_GETEVENTS);
      if (entered >= 0) {
        queued -= std::min(queued, static_cast<unsigned>(entered));
      } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
        // The ring itself is gone. What is in flight cannot be told apart from what never went, so
        // nothing that was not reported done may be trusted.
        const int error = errno;
        for (size_t i = 0; i < requests.size(); ++i) {
          if (done[i] < requests[i].bytes && requests[i].error == 0) requests[i].error = error;
        }
        return;
      }
      unsigned head = *cq_head_;
      const unsigned tail = std::atomic_ref<unsigned>(*cq_tail_).load(std::memory_order_acquire);
      for (; head != tail; ++head) {
        const io_uring_cqe& cqe = cqes_[head & cq_mask_];
        const size_t id = static_cast<size_t>(cqe.user_data);
        --in_flight;
        if (Advance(requests[id], &done[id], cqe.res)) {
          again.push_back(id);
        } else {
          ++ended;
        }
      }
      std::atomic_ref<unsigned>(*cq_head_).store(head, std::memory_order_release);
    }
  }

 private:
  void Queue(const IoRequest& request, size_t id, uint32_t done, bool write) {
    const unsigned tail = *sq_tail_;
    const unsigned slot = tail & sq_mask_;
    io_uring_sqe& sqe = sqes_[slot];
    sqe = io_uring_sqe{};
    sqe.opcode = write ? IORING_OP_WRITE : IORING_OP_READ;
    sqe.fd = request.fd;
    sqe.off = request.offset + done;
    sqe.addr = reinterpret_cast<uint64_t>(request.data + done);
    sqe.len = request.bytes - done;
    sqe.user_data = id;
    sq_array_[slot] = slot;
    std::atomic_ref<unsigned>(*sq_tail_).store(tail + 1, std::memory_order_release);
  }

  unsigned depth_;
  int ring_fd_ = -1;
  void* ring_ = nullptr;
  size_t ring_bytes_ = 0, sqe_bytes_ = 0;
  io_uring_sqe* sqes_ = nullptr;
  unsigned *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0;
  io_uring_cqe* cqes_ = nullptr;
};

class ThreadEngine final : public IoEngine {
 public:
  explicit ThreadEngine(int depth) {
    for (int i = 0; i < depth; ++i) threads_.emplace_back([this] { Work(); });
  }

  ~ThreadEngine() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  const char* name() const override { return "threads"; }

  void Run(std::vector<IoRequest>& requests, bool write) override {
    std::unique_lock<std::mutex> lock(mutex_);
    requests_ = &requests;
    write_ = write;
    next_ = 0;
    left_ = requests.size();
    wake_.notify_all();
    idle_.wait(lock, [this] { return left_ == 0; });
    requests_ = nullptr;
  }

 private:
  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || (requests_ != nullptr && next_ < requests_->size()); });
      if (stop_) return;
      IoRequest& request = (*requests_)[next_++];
      const bool write = write_;
      lock.unlock();
      uint32_t done = 0;
      for (;;) {
        const off_t offset = static_cast<off_t>(request.offset + done);
        const ssize_t moved =
            write ? pwrite(request.fd, request.data + done, request.bytes - done, offset)
                  : pread(request.fd, request.data + done, request.bytes - done, offset);
        if (!Advance(request, &done, moved < 0 ? -errno : moved)) break;
      }
      lock.lock();
      if (--left_ == 0) idle_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::vector<std::thread> threads_;
  std::vector<IoRequest>* requests_ = nullptr;
  size_t next_ = 0, left_ = 0;
  bool write_ = false, stop_ = false;
};

}  // namespace

std::unique_ptr<IoEngine> MakeIoEngine(IoEngineKind kind, int depth, std::string* note) {
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
  return std::make_unique<ThreadEngine>(std::min(depth, 32));
}

}  // namespace flexkv
