// A CTA per multiprocessor works through tiles of kRows positions. It has all weights in shared memory, and two stages of
// rows: one warpgroup copies the rows of a tile, each once for all taps, and two others take the tiles in turn, each with
// a stage of its own, so that one's products run beside the other's Snakes and its reading and writing of memory.
//
// Rows lie in shared memory by 8 channels (16 bytes), as products without swizzling have it. So a tap's rows are those of
// the tile, moved by 16 bytes a position, and reading them has no bank conflicts. A stage's pitch is odd in units of 16
// bytes, so that writing them has none either.
#include "residual_unit.h"

#include <hopper.h>

#include <exception>
#include <stdexcept>
#include <string>

#include "../cuda_check.h"

namespace dac::hopper {
namespace {

constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = kWarpgroup * (1 + kConsumers);
// Positions of a tile, and of one product.
constexpr int kRows = 128, kProduct = 64;
// Rows of a stage: those of the widest dilation, and one more to be odd.
constexpr int kPitch = kRows + (kTaps - 1) * kMaxDilation + 1;
// Elements of 16 bytes, and factors of a channel.
constexpr int kPiece = 8, kFactors = 6;
enum Factor { kBias1, kAlpha1, kInverse1, kBias2, kAlpha2, kInverse2 };

template <int C>
struct Shared {
  // [tap][pieces of input channels][output channels], the second convolution last.
  uint16_t weights[kTaps + 1][C / kPiece][C][kPiece];
  // [stage][pieces of channels][positions].
  uint16_t rows[kConsumers][C / kPiece][kPitch][kPiece];
  float factors[kFactors][C];
  uint64_t full[kConsumers], empty[kConsumers];
};

// What a CTA can have on Hopper.
static_assert(sizeof(Shared<96>) <= 227 << 10);

struct Tile {
  int item, first;
};

DAC_HD int tiles_per_item(const Unit& unit) { return (unit.time + kRows - 1) / kRows; }

__device__ Tile tile_of(const Unit& unit, int number) {
  const int each = tiles_per_item(unit);
  return {number / each, number % each * kRows};
}

template <int C>
__device__ void load_constants(const Unit& unit, Shared<C>& shared) {
  const char* weights = static_cast<const char*>(unit.weights);
  char* to = reinterpret_cast<char*>(shared.weights);
  for (int at = threadIdx.x * 16; at < static_cast<int>(sizeof shared.weights); at += kThreads * 16) {
    copy_async(to + at, weights + at, true);
  }
  for (int i = threadIdx.x; i < kFactors * C; i += kThreads) shared.factors[i / C][i % C] = unit.factors[i];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kConsumers; ++stage) {
      initialize(&shared.full[stage], kWarpgroup);
      initialize(&shared.empty[stage], kWarpgroup);
    }
  }
  wait_for_copies();
  show_to_products();
  __syncthreads();
}

template <int C>
__device__ void produce(const Unit& unit, Shared<C>& shared, int thread) {
  const uint16_t* snaked = static_cast<const uint16_t*>(unit.snaked);
  const int rows = kRows + (kTaps - 1) * unit.dilation;
  const int count = unit.items * tiles_per_item(unit);
  for (int number = blockIdx.x, use = 0; number < count; number += gridDim.x, ++use) {
    const int stage = use % kConsumers;
    const Tile tile = tile_of(unit, number);
    wait(&shared.empty[stage], use / kConsumers % 2 ^ 1);
    for (int i = thread; i < rows * (C / kPiece); i += kWarpgroup) {
      const int row = i / (C / kPiece), piece = i % (C / kPiece);
      const int from = tile.first + row - unit.padding;
      const bool exists = from >= 0 && from < unit.size;
      const int64_t at = (static_cast<int64_t>(tile.item) * unit.size + (exists ? from : 0)) * C + piece * kPiece;
      copy_async(shared.rows[stage][piece][row], snaked + at, exists);
    }
    wait_for_copies();
    show_to_products();
    arrive(&shared.full[stage]);
  }
}

// By the sine of the special function unit: at 16 bits nobody sees its errors. Those by rounding alpha x grow as x does.
__device__ float snake(float x, float alpha, float inverse) {
  const float s = near_sine(alpha * x);
  return x + inverse * (s * s);
}

// 8 elements in 16 bytes of global memory.
struct alignas(16) Piece {
  uint32_t pairs[4];
};

// What a thread reads and writes of a product: rows `row` and `row + 8`, 8 channels of each 32.
template <int C>
using Pieces = Piece[2][C / 32];

template <int C>
__device__ void load(const Unit& unit, int item, int row, int quarter, Pieces<C>& x) {
  // Between an output and the middle of its taps.
  const int middle = (kTaps - 1) / 2 * unit.dilation - unit.padding;
  const uint16_t* from = static_cast<const uint16_t*>(unit.x);
#pragma unroll
  for (int half = 0; half < 2; ++half, row += 8) {
    if (row >= unit.time) return;
#pragma unroll
    for (int group = 0; group < C / 32; ++group) {
      const int64_t position = static_cast<int64_t>(item) * unit.size + row + middle;
      x[half][group] = *reinterpret_cast<const Piece*>(from + position * C + group * 32 + quarter * kPiece);
    }
  }
}

// Adds bias and residual to the sums of the second convolution, and writes the outputs.
template <class T, int C>
__device__ void finish(const Unit& unit, const Shared<C>& shared, const float (&sums)[C / 2], const Pieces<C>& x,
                       int item, int row, int quarter) {
  const int64_t length = unit.lengths ? unit.lengths[item] : unit.time;
#pragma unroll
  for (int half = 0; half < 2; ++half, row += 8) {
    if (row >= unit.time) return;
#pragma unroll
    for (int group = 0; group < C / 32; ++group) {
      const int channel = group * 32 + quarter * kPiece;
      const int64_t to = (static_cast<int64_t>(item) * unit.time + row) * C + channel;
      Piece y, snaked;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        float values[2], waves[2];
        unpack(x[half][group].pairs[pair], values, T());
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = channel + 2 * pair + i;
          const float sum = sums[(group * 4 + pair) * 4 + half * 2 + i] + shared.factors[kBias2][at];
          values[i] += row < length ? sum : 0.0f;
          waves[i] = unit.y_snaked ? snake(values[i], shared.factors[kAlpha2][at], shared.factors[kInverse2][at]) : 0;
        }
        y.pairs[pair] = packed(values[0], values[1], T());
        snaked.pairs[pair] = packed(waves[0], waves[1], T());
      }
      if (unit.y) *reinterpret_cast<Piece*>(static_cast<uint16_t*>(unit.y) + to) = y;
      if (unit.y_snaked) *reinterpret_cast<Piece*>(static_cast<uint16_t*>(unit.y_snaked) + to) = snaked;
    }
  }
}

template <class T, int C>
__device__ void consume(const Unit& unit, Shared<C>& shared, int stage, int thread) {
  const uint64_t rows = matrix(shared.rows[stage], kPitch * 16), weights = matrix(shared.weights, C * 16);
  const int own = thread / 32 * 16 + thread % 32 / 4, quarter = thread % 4;
  const int count = unit.items * tiles_per_item(unit), step = kConsumers * gridDim.x;
  for (int number = blockIdx.x + stage * gridDim.x, use = 0; number < count; number += step, ++use) {
    const Tile tile = tile_of(unit, number);
    wait(&shared.full[stage], use & 1);
    for (int begin = 0; begin < kRows; begin += kProduct) {
      float sums[C / 2];
      fence_registers();
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
        for (int k = 0; k < C / 16; ++k) {
          // Addresses in units of 16 bytes.
          const uint64_t a = rows + begin + tap * unit.dilation + 2 * k * kPitch;
          multiply(sums, a, weights + (tap * (C / kPiece) + 2 * k) * C, tap + k == 0, T());
        }
      }
      wait_for_products();
      if (begin + kProduct == kRows) arrive(&shared.empty[stage]);
      Pieces<C> x;
      load<C>(unit, tile.item, tile.first + begin + own, quarter, x);
      // The hidden activation lies as the sums do, and as a product takes it from registers.
      uint32_t hidden[C / 16][4];
#pragma unroll
      for (int i = 0; i < C / 2; i += 2) {
        const int channel = i / 4 * 8 + 2 * quarter;
        float values[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float sum = sums[i + j] + shared.factors[kBias1][channel + j];
          values[j] = snake(sum, shared.factors[kAlpha1][channel + j], shared.factors[kInverse1][channel + j]);
        }
        hidden[i / 8][i / 2 % 4] = packed(values[0], values[1], T());
      }
      fence_registers();
#pragma unroll
      for (int k = 0; k < C / 16; ++k) {
        multiply(sums, hidden[k], weights + (kTaps * (C / kPiece) + 2 * k) * C, k == 0, T());
      }
      wait_for_products();
      finish<T, C>(unit, shared, sums, x, tile.item, tile.first + begin + own, quarter);
    }
  }
}

template <class T, int C>
__global__ void __launch_bounds__(kThreads, 1) run(Unit unit) {
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(shared_memory());
  load_constants(unit, shared);
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  if (warpgroup == kConsumers) {
    produce(unit, shared, thread);
  } else {
    consume<T>(unit, shared, warpgroup, thread);
  }
}

template <class T, int C>
void start(const Unit& unit, int multiprocessors, void* stream) {
  const char* what = "residual_unit";
  const int tiles = unit.items * tiles_per_item(unit);
  constexpr int kBytes = sizeof(Shared<C>);
  check_cuda(cudaFuncSetAttribute(run<T, C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), what);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(tiles < multiprocessors ? tiles : multiprocessors), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes, config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, run<T, C>, unit), what);
}

}  // namespace

extern "C" void dac_pack_residual_unit(int channels, const uint16_t* weight1, const uint16_t* weight2,
                                       uint16_t* packed) {
  for (int tap = 0; tap <= kTaps; ++tap) {
    for (int in = 0; in < channels; ++in) {
      for (int column = 0; column < channels; ++column) {
        // A thread has 2 columns of each 8, from 2 (t % 4) on: those of 4 times 8 are neighbours as output channels.
        const int in_eight = column % 8, eight = column / 8 % 4;
        const int out = column / 32 * 32 + in_eight / 2 * 8 + eight * 2 + in_eight % 2;
        packed[((tap * (channels / kPiece) + in / kPiece) * channels + column) * kPiece + in % kPiece] =
            tap < kTaps ? weight1[(column * channels + in) * kTaps + tap] : weight2[out * channels + in];
      }
    }
  }
}

extern "C" const char* dac_residual_unit(bool bfloat16, int channels, const Unit* unit, int multiprocessors,
                                         void* stream) {
  static thread_local std::string problem;
  try {
    if (unit->dilation < 1 || unit->dilation > kMaxDilation) {
      throw std::invalid_argument("dilation " + std::to_string(unit->dilation) + "; accepted: 1 to 9");
    }
    if (channels == 64) {
      (bfloat16 ? start<BFloat16, 64> : start<Float16, 64>)(*unit, multiprocessors, stream);
    } else if (channels == 96) {
      (bfloat16 ? start<BFloat16, 96> : start<Float16, 96>)(*unit, multiprocessors, stream);
    } else {
      throw std::invalid_argument(std::to_string(channels) + " channels; accepted: 64, 96");
    }
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

}  // namespace dac::hopper
