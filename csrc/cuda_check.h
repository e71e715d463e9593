// CUDA's return codes as exceptions, the current device for the length of a scope, and launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace dac {

inline void check_cuda(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")");
}

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    check_cuda(cudaGetDevice(&before_), what);
    check_cuda(cudaSetDevice(device), what);
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Runs a kernel on a stream of the current device, asynchronously.
template <class... Parameters, class... Arguments>
void launch(const char* what, void* stream, int64_t blocks, int threads, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace dac
