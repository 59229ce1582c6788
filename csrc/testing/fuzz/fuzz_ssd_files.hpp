// What the fuzz target of the SSD tier's files shares with its driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace flexkv {

// Plants a wrong expectation, so that the driver can show that a broken invariant ends the run.
extern bool fuzz_self_test;

// Inputs that lead deep: files as the store writes them, and recipes for such files.
std::vector<std::string> FuzzSeeds();

}  // namespace flexkv
