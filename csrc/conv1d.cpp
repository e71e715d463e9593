#include "conv1d.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "parallel.h"
#include "snake_math.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace dac {
namespace {

// Most rows of one piece of work: enough to fetch a panel of weights for, few enough that their inputs stay in the
// second-level cache. And the fewest, if a layer would else have less than kPieces pieces for each thread.
constexpr int64_t kMostBlockRows = 224, kLeastBlockRows = 28, kPieces = 8;
// Rows that are multiplied at once: as many as the registers hold sums for.
constexpr int kMostRows = 14;

// The inputs of some rows of a product.
template <class S>
struct Source {
  const ConvShape& shape;
  const S* item;
  int64_t row_stride, first_row;
  const S* zeros;

  INLINE bool inside(int rows) const {
    const int64_t low = first_row * shape.stride - shape.padding;
    const int64_t high = low + (rows - 1) * shape.stride + (shape.taps - 1) * shape.dilation;
    return low >= 0 && high < shape.positions;
  }

  INLINE const S* run(int row, int64_t tap, bool inside) const {
    const int64_t position = (first_row + row) * shape.stride + tap * shape.dilation - shape.padding;
    if (!inside && (position < 0 || position >= shape.positions)) return zeros;
    return item + position * row_stride;
  }
};

// sums [rows, kPanel]: the product of some rows with one panel.
template <class S>
using Multiply = void (*)(const Source<S>&, const S* panel, float* sums);

// Functions for 1, 2, ... rows.
template <class S>
struct Multipliers {
  int most_rows;
  std::array<Multiply<S>, kMostRows> of_rows;
};

#if defined(__x86_64__) && defined(__GNUC__)

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx2,fma")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bf16,avx2,fma")))

template <int kRows>
AVX512 void multiply_avx512(const Source<float>& source, const float* panel, float* sums) {
  __m512 total[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
  const bool inside = source.inside(kRows);
  for (int64_t tap = 0; tap < source.shape.taps; ++tap) {
    const float* run[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) run[r] = source.run(r, tap, inside);
#pragma GCC unroll 4
    for (int64_t k = 0; k < source.shape.inputs; ++k, panel += kPanel) {
      const __m512 left = _mm512_loadu_ps(panel), right = _mm512_loadu_ps(panel + 16);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512 value = _mm512_set1_ps(run[r][k]);
        total[r][0] = _mm512_fmadd_ps(value, left, total[r][0]);
        total[r][1] = _mm512_fmadd_ps(value, right, total[r][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(sums + r * kPanel, total[r][0]);
    _mm512_storeu_ps(sums + r * kPanel + 16, total[r][1]);
  }
}

INLINE int pair_at(const BFloat16* run) {
  int pair;
  std::memcpy(&pair, run, sizeof pair);
  return pair;
}

template <int kRows>
AVX512_BF16 void multiply_avx512(const Source<BFloat16>& source, const BFloat16* panel, float* sums) {
  __m512 total[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
  const bool inside = source.inside(kRows);
  for (int64_t tap = 0; tap < source.shape.taps; ++tap) {
    const BFloat16* run[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) run[r] = source.run(r, tap, inside);
#pragma GCC unroll 4
    for (int64_t k = 0; k < source.shape.inputs; k += 2, panel += 2 * kPanel) {
      const auto left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel));
      const auto right = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + kPanel));
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair_at(run[r] + k)));
        total[r][0] = _mm512_dpbf16_ps(total[r][0], pair, left);
        total[r][1] = _mm512_dpbf16_ps(total[r][1], pair, right);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(sums + r * kPanel, total[r][0]);
    _mm512_storeu_ps(sums + r * kPanel + 16, total[r][1]);
  }
}

// 16 columns at a time.
template <int kRows>
AVX2 void multiply_avx2(const Source<float>& source, const float* panel, float* sums) {
  const bool inside = source.inside(kRows);
  for (int half = 0; half < kPanel; half += 16) {
    __m256 total[kRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm256_setzero_ps();
    const float* weight = panel + half;
    for (int64_t tap = 0; tap < source.shape.taps; ++tap) {
      const float* run[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) run[r] = source.run(r, tap, inside);
      for (int64_t k = 0; k < source.shape.inputs; ++k, weight += kPanel) {
        const __m256 left = _mm256_loadu_ps(weight), right = _mm256_loadu_ps(weight + 8);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const __m256 value = _mm256_set1_ps(run[r][k]);
          total[r][0] = _mm256_fmadd_ps(value, left, total[r][0]);
          total[r][1] = _mm256_fmadd_ps(value, right, total[r][1]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      _mm256_storeu_ps(sums + r * kPanel + half, total[r][0]);
      _mm256_storeu_ps(sums + r * kPanel + half + 8, total[r][1]);
    }
  }
}

template <class S, int... kLess>
Multipliers<S> with_avx512(std::integer_sequence<int, kLess...>) {
  return {sizeof...(kLess), {multiply_avx512<kLess + 1>...}};
}

template <int... kLess>
Multipliers<float> with_avx2(std::integer_sequence<int, kLess...>) {
  return {sizeof...(kLess), {multiply_avx2<kLess + 1>...}};
}

Multipliers<float> multipliers(InstructionSet set, float) {
  if (set == InstructionSet::avx512) return with_avx512<float>(std::make_integer_sequence<int, kMostRows>());
  return with_avx2(std::make_integer_sequence<int, 6>());
}

Multipliers<BFloat16> multipliers(InstructionSet, BFloat16) {
  return with_avx512<BFloat16>(std::make_integer_sequence<int, kMostRows>());
}

const char* lacks(float) { return supported(InstructionSet::avx2) ? nullptr : "AVX2 and FMA"; }

const char* lacks(BFloat16) {
  return supported(InstructionSet::avx512) && __builtin_cpu_supports("avx512bf16") ? nullptr : "AVX-512 with BF16";
}

#else

template <class S>
Multipliers<S> multipliers(InstructionSet, S) {
  return {};
}

template <class S>
const char* lacks(S) {
  return "x86-64, for which there are kernels,";
}

#endif

// From the sums [rows, kPanel] of some rows of item b to their results, n columns from `column` on.
template <class S>
struct Epilogue {
  const ConvShape& shape;
  const Layer<S>& layer;
  const float* inverse;  // 1 / (alpha + 1e-9).

  INLINE void operator()(float* sums, int64_t b, int64_t first, int rows, int64_t column, int n) const {
    for (int r = 0; r < rows; ++r) {
      float* c = sums + r * kPanel;
      const int64_t row = first + r;
      for (int i = 0; i < kPanel; ++i) c[i] += layer.bias[column + i];
      if (layer.tanh) {
        for (int i = 0; i < n; ++i) c[i] = std::tanh(c[i]);
      }
      if (layer.lengths) {
        const int64_t valid = (layer.lengths[b] + shape.crop) * shape.channels - row * shape.columns - column;
        for (int64_t i = std::max<int64_t>(valid, 0); i < n; ++i) c[i] = 0;
      }
      if (layer.residual.data) add(layer.residual.at(b, row) + column, c, n);
      if (layer.y.data) store(c, layer.y.at(b, row) + column, n);
    }
    if (!layer.snaked.data) return;
    snake(sums, rows, layer.alpha + column, inverse + column);
    for (int r = 0; r < rows; ++r) store(sums + r * kPanel, layer.snaked.at(b, first + r) + column, n);
  }

  // In place. All rows in one loop, whose check for arguments that are far off then costs little.
  static INLINE void snake(float* __restrict sums, int rows, const float* __restrict alpha,
                           const float* __restrict inverse) {
    float result[kMostRows * kPanel], largest[kPanel] = {};
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < kPanel; ++i) {
        const float c = sums[r * kPanel + i], t = alpha[i] * c;
        const float s = sine(reduce(t)), size = std::fabs(t);
        largest[i] = size > largest[i] ? size : largest[i];
        result[r * kPanel + i] = c + inverse[i] * (s * s);
      }
    }
    int far = 0;
    for (int i = 0; i < kPanel; ++i) far |= largest[i] > kFar;
    if (far) {
      for (int r = 0; r < rows; ++r) forward_block<1>(sums + r * kPanel, alpha, inverse, result + r * kPanel, kPanel);
    }
    for (int i = 0; i < rows * kPanel; ++i) sums[i] = result[i];
  }

  // Whole panels by themselves, since loops of a known length become a few instructions.
  static INLINE void add(const S* from, float* to, int n) {
    float value;
    if (n == kPanel) {
      for (int i = 0; i < kPanel; ++i) convert(from[i], value), to[i] += value;
    } else {
      for (int i = 0; i < n; ++i) convert(from[i], value), to[i] += value;
    }
  }

  static INLINE void store(const float* from, S* to, int n) {
    if (n == kPanel) {
      for (int i = 0; i < kPanel; ++i) convert(from[i], to[i]);
    } else {
      for (int i = 0; i < n; ++i) convert(from[i], to[i]);
    }
  }
};

// Rows of each piece of work, for `others` pieces of the same rows: none of an empty batch.
int64_t block_rows(int64_t rows, int64_t others, int threads) {
  others = std::max<int64_t>(others, 1);
  const int64_t wanted = (kPieces * threads + others - 1) / others;
  const int64_t blocks = std::max((rows + kMostBlockRows - 1) / kMostBlockRows, std::min(wanted, rows / kLeastBlockRows));
  return (rows + blocks - 1) / std::max<int64_t>(blocks, 1);
}

// A layer on an input, ready to be computed in pieces.
template <class S>
class Product {
 public:
  Product(const ConvShape& shape, Rows<const S> x, const Layer<S>& layer, InstructionSet set)
      : shape_(shape),
        x_(x),
        layer_(layer),
        set_(set),
        multipliers_(multipliers(set, S())),
        panels_((shape.columns + kPanel - 1) / kPanel),
        zeros_(shape.inputs),
        inverse_(layer.alpha ? panels_ * kPanel : 0) {
    for (size_t i = 0; i < inverse_.size(); ++i) inverse_[i] = 1 / (layer.alpha[i] + 1e-9f);
  }

  int64_t panels() const { return panels_; }
  int64_t weight_size() const { return panels_ * kPanel * shape_.taps * shape_.inputs; }

  // Rows [begin, end) of item b, and the columns of one panel.
  void compute(int64_t b, int64_t begin, int64_t end, int64_t panel) const {
    run(set_, [&]() __attribute__((always_inline)) {
      float sums[kMostRows * kPanel];
      const S* weight = layer_.weight + panel * kPanel * shape_.taps * shape_.inputs;
      const int64_t column = panel * kPanel;
      const int n = static_cast<int>(std::min<int64_t>(kPanel, shape_.columns - column));
      const Epilogue<S> epilogue = {shape_, layer_, inverse_.data()};
      const int64_t tiles = (end - begin + multipliers_.most_rows - 1) / multipliers_.most_rows;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        // Tiles of almost equal sizes.
        const int64_t first = begin + (end - begin) * tile / tiles, last = begin + (end - begin) * (tile + 1) / tiles;
        const int rows = static_cast<int>(last - first);
        const Source<S> source = {shape_, x_.at(b, 0), x_.row_stride, first, zeros_.data()};
        multipliers_.of_rows[rows - 1](source, weight, sums);
        epilogue(sums, b, first, rows, column, n);
      }
    });
  }

 private:
  const ConvShape& shape_;
  const Rows<const S> x_;
  const Layer<S>& layer_;
  const InstructionSet set_;
  const Multipliers<S> multipliers_;
  const int64_t panels_;
  const std::vector<S> zeros_;
  std::vector<float> inverse_;
};

}  // namespace

template <class S>
const char* conv1d_lacks() {
  return lacks(S());
}

template <class S>
void conv1d(const ConvShape& shape, Rows<const S> x, const Layer<S>& layer, int threads, InstructionSet set) {
  const Product<S> product(shape, x, layer, set);
  const int64_t panels = product.panels(), size = block_rows(shape.rows, shape.batch * panels, threads);
  const int64_t blocks = (shape.rows + size - 1) / size;
  const int64_t pieces = shape.batch * blocks;
  // What is larger is read only once: weights, or inputs.
  const bool by_panel = product.weight_size() > shape.batch * shape.positions * shape.inputs;
  parallel_for(pieces * panels, 1, threads, [&](int64_t index, int64_t) {
    const int64_t panel = by_panel ? index / pieces : index % panels;
    const int64_t piece = by_panel ? index % pieces : index / panels;
    const int64_t begin = piece % blocks * size;
    product.compute(piece / blocks, begin, std::min(begin + size, shape.rows), panel);
  });
}

template <class S>
void residual_unit(const ConvShape& shape, Rows<const S> x, const Layer<S>& first, const Layer<S>& second, int threads,
                   InstructionSet set) {
  const int64_t size = block_rows(shape.rows, shape.batch, threads), channels = shape.channels;
  const int64_t blocks = (shape.rows + size - 1) / size;
  const ConvShape pointwise = {shape.batch, shape.rows, channels, shape.rows, channels, 1, 1, 1, 0, channels, 0};
  if (shape.batch * blocks < kPieces * threads) {
    // Too few pieces to share out.
    std::vector<S> hidden(shape.batch * shape.rows * channels);
    Layer<S> to_hidden = first;
    to_hidden.snaked = {hidden.data(), shape.rows * channels, channels};
    conv1d(shape, x, to_hidden, threads, set);
    return conv1d(pointwise, {hidden.data(), shape.rows * channels, channels}, second, threads, set);
  }
  parallel_for(shape.batch * blocks, 1, threads, [&](int64_t index, int64_t) {
    const int64_t b = index / blocks, begin = index % blocks * size;
    const int64_t end = std::min(begin + size, shape.rows);
    // Stays in the cache: nothing but this piece's rows of the second product reads it.
    thread_local std::vector<S> hidden;
    hidden.resize(size * channels);
    Layer<S> to_hidden = first;
    to_hidden.snaked = {hidden.data() - begin * channels, 0, channels};
    const Product<S> wide(shape, x, to_hidden, set);
    for (int64_t panel = 0; panel < wide.panels(); ++panel) wide.compute(b, begin, end, panel);
    const Rows<const S> from_hidden = {to_hidden.snaked.data, 0, channels};
    const Product<S> narrow(pointwise, from_hidden, second, set);
    for (int64_t panel = 0; panel < narrow.panels(); ++panel) narrow.compute(b, begin, end, panel);
  });
}

#define DAC_CONV1D(S)                                                                                             \
  template const char* conv1d_lacks<S>();                                                                         \
  template void conv1d(const ConvShape&, Rows<const S>, const Layer<S>&, int, InstructionSet);                    \
  template void residual_unit(const ConvShape&, Rows<const S>, const Layer<S>&, const Layer<S>&, int, InstructionSet)
DAC_CONV1D(float);
DAC_CONV1D(BFloat16);

}  // namespace dac
