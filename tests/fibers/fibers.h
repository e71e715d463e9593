// How main.cpp drives the fibers, and what fibers.cpp tells races.cpp.
#pragma once

#include <cstddef>
#include <string>

namespace fibers {

// The order of blocks and threads; 0: by number. Call before the first launch.
void shuffle(unsigned seed);
// Leave out what is called at this site, "file.cu:12".
void leave_out(const std::string& site);
// How often each site was passed, "file.cu:12 34" a line.
std::string passed();

// The thread that runs, or kNoThread outside a launch.
constexpr int kNoThread = -1, kWarp = 32;
struct Now {
  int thread, block;
  // Barriers that all blocks have passed so far, and those that warps have; blocks so far.
  unsigned phase, warp_phase, run;
};
Now now();

// Whether all threads of a block share this address, or a single thread has it on its stack.
bool shared(const void* address);
bool on_a_stack(const void* address);

[[noreturn]] void fail(const std::string& why);

// races.cpp: what came before does not matter any more.
void forget_accesses();

}  // namespace fibers
