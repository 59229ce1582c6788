// Fuzz target: slot file and journal with arbitrary contents. What they hold may be lost, but reading
// them must not crash, hang, take memory that the files do not account for, or invent slots.
//
// Arbitrary bytes never get past a checksum. So an input is either the files themselves or a recipe
// from which they are encoded; both can have edits and then new checksums, which is how decoding gets to
// see intact nonsense.
//
// Input: one byte of Mode bits, two bytes of length; then Raw: that many bytes of the slot file, and the
// journal; Built: the recipe.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

#include "base/checksum.hpp"
#include "ssd/disk.hpp"
#include "ssd/ssd_format.hpp"
#include "ssd/ssd_image.hpp"
#include "testing/fuzz/fuzz_target.hpp"

namespace flexkv {

namespace {

enum Mode : uint8_t {
  kBuilt = 1,   // else raw
  kReseal = 2,  // new checksums after the edits
  kNoJournal = 4,
  kFaults = 8,  // short reads, and maybe one that fails
  kHole = 16,   // zeros in the journal: frames that are further apart than the window that reads it
  kTail = 32,   // the slot file goes on, so that slots can lie inside it
  kEdits = 64,
  kOneCopy = 128,  // built: the second superblock is left blank
};

constexpr int kSlotsFd = 0, kJournalFd = 1;
constexpr uint64_t kTailMax = uint64_t{64} << 20;
constexpr size_t kHoleMax = size_t{10} << 20;

// Of a frame's header. They are private to the format, so CheckLayout sees that they are right.
constexpr size_t kFrameRecordBytesAt = 4, kFrameCountAt = 8, kFramePayloadSumAt = 40, kFrameSumAt = 48;
constexpr size_t kFrameHeaderBytes = 56;

// Two files in memory. Both may be longer than the bytes they have: zeros follow.
class MemoryDisk : public Disk {
 public:
  struct File {
    std::string bytes;
    uint64_t size = 0;
  };
  MemoryDisk(File slots, File journal) : files_{std::move(slots), std::move(journal)} {}
  void Fault(size_t longest_read, int failing_read) {
    longest_read_ = longest_read;
    reads_left_ = failing_read;
  }

  int64_t Size(int fd) override { return static_cast<int64_t>(At(fd).size); }
  int64_t Read(int fd, void* data, size_t bytes, uint64_t offset) override {
    const File& file = At(fd);
    if (reads_left_ >= 0 && reads_left_-- == 0) return -EIO;
    if (offset >= file.size) return 0;
    bytes = std::min({bytes, longest_read_, static_cast<size_t>(file.size - offset)});
    const size_t have = offset >= file.bytes.size() ? 0 : std::min(bytes, file.bytes.size() - offset);
    if (have > 0) std::memcpy(data, file.bytes.data() + offset, have);
    std::memset(static_cast<char*>(data) + have, 0, bytes - have);
    return static_cast<int64_t>(bytes);
  }
  // Loading changes nothing.
  int Open(const std::string&, int) override { std::abort(); }
  void Close(int) override { std::abort(); }
  int64_t Write(int, const void*, size_t, uint64_t) override { std::abort(); }
  int Sync(int) override { std::abort(); }
  int Reserve(int, uint64_t) override { std::abort(); }
  int Truncate(int, uint64_t) override { std::abort(); }

 private:
  const File& At(int fd) const {
    Check(fd == kSlotsFd || fd == kJournalFd, "only files that were given are read");
    return files_[static_cast<size_t>(fd)];
  }

  const std::array<File, 2> files_;
  size_t longest_read_ = SIZE_MAX;
  int reads_left_ = -1;  // until one fails; < 0: none does
};

void SealPage(char* page) {
  const uint64_t sum = Checksum(page, kSsdPage - sizeof sum);
  std::memcpy(page + kSsdPage - sizeof sum, &sum, sizeof sum);
}

// Gives what may be a frame the checksums of what is in it, as far as its own words allow.
void SealFrame(char* data, size_t available) {
  if (available < kFrameHeaderBytes) return;
  uint32_t record_bytes, count;
  std::memcpy(&record_bytes, data + kFrameRecordBytesAt, sizeof record_bytes);
  std::memcpy(&count, data + kFrameCountAt, sizeof count);
  const uint64_t payload = static_cast<uint64_t>(record_bytes) * count;
  if (payload <= available - kFrameHeaderBytes) {
    const uint64_t sum = Checksum(data + kFrameHeaderBytes, payload);
    std::memcpy(data + kFramePayloadSumAt, &sum, sizeof sum);
  }
  const uint64_t sum = Checksum(data, kFrameSumAt);
  std::memcpy(data + kFrameSumAt, &sum, sizeof sum);
}

// A format that has moved would make kReseal do nothing, without a word.
void CheckLayout() {
  std::string frame;
  AppendFrame(&frame, {1, 2}, 3, std::string(2 * RecordBytes(1), 'r'), 1);
  std::string sealed = frame;
  std::memset(sealed.data() + kFramePayloadSumAt, 0, kFrameHeaderBytes - kFramePayloadSumAt);
  SealFrame(sealed.data(), sealed.size());
  Check(sealed == frame, "the fuzzer knows how a frame is sealed");
  std::string page(kSsdPage, '\0');
  EncodeJournalHeader({{1, 2}, {3, 4}, 5}, page.data());
  sealed = page;
  std::memset(sealed.data() + kSsdPage - sizeof(uint64_t), 0, sizeof(uint64_t));
  SealPage(sealed.data());
  Check(sealed == page, "the fuzzer knows how a page is sealed");
}

BlockKey TakeKey(Source* source) {
  const uint64_t number = source->Number();
  return {number, number >> 32};
}

struct Files {
  std::string slots, journal;
  std::vector<size_t> frames;  // where the journal has or may have some
};

Superblock TakeSuperblock(Source* source, const Superblock* other) {
  Superblock superblock;
  superblock.sequence = 1 + source->Number();
  const uint8_t like = source->Byte();
  if (other != nullptr && like % 4 != 3) {  // as a rule, the two copies differ in little
    const uint64_t sequence = superblock.sequence;
    superblock = *other;
    superblock.sequence = sequence;
    if (like % 4 == 1) superblock.num_slots = source->Number();
    if (like % 4 == 2) superblock.generation = TakeKey(source);
    return superblock;
  }
  superblock.generation = TakeKey(source);
  superblock.name_space = TakeKey(source);
  superblock.num_slots = source->Number();
  const uint8_t slices = source->Byte();
  const size_t num_slices = slices == 0xFF ? kSlicesMax : 1 + slices % 8;
  for (size_t i = 0; i < num_slices; ++i) {
    const uint8_t pages = source->Byte();
    superblock.slice_bytes.push_back(pages < 0xF0 ? static_cast<uint32_t>((1 + pages % 4) * kSsdPage)
                                                  : source->Take<uint32_t>());
  }
  superblock.keep = source->Byte() % 4 != 1;
  superblock.label = source->Bytes(source->Byte() * size_t{5});  // at most more than a label may have
  return superblock;
}

void AppendFrames(Source* source, const JournalHeader& header, bool hole, Files* files) {
  uint64_t number = 0;
  for (int frames = source->Byte() % 9; frames > 0; --frames) {
    const uint8_t kind = source->Byte();
    number = kind % 8 == 7 ? source->Number() : number + 1;
    const BlockKey generation = kind % 16 == 6 ? TakeKey(source) : header.generation;
    const size_t slices = kind % 16 == 5 ? 1 + source->Byte() % 8 : header.num_slices;
    const size_t most = kFramePayloadMax / RecordBytes(slices);
    // The largest frame there can be; its records beyond the first few are all alike.
    const size_t count = kind == 0xFF ? most : 1 + (kind >> 4);
    std::string records, record;
    for (size_t i = 0; i < count; ++i) {
      if (i < 16) {
        Record fields;
        fields.key = TakeKey(source);
        fields.parent = TakeKey(source);
        fields.sequence = source->Number();
        fields.slot = static_cast<uint32_t>(source->Number());
        fields.kind = static_cast<RecordKind>(source->Byte() % 4);
        record.assign(reinterpret_cast<const char*>(&fields), sizeof fields);
        record.resize(RecordBytes(slices), static_cast<char>(source->Byte()));
      }
      records += record;
    }
    if (hole && kind % 4 == 0) {
      files->journal.resize(std::min(files->journal.size() + source->Byte() * 16 * kSsdPage, kHoleMax));
    }
    files->frames.push_back(files->journal.size());
    AppendFrame(&files->journal, generation, number, records, slices);
  }
}

Files Build(Source* source, uint8_t mode) {
  Files files;
  files.slots.resize(2 * kSsdPage);
  const Superblock first = TakeSuperblock(source, nullptr);
  EncodeSuperblock(first, files.slots.data());
  Superblock second = first;
  if (!(mode & kOneCopy)) {
    second = TakeSuperblock(source, &first);
    EncodeSuperblock(second, files.slots.data() + kSsdPage);
  }
  const Superblock& newest = second.sequence > first.sequence ? second : first;
  JournalHeader header{newest.generation, newest.name_space,
                       static_cast<uint32_t>(newest.slice_bytes.size())};
  const uint8_t odd = source->Byte();
  if (odd % 16 == 1) header.generation = TakeKey(source);
  if (odd % 16 == 2) header.name_space = TakeKey(source);
  if (odd % 16 == 3) header.num_slices = 1 + source->Byte();
  files.journal.resize(kSsdPage);
  EncodeJournalHeader(header, files.journal.data());
  AppendFrames(source, header, mode & kHole, &files);
  return files;
}

Files Raw(Source* source, uint16_t split, uint8_t mode) {
  Files files;
  files.slots = source->Bytes(split);
  files.journal = source->Bytes(source->left());
  for (size_t at = kSsdPage; at < files.journal.size(); at += kSsdPage) files.frames.push_back(at);
  if (mode & kHole && files.journal.size() > 2 * kSsdPage) {
    const size_t hole = kSsdPage * (1 + split % 2500);
    files.journal.insert(2 * kSsdPage, hole, '\0');
    for (size_t& at : files.frames) at += at >= 2 * kSsdPage ? hole : 0;
  }
  return files;
}

void Edit(const std::string& edits, Files* files) {
  // 7 bytes each: which file and how wide, where, what.
  for (size_t at = 0; at + 7 <= edits.size(); at += 7) {
    uint16_t where;
    uint32_t what;
    std::memcpy(&where, edits.data() + at + 1, sizeof where);
    std::memcpy(&what, edits.data() + at + 3, sizeof what);
    const uint8_t how = static_cast<uint8_t>(edits[at]);
    std::string& file = how & 1 ? files->journal : files->slots;
    if (file.empty()) continue;
    // Where a header's fields are, or a frame's, most of the time.
    size_t offset = how & 2 ? where : where % 128;
    if (how & 4) offset += kSsdPage;
    if (how & 8 && how & 1 && !files->frames.empty()) {
      offset = files->frames[(how >> 4) % files->frames.size()] + where % 128;
    }
    offset %= file.size();
    std::memcpy(file.data() + offset, &what,
                std::min(how & 16 ? size_t{1} : size_t{4}, file.size() - offset));
  }
}

void Reseal(Files* files) {
  for (size_t at = 0; at + kSsdPage <= std::min(files->slots.size(), 2 * kSsdPage); at += kSsdPage) {
    // A blank page stays blank.
    if (files->slots[at] != 0) SealPage(files->slots.data() + at);
  }
  if (files->journal.size() >= kSsdPage) SealPage(files->journal.data());
  for (size_t at : files->frames) {
    if (at < files->journal.size()) SealFrame(files->journal.data() + at, files->journal.size() - at);
  }
}

bool Equal(const Superblock& a, const Superblock& b) {
  return a.sequence == b.sequence && a.generation == b.generation && a.name_space == b.name_space &&
         a.num_slots == b.num_slots && a.slice_bytes == b.slice_bytes && a.keep == b.keep &&
         a.label == b.label;
}

void CheckSuperblock(const char* page) {
  Superblock superblock, again;
  uint32_t version = 0;
  if (DecodeSuperblock(page, &superblock, &version) != Decoded::kOk) return;
  Check(version == kSsdFormatVersion, "a page that is good has the version we know");
  Check(superblock.slot_bytes() >= kSsdPage, "a slot has bytes");
  std::string encoded(kSsdPage, 'x');
  EncodeSuperblock(superblock, encoded.data());
  Check(DecodeSuperblock(encoded.data(), &again, &version) == Decoded::kOk,
        "what was decoded can be encoded");
  Check(Equal(superblock, again), "a superblock survives encoding");
}

bool CheckJournalHeader(const char* page, JournalHeader* header) {
  JournalHeader again;
  uint32_t version = 0;
  if (DecodeJournalHeader(page, header, &version) != Decoded::kOk) return false;
  std::string encoded(kSsdPage, 'x');
  EncodeJournalHeader(*header, encoded.data());
  Check(DecodeJournalHeader(encoded.data(), &again, &version) == Decoded::kOk &&
            again.generation == header->generation && again.name_space == header->name_space &&
            again.num_slices == header->num_slices,
        "a journal's header survives encoding");
  return true;
}

void CheckFrame(const std::string& journal, size_t at, const JournalHeader& header) {
  if (at >= journal.size()) return;
  // An allocation of its own: reading beyond it is seen.
  const std::vector<char> data(journal.begin() + static_cast<std::ptrdiff_t>(at), journal.end());
  FrameView frame;
  if (!DecodeFrame(data.data(), data.size(), header, &frame)) return;
  const size_t begin = static_cast<size_t>(frame.records - data.data());
  const size_t bytes = frame.count * RecordBytes(header.num_slices);
  Check(frame.count > 0 && bytes <= kFramePayloadMax, "a frame has records, and not too many");
  Check(begin + bytes <= data.size(), "a frame's records are in it");
  Check(frame.bytes % kSsdPage == 0 && frame.bytes >= begin + bytes, "a frame takes whole pages");
}

void CheckDecoders(const Files& files) {
  for (size_t copy = 0; copy < 2; ++copy) {
    std::string page =
        copy * kSsdPage < files.slots.size() ? files.slots.substr(copy * kSsdPage, kSsdPage) : "";
    page.resize(kSsdPage);
    CheckSuperblock(page.data());
  }
  std::string page = files.journal.substr(0, kSsdPage);
  page.resize(kSsdPage);
  JournalHeader header;
  if (!CheckJournalHeader(page.data(), &header)) return;
  for (size_t i = 0; i < std::min<size_t>(files.frames.size(), 9); ++i) {
    CheckFrame(files.journal, files.frames[i], header);
  }
}

void CheckImage(const SsdImage& image, uint64_t slots_size, uint64_t journal_size) {
  const Superblock& superblock = image.superblock;
  const uint64_t slices = superblock.slice_bytes.size();
  Check(superblock.sequence != 0 || image.entries.empty(), "without a superblock there are no slots");
  Check(image.entries.size() <= superblock.num_slots, "no more slots than the superblock says");
  uint64_t room = 0;
  if (slices > 0 && slots_size > kSlotsOffset) room = (slots_size - kSlotsOffset) / superblock.slot_bytes();
  if (fuzz_self_test) room = 0;
  Check(image.entries.size() <= room, "no more slots than the file has room for");
  uint64_t live = 0;
  for (size_t slot = 0; slot < image.entries.size(); ++slot) {
    const SsdEntry& entry = image.entries[slot];
    if (entry.sequence == 0) continue;
    ++live;
    Check(slot < superblock.num_slots, "a live slot is one that there is");
    Check(!(entry.key == BlockKey{}), "a live slot has a key");
    Check(entry.sequence <= image.last_sequence, "the last sequence is the highest");
    // For the sanitizer: the checksums of the slot are there.
    volatile uint64_t first = image.checksums[slot * slices];
    volatile uint64_t last = image.checksums[slot * slices + slices - 1];
    static_cast<void>(first), static_cast<void>(last);
  }
  Check(live == image.num_live, "the live slots are counted");
  Check(image.journal_end >= kSsdPage && image.journal_end % kSsdPage == 0, "frames start on pages");
  Check(image.journal_end <= AlignUp(std::max<size_t>(journal_size, kSsdPage), kSsdPage),
        "the journal does not end behind its file");
  Check(image.damaged_bytes < std::max<uint64_t>(journal_size, 1), "no more damage than there are bytes");
  Check(image.records >= image.frames, "a frame has records");
}

}  // namespace

std::vector<std::string> FuzzSeeds() {
  Superblock superblock;
  superblock.sequence = 2;
  superblock.generation = {1, 2};
  superblock.name_space = {3, 4};
  superblock.num_slots = 16;
  superblock.slice_bytes = {4096, 8192};
  superblock.label = "a model";
  std::string slots(2 * kSsdPage, '\0'), journal(kSsdPage, '\0');
  EncodeSuperblock(superblock, slots.data());
  superblock.sequence = 3;
  EncodeSuperblock(superblock, slots.data() + kSsdPage);
  EncodeJournalHeader({superblock.generation, superblock.name_space, 2}, journal.data());
  for (uint64_t number = 1; number <= 3; ++number) {
    std::string records;
    for (uint32_t i = 0; i < 4; ++i) {
      const RecordKind kind = i == 3 ? RecordKind::kDropped : RecordKind::kStored;
      const Record record{{number, i + 1}, {}, number * 4 + i, i * static_cast<uint32_t>(number), kind};
      records.append(reinterpret_cast<const char*>(&record), sizeof record);
      records.append(2 * sizeof(uint64_t), 's');
    }
    AppendFrame(&journal, superblock.generation, number, records, 2);
  }
  const auto head = [](int mode, size_t length) {
    return std::string{static_cast<char>(mode), static_cast<char>(length & 0xFF),
                       static_cast<char>(length >> 8)};
  };
  // Tail, faults and edits come first in an input: see LLVMFuzzerTestOneInput.
  const std::string tail("\x40\x01\0", 3), faults("\x01\0\x05", 3),
      edit("\x01\x08\x20\0\0\xFF\xFF\xFF\x7F", 9);
  std::vector<std::string> seeds;
  seeds.push_back(head(kTail, slots.size()) + tail + slots + journal);
  seeds.push_back(head(0, slots.size()) + slots + journal);
  seeds.push_back(head(kTail | kHole, slots.size()) + tail + slots + journal);
  seeds.push_back(head(kTail | kNoJournal, slots.size()) + tail + slots);
  seeds.push_back(head(kTail | kFaults, slots.size()) + tail + faults + slots + journal);
  seeds.push_back(head(kTail | kEdits | kReseal, slots.size()) + tail + edit.substr(0, 9) + slots + journal);
  // Sequence, (like,) generation, name space, slots, slices - 1, pages of each, keep, label: none.
  const std::string first("\x01\0\x01\x02\x40\x01\0\x01\0\0", 10), second("\x02\0", 2);
  std::string frames("\0\x03", 2);  // nothing odd, three frames
  for (int frame = 0; frame < 3; ++frame) {
    frames += '\x30';  // four records
    for (char i = 1; i <= 4; ++i) frames += {i, 0, static_cast<char>(frame * 4 + i), i, 1, 's'};
  }
  for (const int mode : {0, int{kHole}, int{kFaults}, kEdits | kReseal, int{kOneCopy}}) {
    std::string seed = head(kBuilt | kTail | mode, 0) + tail;
    if (mode & kFaults) seed += faults;
    if (mode & kEdits) seed += edit;
    seeds.push_back(seed + first + (mode & kOneCopy ? "" : second) + frames);
  }
  // The superblock asks for terabytes.
  seeds.push_back(head(kBuilt | kTail | kOneCopy, 0) + tail +
                  std::string("\x01\0\x01\x02\xFF\xFF\xFF\xFF\x7F\0\0\0\0\xFF", 14));
  return seeds;
}

}  // namespace flexkv

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flexkv;
  static const bool checked = (CheckLayout(), true);
  static_cast<void>(checked);
  Source source(data, size);
  const uint8_t mode = source.Byte();
  const uint16_t split = source.Take<uint16_t>();
  uint64_t tail = 0;
  if (mode & kTail) {
    const uint16_t pages = source.Take<uint16_t>();
    tail = std::min<uint64_t>(uint64_t{pages} * kSsdPage + source.Byte(), kTailMax);
  }
  size_t longest_read = SIZE_MAX, failing_read = SIZE_MAX, cut_slots = SIZE_MAX, cut_journal = SIZE_MAX;
  if (mode & kFaults) {
    const uint8_t which = source.Byte();
    const uint16_t amount = source.Take<uint16_t>();
    if (which & 1) longest_read = 512 + amount;
    if (which & 2) failing_read = amount % 8;
    if (which & 4) cut_slots = amount;
    if (which & 8) cut_journal = amount * size_t{37};
  }
  std::string edits;
  if (mode & kEdits) edits = source.Bytes((1 + source.Byte() % 16) * size_t{7});

  Files files = mode & kBuilt ? Build(&source, mode) : Raw(&source, split, mode);
  Edit(edits, &files);
  if (mode & kReseal) Reseal(&files);
  if (cut_slots < files.slots.size()) files.slots.resize(cut_slots);
  if (cut_journal < files.journal.size()) files.journal.resize(cut_journal);
  CheckDecoders(files);

  const uint64_t slots_size = files.slots.size() + tail, journal_size = files.journal.size();
  MemoryDisk disk({std::move(files.slots), slots_size}, {std::move(files.journal), journal_size});
  disk.Fault(longest_read, failing_read == SIZE_MAX ? -1 : static_cast<int>(failing_read));
  try {
    const SsdImage image = LoadImage(disk, kSlotsFd, mode & kNoJournal ? -1 : kJournalFd, "fuzz");
    CheckImage(image, slots_size, journal_size);
  } catch (const MismatchError&) {
  } catch (const SystemError&) {
  }  // Anything else is a finding.
  return 0;
}
