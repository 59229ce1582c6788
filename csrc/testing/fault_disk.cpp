#include "testing/fault_disk.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <list>

#include "base/types.hpp"

namespace flexkv {

namespace {

using Clock = std::chrono::steady_clock;

// Short transfers end on a boundary that O_DIRECT can go on from.
constexpr size_t kShortUnit = 512;
// Nobody wakes an engine when faults are cleared: with transfers that wait for their faults it looks so
// often.
constexpr double kLookForClearS = 0.002;

Clock::duration Seconds(double s) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
}

// Directories are compared by this.
std::string Canonical(const std::filesystem::path& directory) {
  std::error_code ignored;
  return std::filesystem::weakly_canonical(directory.empty() ? "." : directory, ignored).string();
}

std::string DirectoryOf(const std::string& path) {
  return Canonical(std::filesystem::path(path).parent_path());
}

}  // namespace

// ---- faults ------------------------------------------------------------------------------------

void FaultyDisk::SetFault(const std::string& operation, double probability, int error, double delay_s,
                          uint64_t after) {
  constexpr std::string_view kCalls[] = {"open",     "read",   "write",       "sync",  "reserve",
                                         "truncate", "rename", "open_direct", "direct"};
  const bool call = std::find(std::begin(kCalls), std::end(kCalls), operation) != std::end(kCalls);
  Require(call || operation == "short" || operation == "flip", "no such fault: " + operation);
  Require(probability >= 0 && probability <= 1, "a probability is between 0 and 1");
  Require(error >= 0 && delay_s >= 0, "an errno and a delay are not negative");
  Require(call || (error == 0 && delay_s == 0), operation + " takes neither an error nor a delay");
  Require(!call || probability == 0 || error > 0 || delay_s > 0, operation + " needs an error or a delay");
  std::lock_guard<std::mutex> lock(mutex_);
  faults_[operation] = {probability, error, delay_s, after, 0};
}

void FaultyDisk::ClearFaults() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    faults_.clear();
    ++era_;
  }
  cleared_.notify_all();
}

bool FaultyDisk::IsOver(const Fault& fault) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return fault.era != era_;
}

std::map<std::string, uint64_t> FaultyDisk::Injected() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return injected_;
}

FaultyDisk::Fault FaultyDisk::DrawLocked(std::string_view operation) {
  const auto it = faults_.find(operation);
  if (it == faults_.end()) return {};
  if (it->second.after > 0) {
    it->second.after--;
    return {};
  }
  if (std::uniform_real_distribution<double>()(random_) >= it->second.probability) return {};
  injected_[it->first]++;
  Fault fault = it->second;
  fault.era = era_;
  return fault;
}

FaultyDisk::Fault FaultyDisk::Draw(std::string_view operation) {
  std::lock_guard<std::mutex> lock(mutex_);
  return DrawLocked(operation);
}

int FaultyDisk::Inject(std::string_view operation) {
  std::unique_lock<std::mutex> lock(mutex_);
  const Fault fault = DrawLocked(operation);
  if (fault.delay_s > 0) {
    cleared_.wait_for(lock, Seconds(fault.delay_s), [&] { return era_ != fault.era; });
  }
  return -fault.error;
}

size_t FaultyDisk::Shorten(size_t bytes) {
  if (bytes <= kShortUnit) return bytes;
  std::lock_guard<std::mutex> lock(mutex_);
  if (DrawLocked("short").probability == 0) return bytes;
  return kShortUnit * (1 + random_() % ((bytes - 1) / kShortUnit));
}

void FaultyDisk::Flip(char* data, size_t bytes) {
  if (bytes == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (DrawLocked("flip").probability == 0) return;
  const uint64_t bit = random_() % (uint64_t{bytes} * 8);
  data[bit / 8] = static_cast<char>(data[bit / 8] ^ (1 << bit % 8));
}

int FaultyDisk::InjectTransfer(std::string_view operation, int fd) {
  const int flags = fcntl(fd, F_GETFL);
  const int error = flags >= 0 && (flags & O_DIRECT) != 0 ? Inject("direct") : 0;
  return error < 0 ? error : Inject(operation);
}

int FaultyDisk::Open(const std::string& path, int flags) {
  int error = Inject("open");
  if (error == 0 && (flags & O_DIRECT) != 0) error = Inject("open_direct");
  return error < 0 ? error : Disk::Open(path, flags);
}

int64_t FaultyDisk::Read(int fd, void* data, size_t bytes, uint64_t offset) {
  if (const int error = InjectTransfer("read", fd); error < 0) return error;
  const int64_t moved = Disk::Read(fd, data, Shorten(bytes), offset);
  if (moved > 0) Flip(static_cast<char*>(data), static_cast<size_t>(moved));
  return moved;
}

int64_t FaultyDisk::Write(int fd, const void* data, size_t bytes, uint64_t offset) {
  const int error = InjectTransfer("write", fd);
  return error < 0 ? error : Disk::Write(fd, data, Shorten(bytes), offset);
}

int FaultyDisk::Sync(int fd) {
  const int error = Inject("sync");
  return error < 0 ? error : Disk::Sync(fd);
}

int FaultyDisk::Reserve(int fd, uint64_t bytes) {
  const int error = Inject("reserve");
  return error < 0 ? error : Disk::Reserve(fd, bytes);
}

int FaultyDisk::Truncate(int fd, uint64_t bytes) {
  const int error = Inject("truncate");
  return error < 0 ? error : Disk::Truncate(fd, bytes);
}

int FaultyDisk::Rename(const std::string& from, const std::string& to) {
  const int error = Inject("rename");
  return error < 0 ? error : Disk::Rename(from, to);
}

int FaultyDisk::SyncDirectory(const std::string& path) {
  const int error = Inject("sync");
  return error < 0 ? error : Disk::SyncDirectory(path);
}

// What the thread engine calls: results that are really short. All other faults of a transfer are the
// business of the engine around it, whose stalls occupy no thread and can be cancelled.
class FaultyDisk::ShortDisk final : public Disk {
 public:
  explicit ShortDisk(FaultyDisk* disk) : disk_(disk) {}

  int64_t Read(int fd, void* data, size_t bytes, uint64_t offset) override {
    return Disk::Read(fd, data, disk_->Shorten(bytes), offset);
  }
  int64_t Write(int fd, const void* data, size_t bytes, uint64_t offset) override {
    return Disk::Write(fd, data, disk_->Shorten(bytes), offset);
  }

 private:
  FaultyDisk* const disk_;
};

// A real engine with faults in front of it.
class FaultyDisk::Engine final : public IoEngine {
 public:
  Engine(FaultyDisk* disk, IoEngineKind kind, int depth, std::string* note)
      : disk_(disk),
        short_disk_(disk),
        inner_(MakeIoEngine(kind, depth, &short_disk_, note)),
        calls_disk_(std::string_view(inner_->name()) == "threads") {}

  const char* name() const override { return inner_->name(); }
  int depth() const override { return inner_->depth(); }

  void Submit(Io* const* ios, size_t count) override {
    const Clock::time_point now = Clock::now();
    for (size_t i = 0; i < count; ++i) {
      const Fault fault = disk_->Draw(ios[i]->write ? "write" : "read");
      if (fault.error == 0 && fault.delay_s == 0) {
        Pass(ios[i]);
      } else {
        held_.push_back({ios[i], now + Seconds(fault.delay_s), fault});
      }
    }
    Flush();
  }

  // May return early and with nothing when a stall ends or the rest of a transfer is started.
  void Reap(std::vector<Io*>* ended, double timeout_s) override {
    const size_t before = ended->size();
    ReleaseDue(ended);
    double wait_s = ended->size() > before ? 0 : timeout_s;
    const Clock::time_point now = Clock::now();
    for (const Held& held : held_) {
      const double left_s = std::chrono::duration<double>(held.due - now).count();
      wait_s = std::min({wait_s, left_s, kLookForClearS});
    }
    landed_.clear();
    inner_->Reap(&landed_, std::max(0.0, wait_s));
    for (Io* io : landed_) Land(io, ended);
    Flush();
    ReleaseDue(ended);
  }

  void Cancel(Io* io) override {
    const auto held = std::find_if(held_.begin(), held_.end(), [&](const Held& h) { return h.io == io; });
    if (held != held_.end()) {
      held->due = Clock::now();
      held->fault.error = ECANCELED;
      return;
    }
    const auto part =
        std::find_if(parts_.begin(), parts_.end(), [&](const Part& p) { return p.whole == io; });
    if (part != parts_.end()) part->cancelled = true;
    inner_->Cancel(part != parts_.end() ? &*part : io);
  }

  bool RegisterFile(int fd) override { return inner_->RegisterFile(fd); }
  bool RegisterMemory(char* base, size_t bytes) override { return inner_->RegisterMemory(base, bytes); }
  void Wake() override { inner_->Wake(); }

 private:
  // Decided, and not known to the inner engine: fails, or is passed on, when it is due.
  struct Held {
    Io* io;
    Clock::time_point due;
    Fault fault;
  };
  // A piece of a transfer. The inner engine knows only this one.
  struct Part : Io {
    Io* whole = nullptr;
    bool cancelled = false;
  };

  // Takes a transfer, or what is left of it, to the inner engine with the next Flush. The kernel does
  // not make short transfers when asked to: the ring gets them in pieces.
  void Pass(Io* io) {
    const uint32_t left = io->bytes - io->done;
    const uint32_t bytes = calls_disk_ ? left : static_cast<uint32_t>(disk_->Shorten(left));
    if (bytes == io->bytes) {
      next_.push_back(io);
      return;
    }
    Part& part = parts_.emplace_back();
    part.write = io->write;
    part.fd = io->fd;
    part.offset = io->offset + io->done;
    part.data = io->data + io->done;
    part.bytes = bytes;
    part.whole = io;
    next_.push_back(&part);
  }

  void Flush() {
    if (!next_.empty()) inner_->Submit(next_.data(), next_.size());
    next_.clear();
  }

  void ReleaseDue(std::vector<Io*>* ended) {
    const Clock::time_point now = Clock::now();
    std::erase_if(held_, [&](const Held& held) {
      if (held.due > now && !disk_->IsOver(held.fault)) return false;
      if (held.fault.error == 0) {
        Pass(held.io);
      } else {
        held.io->error = held.fault.error;
        ended->push_back(held.io);
      }
      return true;
    });
    Flush();
  }

  void Land(Io* io, std::vector<Io*>* ended) {
    const auto part = std::find_if(parts_.begin(), parts_.end(), [&](const Part& p) { return &p == io; });
    if (part != parts_.end()) {
      io = part->whole;
      io->done += part->done;
      io->error = part->error;
      const bool cancelled = part->cancelled;
      parts_.erase(part);
      if (io->error == 0 && io->done < io->bytes) {
        if (!cancelled) return Pass(io);
        io->error = ECANCELED;
      }
    }
    if (!io->write && io->error == 0) disk_->Flip(io->data, io->bytes);
    ended->push_back(io);
  }

  FaultyDisk* const disk_;
  ShortDisk short_disk_;
  const std::unique_ptr<IoEngine> inner_;
  const bool calls_disk_;
  std::vector<Held> held_;
  std::list<Part> parts_;
  std::vector<Io*> next_, landed_;
};

std::unique_ptr<IoEngine> FaultyDisk::MakeEngine(IoEngineKind kind, int depth, std::string* note) {
  return std::make_unique<Engine>(this, kind, depth, note);
}

// ---- power loss --------------------------------------------------------------------------------

PowerLossDisk::~PowerLossDisk() {
  // Without a power failure everything becomes durable in the end.
  for (const DirectoryChange& change : changes_) unlink(change.undo.c_str());
  for (const auto& file : files_) {
    if (file->fd >= 0) close(file->fd);
  }
}

bool PowerLossDisk::Identify(const std::string& path, Identity* identity) {
  struct stat stat;
  if (lstat(path.c_str(), &stat) < 0) return false;
  *identity = {stat.st_dev, stat.st_ino};
  return true;
}

std::shared_ptr<PowerLossDisk::File> PowerLossDisk::Find(int fd) {
  const auto it = open_.find(fd);
  return it == open_.end() ? nullptr : it->second;
}

// Forgets files that nobody uses and that a power failure cannot change, or nobody could find.
void PowerLossDisk::ForgetFiles() {
  std::erase_if(files_, [this](const std::shared_ptr<File>& file) {
    if (file->opens > 0 || (!file->sectors.empty() && Disk::Links(file->fd) != 0)) return false;
    if (file->fd >= 0) close(file->fd);
    return true;
  });
}

// The file has a new end: what was behind it is gone from all versions.
void PowerLossDisk::Cut(File* file, uint64_t bytes) {
  file->sectors.erase(file->sectors.lower_bound((bytes + kSector - 1) / kSector), file->sectors.end());
  const auto last = file->sectors.find(bytes / kSector);
  if (last == file->sectors.end()) return;
  for (Version& version : last->second) {
    std::fill(version.data.begin() + static_cast<ptrdiff_t>(bytes % kSector), version.data.end(), 0);
  }
}

int PowerLossDisk::Open(const std::string& path, int flags) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (off_) return -EIO;
  // Sectors are read back before and after they are written.
  if ((flags & O_ACCMODE) == O_WRONLY) flags = (flags & ~O_ACCMODE) | O_RDWR;
  Identity identity;
  const bool existed = Identify(path, &identity);
  const int fd = Disk::Open(path, flags & ~O_DIRECT);
  if (fd < 0) return fd;
  struct stat stat;
  if (fstat(fd, &stat) < 0) {
    const int error = -errno;
    Disk::Close(fd);
    return error;
  }
  identity = {stat.st_dev, stat.st_ino};
  if (!existed) changes_.push_back({++clock_, DirectoryOf(path), "", path, "", identity, {}});
  auto it = std::find_if(files_.begin(), files_.end(),
                         [&](const auto& file) { return file->identity == identity; });
  if (it == files_.end()) {
    it = files_.insert(files_.end(), std::make_shared<File>());
    (*it)->identity = identity;
  }
  (*it)->opens++;
  open_[fd] = *it;
  if (flags & O_TRUNC) Cut(it->get(), 0);
  return fd;
}

void PowerLossDisk::Close(int fd) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (const auto file = Find(fd)) {
    file->opens--;
    open_.erase(fd);
  }
  Disk::Close(fd);
  ForgetFiles();
}

int64_t PowerLossDisk::Read(int fd, void* data, size_t bytes, uint64_t offset) {
  std::lock_guard<std::mutex> lock(mutex_);
  return off_ ? -EIO : Disk::Read(fd, data, bytes, offset);
}

int64_t PowerLossDisk::Write(int fd, const void* data, size_t bytes, uint64_t offset) {
  // Under the lock throughout: versions are in the order in which the file got them.
  std::lock_guard<std::mutex> lock(mutex_);
  if (off_) return -EIO;
  const auto file = Find(fd);
  if (!file) return -EBADF;
  if (file->fd < 0) {
    file->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (file->fd < 0) return -errno;
  }
  const uint64_t first = offset / kSector, end = (offset + bytes + kSector - 1) / kSector;
  // Whole sectors around the write; zero where the file has ended.
  std::vector<char> sectors((end - first) * kSector);
  const int64_t got = Disk::Read(fd, sectors.data(), sectors.size(), first * kSector);
  if (got < 0) return got;
  auto version = [&](uint64_t sector, uint64_t time) {
    Version out{time, {}};
    std::memcpy(out.data.data(), sectors.data() + (sector - first) * kSector, kSector);
    return out;
  };
  const int64_t moved = Disk::Write(fd, data, bytes, offset);
  if (moved <= 0) return moved;
  const uint64_t moved_end = (offset + static_cast<uint64_t>(moved) + kSector - 1) / kSector;
  for (uint64_t sector = first; sector < moved_end; ++sector) {
    std::vector<Version>& versions = file->sectors[sector];
    if (versions.empty()) versions.push_back(version(sector, 0));
  }
  std::memcpy(sectors.data() + offset % kSector, data, static_cast<size_t>(moved));
  ++clock_;
  for (uint64_t sector = first; sector < moved_end; ++sector) {
    file->sectors[sector].push_back(version(sector, clock_));
  }
  return moved;
}

int PowerLossDisk::Sync(int fd) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (off_) return -EIO;
  const auto file = Find(fd);
  if (!file) return -EBADF;
  // Covers what was written by now. Writes go on meanwhile, and the power may fail.
  const uint64_t time = clock_;
  lock.unlock();
  const int result = Disk::Sync(fd);
  lock.lock();
  if (off_) return -EIO;
  if (result < 0) return result;
  for (auto it = file->sectors.begin(); it != file->sectors.end();) {
    std::vector<Version>& versions = it->second;
    const auto later = std::find_if(versions.begin() + 1, versions.end(),
                                    [&](const Version& version) { return version.time > time; });
    versions.erase(versions.begin(), later - 1);
    it = versions.size() == 1 ? file->sectors.erase(it) : std::next(it);
  }
  return result;
}

int PowerLossDisk::Reserve(int fd, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  return off_ ? -EIO : Disk::Reserve(fd, bytes);
}

int PowerLossDisk::Truncate(int fd, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (off_) return -EIO;
  const auto file = Find(fd);
  if (!file) return -EBADF;
  const int result = Disk::Truncate(fd, bytes);
  if (result >= 0) Cut(file.get(), bytes);
  return result;
}

int64_t PowerLossDisk::Size(int fd) {
  std::lock_guard<std::mutex> lock(mutex_);
  return off_ ? -EIO : Disk::Size(fd);
}

int PowerLossDisk::Rename(const std::string& from, const std::string& to) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (off_) return -EIO;
  const std::string directory = DirectoryOf(to);
  if (DirectoryOf(from) != directory) return -EXDEV;
  Identity identity, replaced;
  if (!Identify(from, &identity)) return -errno;
  const uint64_t time = ++clock_;
  std::string undo;
  if (Identify(to, &replaced)) {
    // Numbered: the same target may be replaced again before the directory is synced.
    undo = to + ".undo" + std::to_string(time);
    if (link(to.c_str(), undo.c_str()) < 0) return -errno;
  }
  const int result = Disk::Rename(from, to);
  if (result < 0) {
    unlink(undo.c_str());
    return result;
  }
  changes_.push_back({time, directory, from, to, undo, identity, replaced});
  return result;
}

int PowerLossDisk::SyncDirectory(const std::string& path) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (off_) return -EIO;
  const uint64_t time = clock_;
  lock.unlock();
  const int result = Disk::SyncDirectory(path);
  const std::string directory = Canonical(path);
  lock.lock();
  if (off_) return -EIO;
  if (result < 0) return result;
  std::erase_if(changes_, [&](const DirectoryChange& change) {
    if (change.time > time || change.directory != directory) return false;
    unlink(change.undo.c_str());
    return true;
  });
  ForgetFiles();  // the last name of a replaced file may have gone
  return result;
}

int PowerLossDisk::Links(int fd) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (off_) return -EIO;
  const int links = Disk::Links(fd);
  const auto file = Find(fd);
  if (links < 0 || !file) return links;
  // Our own do not count.
  return links - static_cast<int>(std::count_if(changes_.begin(), changes_.end(), [&](const auto& change) {
           return change.replaced == file->identity;
         }));
}

std::unique_ptr<IoEngine> PowerLossDisk::MakeEngine(IoEngineKind, int depth, std::string* note) {
  return MakeIoEngine(IoEngineKind::kThreads, depth, this, note);
}

uint64_t PowerLossDisk::PowerFail(uint64_t seed) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (off_) return 0;
  off_ = true;
  std::mt19937_64 random(seed);
  uint64_t count = 0;
  for (const auto& file : files_) {
    for (const auto& [sector, versions] : file->sectors) {
      const Version& left = versions[random() % versions.size()];
      const uint64_t offset = sector * kSector;
      // The file keeps its size, also where it ends within a sector.
      const int64_t size = Disk::Size(file->fd);
      if (size < 0) throw SystemError("cannot lose power: the size of a file is not known");
      const size_t bytes = std::min<uint64_t>(kSector, static_cast<uint64_t>(size) - offset);
      if (Disk::Write(file->fd, left.data.data(), bytes, offset) != static_cast<int64_t>(bytes)) {
        throw SystemError("cannot lose power: a sector cannot be written");
      }
      ++count;
    }
  }
  // The youngest first: what an older one would undo must be in its place again.
  for (auto change = changes_.rbegin(); change != changes_.rend(); ++change) {
    Identity to, from;
    const bool undone = random() % 2 == 0 && Identify(change->to, &to) && to == change->identity &&
                        (change->from.empty() || !Identify(change->from, &from));
    if (!undone) {
      unlink(change->undo.c_str());
    } else if (change->from.empty()) {
      unlink(change->to.c_str());
    } else {
      rename(change->to.c_str(), change->from.c_str());
      rename(change->undo.c_str(), change->to.c_str());
    }
  }
  changes_.clear();
  return count;
}

}  // namespace flexkv
