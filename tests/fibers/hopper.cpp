#include "hopper.h"

#include <array>
#include <cstring>
#include <vector>

#include "fibers.h"

namespace dac::hopper {
namespace {

alignas(128) __shared__ char memory[kSharedBytes];

// What copies and products of shared memory are made of.
constexpr int kPiece = 16;

struct Copy {
  void* to;
  const void* from;
  bool exists;
};

struct Thread {
  std::vector<Copy> copies;
  // Pieces that its copies wrote since it last showed them.
  std::vector<int> hidden;
  std::vector<Product> products;
  bool fenced = false;
};

// All threads of one come to each wait for products.
struct Warpgroup {
  std::array<Thread, 128> threads;
  int waiting = 0, waits = 0;
};

std::vector<Warpgroup> groups;
// Pieces of shared memory that products may read.
std::array<bool, kSharedBytes / kPiece> shown;

// That of the thread that runs. A block begins with nothing under way.
Warpgroup& group() {
  static unsigned run = 0;
  const fibers::Now now = fibers::now();
  if (now.run != run) groups.clear(), shown.fill(false), run = now.run;
  if (groups.size() <= now.thread / 128u) groups.resize(now.thread / 128 + 1);
  return groups[now.thread / 128];
}

Thread& thread() { return group().threads[fibers::now().thread % 128]; }

// Whether the call at this site is made.
bool passes(const char* file, int line) {
  return fibers::wait_until([] { return true; }, {file, line});
}

// An element of a matrix in shared memory, by the fields of its descriptor.
uint16_t element(uint64_t matrix, int row, int column) {
  const auto field = [&](int begin) { return static_cast<int>(matrix >> begin & 0x3FFF) << 4; };
  if (matrix >> 46) fibers::fail("a matrix with fields that are not emulated");
  const int at = field(0) + row / 8 * field(32) + row % 8 * 16 + column / 8 * field(16) + column % 8 * 2;
  if (at >= kSharedBytes) fibers::fail("a product reads beyond shared memory");
  if (!shown[at / kPiece]) fibers::fail("a product reads what nobody has shown to it");
  uint16_t bits;
  std::memcpy(&bits, memory + at, 2);
  return bits;
}

// The number `i` of each thread's products, for the whole group.
void run(Warpgroup& group, size_t i) {
  const Product& any = group.threads[0].products[i];
  float a[64][16], b[kMostColumns][16];
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      // A thread has 2 columns of each 8, of two rows.
      const Product& holder = group.threads[row / 16 * 32 + row % 8 * 4 + k % 8 / 2].products[i];
      const int held = row / 8 % 2 + k / 8 * 2;
      a[row][k] = any.value(any.registers ? holder.registers[held] >> (16 * (k % 2)) : element(any.a, row, k));
    }
  }
  for (int column = 0; column < any.columns; ++column) {
    for (int k = 0; k < 16; ++k) b[column][k] = any.value(element(any.b, column, k));
  }
  for (int thread = 0; thread < 128; ++thread) {
    const Product& product = group.threads[thread].products[i];
    if (product.a != any.a || product.b != any.b) fibers::fail("a warpgroup's matrices differ");
    for (int j = 0; j < product.columns / 2; ++j) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + j / 2 % 2 * 8, column = j / 4 * 8 + thread % 4 * 2 + j % 2;
      float& sum = product.sums[j];
      if (product.begins) sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
    }
  }
}

// A barrier in shared memory.
struct Barrier {
  int16_t threads, missing;
  uint32_t phase;
};

Barrier& at(uint64_t* barrier) { return *reinterpret_cast<Barrier*>(barrier); }

}  // namespace

char* shared_memory() { return memory; }

void copy_async(void* to, const void* from, bool exists) { thread().copies.push_back({to, from, exists}); }

void wait_for_copies(const char* file, int line) {
  if (!passes(file, line)) return;
  Thread& thread = hopper::thread();
  for (const Copy& copy : thread.copies) {
    std::memset(copy.to, 0, kPiece);
    if (copy.exists) std::memcpy(copy.to, copy.from, kPiece);
    const int piece = static_cast<int>(static_cast<char*>(copy.to) - memory) / kPiece;
    shown[piece] = false;
    thread.hidden.push_back(piece);
  }
  thread.copies.clear();
}

void show_to_products(const char* file, int line) {
  if (!passes(file, line)) return;
  for (const int piece : thread().hidden) shown[piece] = true;
  thread().hidden.clear();
}

void initialize(uint64_t* barrier, int threads) {
  at(barrier) = {static_cast<int16_t>(threads), static_cast<int16_t>(threads), 0};
}

void arrive(uint64_t* barrier, const char* file, int line) {
  if (!passes(file, line)) return;
  Barrier& own = at(barrier);
  if (--own.missing < 0) fibers::fail("a barrier that is not initialized");
  if (own.missing == 0) own.missing = own.threads, ++own.phase;
}

void wait(uint64_t* barrier, int parity, const char* file, int line) {
  fibers::wait_until([&] { return at(barrier).phase % 2 != static_cast<unsigned>(parity); }, {file, line});
}

void fence_registers(const char* file, int line) {
  if (passes(file, line)) thread().fenced = true;
}

void wait_for_products(const char* file, int line) {
  if (!passes(file, line)) return;
  Warpgroup& group = hopper::group();
  const int before = group.waits;
  if (++group.waiting == 128) {
    for (size_t i = 0; i < group.threads[0].products.size(); ++i) run(group, i);
    for (Thread& thread : group.threads) thread.products.clear(), thread.fenced = false;
    group.waiting = 0, ++group.waits;
  }
  fibers::wait_until([&] { return group.waits != before; }, {file, line});
}

uint64_t matrix(const void* at, int next) {
  const uint64_t address = static_cast<const char*>(at) - memory;
  return address >> 4 | static_cast<uint64_t>(next >> 4) << 16 | static_cast<uint64_t>(128 >> 4) << 32;
}

void start(const Product& product) {
  if (!thread().fenced) fibers::fail("a product with registers that are not fenced");
  thread().products.push_back(product);
}

}  // namespace dac::hopper
