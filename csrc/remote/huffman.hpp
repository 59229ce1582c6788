// A Huffman code for bytes of which some are far more frequent than others, and which follow each other as if
// they were drawn: nothing but how often each occurs makes them smaller. Pure functions over bytes.
//
// Bytes are coded in chunks of 64 Ki, each with a code of its own:
//
//   128 bytes  the length of the code of each of the 256 bytes, 4 bits each, the first in the low bits; 0: it
//              does not occur. Codes are canonical: shorter ones first, of one length in the order of the bytes
//   4 x 4      sizes of four streams, little-endian; each has a quarter of the chunk (rounded up; the last ones
//              have what is left)
//   the streams, one after the other: codes from the highest bit on, filled up with zeros to a whole byte
#pragma once

#include <cstddef>
#include <cstdint>

namespace flexkv {

// So many bytes behind what is decoded may be read, whatever they are.
constexpr size_t kHuffmanSlack = 8;

// Returns how many bytes were written to `to`; 0: there is no room.
size_t HuffmanEncode(const uint8_t* from, size_t count, char* to, size_t room);
// Whether `from` are exactly `count` bytes, however they came about.
bool HuffmanDecode(const char* from, size_t bytes, uint8_t* to, size_t count);

}  // namespace flexkv
