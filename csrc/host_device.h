// Functions of one source for the host and the device.
#pragma once

#ifdef __CUDACC__
#define DAC_HD __host__ __device__ __forceinline__
#else
#define DAC_HD inline __attribute__((always_inline))
#endif
