// Data races. Objects compiled with -fsanitize=thread call the functions at the end of this file, which g++ would
// otherwise take from its own library, at every access to memory. Of two accesses to an address, one of them a write,
// one must come before the other: in the same thread, or beyond a barrier of its block or warp, or in another launch.
// This does not depend on the order in which threads happen to run.
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>

#include "fibers.h"

namespace fibers {
namespace {

constexpr Now kNever = {kNoThread, 0, 0, 0, 0};

// What was done to one granule: the last write; the last read, and another one that nothing orders before it, if there
// is one, by a thread as far away as possible: any later write that some read is not ordered with, one of these two
// is not ordered with.
struct Record {
  Now write = kNever, read = kNever, other_read = kNever;
};

// In bytes: what is written at once is no smaller.
constexpr uintptr_t kGranule = 2, kPage = 4096;
using Page = std::array<Record, kPage / kGranule>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;

Record& record_of(uintptr_t address) {
  static uintptr_t last = 0;
  static Page* page = nullptr;
  if (address / kPage != last || pages.empty()) {
    last = address / kPage;
    std::unique_ptr<Page>& at = pages[last];
    if (!at) at = std::make_unique<Page>();
    page = at.get();
  }
  return (*page)[address % kPage / kGranule];
}

// Whether nothing but luck decides which of the two comes first.
bool unordered(const Now& before, const Now& now, bool shared) {
  if (before.thread == kNoThread) return false;
  if (before.block != now.block) return !shared;
  if (before.phase != now.phase || before.thread == now.thread) return false;
  return before.thread / kWarp != now.thread / kWarp || before.warp_phase == now.warp_phase;
}

// How far two threads are apart.
int distance(const Now& a, const Now& b) {
  if (a.block != b.block) return 3;
  return a.thread / kWarp != b.thread / kWarp ? 2 : a.thread != b.thread;
}

[[noreturn]] void race(const char* first, const Now& before, const char* second, const Now& now, bool shared) {
  const auto name = [](const Now& at) {
    return "thread " + std::to_string(at.thread) + " of block " + std::to_string(at.block);
  };
  const std::string where = shared ? "shared" : "global";
  fail("race in " + where + " memory: " + name(before) + first + ", " + name(now) + second +
       ", with no barrier between them");
}

void access(const void* address, size_t bytes, bool writes) {
  const Now now = fibers::now();
  if (now.thread == kNoThread || on_a_stack(address)) return;
  const bool shared = fibers::shared(address);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address) / kGranule * kGranule;
  const uintptr_t end = reinterpret_cast<uintptr_t>(address) + bytes;
  for (uintptr_t at = begin; at < end; at += kGranule) {
    Record& record = record_of(at);
    if (unordered(record.write, now, shared)) race(" writes", record.write, writes ? " writes" : " reads", now, shared);
    if (writes) {
      for (const Now& read : {record.read, record.other_read}) {
        if (unordered(read, now, shared)) race(" reads", read, " writes", now, shared);
      }
      record.write = now;
    } else if (!unordered(record.read, now, shared)) {
      record.read = now;
    } else if (!unordered(record.other_read, now, shared) ||
               distance(record.read, record.other_read) <= distance(record.read, now)) {
      record.other_read = now;
    }
  }
}

}  // namespace

void forget_accesses() { pages.clear(); }

}  // namespace fibers

#define FIBERS_ACCESS(size)                                                                           \
  void __tsan_read##size(void* address) { fibers::access(address, size, false); }                     \
  void __tsan_write##size(void* address) { fibers::access(address, size, true); }                     \
  void __tsan_unaligned_read##size(void* address) { fibers::access(address, size, false); }           \
  void __tsan_unaligned_write##size(void* address) { fibers::access(address, size, true); }

extern "C" {
FIBERS_ACCESS(1)
FIBERS_ACCESS(2)
FIBERS_ACCESS(4)
FIBERS_ACCESS(8)
FIBERS_ACCESS(16)
void __tsan_read_range(void* address, size_t bytes) { fibers::access(address, bytes, false); }
void __tsan_write_range(void* address, size_t bytes) { fibers::access(address, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
