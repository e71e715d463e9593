// Mean removal and peak normalisation of signals, y = 0.8 (x - mean) / (peak + 1e-9) with peak = max |x - mean|, and
// its gradient. Each signal is cut into chunks: a first pass leaves one partial result a chunk, a second one adds up
// its signal's and writes its chunk. The arithmetic is one source for the host and the device.
#pragma once

#include <cstdint>

#include "fft.h"

namespace dac {

struct Signals {
  int64_t count, samples, stride;  // x: rows of samples, `stride` elements apart; everything else contiguous.
  int64_t chunk;                   // Samples in a chunk.

  DAC_HD int64_t chunks() const { return (samples + chunk - 1) / chunk; }
};

// What the forward op's first pass finds in a chunk.
template <class S>
struct Extent {
  double sum;
  S low, high;

  DAC_HD void add(S x) {
    sum += x;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  DAC_HD void add(const Extent& other) {
    sum += other.sum;
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
  }
};

// What the backward op needs of the forward one.
template <class S>
struct Level {
  S mean, peak;

  DAC_HD S factor() const { return static_cast<S>(0.8) / (peak + static_cast<S>(1e-9)); }
};

template <class S>
DAC_HD Level<S> level(const Extent<S>& extent, int64_t samples) {
  const S mean = static_cast<S>(extent.sum / static_cast<double>(samples));
  // Rounding is monotonic, so this is exactly the largest |x - mean|. Comparisons drop NaN, but the mean keeps it.
  const S above = extent.high - mean, below = mean - extent.low;
  return {mean, above > below ? above : below};
}

// What the backward op's first pass finds in a chunk: sums of g and g (x - mean), and the number of samples at the
// peak, above and below the mean (of equals each gets an equal share of the peak's gradient).
struct Slope {
  double grad, product, above, below;

  template <class S>
  DAC_HD void add(S g, S x, const Level<S>& level) {
    const S centred = x - level.mean;
    grad += g;
    product += static_cast<double>(g) * centred;
    above += centred == level.peak;
    below += centred == -level.peak;
  }
  DAC_HD void add(const Slope& other) {
    grad += other.grad, product += other.product, above += other.above, below += other.below;
  }
};

// The gradient of a sample is factor g + mean_part, and at the peak that much more or, below the mean, less.
template <class S>
struct Gradient {
  S factor, mean_part, peak_part;

  DAC_HD S at(S g, S x, const Level<S>& level) const {
    const S centred = x - level.mean, base = factor * g + mean_part;
    if (centred == level.peak && level.peak > 0) return base + peak_part;
    return centred == -level.peak && level.peak > 0 ? base - peak_part : base;
  }
};

template <class S>
DAC_HD Gradient<S> gradient(const Slope& slope, const Level<S>& level, int64_t samples) {
  const double factor = level.factor();
  const double of_peak = -factor * slope.product / (static_cast<double>(level.peak) + 1e-9);
  const double share = level.peak > 0 ? of_peak / (slope.above + slope.below) : 0;
  const double total = factor * slope.grad + share * (slope.above - slope.below);
  return {static_cast<S>(factor), static_cast<S>(-total / static_cast<double>(samples)), static_cast<S>(share)};
}

// levels [count] is written for the backward op; partial has room for count * chunks() results. S: float or double.
template <class S>
void disc_preprocess_forward(const Signals& signals, const S* x, S* y, Level<S>* levels, Extent<S>* partial,
                             int threads);
template <class S>
void disc_preprocess_backward(const Signals& signals, const S* grad, const S* x, const Level<S>* levels, S* grad_x,
                              Slope* partial, int threads);

// On a CUDA device, asynchronous on the stream; std::runtime_error where CUDA reports an error.
void disc_preprocess_forward_cuda(const Signals& signals, const float* x, float* y, Level<float>* levels,
                                  Extent<float>* partial, int device, void* stream);
void disc_preprocess_backward_cuda(const Signals& signals, const float* grad, const float* x,
                                   const Level<float>* levels, float* grad_x, Slope* partial, int device,
                                   void* stream);

}  // namespace dac
