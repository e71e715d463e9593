// CUDA's return codes as exceptions, and the current device for the length of a scope.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

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

}  // namespace dac
