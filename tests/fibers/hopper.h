// csrc/hopper/hopper.h on a CPU, by hopper.cpp. What is asynchronous happens at the last moment: copies and products when
// a thread waits for them. Refused are products of bytes that nobody has shown to them, and products whose registers are
// not fenced.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../../csrc/half.h"

#define DAC_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace dac::hopper {

constexpr int kSharedBytes = 227 << 10;
// Of a product.
constexpr int kMostColumns = 256;

char* shared_memory();
void copy_async(void* to, const void* from, bool exists);
void wait_for_copies(DAC_SITE);
void show_to_products(DAC_SITE);
void initialize(uint64_t* barrier, int threads);
void arrive(uint64_t* barrier, DAC_SITE);
void wait(uint64_t* barrier, int parity, DAC_SITE);
void fence_registers(DAC_SITE);
void wait_for_products(DAC_SITE);
uint64_t matrix(const void* at, int next);

// A product under way. It has addresses of registers, which count when it happens.
struct Product {
  float* sums;
  int columns;
  // Of a in registers; null: it is in memory.
  const uint32_t* registers;
  uint64_t a, b;
  bool begins;
  float (*value)(uint16_t);
};
void start(const Product& product);

template <class T>
float value(uint16_t bits) {
  float value;
  convert(T{bits}, value);
  return value;
}

template <class T, int N>
void multiply(float (&sums)[N], uint64_t a, uint64_t b, bool begins, T) {
  start({sums, 2 * N, nullptr, a, b, begins, value<T>});
}

template <class T, int N>
void multiply(float (&sums)[N], const uint32_t (&a)[4], uint64_t b, bool begins, T) {
  start({sums, 2 * N, a, 0, b, begins, value<T>});
}

inline float near_sine(float x) { return std::sin(x); }

template <class T>
uint32_t packed(float low, float high, T) {
  T halves[2];
  convert(low, halves[0]);
  convert(high, halves[1]);
  return halves[0].bits | static_cast<uint32_t>(halves[1].bits) << 16;
}

template <class T>
void unpack(uint32_t bits, float (&to)[2], T) {
  for (const int i : {0, 1}) to[i] = value<T>(static_cast<uint16_t>(bits >> (16 * i)));
}

}  // namespace dac::hopper

#undef DAC_SITE
