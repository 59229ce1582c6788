#include "remote/compression.hpp"

#include <time.h>

#include <cstring>
#include <memory>

#include "base/types.hpp"
#include "remote/huffman.hpp"

namespace flexkv {

namespace {

size_t NumberBytes(Compression how) {
  switch (how) {
    case Compression::kNone:
      break;
    case Compression::kWords16:
      return 2;
    case Compression::kWords32:
      return 4;
  }
  throw UsageError("there are no numbers of this kind");
}

template <typename Byte>
std::unique_ptr<Byte[]> Room(size_t bytes) {
  return std::unique_ptr<Byte[]>(new Byte[bytes]);
}

template <typename Word>
void Split(const char* __restrict block, size_t count, char* __restrict rest, uint8_t* __restrict exponents) {
  constexpr int kBits = 8 * sizeof(Word);
  for (size_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, block + i * sizeof word, sizeof word);
    word = static_cast<Word>(word << 1 | word >> (kBits - 1));
    for (size_t byte = 0; byte + 1 < sizeof word; ++byte) {
      rest[byte * count + i] = static_cast<char>(word >> (8 * byte));
    }
    exponents[i] = static_cast<uint8_t>(word >> (kBits - 8));
  }
}

template <typename Word>
void Join(const char* __restrict rest, const uint8_t* __restrict exponents, size_t count,
          char* __restrict block) {
  constexpr int kBits = 8 * sizeof(Word);
  for (size_t i = 0; i < count; ++i) {
    Word word = static_cast<Word>(static_cast<Word>(exponents[i]) << (kBits - 8));
    for (size_t byte = 0; byte + 1 < sizeof word; ++byte) {
      word = static_cast<Word>(
          word |
          static_cast<Word>(static_cast<Word>(static_cast<uint8_t>(rest[byte * count + i])) << (8 * byte)));
    }
    word = static_cast<Word>(word >> 1 | word << (kBits - 1));
    std::memcpy(block + i * sizeof word, &word, sizeof word);
  }
}

// That this thread has had of a core: others may have the cores for most of the time.
double ThreadSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

Compression CompressionOf(size_t number_bytes) {
  if (number_bytes == 2) return Compression::kWords16;
  if (number_bytes == 4) return Compression::kWords32;
  return Compression::kNone;
}

size_t CompressBlock(Compression how, const char* block, size_t bytes, char* to, size_t room) {
  const size_t number_bytes = NumberBytes(how), count = bytes / number_bytes, rest = bytes - count;
  if (bytes % number_bytes != 0 || room <= rest) return 0;
  const std::unique_ptr<uint8_t[]> exponents = Room<uint8_t>(count);
  if (number_bytes == 2) {
    Split<uint16_t>(block, count, to, exponents.get());
  } else {
    Split<uint32_t>(block, count, to, exponents.get());
  }
  const size_t coded = HuffmanEncode(exponents.get(), count, to + rest, room - rest);
  return coded == 0 ? 0 : rest + coded;
}

bool ExpandBlock(Compression how, const char* from, size_t stored_bytes, char* block, size_t bytes) {
  const size_t number_bytes = NumberBytes(how), count = bytes / number_bytes, rest = bytes - count;
  if (bytes % number_bytes != 0 || stored_bytes <= rest) return false;
  const std::unique_ptr<uint8_t[]> exponents = Room<uint8_t>(count);
  if (!HuffmanDecode(from + rest, stored_bytes - rest, exponents.get(), count)) return false;
  if (number_bytes == 2) {
    Join<uint16_t>(from, exponents.get(), count, block);
  } else {
    Join<uint32_t>(from, exponents.get(), count, block);
  }
  return true;
}

CompressionTrial TryCompression(Compression how, const char* block, size_t bytes) {
  const std::unique_ptr<char[]> stored = Room<char>(bytes + kHuffmanSlack), back = Room<char>(bytes);
  std::memset(stored.get(), 0, bytes);  // or the memory's first use would be measured, too
  std::memset(back.get(), 0, bytes);
  CompressionTrial trial;
  const double begin_s = ThreadSeconds();
  trial.stored_bytes = CompressBlock(how, block, bytes, stored.get(), bytes - 1);
  const double between_s = ThreadSeconds();
  if (trial.stored_bytes == 0) {
    trial.stored_bytes = bytes;
  } else {
    ExpandBlock(how, stored.get(), trial.stored_bytes, back.get(), bytes);
  }
  trial.compress_s = between_s - begin_s;
  trial.expand_s = ThreadSeconds() - between_s;
  return trial;
}

}  // namespace flexkv
