// Runs a fuzz target without libFuzzer: random inputs, and seeds with mutations. It does not learn from
// coverage; it is for smoke tests, and for running saved inputs again.
//
//   driver [--seconds S] [--runs N] [--seed N] [--self-test] [--write-seeds DIR] [--crash FILE] [INPUT ...]
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "testing/fuzz/fuzz_target.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

std::string g_input, g_crash = "crash-input";

// On the way out, whatever the reason: only plain system calls.
void SaveInput() {
  static volatile sig_atomic_t saved = 0;
  if (saved) return;
  saved = 1;
  const int fd = open(g_crash.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return;
  const char hint[] = "FINDING: the input is in ";
  if (write(fd, g_input.data(), g_input.size()) == static_cast<ssize_t>(g_input.size()) &&
      write(STDERR_FILENO, hint, sizeof hint - 1) > 0 &&
      write(STDERR_FILENO, g_crash.data(), g_crash.size()) > 0) {
    static_cast<void>(!write(STDERR_FILENO, "\n", 1));
  }
  close(fd);
}

void OnAbort(int) {
  SaveInput();
  std::signal(SIGABRT, SIG_DFL);
  std::raise(SIGABRT);
}

void Run(std::string input) {
  g_input = std::move(input);
  // A copy of exactly its size, so that the sanitizer sees reads beyond it.
  const std::vector<uint8_t> exact(g_input.begin(), g_input.end());
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

class Mutator {
 public:
  Mutator(uint64_t seed, std::vector<std::string> seeds) : random_(seed), seeds_(std::move(seeds)) {}

  std::string Next() {
    if (Below(8) == 0) {
      std::string input(1 + Below(600), '\0');
      for (char& c : input) c = Value();
      return input;
    }
    std::string input = seeds_[Below(seeds_.size())];
    // The modes as they are half of the time: some lead to what others never reach.
    if (Below(2) == 0) input[0] = static_cast<char>(input[0] ^ (1 << Below(8)));
    for (uint64_t count = Below(6); count > 0; --count) Mutate(&input);
    return input;
  }

 private:
  uint64_t Below(uint64_t bound) { return random_() % bound; }
  char Value() {
    static constexpr unsigned char kOdd[] = {0, 1, 2, 0x7F, 0x80, 0xF0, 0xFE, 0xFF};
    return static_cast<char>(Below(2) == 0 ? kOdd[Below(sizeof kOdd)] : Below(256));
  }
  void Mutate(std::string* input) {
    const size_t at = 1 + Below(input->size());
    switch (Below(6)) {
      case 0:
        if (at < input->size()) (*input)[at] = static_cast<char>((*input)[at] ^ (1 << Below(8)));
        break;
      case 1:
        for (size_t i = at; i < std::min(input->size(), at + 8); ++i) (*input)[i] = Value();
        break;
      case 2:  // near the start, where the fields of a recipe are
        (*input)[std::min(input->size() - 1, 1 + Below(64))] = Value();
        break;
      case 3:
        input->insert(at, 1 + Below(16), Value());
        break;
      case 4:
        input->erase(at, 1 + Below(16));
        break;
      default:
        if (Below(8) == 0) input->resize(std::max<size_t>(4, at));
        break;
    }
  }

  std::mt19937_64 random_;
  const std::vector<std::string> seeds_;
};

[[noreturn]] void Usage(const char* what) {
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 5;
  uint64_t runs = UINT64_MAX, seed = 1;
  std::vector<std::string> inputs;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const auto value = [&] {
      if (++i >= argc) Usage("an option lacks its value");
      return argv[i];
    };
    if (option == "--seconds") {
      seconds = std::atof(value());
    } else if (option == "--runs") {
      runs = std::strtoull(value(), nullptr, 10);
    } else if (option == "--seed") {
      seed = std::strtoull(value(), nullptr, 10);
    } else if (option == "--crash") {
      g_crash = value();
    } else if (option == "--self-test") {
      flexkv::fuzz_self_test = true;
    } else if (option == "--write-seeds") {
      const std::string directory = value();
      size_t number = 0;
      for (const std::string& each : flexkv::FuzzSeeds()) {
        std::ofstream file(directory + "/seed-" + std::to_string(number++), std::ios::binary);
        if (!file.write(each.data(), static_cast<std::streamsize>(each.size()))) Usage("cannot write seeds");
      }
      return 0;
    } else if (option.rfind("--", 0) == 0) {
      Usage("no such option");
    } else {
      inputs.push_back(option);
    }
  }
  for (const std::string& name : inputs) {
    std::ifstream file(name, std::ios::binary);
    if (!file) Usage("cannot read an input");
    Run({std::istreambuf_iterator<char>(file), {}});
  }
  if (!inputs.empty()) return 0;

  std::signal(SIGABRT, OnAbort);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(SaveInput);
#endif
  uint64_t done = 0;
  for (const std::string& each : flexkv::FuzzSeeds()) {
    Run(each);
    ++done;
  }
  Mutator mutator(seed, flexkv::FuzzSeeds());
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (; done < runs && std::chrono::steady_clock::now() < end; ++done) Run(mutator.Next());
  std::printf("%llu executions, no findings\n", static_cast<unsigned long long>(done));
  return 0;
}
