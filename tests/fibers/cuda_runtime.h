// What csrc's .cu files use of CUDA, on a CPU: g++ compiles them against this header in place of the toolkit's. A
// launch runs the blocks one after another, and of a block one thread at a time, each on a fiber of its own that gives
// way at every barrier. fibers.cpp says in which order, and what it refuses.
#pragma once

#include <cstddef>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// One for all fibers, where fibers.cpp finds it.
#define __shared__ static __attribute__((section("fibers_shared")))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

template <class T>
T __ldg(const T* address) {
  return *address;
}

namespace fibers {

// A call in the source. `main` can leave out the calls of one site, to see whether that is noticed.
struct Site {
  const char* file;
  int line;
};

// Whose threads wait for each other; `none`: a thread waits for a condition.
enum class Scope { warp, block, none };

void barrier(Scope scope, Site site);
// Whether the call at this site is made; goes on when `ready`.
bool wait_until(const std::function<bool()>& ready, Site site);
void copy(void* to, const void* from, size_t bytes);
void synchronize(Site site);
void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

}  // namespace fibers

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  fibers::barrier(fibers::Scope::block, {file, line});
}

inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  fibers::barrier(fibers::Scope::warp, {file, line});
}

enum cudaError_t { cudaSuccess };
using cudaStream_t = struct Stream*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

template <class T>
cudaError_t cudaMemcpyToSymbol(T& symbol, const void* from, size_t bytes) {
  fibers::copy(&symbol, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t, const char* file = __builtin_FILE(),
                                         int line = __builtin_LINE()) {
  fibers::synchronize({file, line});
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  fibers::launch(config->gridDim.x, config->blockDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}
