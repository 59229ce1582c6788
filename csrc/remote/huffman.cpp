#include "remote/huffman.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

namespace flexkv {

namespace {

constexpr size_t kChunk = 64 << 10;
constexpr size_t kSymbols = 256, kStreams = 4;
constexpr int kBitsMax = 11;  // of a code
constexpr size_t kLengthsBytes = kSymbols / 2, kHeaderBytes = kLengthsBytes + kStreams * sizeof(uint32_t);
// Codes that are certainly among the bits that one read of eight bytes brings, wherever in a byte it begins.
constexpr size_t kAtOnce = (64 - 7) / kBitsMax;

using Lengths = std::array<uint8_t, kSymbols>;

struct Code {
  uint16_t bits = 0;
  uint8_t length = 0;
};

// Begin and end of the part of a chunk that a stream has.
std::pair<size_t, size_t> PartOf(size_t count, size_t stream) {
  const size_t quarter = (count + kStreams - 1) / kStreams;
  return {std::min(count, stream * quarter), std::min(count, (stream + 1) * quarter)};
}

// The tree is built from the leaves: the two lightest become one, again and again. If it gets too deep, weights
// are made more alike.
Lengths LengthsOf(std::array<uint32_t, kSymbols> weights) {
  for (;;) {
    std::vector<std::pair<uint32_t, size_t>> leaves;
    for (size_t symbol = 0; symbol < kSymbols; ++symbol) {
      if (weights[symbol] > 0) leaves.emplace_back(weights[symbol], symbol);
    }
    std::sort(leaves.begin(), leaves.end());
    const size_t count = leaves.size(), nodes = 2 * count - 1;
    std::array<uint64_t, 2 * kSymbols> weight{};
    std::array<size_t, 2 * kSymbols> parent{};
    for (size_t i = 0; i < count; ++i) weight[i] = leaves[i].first;
    size_t leaf = 0, inner = count;  // the lightest of each kind that has no parent yet
    for (size_t node = count; node < nodes; ++node) {
      for (int child = 0; child < 2; ++child) {
        const bool takes_leaf = leaf < count && (inner >= node || weight[leaf] <= weight[inner]);
        const size_t lightest = takes_leaf ? leaf++ : inner++;
        weight[node] += weight[lightest];
        parent[lightest] = node;
      }
    }
    std::array<int, 2 * kSymbols> depth{};
    for (size_t node = nodes - 1; node-- > 0;) depth[node] = depth[parent[node]] + 1;
    if (*std::max_element(depth.begin(), depth.begin() + static_cast<std::ptrdiff_t>(count)) <= kBitsMax) {
      Lengths lengths{};
      for (size_t i = 0; i < count; ++i) lengths[leaves[i].second] = static_cast<uint8_t>(depth[i]);
      return lengths;
    }
    for (uint32_t& each : weights) each = (each + 1) / 2;
  }
}

// Calls `use` for each code, in order. Returns whether they are a whole code: every row of bits begins with
// exactly one of them.
template <typename Use>
bool ForEachCode(const Lengths& lengths, Use use) {
  uint32_t next = 0;
  for (int length = 1; length <= kBitsMax; ++length) {
    next <<= 1;
    for (size_t symbol = 0; symbol < kSymbols; ++symbol) {
      if (lengths[symbol] != length) continue;
      if (next >> length != 0) return false;
      use(symbol, Code{static_cast<uint16_t>(next), static_cast<uint8_t>(length)});
      ++next;
    }
  }
  return next == 1u << kBitsMax;
}

size_t EncodeStream(const uint8_t* begin, const uint8_t* end, const std::array<Code, kSymbols>& codes,
                    char* to) {
  uint64_t bits = 0;
  int held = 0;
  char* out = to;
  for (; begin < end; ++begin) {
    const Code code = codes[*begin];
    bits = bits << code.length | code.bits;
    held += code.length;
    if (held >= 32) {
      held -= 32;
      const uint32_t word = __builtin_bswap32(static_cast<uint32_t>(bits >> held));
      std::memcpy(out, &word, sizeof word);
      out += sizeof word;
    }
  }
  for (; held > 0; held -= 8) {
    *out++ = static_cast<char>(held >= 8 ? bits >> (held - 8) : bits << (8 - held));
  }
  return static_cast<size_t>(out - to);
}

size_t EncodeChunk(const uint8_t* from, size_t count, char* to, size_t room) {
  std::array<std::array<uint32_t, kSymbols>, kStreams> counts{};  // several, or each waits for the one before
  for (size_t i = 0; i < count; ++i) ++counts[i % kStreams][from[i]];
  for (size_t symbol = 0; symbol < kSymbols; ++symbol) {
    for (size_t i = 1; i < kStreams; ++i) counts[0][symbol] += counts[i][symbol];
  }
  std::array<uint32_t, kSymbols> weights = counts[0];
  if (weights[from[0]] == count) weights[from[0] ^ 1] = 1;  // one code alone would not be a whole one
  const Lengths lengths = LengthsOf(weights);
  size_t bits = 0;
  for (size_t symbol = 0; symbol < kSymbols; ++symbol) bits += size_t{counts[0][symbol]} * lengths[symbol];
  if (room < kHeaderBytes + bits / 8 + kStreams) return 0;
  std::array<Code, kSymbols> codes;
  ForEachCode(lengths, [&](size_t symbol, Code code) { codes[symbol] = code; });
  for (size_t i = 0; i < kLengthsBytes; ++i) {
    to[i] = static_cast<char>(lengths[2 * i] | lengths[2 * i + 1] << 4);
  }
  size_t used = kHeaderBytes;
  for (size_t stream = 0; stream < kStreams; ++stream) {
    const auto [begin, end] = PartOf(count, stream);
    const auto size = static_cast<uint32_t>(EncodeStream(from + begin, from + end, codes, to + used));
    std::memcpy(to + kLengthsBytes + stream * sizeof size, &size, sizeof size);
    used += size;
  }
  return used;
}

struct Stream {
  const char* from = nullptr;
  size_t size = 0;  // bytes
  size_t at = 0;    // bits
  uint8_t* to = nullptr;
  size_t count = 0;

  bool is_beyond_its_end() const { return at > 8 * size; }
  uint64_t Next() const {
    uint64_t bits;
    std::memcpy(&bits, from + at / 8, sizeof bits);
    return __builtin_bswap64(bits) << at % 8;
  }
};

struct Entry {
  uint8_t symbol = 0;
  uint8_t length = 0;
};

// Returns how many bytes of `from` the chunk took; 0: it is none.
size_t DecodeChunk(const char* from, size_t bytes, uint8_t* to, size_t count) {
  if (bytes < kHeaderBytes) return 0;
  Lengths lengths;
  for (size_t i = 0; i < kLengthsBytes; ++i) {
    lengths[2 * i] = static_cast<uint8_t>(from[i]) & 15;
    lengths[2 * i + 1] = static_cast<uint8_t>(from[i]) >> 4;
  }
  if (*std::max_element(lengths.begin(), lengths.end()) > kBitsMax) return 0;
  std::array<Entry, 1 << kBitsMax> entries;
  const bool whole = ForEachCode(lengths, [&](size_t symbol, Code code) {
    const int rest = kBitsMax - code.length;
    std::fill_n(entries.begin() + (code.bits << rest), 1 << rest,
                Entry{static_cast<uint8_t>(symbol), code.length});
  });
  if (!whole) return 0;
  std::array<Stream, kStreams> streams;
  size_t used = kHeaderBytes;
  for (size_t i = 0; i < kStreams; ++i) {
    uint32_t size;
    std::memcpy(&size, from + kLengthsBytes + i * sizeof size, sizeof size);
    if (size > bytes - used) return 0;
    const auto [begin, end] = PartOf(count, i);
    streams[i] = {from + used, size, 0, to + begin, end - begin};
    used += size;
  }
  size_t done = 0;
  // The last stream is the shortest. All side by side: each waits for its own last code only.
  for (; done + kAtOnce <= streams.back().count; done += kAtOnce) {
    for (Stream& stream : streams) {
      if (stream.is_beyond_its_end()) return 0;
      uint64_t bits = stream.Next();
      for (size_t i = 0; i < kAtOnce; ++i) {
        const Entry entry = entries[bits >> (64 - kBitsMax)];
        stream.to[done + i] = entry.symbol;
        bits <<= entry.length;
        stream.at += entry.length;
      }
    }
  }
  for (Stream& stream : streams) {
    for (size_t i = done; i < stream.count; ++i) {
      if (stream.is_beyond_its_end()) return 0;
      const Entry entry = entries[stream.Next() >> (64 - kBitsMax)];
      stream.to[i] = entry.symbol;
      stream.at += entry.length;
    }
    if ((stream.at + 7) / 8 != stream.size) return 0;
  }
  return used;
}

}  // namespace

size_t HuffmanEncode(const uint8_t* from, size_t count, char* to, size_t room) {
  size_t used = 0;
  for (size_t done = 0; done < count; done += kChunk) {
    const size_t size = EncodeChunk(from + done, std::min(kChunk, count - done), to + used, room - used);
    if (size == 0) return 0;
    used += size;
  }
  return used;
}

bool HuffmanDecode(const char* from, size_t bytes, uint8_t* to, size_t count) {
  size_t used = 0;
  for (size_t done = 0; done < count; done += kChunk) {
    const size_t size = DecodeChunk(from + used, bytes - used, to + done, std::min(kChunk, count - done));
    if (size == 0) return false;
    used += size;
  }
  return used == bytes;
}

}  // namespace flexkv
