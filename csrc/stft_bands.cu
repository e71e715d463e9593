// A block transforms kPoints complex points of one item, whatever the window: 1 frame of 4096 samples, or 128 of 32.
// Instructions limit this as much as memory does (butterflies, addresses), hence transforms of a size known when
// compiling, and bins that go straight between registers and the tensors: neighbouring threads have neighbouring bins.
//
// The backward op is two launches. The first transforms every frame once, and adds up a block's frames where they
// overlap; the second adds up the blocks that cover a sample or one of its reflections.
#include <mutex>
#include <set>

#include "cuda_check.h"
#include "stft_bands.h"

namespace dac {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kPoints = 8 * kThreads;
// Samples between the first frames of neighbouring blocks.
constexpr int kStep = kPoints / 2;

__device__ Tables<float> tables;

// In exchanges one element in 9 is left free: elements 8 apart then lie in different banks. padded(i) + padded(j) is
// padded(i + j) where the lowest three bits of i and j have no carry.
DAC_HD constexpr int padded(int i) { return i + i / 8; }

// Declared outside templates, in which g++ drops attributes of static variables (see tests/fibers).
__device__ __forceinline__ Complex<float>* shared_rows() {
  alignas(float4) __shared__ Complex<float> rows[padded(kPoints)];
  return rows;
}

// Transforms of M points: the frame of the block that this thread works on, as number `worker` of M / 8. A frame has a
// row of its own in shared memory.
template <int M>
struct Place {
  static constexpr int kFrames = kPoints / M, kWorkers = M / 8, kRow = padded(M);
  // Nobody else waits for a frame's workers where they are in one warp.
  static constexpr bool kOneWarp = kWorkers <= kWarp;
  int slot = threadIdx.x / kWorkers, worker = threadIdx.x % kWorkers;
};

// Complex transform of a frame, elements as in fft.h. Nobody may need what is in its row any more, before and after.
template <int M, int kStride = 1>
__device__ __forceinline__ void transform(Complex<float> (&v)[8], int worker, Complex<float>* row) {
  constexpr int R = radix(M, kStride);
  pass<R>(v, worker, M, kStride, tables.root);
  if constexpr (kStride * R < M) {
    static_assert(R == 8, "a destination is that of element 0 and e strides");
    Complex<float>* to = row + padded(destination<R>(worker, 0, M, kStride));
    const Complex<float>* from = row + padded(worker);
#pragma unroll
    for (int e = 0; e < 8; ++e) to[padded(e * kStride)] = v[e];
    Place<M>::kOneWarp ? __syncwarp() : __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = from[padded(e * (M / 8))];
    Place<M>::kOneWarp ? __syncwarp() : __syncthreads();
    transform<M, kStride * R>(v, worker, row);
  }
}

// The blocks of a launch: of each window so many for an item. And for the backward op, where each window has what its
// blocks found, a row of `covered` elements each; the last entry is the number of all.
struct Grid {
  int chunks[kMaxWindows];
  int64_t partial[kMaxWindows + 1];
  int64_t blocks;
};

// Positions that a block's frames cover.
DAC_HD int covered(const Spectrogram& s) { return kStep + 3 * s.hop; }

Grid grid_of(const Plan& plan) {
  Grid grid = {};
  for (int w = 0; w < plan.windows; ++w) {
    const Spectrogram& s = plan.window[w];
    const int frames = kPoints / (s.size / 2);
    grid.chunks[w] = (s.frames - 1) / frames + 1;
    grid.blocks += plan.batch * grid.chunks[w];
    grid.partial[w + 1] = grid.partial[w] + plan.batch * grid.chunks[w] * covered(s);
  }
  return grid;
}

// What a block works on.
struct Task {
  int window, item, chunk;
};

__device__ Task task_of(const Plan& plan, const Grid& grid) {
  int window = 0;
  unsigned block = blockIdx.x, chunks = grid.chunks[0];
  while (block >= static_cast<unsigned>(plan.batch) * chunks) {
    block -= static_cast<unsigned>(plan.batch) * chunks;
    chunks = grid.chunks[++window];
  }
  return {window, static_cast<int>(block / chunks), static_cast<int>(block % chunks)};
}

// Calls visit(j, re, im) with where a worker's bins are in the band tensors, whose elements are T. For j = 0..3 it is that
// of element j, for 4 the middle one (of worker 0), for 5..8 the mirror images of elements 3..0, so that bins ascend. A
// bin that no band wants is left out.
template <int M, bool kLast, class T, class Visit>
__device__ __forceinline__ void each_bin(const Spectrogram& s, int item, int frame, int worker, const Visit& visit) {
  constexpr int kPair = kLast ? 2 : 1;
  // The segment's bins are [low, high). `own` is what distinguishes this worker's bin from others'; re and im are of bin
  // `own`, so that the rest of an address is a constant.
  int next = 0, low = 0, high = 0, own = worker;
  T *re = nullptr, *im = nullptr;
#pragma unroll
  for (int j = 0; j < 9; ++j) {
    if (j == 4 && worker > 0) continue;
    // The same segment once more, for another `own`.
    if (j == 5) own = -worker, high = 0, --next;
    const int common = j < 4 ? j * (M / 8) : M - (8 - j) * (M / 8);
    if (own + common >= high) {
      while (own + common >= high) high = s.segment[next++].high;
      const Segment& segment = s.segment[next - 1];
      low = segment.data ? segment.low : high;
      if (!segment.data) continue;
      T* first = static_cast<T*>(segment.data) + (own - low) * kPair;
      re = first + row_offset(s, segment, kLast, item, frame, 0);
      im = first + row_offset(s, segment, kLast, item, frame, 1);
    }
    if (own + common >= low) visit(j, re + common * kPair, im + common * kPair);
  }
}

// A frame's samples, windowed, as the elements of its transform.
template <int M>
__device__ __forceinline__ void load_frame(const Spectrogram& s, const float* signal, int frame, int worker,
                                           Complex<float> (&v)[8]) {
  const auto* window = reinterpret_cast<const float2*>(tables.half_hann + 2 * M);
  const int start = s.start(frame);
  const float* first = signal + start;
  if (start >= 0 && start + 2 * M <= s.samples && reinterpret_cast<uintptr_t>(first) % sizeof(float2) == 0) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = worker + e * (M / 8);
      const float2 sample = __ldg(reinterpret_cast<const float2*>(first) + i);
      v[e] = {sample.x * window[i].x, sample.y * window[i].y};
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int i = worker + e * (M / 8), n = start + 2 * i;
    v[e].re = __ldg(signal + reflect(n, s.samples)) * window[i].x;
    v[e].im = __ldg(signal + reflect(n + 1, s.samples)) * window[i].y;
  }
}

template <int M, class Out>
__device__ void forward_block(const Plan& plan, const Spectrogram& s, const float* x, int64_t stride, const Task& task) {
  const Place<M> place;
  const int frame = task.chunk * Place<M>::kFrames + place.slot;
  Complex<float> v[8] = {};
  if (frame < s.frames) load_frame<M>(s, x + task.item * stride, frame, place.worker, v);
  Complex<float>* row = shared_rows() + place.slot * Place<M>::kRow;
  transform<M>(v, place.worker, row);

  // A worker splits its elements 0..3 and their mirror images, which other workers hold: among their elements 4..7.
#pragma unroll
  for (int e = 4; e < 8; ++e) row[place.worker + e * (M / 8)] = v[e];
  Place<M>::kOneWarp ? __syncwarp() : __syncthreads();
  const Complex<float>* root = tables.root + 2 * M;
  Complex<float> mirror[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int k = place.worker + e * (M / 8);
    mirror[e] = k == 0 ? v[0] : row[M - k];
    split(v[e], mirror[e], root[k]);
  }
  // The middle bin is its own mirror image.
  if (place.worker == 0) {
    Complex<float> same = v[4];
    split(v[4], same, root[M / 2]);
  }

  if (frame >= s.frames) return;
  const auto bin = [&](int j) {
    const Complex<float>& from = j <= 4 ? v[j] : mirror[8 - j];
    Complex<Out> to;
    convert(from.re, to.re);
    convert(from.im, to.im);
    return to;
  };
  if (plan.channels_last) {
    each_bin<M, true, Out>(s, task.item, frame, place.worker,
                           [&](int j, Out* pair, Out*) { *reinterpret_cast<Complex<Out>*>(pair) = bin(j); });
  } else {
    each_bin<M, false, Out>(s, task.item, frame, place.worker,
                            [&](int j, Out* re, Out* im) { *re = bin(j).re, *im = bin(j).im; });
  }
}

__device__ __forceinline__ void add(float& sum, float value) { sum += value; }
__device__ __forceinline__ void add(float4& sum, const float4& value) {
  sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
}

// The gradient of the positions that a block's frames cover, as far as it comes from these frames.
template <int M, class In>
__device__ void inverse_block(const Plan& plan, const Spectrogram& s, const Task& task, float* partial) {
  constexpr unsigned kFrames = Place<M>::kFrames, kHop = M / 2;
  const Place<M> place;
  const int frame = task.chunk * kFrames + place.slot;
  Complex<float> v[8] = {}, mirror[4] = {};
  const auto set_bin = [&](int j, const Complex<In>& from) {
    Complex<float>& to = j <= 4 ? v[j] : mirror[8 - j];
    convert(from.re, to.re);
    convert(from.im, to.im);
  };
  if (frame < s.frames && plan.channels_last) {
    each_bin<M, true, const In>(s, task.item, frame, place.worker, [&](int j, const In* pair, const In*) {
      set_bin(j, *reinterpret_cast<const Complex<In>*>(pair));
    });
  } else if (frame < s.frames) {
    each_bin<M, false, const In>(s, task.item, frame, place.worker,
                                 [&](int j, const In* re, const In* im) { set_bin(j, {*re, *im}); });
  }

  // As in the forward op, the other way round.
  Complex<float>* row = shared_rows() + place.slot * Place<M>::kRow;
  const Complex<float>* root = tables.root + 2 * M;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int k = place.worker + e * (M / 8);
    merge(v[e], mirror[e], root[k], k == 0);
    row[M - k] = mirror[e];
  }
  if (place.worker == 0) {
    Complex<float> same = v[4];
    merge(v[4], same, root[M / 2], false);
    row[M / 2] = v[4];
  }
  Place<M>::kOneWarp ? __syncwarp() : __syncthreads();
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] = swapped(e < 4 ? v[e] : row[place.worker + e * (M / 8)]);
  Place<M>::kOneWarp ? __syncwarp() : __syncthreads();
  transform<M>(v, place.worker, row);

  const auto* window = reinterpret_cast<const float2*>(tables.half_hann + 2 * M);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int i = place.worker + e * (M / 8);
    row[i] = {v[e].im * window[i].x, v[e].re * window[i].y};
  }
  __syncthreads();
  // Frames past the item's last one are zeros.
  const auto* values = reinterpret_cast<const float*>(shared_rows());
  constexpr int kApart = 2 * Place<M>::kRow - M / 2;
  for (unsigned n = 4 * threadIdx.x; n < kStep + 3 * kHop; n += 4 * kThreads) {
    const int newest = n / kHop;
    float4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int back = 3; back >= 0; --back) {
      const int t = newest - back;
      if (static_cast<unsigned>(t) < kFrames) add(sum, *reinterpret_cast<const float4*>(values + n + t * kApart));
    }
    *reinterpret_cast<float4*>(partial + n) = sum;
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

template <class Out>
__global__ void __launch_bounds__(kThreads, 4)
    forward_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Grid grid, const float* x,
                   int64_t stride) {
  const Task task = task_of(plan, grid);
  const Spectrogram& s = plan.window[task.window];
  DAC_WITH_SIZE(s.size, forward_block<M, Out>(plan, s, x, stride, task))
}

template <class In>
__global__ void __launch_bounds__(kThreads, 4)
    inverse_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Grid grid, float* partial) {
  const Task task = task_of(plan, grid);
  const Spectrogram& s = plan.window[task.window];
  partial += grid.partial[task.window] + static_cast<int64_t>(task.item * grid.chunks[task.window] + task.chunk) * covered(s);
  DAC_WITH_SIZE(s.size, inverse_block<M, In>(plan, s, task, partial))
}

// What the blocks of an item that cover a position found for it, added up. V: float, or float4 for four positions.
template <class V>
__device__ __forceinline__ V covering(const Spectrogram& s, const float* partial, int chunks, int position) {
  const int size = covered(s), offset = position + s.pad;
  const int first = offset < size ? 0 : (offset - size) / kStep + 1, last = lesser(offset / kStep, chunks - 1);
  const float* at = partial + static_cast<int64_t>(first) * size + (offset - first * kStep);
  V sum = {};
  for (int c = first; c <= last; ++c, at += size - kStep) add(sum, __ldg(reinterpret_cast<const V*>(at)));
  return sum;
}

DAC_HD unsigned quads_of(unsigned samples) { return (samples + 3) / 4; }

// Four neighbouring samples a thread.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Grid grid, const float* partial,
                  float* grad_x) {
  const int samples = plan.window[0].samples;
  const unsigned index = blockIdx.x * kThreads + threadIdx.x, quads = quads_of(samples);
  const int item = index / quads, first = index % quads * 4;
  if (item >= plan.batch) return;
  float4 total = {0, 0, 0, 0};
  for (int w = 0; w < plan.windows; ++w) {
    const Spectrogram& s = plan.window[w];
    const float* of_item = partial + grid.partial[w] + static_cast<int64_t>(item) * grid.chunks[w] * covered(s);
    add(total, covering<float4>(s, of_item, grid.chunks[w], first));
    for (int which = 1; which < kImages; ++which) {
      const Image way = image(s, which);
      const Range held = common(way.map(way.positions), {first, lesser(first + 4, samples)});
      const auto reflected = [&](int sample) {
        if (sample < held.begin || sample >= held.end) return 0.0f;
        return covering<float>(s, of_item, grid.chunks[w], way.shift + way.sign * sample);
      };
      if (held.begin >= held.end) continue;
      add(total, {reflected(first), reflected(first + 1), reflected(first + 2), reflected(first + 3)});
    }
  }
  float* out = grad_x + static_cast<int64_t>(item) * samples + first;
  const float of[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < samples) out[i] = of[i];
  }
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
  const Grid grid = grid_of(plan);
  launch(what, stream, grid.blocks, kThreads, forward_kernel<Out>, plan, grid, x, stride);
}

int64_t stft_bands_partial(const Plan& plan) { return grid_of(plan).partial[plan.windows]; }

template <class In>
void stft_bands_backward_cuda(const Plan& plan, float* partial, float* grad_x, int device, void* stream) {
  const char* what = "stft_bands backward";
  const DeviceGuard guard(device, what);
  prepare(device);
  const Grid grid = grid_of(plan);
  const int64_t blocks = (plan.batch * quads_of(plan.window[0].samples) + kThreads - 1) / kThreads;
  launch(what, stream, grid.blocks, kThreads, inverse_kernel<In>, plan, grid, partial);
  launch(what, stream, blocks, kThreads, gather_kernel, plan, grid, partial, grad_x);
}

template void stft_bands_forward_cuda<float>(const Plan&, const float*, int64_t, int, void*);
template void stft_bands_forward_cuda<BFloat16>(const Plan&, const float*, int64_t, int, void*);
template void stft_bands_backward_cuda<float>(const Plan&, float*, float*, int, void*);
template void stft_bands_backward_cuda<BFloat16>(const Plan&, float*, float*, int, void*);

}  // namespace dac
