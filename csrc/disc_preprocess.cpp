#include "disc_preprocess.h"

#include <algorithm>

#include "parallel.h"

namespace dac {
namespace {

// Calls body(signal, chunk, first sample, one past the last) for every chunk.
template <class Body>
void each_chunk(const Signals& signals, int threads, const Body& body) {
  const int64_t chunks = signals.chunks();
  parallel_for(signals.count * chunks, 1, threads, [&](int64_t index, int64_t) {
    const int64_t begin = index % chunks * signals.chunk;
    body(index / chunks, index, begin, std::min(begin + signals.chunk, signals.samples));
  });
}

template <class Part>
Part total(const Signals& signals, const Part* partial, int64_t signal) {
  Part sum = partial[signal * signals.chunks()];
  for (int64_t c = 1; c < signals.chunks(); ++c) sum.add(partial[signal * signals.chunks() + c]);
  return sum;
}

}  // namespace

template <class S>
void disc_preprocess_forward(const Signals& signals, const S* x, S* y, Level<S>* levels, Extent<S>* partial,
                             int threads) {
  each_chunk(signals, threads, [&](int64_t signal, int64_t chunk, int64_t begin, int64_t end) {
    const S* row = x + signal * signals.stride;
    Extent<S> extent = {0, row[begin], row[begin]};
    for (int64_t i = begin; i < end; ++i) extent.add(row[i]);
    partial[chunk] = extent;
  });
  for (int64_t signal = 0; signal < signals.count; ++signal) {
    levels[signal] = level(total(signals, partial, signal), signals.samples);
  }
  each_chunk(signals, threads, [&](int64_t signal, int64_t, int64_t begin, int64_t end) {
    const Level<S> own = levels[signal];
    const S factor = own.factor();
    for (int64_t i = begin; i < end; ++i) {
      y[signal * signals.samples + i] = (x[signal * signals.stride + i] - own.mean) * factor;
    }
  });
}

template <class S>
void disc_preprocess_backward(const Signals& signals, const S* grad, const S* x, const Level<S>* levels, S* grad_x,
                              Slope* partial, int threads) {
  each_chunk(signals, threads, [&](int64_t signal, int64_t chunk, int64_t begin, int64_t end) {
    Slope slope = {};
    for (int64_t i = begin; i < end; ++i) {
      slope.add(grad[signal * signals.samples + i], x[signal * signals.stride + i], levels[signal]);
    }
    partial[chunk] = slope;
  });
  each_chunk(signals, threads, [&](int64_t signal, int64_t, int64_t begin, int64_t end) {
    const Gradient<S> of_x = gradient(total(signals, partial, signal), levels[signal], signals.samples);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = signal * signals.samples + i;
      grad_x[at] = of_x.at(grad[at], x[signal * signals.stride + i], levels[signal]);
    }
  });
}

template void disc_preprocess_forward(const Signals&, const float*, float*, Level<float>*, Extent<float>*, int);
template void disc_preprocess_forward(const Signals&, const double*, double*, Level<double>*, Extent<double>*, int);
template void disc_preprocess_backward(const Signals&, const float*, const float*, const Level<float>*, float*,
                                       Slope*, int);
template void disc_preprocess_backward(const Signals&, const double*, const double*, const Level<double>*, double*,
                                       Slope*, int);

}  // namespace dac
