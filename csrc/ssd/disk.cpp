#include "ssd/disk.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace flexkv {

namespace {

// Zeros are written in pieces of this size.
constexpr size_t kFillBytes = size_t{4} << 20;

int Result(int value) { return value < 0 ? -errno : value; }

// What file systems, FUSE drivers and system call filters say about calls that they do not know.
bool IsUnsupported(int error) { return error == -EOPNOTSUPP || error == -ENOSYS || error == -EINVAL; }

}  // namespace

DiskError::DiskError(const std::string& path, const std::string& what, int error)
    : SystemError(path + ": " + what + ": " + std::strerror(std::abs(error))),
      path_(path),
      error_(std::abs(error)) {}

int Disk::Open(const std::string& path, int flags) {
  return Result(open(path.c_str(), flags | O_CLOEXEC, 0600));
}

void Disk::Close(int fd) { close(fd); }

int64_t Disk::Read(int fd, void* data, size_t bytes, uint64_t offset) {
  const ssize_t moved = pread(fd, data, bytes, static_cast<off_t>(offset));
  return moved < 0 ? -errno : moved;
}

int64_t Disk::Write(int fd, const void* data, size_t bytes, uint64_t offset) {
  const ssize_t moved = pwrite(fd, data, bytes, static_cast<off_t>(offset));
  return moved < 0 ? -errno : moved;
}

int Disk::Sync(int fd) { return Result(fdatasync(fd)); }

int Disk::Reserve(int fd, uint64_t bytes) {
  // Not posix_fallocate: where the file system cannot, that writes single bytes, which O_DIRECT refuses.
  int result;
  do {
    result = Result(fallocate(fd, 0, 0, static_cast<off_t>(bytes)));
  } while (result == -EINTR);
  return result;
}

int Disk::Truncate(int fd, uint64_t bytes) { return Result(ftruncate(fd, static_cast<off_t>(bytes))); }

int64_t Disk::Size(int fd) {
  struct stat stat;
  return fstat(fd, &stat) < 0 ? -errno : stat.st_size;
}

int Disk::Rename(const std::string& from, const std::string& to) {
  return Result(rename(from.c_str(), to.c_str()));
}

int Disk::SyncDirectory(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return -errno;
  const int result = Result(fsync(fd));
  close(fd);
  return result;
}

int Disk::Links(int fd) {
  struct stat stat;
  return fstat(fd, &stat) < 0 ? -errno : static_cast<int>(stat.st_nlink);
}

std::unique_ptr<IoEngine> Disk::MakeEngine(IoEngineKind kind, int depth, std::string* note) {
  return MakeIoEngine(kind, depth, this, note);
}

int Disk::ReadAll(int fd, void* data, size_t bytes, uint64_t offset) {
  for (size_t done = 0; done < bytes;) {
    const int64_t moved = Read(fd, static_cast<char*>(data) + done, bytes - done, offset + done);
    if (moved == -EINTR || moved == -EAGAIN) continue;
    if (moved < 0) return static_cast<int>(moved);
    if (moved == 0) return -ENODATA;
    done += static_cast<size_t>(moved);
  }
  return 0;
}

int Disk::WriteAll(int fd, const void* data, size_t bytes, uint64_t offset) {
  for (size_t done = 0; done < bytes;) {
    const int64_t moved = Write(fd, static_cast<const char*>(data) + done, bytes - done, offset + done);
    if (moved == -EINTR || moved == -EAGAIN) continue;
    if (moved < 0) return static_cast<int>(moved);
    if (moved == 0) return -EIO;
    done += static_cast<size_t>(moved);
  }
  return 0;
}

int Disk::TakeSpace(int fd, uint64_t bytes, bool* by_writing) {
  const int error = Reserve(fd, bytes);
  return IsUnsupported(error) ? FillHoles(fd, bytes, by_writing) : error;
}

int Disk::FillHoles(int fd, uint64_t bytes, bool* by_writing) {
  int64_t size = Size(fd);
  if (size < 0) return static_cast<int>(size);
  const std::unique_ptr<char, void (*)(void*)> buffer(
      static_cast<char*>(std::aligned_alloc(kIoAlignment, kFillBytes)), std::free);
  if (!buffer) return -ENOMEM;
  // O_DIRECT reads up to the end of a file only if that is aligned.
  if (size % static_cast<int64_t>(kIoAlignment) != 0) {
    size = static_cast<int64_t>(AlignUp(static_cast<uint64_t>(size), kIoAlignment));
    if (const int error = Truncate(fd, static_cast<uint64_t>(size)); error < 0) return error;
  }
  for (uint64_t at = 0; at < bytes;) {
    // The next hole. All that lies behind the end is one, and the only one where the file system knows
    // of no others.
    uint64_t end = bytes;
    if (at < static_cast<uint64_t>(size)) {
      const off_t hole = lseek(fd, static_cast<off_t>(at), SEEK_HOLE);
      at = static_cast<uint64_t>(hole < 0 ? size : hole);
      const off_t data = lseek(fd, static_cast<off_t>(at), SEEK_DATA);
      if (data >= 0) end = std::min(bytes, AlignUp(static_cast<uint64_t>(data), kIoAlignment));
    }
    // A file system's blocks may be smaller than what O_DIRECT moves: a piece may begin or end with data.
    at = at / kIoAlignment * kIoAlignment;
    while (at < end) {
      const size_t piece = std::min<uint64_t>(kFillBytes, end - at);
      std::memset(buffer.get(), 0, piece);
      const size_t held =
          std::min<uint64_t>(piece, static_cast<uint64_t>(size) - std::min<uint64_t>(at, size));
      int error = held > 0 ? ReadAll(fd, buffer.get(), held, at) : 0;
      if (error == 0) error = WriteAll(fd, buffer.get(), piece, at);
      if (error < 0) return error;
      *by_writing = true;
      at += piece;
    }
  }
  // Through a cache, what there was no room for fails only now.
  return Persist(fd);
}

int Disk::Persist(int fd) {
  const int error = Sync(fd);
  return IsUnsupported(error) ? 0 : error;
}

int Disk::PersistDirectory(const std::string& path) {
  const int error = SyncDirectory(path);
  return IsUnsupported(error) ? 0 : error;
}

}  // namespace flexkv
