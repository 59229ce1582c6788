// Fuzz target: values from a remote store and the code that some are compressed with. What comes from there may
// be anything: it is the block that was stored, or it is refused, and nothing is written beside it.
//
// Arbitrary bytes never get past a sum. So a value is made, edited and given new sums, which is how expanding gets
// to see intact nonsense.
//
// Input: one byte of Mode bits, one byte: how often the bytes at its end are repeated, then what the mode asks for.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>

#include "base/checksum.hpp"
#include "remote/compression.hpp"
#include "remote/huffman.hpp"
#include "remote/remote_value.hpp"
#include "testing/fuzz/fuzz_target.hpp"

namespace flexkv {

namespace {

enum Mode : uint8_t {
  kValue = 1,     // a header and a body; else the code alone
  kDecode = 2,    // the code: of bytes that nobody has encoded
  kWords32 = 4,   // the value: numbers of 32 bits, else 16
  kCompress = 8,  // the value: compressed
  kEdits = 16,
  kReseal = 32,  // the value: new sums after the edits
  kRough = 64,   // what is repeated is mixed up, so that it does not shrink
};

constexpr size_t kBytesMax = size_t{300} << 10;  // chunks of the code are 64 KiB
// Of a header; remote_value.cpp keeps them to itself, and CheckLayout sees that they are right.
constexpr size_t kStoredBytesAt = 56, kSlicesAt = 68, kSumsAt = 72, kHeaderSumAt = kValueHeaderBytes - 8;

// Exactly so many bytes, so that the sanitizer sees every access beyond them.
template <typename Byte = char>
std::unique_ptr<Byte[]> Exactly(size_t bytes) {
  return std::unique_ptr<Byte[]>(new Byte[bytes]);
}

std::string Repeated(const std::string& bytes, size_t times, bool rough) {
  std::string all;
  for (size_t i = 0; i < times && all.size() + bytes.size() <= kBytesMax; ++i) {
    for (size_t j = 0; j < bytes.size(); ++j) {
      const size_t mixed = (i + 1) * (j + 1) * 2654435761u >> 13;
      all += static_cast<char>(rough ? static_cast<size_t>(bytes[j]) ^ mixed : static_cast<size_t>(bytes[j]));
    }
  }
  return all;
}

bool Decodes(const char* from, size_t bytes, uint8_t* to, size_t count) {
  const auto exact = Exactly(bytes + kHuffmanSlack);
  std::memcpy(exact.get(), from, bytes);
  std::memset(exact.get() + bytes, 0xFF, kHuffmanSlack);
  return HuffmanDecode(exact.get(), bytes, to, count);
}

void CheckCode(Source* source, uint8_t mode, size_t times) {
  const size_t room_or_count = source->Take<uint32_t>() % (kBytesMax + 1);
  const std::string bytes = Repeated(source->Bytes(source->left()), times, mode & kRough);
  if (mode & kDecode) {
    const auto to = Exactly<uint8_t>(room_or_count);
    if (!Decodes(bytes.data(), bytes.size(), to.get(), room_or_count)) return;
    Check(!fuzz_self_test, "what nobody has encoded is decoded");
    // Whatever it is, there is one way to encode it.
    const auto room = Exactly(bytes.size());
    const size_t again = HuffmanEncode(to.get(), room_or_count, room.get(), bytes.size());
    const auto back = Exactly<uint8_t>(room_or_count);
    Check(again == 0 || (Decodes(room.get(), again, back.get(), room_or_count) &&
                         std::memcmp(back.get(), to.get(), room_or_count) == 0),
          "what was decoded comes back");
    return;
  }
  const auto from = Exactly<uint8_t>(bytes.size());
  std::memcpy(from.get(), bytes.data(), bytes.size());
  const auto to = Exactly(room_or_count);
  const size_t size = HuffmanEncode(from.get(), bytes.size(), to.get(), room_or_count);
  Check(size <= room_or_count, "a code keeps to its room");
  if (size == 0) return;
  Check(!fuzz_self_test, "nothing is encoded");
  const auto back = Exactly<uint8_t>(bytes.size());
  Check(Decodes(to.get(), size, back.get(), bytes.size()) &&
            std::memcmp(back.get(), from.get(), bytes.size()) == 0,
        "what was encoded comes back");
  Check(!Decodes(to.get(), size - 1, back.get(), bytes.size()), "a code without its end is none");
  const std::string longer = std::string(to.get(), size) + '\0';
  Check(!Decodes(longer.data(), longer.size(), back.get(), bytes.size()),
        "a code with more behind it is none");
}

template <typename T>
void Put(char* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

uint64_t PartSum(const ValueShape& shape, const BlockKey& key, size_t part, const char* begin, size_t bytes) {
  const uint64_t identity[] = {shape.name_space.lo, shape.name_space.hi, key.lo, key.hi, part};
  return Checksum(begin, bytes, Checksum(identity, sizeof identity));
}

// New sums for what is stored: of the header, and of a body that is compressed or else of its slices.
void Reseal(const ValueShape& shape, const BlockKey& key, bool compressed, const char* body, size_t bytes,
            char* page) {
  const size_t slices = shape.slice_offsets.size() - 1;
  if (compressed) {
    Put(page + kSumsAt + slices * sizeof(uint64_t), PartSum(shape, key, slices, body, bytes));
  } else {
    for (size_t slice = 0; slice < slices; ++slice) {
      const size_t begin = shape.slice_offsets[slice];
      Put(page + kSumsAt + slice * sizeof(uint64_t),
          PartSum(shape, key, slice, body + begin, shape.slice_offsets[slice + 1] - begin));
    }
  }
  Put(page + kHeaderSumAt, Checksum(page, kHeaderSumAt));
}

// Of a block of one slice, not edited and resealed: the same.
void CheckLayout() {
  const ValueShape shape{{1, 2}, {0, 2 * kIoAlignment}};
  const BlockKey key{3, 4};
  const std::string block(2 * kIoAlignment, 'x');
  std::array<char, kValueHeaderBytes> page, resealed;
  EncodeValueHeader(shape, key, block.data(), page.data());
  resealed = page;
  std::memset(resealed.data() + kSumsAt, 0, sizeof(uint64_t));
  Reseal(shape, key, false, block.data(), block.size(), resealed.data());
  uint64_t stored_bytes;
  uint32_t slices;
  std::memcpy(&stored_bytes, page.data() + kStoredBytesAt, sizeof stored_bytes);
  std::memcpy(&slices, page.data() + kSlicesAt, sizeof slices);
  Check(page == resealed && stored_bytes == block.size() && slices == 1, "the target knows the format");
}

// Four bytes: where, and what is to be there. Mostly where much hangs on it.
void Edit(const char* edit, size_t code, size_t stored, char* page, char* body) {
  const size_t where = static_cast<uint8_t>(edit[0]) % 4;
  const size_t at = static_cast<uint8_t>(edit[1]) + size_t{256} * static_cast<uint8_t>(edit[2]);
  if (where == 0) page[at % kValueHeaderBytes] = edit[3];
  if (where == 1) page[at % (kSumsAt + 64)] = edit[3];
  if (where == 2) page[kStoredBytesAt + at % sizeof(uint64_t)] = edit[3];
  if (where == 3)
    body[at % 2 == 0 && code < stored ? code + at / 2 % (stored - code) : at / 2 % stored] = edit[3];
}

void CheckValue(Source* source, uint8_t mode, size_t times) {
  ValueShape shape{{source->Byte(), 7}, {0}};
  const BlockKey key{source->Byte(), 9};
  const size_t pages = 1 + source->Byte() % 8, slices = 1 + source->Byte() % 4;
  const size_t bytes = pages * kIoAlignment;
  for (size_t slice = 1; slice <= slices; ++slice) {
    shape.slice_offsets.push_back(slice == slices ? bytes : bytes * slice / slices / 64 * 64);
  }
  const std::string edits = mode & kEdits ? source->Bytes((1 + source->Byte() % 16) * size_t{4}) : "";
  const uint64_t odd = source->Number();  // mostly all of it comes
  const std::string given = Repeated(source->Bytes(source->left()), times, mode & kRough);
  const auto block = Exactly(bytes), body = Exactly(bytes);
  for (size_t i = 0; i < bytes; ++i) block[i] = given.empty() ? 0 : given[i % given.size()];
  std::array<char, kValueHeaderBytes> page;
  EncodeValueHeader(shape, key, block.get(), page.data());
  std::memcpy(body.get(), block.get(), bytes);
  size_t stored = 0;
  if (mode & kCompress) {
    const auto to = Exactly(bytes);
    const Compression how = mode & kWords32 ? Compression::kWords32 : Compression::kWords16;
    stored = CompressValue(shape, key, how, block.get(), page.data(), to.get());
    Check(stored < bytes && stored % kIoAlignment == 0, "what is compressed is fewer pages");
    if (stored > 0) std::memcpy(body.get(), to.get(), stored);
  }
  const bool compressed = stored > 0;
  if (!compressed) stored = bytes;
  const size_t code = bytes - bytes / (mode & kWords32 ? 4 : 2);  // where it begins
  for (size_t at = 0; at + 4 <= edits.size(); at += 4)
    Edit(edits.data() + at, code, stored, page.data(), body.get());
  size_t came = odd < 0xF0 ? stored : odd % (bytes + 1);
  if (mode & kReseal) {
    uint64_t said;
    std::memcpy(&said, page.data() + kStoredBytesAt, sizeof said);
    if (said < bytes) came = AlignUp(said, kIoAlignment);
    Reseal(shape, key, compressed, body.get(), compressed ? came : bytes, page.data());
  }
  const std::string why = RestoreValue(shape, key, page.data(), body.get(), came);
  if (!why.empty()) {
    Check(!edits.empty() || came != stored, "what was stored comes back");
    return;
  }
  Check(!fuzz_self_test, "nothing comes back");
  Check(came == stored || (mode & kReseal), "exactly what was stored has come");
  // New sums of what is compressed are not those of the block: these were made of what it was.
  Check(std::memcmp(body.get(), block.get(), bytes) == 0 || (!compressed && (mode & kReseal)),
        "what comes back is what was stored");
}

}  // namespace

std::vector<std::string> FuzzSeeds() {
  std::vector<std::string> seeds;
  const auto head = [](int mode, int times) {
    return std::string{static_cast<char>(mode), static_cast<char>(times)};
  };
  const auto number = [](uint32_t value) {
    std::string bytes(sizeof value, '\0');
    std::memcpy(bytes.data(), &value, sizeof value);
    return bytes;
  };
  std::string few;
  for (int i = 0; i < 400; ++i) few += static_cast<char>(120 + __builtin_ctz(static_cast<unsigned>(i + 1)));
  for (const int rough : {0, int{kRough}}) {
    for (const int times : {1, 255}) {
      for (const uint32_t room : {uint32_t{600}, static_cast<uint32_t>(kBytesMax)}) {
        seeds.push_back(head(rough, times) + number(room) + few);
      }
    }
    for (const int compress : {0, int{kCompress}, kCompress | kWords32}) {
      for (const int edits : {0, int{kEdits}, kEdits | kReseal}) {
        // Namespace, key, pages - 1, slices - 1, (edits,) all of it came.
        std::string seed = head(kValue | rough | compress | edits, 32) + std::string("\1\2\7\2", 4);
        if (edits) seed += '\0' + number(0x41002301);
        seeds.push_back(seed + '\0' + few);
        // It says that fewer bytes are stored than there are numbers.
        if (edits)
          seeds.push_back(seed.substr(0, 6) + '\1' + number(0x01000102) + number(0x00000002) + '\0' + few);
      }
    }
  }
  for (const size_t count : {few.size(), size_t{1}}) {
    std::string coded(1 << 10, '\0');
    coded.resize(
        HuffmanEncode(reinterpret_cast<const uint8_t*>(few.data()), count, coded.data(), coded.size()));
    // As it is, and of more bytes than it is of: it comes to its end before.
    for (const uint32_t more : {0u, 1u, 60'000u}) {
      seeds.push_back(head(kDecode, 0) + number(static_cast<uint32_t>(count) + more) + coded);
    }
  }
  return seeds;
}

}  // namespace flexkv

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flexkv;
  static const bool checked = (CheckLayout(), true);
  static_cast<void>(checked);
  Source source(data, size);
  const uint8_t mode = source.Byte();
  const size_t times = source.Byte() + size_t{1};
  if (mode & kValue) {
    CheckValue(&source, mode, times);
  } else {
    CheckCode(&source, mode, times);
  }
  return 0;
}
