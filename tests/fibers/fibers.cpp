// A launch on a CPU. Blocks run one after another; of a block, every thread runs until its next barrier, in an order that
// is shuffled anew between any two. Refused are barriers that not all threads of a block or warp reach, or not the same
// one. Shared memory is NaN when a block begins. A copy from pageable memory ends when the host waits, no sooner.
#include "fibers.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, gridDim;

// The linker's names for the bounds of the section.
extern char __start_fibers_shared[], __stop_fibers_shared[];

namespace fibers {
namespace {

constexpr size_t kStack = 256 << 10;

// A stack, and where its execution stands.
struct Context {
  ucontext_t registers;
  void* stack = nullptr;
  size_t size = 0;
};

// A site by name, and how often it was passed.
struct Place {
  Site site;
  std::string name;
  int passes;
};

struct Fiber : Context {
  // Where it waits, and for whom; the thread's end is a place where the block meets, too.
  const Place* place = nullptr;
  Scope scope = Scope::block;
  const std::function<bool()>* ready = nullptr;
};

const Place kEnd = {{"", 0}, "its end", 0};

struct Copy {
  void* to;
  std::vector<char> bytes;
};

std::mt19937 generator;
bool in_order = true;
std::string left_out;
std::list<Place> places;
std::vector<Copy> pending;

std::vector<char> stacks;
std::vector<Fiber> threads;
Context host;
const std::function<void()>* body = nullptr;
Now current = {kNoThread, 0, 0, 0, 0};

// The place that is passed; null: the call there is left out.
const Place* pass(Site site) {
  const auto same = [&](const Place& place) { return place.site.file == site.file && place.site.line == site.line; };
  auto place = std::find_if(places.begin(), places.end(), same);
  if (place == places.end()) {
    const std::string file = site.file, name = file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
    place = places.insert(place, {site, name, 0});
  }
  ++place->passes;
  return place->name == left_out ? nullptr : &*place;
}

// Goes on with `to`, and comes back when another one enters `from`.
void enter(Context& to, Context& from) {
#ifdef __SANITIZE_ADDRESS__
  void* saved = nullptr;
  __sanitizer_start_switch_fiber(&saved, to.stack, to.size);
#endif
  swapcontext(&from.registers, &to.registers);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#endif
}

void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, const_cast<const void**>(&host.stack), &host.size);
#endif
  (*body)();
  Fiber& fiber = threads[current.thread];
  fiber.place = &kEnd, fiber.scope = Scope::block;
  enter(host, fiber);
}

void prepare(Fiber& fiber, void* stack) {
  fiber = Fiber{};
  fiber.stack = stack, fiber.size = kStack;
  getcontext(&fiber.registers);
  fiber.registers.uc_stack = {stack, 0, kStack};
  makecontext(&fiber.registers, run_thread, 0);
}

template <class T>
void mix(std::vector<T>& values) {
  if (!in_order) std::shuffle(values.begin(), values.end(), generator);
}

std::vector<int> first_numbers(size_t count) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

// Every byte 0xFF, red zones of the sanitizer between variables included.
__attribute__((no_sanitize("address"))) void poison_shared() {
  for (volatile char* at = __start_fibers_shared; at < __stop_fibers_shared; ++at) *at = static_cast<char>(0xFF);
}

// These threads wait at one place.
void expect_together(const std::vector<int>& group) {
  const Fiber& first = threads[group[0]];
  for (const int thread : group) {
    const Fiber& other = threads[thread];
    if (other.place == first.place && other.scope == first.scope) continue;
    fail("divergent barrier: one thread is at " + first.place->name + ", another at " + other.place->name);
  }
}

// Lets these threads go on to their next barriers.
void run(std::vector<int> ready) {
  mix(ready);
  for (const int thread : ready) {
    threadIdx.x = thread, current.thread = thread;
    enter(threads[thread], host);
  }
  current.thread = kNoThread;
}

// The threads of warps that wait, each for its own.
std::vector<int> waiting_warps() {
  std::vector<int> ready;
  const int count = static_cast<int>(threads.size());
  for (int begin = 0; begin < count; begin += kWarp) {
    std::vector<int> warp;
    bool waits = false;
    for (int thread = begin; thread < std::min(begin + kWarp, count); ++thread) {
      warp.push_back(thread);
      waits = waits || threads[thread].scope == Scope::warp;
    }
    if (!waits) continue;
    expect_together(warp);
    ready.insert(ready.end(), warp.begin(), warp.end());
  }
  return ready;
}

// Some of the threads whose condition holds by now, at least one if there is any.
std::vector<int> ready_threads() {
  std::vector<int> ready;
  for (size_t thread = 0; thread < threads.size(); ++thread) {
    if (threads[thread].scope == Scope::none && (*threads[thread].ready)()) ready.push_back(static_cast<int>(thread));
  }
  mix(ready);
  if (!in_order && !ready.empty()) ready.resize(1 + generator() % ready.size());
  return ready;
}

// Lets the whole block go on to its next barrier.
void run_block() {
  const std::vector<int> all = first_numbers(threads.size());
  for (std::vector<int> ready = all; !ready.empty();) {
    run(ready);
    ++current.warp_phase;
    ready = waiting_warps();
    const std::vector<int> more = ready_threads();
    ready.insert(ready.end(), more.begin(), more.end());
  }
  for (const Fiber& fiber : threads) {
    if (fiber.scope == Scope::none) fail("deadlock: a thread is at " + fiber.place->name);
  }
  ++current.phase;
  expect_together(all);
}

}  // namespace

void shuffle(unsigned seed) {
  generator.seed(seed);
  in_order = seed == 0;
}

void leave_out(const std::string& site) { left_out = site; }

std::string passed() {
  std::string lines;
  for (const Place& place : places) lines += place.name + " " + std::to_string(place.passes) + "\n";
  return lines;
}

Now now() { return current; }

bool shared(const void* address) { return address >= __start_fibers_shared && address < __stop_fibers_shared; }

bool on_a_stack(const void* address) {
  return address >= stacks.data() && address < stacks.data() + stacks.size();
}

void fail(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::_Exit(1);
}

void barrier(Scope scope, Site site) {
  const Place* place = pass(site);
  if (!place) return;
  Fiber& fiber = threads[current.thread];
  fiber.place = place, fiber.scope = scope;
  enter(host, fiber);
}

bool wait_until(const std::function<bool()>& ready, Site site) {
  const Place* place = pass(site);
  if (!place) return false;
  Fiber& fiber = threads[current.thread];
  fiber.place = place, fiber.scope = Scope::none, fiber.ready = &ready;
  enter(host, fiber);
  return true;
}

void copy(void* to, const void* from, size_t bytes) {
  const char* first = static_cast<const char*>(from);
  pending.push_back({to, {first, first + bytes}});
}

void synchronize(Site site) {
  if (!pass(site)) return;
  for (const Copy& copy : pending) std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
  pending.clear();
}

void launch(unsigned blocks, unsigned count, const std::function<void()>& kernel) {
  stacks.resize(count * kStack);
  threads.resize(count);
  body = &kernel;
  forget_accesses();
  gridDim.x = blocks;
  std::vector<int> numbers = first_numbers(blocks);
  mix(numbers);
  for (const int block : numbers) {
    blockIdx.x = block, current.block = block, ++current.run;
    for (unsigned i = 0; i < count; ++i) prepare(threads[i], &stacks[i * kStack]);
    poison_shared();
    do {
      run_block();
    } while (threads[0].place != &kEnd);
  }
}

}  // namespace fibers
