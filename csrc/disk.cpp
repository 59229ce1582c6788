#include "disk.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace flexkv {

namespace {
int Result(int value) { return value < 0 ? -errno : value; }
}  // namespace

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
  return -posix_fallocate(fd, 0, static_cast<off_t>(bytes));
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

}  // namespace flexkv
