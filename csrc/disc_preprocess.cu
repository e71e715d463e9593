// A block per chunk of a signal; partial results are summed in a fixed order, so equal inputs give equal bits.
#include "cuda_check.h"
#include "disc_preprocess.h"

namespace dac {
namespace {

constexpr int kThreads = 256;

// Every thread's part added up, in thread 0's. Thread counts are powers of two.
template <class Part>
__device__ Part reduce(Part part, Part* shared) {
  const int thread = threadIdx.x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread >= half && thread < 2 * half) shared[thread - half] = part;
    __syncthreads();
    if (thread < half) part.add(shared[thread]);
    __syncthreads();
  }
  return part;
}

// The sum of a signal's partial results, for every thread of the block.
template <class Part>
__device__ Part total(const Signals& signals, const Part* partial, int64_t signal, Part empty, Part* shared) {
  const int64_t chunks = signals.chunks();
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads) empty.add(partial[signal * chunks + c]);
  const Part sum = reduce(empty, shared);
  if (threadIdx.x == 0) shared[0] = sum;
  __syncthreads();
  return shared[0];
}

struct Chunk {
  int64_t signal, begin, end;
};

__device__ Chunk chunk_of(const Signals& signals) {
  const int64_t begin = blockIdx.x % signals.chunks() * signals.chunk, end = begin + signals.chunk;
  return {static_cast<int64_t>(blockIdx.x / signals.chunks()), begin, end < signals.samples ? end : signals.samples};
}

__global__ void __launch_bounds__(kThreads) measure(Signals signals, const float* x, Extent<float>* partial) {
  __shared__ Extent<float> shared[kThreads / 2];
  const Chunk chunk = chunk_of(signals);
  const float* row = x + chunk.signal * signals.stride;
  Extent<float> extent = {0, row[chunk.begin], row[chunk.begin]};
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) extent.add(row[i]);
  extent = reduce(extent, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = extent;
}

__global__ void __launch_bounds__(kThreads)
    scale(Signals signals, const float* x, float* y, Level<float>* levels, const Extent<float>* partial) {
  __shared__ Extent<float> shared[kThreads / 2];
  const Chunk chunk = chunk_of(signals);
  const float* row = x + chunk.signal * signals.stride;
  const Level<float> own =
      level(total(signals, partial, chunk.signal, {0, row[0], row[0]}, shared), signals.samples);
  if (chunk.begin == 0 && threadIdx.x == 0) levels[chunk.signal] = own;
  const float factor = own.factor();
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) {
    y[chunk.signal * signals.samples + i] = (row[i] - own.mean) * factor;
  }
}

__global__ void __launch_bounds__(kThreads) measure_gradient(Signals signals, const float* grad, const float* x,
                                                             const Level<float>* levels, Slope* partial) {
  __shared__ Slope shared[kThreads / 2];
  const Chunk chunk = chunk_of(signals);
  const Level<float> own = levels[chunk.signal];
  Slope slope = {};
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) {
    slope.add(grad[chunk.signal * signals.samples + i], x[chunk.signal * signals.stride + i], own);
  }
  slope = reduce(slope, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = slope;
}

__global__ void __launch_bounds__(kThreads)
    scale_gradient(Signals signals, const float* grad, const float* x, const Level<float>* levels, float* grad_x,
                   const Slope* partial) {
  __shared__ Slope shared[kThreads / 2];
  const Chunk chunk = chunk_of(signals);
  const Level<float> own = levels[chunk.signal];
  const Gradient<float> of_x =
      gradient(total(signals, partial, chunk.signal, Slope{}, shared), own, signals.samples);
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) {
    const int64_t at = chunk.signal * signals.samples + i;
    grad_x[at] = of_x.at(grad[at], x[chunk.signal * signals.stride + i], own);
  }
}

}  // namespace

void disc_preprocess_forward_cuda(const Signals& signals, const float* x, float* y, Level<float>* levels,
                                  Extent<float>* partial, int device, void* stream) {
  const char* what = "disc_preprocess";
  const DeviceGuard guard(device, what);
  const int64_t blocks = signals.count * signals.chunks();
  launch(what, stream, blocks, kThreads, measure, signals, x, partial);
  launch(what, stream, blocks, kThreads, scale, signals, x, y, levels, partial);
}

void disc_preprocess_backward_cuda(const Signals& signals, const float* grad, const float* x,
                                   const Level<float>* levels, float* grad_x, Slope* partial, int device,
                                   void* stream) {
  const char* what = "disc_preprocess backward";
  const DeviceGuard guard(device, what);
  const int64_t blocks = signals.count * signals.chunks();
  launch(what, stream, blocks, kThreads, measure_gradient, signals, grad, x, levels, partial);
  launch(what, stream, blocks, kThreads, scale_gradient, signals, grad, x, levels, grad_x, partial);
}

}  // namespace dac
