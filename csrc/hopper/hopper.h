// What of sm_90a residual_unit.cu uses: barriers in shared memory, asynchronous copies, and the matrix products of a
// warpgroup (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"). tests/fibers/hopper.h does the same on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../half.h"

namespace dac::hopper {

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Of shared memory, as PTX counts.
__device__ __forceinline__ uint32_t address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// 16 bytes of global memory into shared memory, or zeros where `exists` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}

// Until all copies of this thread have arrived.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// What this thread has written to shared memory can be read by products.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier's phase ends when `threads` have arrived.
__device__ __forceinline__ void initialize(uint64_t* barrier, int threads) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

// Until the phase of this parity has ended; before the first phase, that of parity 1 has. Ends the
// launch if that never comes, which is a fault of the program.
__device__ __forceinline__ void wait(uint64_t* barrier, int parity) {
  for (int tries = 0; tries < 1 << 24; ++tries) {
    uint32_t ended;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(ended)
        : "r"(address(barrier)), "r"(parity)
        : "memory");
    if (ended) return;
  }
  __trap();
}

// Between any access to registers and products that use them.
__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Until all products of this warpgroup are done.
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Where a matrix of 16-bit elements lies: 8 rows by 16 bytes are 128 bytes in a row; the next 8 rows are another 128
// bytes away, the next 16 bytes of every row `next` bytes.
__device__ __forceinline__ uint64_t matrix(const void* at, int next) {
  return static_cast<uint64_t>((address(at) & 0x3FFFF) >> 4) | static_cast<uint64_t>(next >> 4) << 16 |
         static_cast<uint64_t>(128 >> 4) << 32;
}

// d += a b, for a of 64 rows and 16 columns and b of as many columns as d has, both K-major: b's columns are rows in
// memory. Thread t of the warpgroup has of d, for i = 0, 1, ..., rows 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2) and columns
// 8 (i / 4) + 2 (t % 4) + i % 2; of an a in registers the same rows and columns, two to a register. `begins`: d is zero.
// clang-format off
#define DAC_32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define DAC_48 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}"
#define DAC_EIGHT(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define DAC_SUMS_32(d) DAC_EIGHT(d, 0), DAC_EIGHT(d, 8), DAC_EIGHT(d, 16), DAC_EIGHT(d, 24)
#define DAC_SUMS_48(d) DAC_SUMS_32(d), DAC_EIGHT(d, 32), DAC_EIGHT(d, 40)
#define DAC_PRODUCT(T, TYPE, N, COUNT, P0, P1, P2, P3, P4, P5)                                                      \
  __device__ __forceinline__ void multiply(float (&d)[COUNT], uint64_t a, uint64_t b, bool begins, T) {             \
    asm volatile("{ .reg .pred p; setp.eq.b32 p, " P2 ", 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " DAC_##COUNT ", "               \
                 P0 ", " P1 ", p, 1, 1, 0, 0; }"                                                                    \
                 : DAC_SUMS_##COUNT(d) : "l"(a), "l"(b), "r"(static_cast<int>(begins)));                            \
  }                                                                                                                 \
  __device__ __forceinline__ void multiply(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, bool begins, T) { \
    asm volatile("{ .reg .pred p; setp.eq.b32 p, " P5 ", 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " DAC_##COUNT ", "               \
                 "{" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, 0; }"                                         \
                 : DAC_SUMS_##COUNT(d)                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(begins)));              \
  }
DAC_PRODUCT(Float16, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
DAC_PRODUCT(Float16, "f16", 96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
DAC_PRODUCT(BFloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
DAC_PRODUCT(BFloat16, "bf16", 96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
#undef DAC_PRODUCT
#undef DAC_SUMS_48
#undef DAC_SUMS_32
#undef DAC_EIGHT
#undef DAC_48
#undef DAC_32
// clang-format on

// Within 2^-20 and the rounding of x / (2 pi).
__device__ __forceinline__ float near_sine(float x) { return __sinf(x); }

__device__ __forceinline__ uint32_t packed(float low, float high, Float16) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ uint32_t packed(float low, float high, BFloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ void unpack(uint32_t bits, float (&to)[2], Float16) {
  const float2 pair = __half22float2(reinterpret_cast<const __half2&>(bits));
  to[0] = pair.x, to[1] = pair.y;
}

__device__ __forceinline__ void unpack(uint32_t bits, float (&to)[2], BFloat16) {
  const float2 pair = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits));
  to[0] = pair.x, to[1] = pair.y;
}

}  // namespace dac::hopper
