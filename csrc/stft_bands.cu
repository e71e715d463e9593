// A block transforms kPoints complex points at a time, whatever the window: 1 frame of 4096 samples, or 128 of 32.
// Instructions limit this as much as memory does (butterflies, addresses), hence transforms of a size known when
// compiling, and rows of bins copied between shared memory and the tensors a warp at a time.
#include <mutex>
#include <set>

#include "cuda_check.h"
#include "stft_bands.h"

namespace dac {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kPoints = 8 * kThreads;
// Samples whose gradients a block owns, at most: the more, the fewer frames are transformed by two blocks.
constexpr int kSpan = 4096;

__device__ Tables<float> tables;

// In exchanges one element in 9 is left free: elements 8 apart then lie in different banks.
__device__ __forceinline__ int padded(int i) { return i + i / 8; }

// Shared memory, declared outside templates: g++ drops attributes of static variables in them (see tests/fibers).
__device__ __forceinline__ Complex<float>* shared_elements() {
  __shared__ Complex<float> elements[kPoints + kPoints / 8];
  return elements;
}

__device__ __forceinline__ float* shared_gradient() {
  __shared__ float gradient[kSpan];
  return gradient;
}

// The thread's index, read anew: what each size of transform derives from it is otherwise kept in registers across the
// loop over windows, for all eight sizes, which spills.
__device__ __forceinline__ int thread_index() {
  int index = threadIdx.x;
#ifdef __CUDA_ARCH__
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
#endif
  return index;
}

// Transforms of M points: the frame of the block that this thread works on, as number `worker` of M / 8.
template <int M>
struct Place {
  static constexpr int kFrames = kPoints / M, kWorkers = M / 8;
  int slot, worker;

  __device__ __forceinline__ explicit Place(int thread) : slot(thread / kWorkers), worker(thread % kWorkers) {}
};

// Complex transform of every frame, elements as in fft.h. Nobody may need what is in shared memory any more, before
// and after.
template <int M, int kStride = 1>
__device__ __forceinline__ void transform(Complex<float> (&v)[8], const Place<M>& place, Complex<float>* shared) {
  constexpr int R = radix(M, kStride);
  pass<R>(v, place.worker, M, kStride, tables.root);
  if constexpr (kStride * R < M) {
    Complex<float>* row = shared + place.slot * padded(M);
#pragma unroll
    for (int e = 0; e < 8; ++e) row[padded(destination<R>(place.worker, e, M, kStride))] = v[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = row[padded(place.worker + e * (M / 8))];
    __syncthreads();
    transform<M, kStride * R>(v, place, shared);
  }
}

struct Frame {
  int item, number;
};

// Calls copy(bins, segment, re, im, lane) by whole warps, for each segment of each slot's frame: its bins in shared
// memory, which holds M + 1 a frame, and its rows' offsets in the tensor. frame_of(slot): item -1 for an empty slot.
template <int M, class FrameOf, class Copy>
__device__ __forceinline__ void each_row(const Spectrogram& s, bool channels_last, Complex<float>* shared,
                                         const FrameOf& frame_of, const Copy& copy) {
  constexpr int kFrames = Place<M>::kFrames;
  for (int task = threadIdx.x / kWarp; task < kFrames * s.segments; task += kThreads / kWarp) {
    const int slot = task % kFrames;
    const Segment& segment = s.segment[task / kFrames];
    const Frame frame = frame_of(slot);
    if (frame.item < 0) continue;
    copy(shared + slot * (M + 1) + segment.low, segment,
         row_offset(s, segment, channels_last, frame.item, frame.number, 0),
         row_offset(s, segment, channels_last, frame.item, frame.number, 1), threadIdx.x % kWarp);
  }
}

template <int M, class Out>
__device__ void forward_block(const Plan& plan, const Spectrogram& s, const float* x, int64_t stride, int block,
                              Complex<float>* shared) {
  const Place<M> place(thread_index());
  const int first = block * Place<M>::kFrames, count = static_cast<int>(plan.batch) * s.frames;
  const auto frame_of = [&](int slot) {
    const int frame = first + slot;
    return frame < count ? Frame{frame / s.frames, frame % s.frames} : Frame{-1, 0};
  };

  Complex<float> v[8] = {};
  const Frame frame = frame_of(place.slot);
  if (frame.item >= 0) {
    const float* signal = x + frame.item * stride;
    const auto* window = reinterpret_cast<const float2*>(tables.half_hann + 2 * M);
    const int start = s.start(frame.number);
    const bool inside = start >= 0 && start + 2 * M <= s.samples;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = place.worker + e * (M / 8), n = start + 2 * i;
      const float2 weight = window[i];
      v[e].re = __ldg(signal + (inside ? n : reflect(n, s.samples))) * weight.x;
      v[e].im = __ldg(signal + (inside ? n + 1 : reflect(n + 1, s.samples))) * weight.y;
    }
  }
  transform<M>(v, place, shared);

  // A worker splits its elements 0..3 and their mirror images, which other workers hold: among their elements 4..7.
  Complex<float>* row = shared + place.slot * (M + 1);
#pragma unroll
  for (int e = 4; e < 8; ++e) row[place.worker + e * (M / 8)] = v[e];
  __syncthreads();
  const Complex<float>* root = tables.root + 2 * M;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int k = place.worker + e * (M / 8);
    // Nobody else reads this one, nor any that is written here.
    Complex<float> mirror = k == 0 ? v[0] : row[M - k];
    split(v[e], mirror, root[k]);
    row[k] = v[e];
    row[M - k] = mirror;
  }
  // The middle bin is its own mirror image.
  if (place.worker == 0) {
    Complex<float> mirror = v[4];
    split(v[4], mirror, root[M / 2]);
    row[M / 2] = v[4];
  }
  __syncthreads();

  each_row<M>(s, plan.channels_last, shared, frame_of,
              [&](const Complex<float>* bins, const Segment& segment, int64_t re, int64_t im, int lane) {
                Out* data = static_cast<Out*>(segment.data);
                if (!data) return;
                for (int k = lane; k < segment.high - segment.low; k += kWarp) {
                  Complex<Out> bin;
                  convert(bins[k].re, bin.re);
                  convert(bins[k].im, bin.im);
                  if (plan.channels_last) {
                    reinterpret_cast<Complex<Out>*>(data + re)[k] = bin;
                  } else {
                    data[re + k] = bin.re;
                    data[im + k] = bin.im;
                  }
                }
              });
}

// Adds one window's part of the gradient to the span's, grad[0] being that of sample span.begin. Sample i belongs to
// thread (i - span.begin) % kThreads throughout.
template <int M, class In>
__device__ void backward_span(const Plan& plan, const Spectrogram& s, int item, Range span, float* grad,
                              Complex<float>* shared) {
  const Range touching = frames_over(s, span);
  for (int first = touching.begin; first < touching.end; first += Place<M>::kFrames) {
    const Range frames = {first, lesser(first + Place<M>::kFrames, touching.end)};
    const auto frame_of = [&](int slot) {
      return first + slot < frames.end ? Frame{item, first + slot} : Frame{-1, 0};
    };
    each_row<M>(s, plan.channels_last, shared, frame_of,
                [&](Complex<float>* bins, const Segment& segment, int64_t re, int64_t im, int lane) {
                  const In* data = static_cast<const In*>(segment.data);
                  for (int k = lane; k < segment.high - segment.low; k += kWarp) {
                    Complex<In> bin = {};
                    if (data && plan.channels_last) {
                      bin = reinterpret_cast<const Complex<In>*>(data + re)[k];
                    } else if (data) {
                      bin = {data[re + k], data[im + k]};
                    }
                    convert(bin.re, bins[k].re);
                    convert(bin.im, bins[k].im);
                  }
                });
    __syncthreads();

    // As in the forward op, the other way round. (An empty slot transforms leftovers that nobody reads.)
    const int thread = thread_index();
    const Place<M> place(thread);
    Complex<float> v[8];
    Complex<float>* row = shared + place.slot * (M + 1);
    const Complex<float>* root = tables.root + 2 * M;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int k = place.worker + e * (M / 8);
      v[e] = row[k];
      Complex<float> mirror = row[M - k];
      merge(v[e], mirror, root[k], k == 0);
      row[M - k] = mirror;
    }
    if (place.worker == 0) {
      Complex<float> middle = row[M / 2], mirror = middle;
      merge(middle, mirror, root[M / 2], false);
      row[M / 2] = middle;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = swapped(e < 4 ? v[e] : row[place.worker + e * (M / 8)]);
    __syncthreads();
    transform<M>(v, place, shared);

    Complex<float>* frame = shared + place.slot * M;
    const auto* window = reinterpret_cast<const float2*>(tables.half_hann + 2 * M);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = place.worker + e * (M / 8);
      const float2 weight = window[i];
      frame[i] = {v[e].im * weight.x, v[e].re * weight.y};
    }
    __syncthreads();
    const float* values = reinterpret_cast<const float*>(shared);
    for (int which = 0; which < kImages; ++which) {
      const Image way = image(s, which);
      const Range samples = samples_under(s, way, frames, span);
      const int owned = (thread - (samples.begin - span.begin)) & (kThreads - 1);
      for (int i = samples.begin + owned; i < samples.end; i += kThreads) {
        grad[i - span.begin] += overlap<float>(M / 2, 3 * M / 4, way.shift + way.sign * i, frames,
                                               [&](int f, int n) { return values[f * 2 * M + n]; });
      }
    }
    __syncthreads();
  }
}

// Runs a statement with M a constant: half the window.
#define DAC_WITH_SIZE(size, ...)                               \
  switch (size) {                                              \
    case 32: { constexpr int M = 16; __VA_ARGS__; break; }     \
    case 64: { constexpr int M = 32; __VA_ARGS__; break; }     \
    case 128: { constexpr int M = 64; __VA_ARGS__; break; }    \
    case 256: { constexpr int M = 128; __VA_ARGS__; break; }   \
    case 512: { constexpr int M = 256; __VA_ARGS__; break; }   \
    case 1024: { constexpr int M = 512; __VA_ARGS__; break; }  \
    case 2048: { constexpr int M = 1024; __VA_ARGS__; break; } \
    case 4096: { constexpr int M = 2048; __VA_ARGS__; break; } \
  }

// Blocks that one window needs.
DAC_HD int blocks_of(const Plan& plan, const Spectrogram& s) {
  const int frames = kPoints / (s.size / 2);
  return (static_cast<int>(plan.batch) * s.frames + frames - 1) / frames;
}

template <class Out>
__global__ void __launch_bounds__(kThreads, 4)
    forward_kernel(const __grid_constant__ Plan plan, const float* x, int64_t stride) {
  Complex<float>* shared = shared_elements();
  int block = blockIdx.x, w = 0;
  for (; block >= blocks_of(plan, plan.window[w]); ++w) block -= blocks_of(plan, plan.window[w]);
  const Spectrogram& s = plan.window[w];
  DAC_WITH_SIZE(s.size, forward_block<M, Out>(plan, s, x, stride, block, shared))
}

template <class In>
__global__ void __launch_bounds__(kThreads, 3)  // A fourth block would leave too few registers: spills.
    backward_kernel(const __grid_constant__ Plan plan, float* grad_x, int spans, int span_size) {
  Complex<float>* shared = shared_elements();
  float* grad = shared_gradient();
  const int item = blockIdx.x / spans, begin = static_cast<int>(blockIdx.x % spans) * span_size;
  const int samples = plan.window[0].samples;
  const Range span = {begin, lesser(begin + span_size, samples)};
  for (int i = threadIdx.x; i < kSpan; i += kThreads) grad[i] = 0;
  for (int w = 0; w < plan.windows; ++w) {
    const Spectrogram& s = plan.window[w];
    DAC_WITH_SIZE(s.size, backward_span<M, In>(plan, s, item, span, grad, shared))
  }
  float* out = grad_x + static_cast<int64_t>(item) * samples + span.begin;
  for (int i = threadIdx.x; i < span.end - span.begin; i += kThreads) out[i] = grad[i];
}

// Copies the tables to a device the first time it is used.
void prepare(int device) {
  static std::mutex mutex;
  static std::set<int> ready;
  const std::lock_guard<std::mutex> lock(mutex);
  if (ready.count(device)) return;
  const auto made = make_tables<float>();
  const char* what = "stft_bands: copying tables to the device (call the op once before capturing it in a CUDA graph)";
  check_cuda(cudaMemcpyToSymbol(tables, made.get(), sizeof(Tables<float>)), what);
  // The copy from pageable memory may not have ended yet, and streams other than the default one would not wait for it.
  check_cuda(cudaStreamSynchronize(nullptr), what);
  ready.insert(device);
}

}  // namespace

template <class Out>
void stft_bands_forward_cuda(const Plan& plan, const float* x, int64_t stride, int device, void* stream) {
  const char* what = "stft_bands";
  const DeviceGuard guard(device, what);
  prepare(device);
  int blocks = 0;
  for (int w = 0; w < plan.windows; ++w) blocks += blocks_of(plan, plan.window[w]);
  launch(what, stream, blocks, kThreads, forward_kernel<Out>, plan, x, stride);
}

template <class In>
void stft_bands_backward_cuda(const Plan& plan, float* grad_x, int device, void* stream) {
  const char* what = "stft_bands backward";
  const DeviceGuard guard(device, what);
  prepare(device);
  const int samples = plan.window[0].samples;
  const int spans = (samples + kSpan - 1) / kSpan;
  launch(what, stream, plan.batch * spans, kThreads, backward_kernel<In>, plan, grad_x, spans,
         (samples + spans - 1) / spans);
}

template void stft_bands_forward_cuda<float>(const Plan&, const float*, int64_t, int, void*);
template void stft_bands_forward_cuda<BFloat16>(const Plan&, const float*, int64_t, int, void*);
template void stft_bands_backward_cuda<float>(const Plan&, float*, int, void*);
template void stft_bands_backward_cuda<BFloat16>(const Plan&, float*, int, void*);

}  // namespace dac
