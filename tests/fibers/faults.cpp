// What the fibers must notice: runs a kernel that has the fault of this name, or "none".
#include <cstdio>
#include <cstring>

#include "cuda_runtime.h"
#include "fibers.h"

namespace {

constexpr int kThreads = 64;

// Every thread passes a number on to its neighbour, twice; two blocks.
__global__ void pass_on(const char* fault, float* out) {
  __shared__ float shared[kThreads];
  const auto is = [&](const char* name) { return std::strcmp(fault, name) == 0; };
  const int thread = threadIdx.x, neighbour = (thread + 1) % kThreads;
  if (is("write_write")) shared[0] = 0;
  if (!is("unwritten")) shared[thread] = 1;
  if (is("ends") && thread == 5) return;
  if (is("elsewhere") && thread == 5) {
    __syncthreads();
  } else if (is("warp")) {
    __syncwarp();
  } else if (!is("write_read")) {
    __syncthreads();
  }
  const float first = shared[neighbour];
  if (!is("read_write")) __syncthreads();
  shared[thread] = first + 1;
  __syncthreads();
  const int block = is("blocks") ? 0 : blockIdx.x;
  out[block * kThreads + thread] = shared[neighbour];
}

}  // namespace

int main(int, char** argv) {
  float out[2 * kThreads] = {};
  const cudaLaunchConfig_t config = {2, kThreads, 0, nullptr};
  cudaLaunchKernelEx(&config, pass_on, argv[1], out);
  for (const float number : out) {
    if (!(number == 2)) fibers::fail("wrong number " + std::to_string(number));
  }
  return 0;
}
