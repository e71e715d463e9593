// The CPU half of csrc without Python, for sanitizers: every op, forward and backward, on awkward sizes and values;
// TRIALS times on random ones, by CALLERS threads at once; and in FORKS forked children, while all but one of the callers
// go on calling an op.
//
//     native_main TRIALS CALLERS FORKS
//
// Prints what was tried. Exits with 1 and a line on standard error where a result is wrong or a child never returns.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../csrc/conv1d.h"
#include "../csrc/disc_preprocess.h"
#include "../csrc/snake.h"
#include "../csrc/stft_bands.h"
#include "../csrc/weight_gradient.h"
#include "../csrc/winograd.h"

namespace {

thread_local std::mt19937 generator(0);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// As many small sizes as large ones.
int64_t size_up_to(int64_t largest) { return between(0, largest >> between(0, 10)); }

int some_threads() { return static_cast<int>(between(1, 4)); }

template <class S>
std::vector<S> noise(int64_t size, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<S> values(size);
  for (S& value : values) value = static_cast<S>(normal(generator));
  return values;
}

void expect_near(double actual, double expected, double tolerance, const char* what) {
  if (std::fabs(actual - expected) <= tolerance || (std::isnan(actual) && std::isnan(expected))) return;
  std::fprintf(stderr, "%s: %.9g, expected %.9g\n", what, actual, expected);
  std::exit(1);
}

void expect_equal(int64_t actual, int64_t expected, const char* what) {
  expect_near(static_cast<double>(actual), static_cast<double>(expected), 0, what);
}

template <class S>
double dot(const std::vector<S>& a, const std::vector<S>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// Gradients in bfloat16 beside values in float: as those of the same gradients in float.
void rounded_gradients(const dac::SnakeShape& shape, dac::Rows<const float> x, const std::vector<float>& alpha,
                       const std::vector<float>& grad, dac::InstructionSet set) {
  const int64_t size = shape.size, item = shape.rows * size;
  std::vector<dac::BFloat16> half(grad.size()), half_x(grad.size());
  std::vector<float> wide(grad.size()), grad_x(grad.size()), same_x(grad.size()), grad_alpha(alpha), same(alpha);
  for (size_t i = 0; i < grad.size(); ++i) {
    dac::convert(grad[i], half[i]);
    dac::convert(half[i], wide[i]);
  }
  const dac::Rows<const dac::BFloat16> from = {half.data(), item, size};
  dac::snake_backward<float, float, float>(shape, {wide.data(), item, size}, x, alpha.data(),
                                           {grad_x.data(), item, size}, grad_alpha.data(), 1, set);
  dac::snake_backward<dac::BFloat16, float, float>(shape, from, x, alpha.data(), {same_x.data(), item, size},
                                                   same.data(), some_threads(), set);
  for (size_t i = 0; i < grad.size(); ++i) expect_near(same_x[i], grad_x[i], 0, "gradient of x, from bfloat16");
  dac::snake_backward<dac::BFloat16, float, dac::BFloat16>(shape, from, x, alpha.data(), {half_x.data(), item, size},
                                                           same.data(), some_threads(), set);
  for (size_t c = 0; c < same.size(); ++c) expect_near(same[c], grad_alpha[c], 0, "gradient of alpha, from bfloat16");
  for (size_t i = 0; i < grad.size(); ++i) {
    dac::BFloat16 expected;
    dac::convert(grad_x[i], expected);
    expect_equal(half_x[i].bits, expected.bits, "gradient of x, in bfloat16");
  }
}

// Every instruction set of this CPU, against the formula.
template <class S>
void snake(int64_t batch, int64_t rows, int64_t size, bool channels_last, double tolerance) {
  const dac::SnakeShape shape = {batch, rows, size, channels_last};
  const int64_t count = batch * rows * size, stride = size + 3;  // Rows with room between them.
  std::vector<S> x = noise<S>(batch * rows * stride, 30), alpha = noise<S>(shape.channels());
  const S odd[] = {std::numeric_limits<S>::quiet_NaN(), std::numeric_limits<S>::infinity(), static_cast<S>(1e30),
                   static_cast<S>(-3e5), static_cast<S>(0)};
  for (size_t i = 0; i < 5 && i < x.size(); ++i) x[i] = odd[i];
  const std::vector<S> grad = noise<S>(count);
  for (const auto set : {dac::InstructionSet::portable, dac::InstructionSet::avx2, dac::InstructionSet::avx512}) {
    if (!dac::supported(set)) continue;
    std::vector<S> y(count), grad_x(count), grad_alpha(shape.channels()), again(shape.channels());
    std::vector<dac::BFloat16> rounded(count);
    const dac::Rows<const S> in = {x.data(), rows * stride, stride}, upstream = {grad.data(), rows * size, size};
    const dac::Rows<S> out = {y.data(), rows * size, size}, to_x = {grad_x.data(), rows * size, size};
    dac::snake_forward<S>(shape, in, alpha.data(), alpha.data(), out, {rounded.data(), rows * size, size},
                          some_threads(), set);
    dac::snake_backward<S, S, S>(shape, upstream, in, alpha.data(), to_x, grad_alpha.data(), some_threads(), set);
    dac::snake_backward<S, S, S>(shape, upstream, in, alpha.data(), to_x, again.data(), 1, set);
    for (size_t c = 0; c < again.size(); ++c) expect_near(again[c], grad_alpha[c], 0, "gradient of alpha, threads");
    if constexpr (sizeof(S) == sizeof(float)) rounded_gradients(shape, in, alpha, grad, set);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i / size, channel = channels_last ? i % size : row % rows;
      const S value = x[row * stride + i % size], a = alpha[channel];
      const double t = a * value, inverse = 1 / (a + static_cast<S>(1e-9)), sine = std::sin(t);
      const double scale = std::fabs(value) + std::fabs(inverse) + 1;
      expect_near(y[i], value + inverse * sine * sine, tolerance * scale, "snake");
      expect_near(grad_x[i], grad[i] * (1 + a * inverse * std::sin(2 * t)), tolerance * 10 * std::fabs(grad[i]) + 1e-30,
                  "gradient of x");
      dac::BFloat16 expected;
      dac::convert(static_cast<float>(y[i]), expected);
      expect_equal(rounded[i].bits, expected.bits, "snake in bfloat16");
    }
  }
}

void snake(double tolerance_float, double tolerance_double) {
  const bool channels_last = between(0, 1), single = between(0, 1);
  const int64_t batch = between(0, 3), rows = size_up_to(100), size = size_up_to(2000);
  if (single) return snake<float>(batch, rows, size, channels_last, tolerance_float);
  snake<double>(batch, rows, size, channels_last, tolerance_double);
}

// A layer with mask, residual and Snake, by every instruction set, against the formula.
template <class S>
void conv1d(const dac::ConvShape& shape, double tolerance) {
  if (dac::conv1d_lacks<S>()) return;
  const auto values = [](int64_t size, double scale) {
    std::vector<S> to(size);
    for (S& value : to) dac::convert(static_cast<float>(noise<double>(1, scale)[0]), value);
    return to;
  };
  const auto wide = [](S from) {
    float to;
    dac::convert(from, to);
    return static_cast<double>(to);
  };
  const int64_t terms = shape.taps * shape.inputs, columns = shape.columns, row_stride = shape.inputs + 2;
  const int64_t panels = (columns + dac::kPanel - 1) / dac::kPanel, pairs = 4 / sizeof(S);
  const std::vector<S> x = values(shape.batch * shape.positions * row_stride, 1);
  const std::vector<S> residual = values(shape.batch * shape.rows * columns, 1);
  const std::vector<S> weight = values(panels * terms * dac::kPanel, 1 / std::sqrt(terms));
  const std::vector<float> bias = noise<float>(panels * dac::kPanel), alpha(panels * dac::kPanel, 1.5f);
  std::vector<int64_t> lengths(shape.batch);
  for (int64_t& length : lengths) length = between(0, shape.rows);
  const dac::Rows<const S> in = {x.data(), shape.positions * row_stride, row_stride};
  for (const auto set : {dac::InstructionSet::avx2, dac::InstructionSet::avx512}) {
    if (!dac::supported(set)) continue;
    std::vector<S> y(residual.size()), snaked(y), again(y);
    const int64_t item = shape.rows * columns;
    dac::Layer<S> layer = {weight.data(), bias.data(), alpha.data(), lengths.data(), false,
                           {residual.data(), item, columns}, {y.data(), item, columns}, {snaked.data(), item, columns}};
    dac::conv1d<S>(shape, in, layer, some_threads(), set);
    layer.y.data = nullptr, layer.snaked.data = again.data();
    dac::conv1d<S>(shape, in, layer, 1, set);
    for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
      expect_near(wide(again[i]), wide(snaked[i]), 0, "snake of a convolution, threads");
      const int64_t b = i / item, row = i / columns % shape.rows, column = i % columns;
      double sum = bias[column];
      for (int64_t tap = 0; tap < shape.taps; ++tap) {
        const int64_t position = row * shape.stride + tap * shape.dilation - shape.padding;
        if (position < 0 || position >= shape.positions) continue;
        for (int64_t k = 0; k < shape.inputs; ++k) {
          const int64_t at = ((column / dac::kPanel * terms + tap * shape.inputs + k) / pairs * dac::kPanel +
                              column % dac::kPanel) * pairs + k % pairs;
          sum += wide(x[(b * shape.positions + position) * row_stride + k]) * wide(weight[at]);
        }
      }
      const double c = (row < lengths[b] ? sum : 0) + wide(residual[i]), sine = std::sin(1.5 * c);
      expect_near(wide(y[i]), c, tolerance * (1 + std::fabs(c)), "convolution");
      expect_near(wide(snaked[i]), c + sine * sine / 1.5, 4 * tolerance * (1 + std::fabs(c)), "snake of a convolution");
    }
  }
}

void conv1d() {
  const int64_t inputs = 2 * between(1, 20), taps = between(1, 7), stride = between(1, 3), dilation = between(1, 9);
  const int64_t columns = between(1, 80), span = dilation * (taps - 1) + 1, padding = between(0, span);
  const int64_t positions = std::max<int64_t>(span - 2 * padding, 1) + size_up_to(400);
  const int64_t rows = (positions + 2 * padding - span) / stride + 1;
  const dac::ConvShape shape = {between(1, 3), positions, inputs,  rows,    columns, taps,
                                stride,        dilation,  padding, columns, 0};
  if (between(0, 1)) return conv1d<float>(shape, 1e-5);
  conv1d<dac::BFloat16>(shape, 1e-2);
}

void weight_gradient() {
  const int64_t batch = between(0, 3), positions = 1 + size_up_to(3000), inputs = between(1, 70), columns = between(1, 70);
  const int64_t taps = between(1, 9), stride = between(1, 4), dilation = between(1, 9), padding = between(0, 30);
  const int64_t rows = std::max<int64_t>(0, positions + 2 * padding - dilation * (taps - 1) + stride - 1) / stride;
  const dac::ConvShape shape = {batch, positions, inputs, rows, columns, taps, stride, dilation, padding, columns, 0};
  const std::vector<float> x = noise<float>(batch * positions * inputs), grad = noise<float>(batch * rows * columns);
  const dac::Rows<const float> from_x = {x.data(), positions * inputs, inputs};
  const dac::Rows<const float> from_grad = {grad.data(), rows * columns, columns};
  std::vector<float> weight(columns * inputs * taps), same(weight);
  for (const auto set : {dac::InstructionSet::portable, dac::InstructionSet::avx2, dac::InstructionSet::avx512}) {
    if (!dac::supported(set)) continue;
    dac::conv1d_weight_gradient(shape, from_grad, from_x, weight.data(), 1, set);
    dac::conv1d_weight_gradient(shape, from_grad, from_x, same.data(), some_threads(), set);
    for (size_t i = 0; i < weight.size(); ++i) expect_near(same[i], weight[i], 0, "weight gradient by threads");
    for (int trial = 0; trial < 20; ++trial) {
      const int64_t o = between(0, columns - 1), i = between(0, inputs - 1), tap = between(0, taps - 1);
      double expected = 0;
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t position = row * stride + tap * dilation - padding;
          if (position < 0 || position >= positions) continue;
          expected += static_cast<double>(grad[(b * rows + row) * columns + o]) * x[(b * positions + position) * inputs + i];
        }
      }
      const double scale = 1 + std::sqrt(static_cast<double>(batch * rows));
      expect_near(weight[(o * inputs + i) * taps + tap], expected, 1e-5 * scale, "weight gradient");
    }
  }
}

// Results one by one; the gradients by what they are for: <y, grad> = <weight, its gradient> + <bias, its gradient>.
void winograd() {
  const int64_t batch = between(0, 3), inputs = between(8, 70), columns = between(8, 70), dilation = between(1, 9);
  const int64_t padding = between(0, 30), span = 6 * dilation + 1;
  const int64_t positions = std::max<int64_t>(1, span - 2 * padding) + size_up_to(3000);
  const int64_t rows = positions + 2 * padding - span + 1;
  const dac::ConvShape shape = {batch, positions, inputs, rows, columns, 7, 1, dilation, padding, columns, 0};
  const std::vector<float> x = noise<float>(batch * positions * inputs), grad = noise<float>(batch * rows * columns);
  const std::vector<float> weight = noise<float>(7 * inputs * columns), bias = noise<float>(columns);
  const dac::Rows<const float> from_x = {x.data(), positions * inputs, inputs};
  const dac::Rows<const float> from_grad = {grad.data(), rows * columns, columns};
  for (const auto set : {dac::InstructionSet::portable, dac::InstructionSet::avx2, dac::InstructionSet::avx512}) {
    if (!dac::supported(set)) continue;
    std::vector<float> y(grad.size()), same(y), of_weight(weight.size()), of_bias(columns), again(of_weight);
    const int64_t item = rows * columns;
    dac::winograd(shape, from_x, weight.data(), bias.data(), {y.data(), item, columns}, 1, set);
    dac::winograd(shape, from_x, weight.data(), bias.data(), {same.data(), item, columns}, some_threads(), set);
    for (size_t i = 0; i < y.size(); ++i) expect_near(same[i], y[i], 0, "filtering by threads");
    dac::winograd_weight_gradient(shape, from_grad, from_x, of_weight.data(), of_bias.data(), 1, set);
    dac::winograd_weight_gradient(shape, from_grad, from_x, again.data(), of_bias.data(), some_threads(), set);
    for (size_t i = 0; i < again.size(); ++i) expect_near(again[i], of_weight[i], 0, "gradient of filtering by threads");
    for (int trial = 0; trial < 20 && batch; ++trial) {
      const int64_t b = between(0, batch - 1), row = between(0, rows - 1), column = between(0, columns - 1);
      double sum = bias[column];
      for (int64_t tap = 0; tap < 7; ++tap) {
        const int64_t position = row + tap * dilation - padding;
        if (position < 0 || position >= positions) continue;
        for (int64_t k = 0; k < inputs; ++k) {
          sum += static_cast<double>(x[(b * positions + position) * inputs + k]) * weight[(tap * inputs + k) * columns + column];
        }
      }
      expect_near(y[(b * rows + row) * columns + column], sum, 2e-5 * std::sqrt(7.0 * inputs), "filtering");
    }
    // [7, columns, inputs], where the weight is [7, inputs, columns].
    double along = dot(bias, of_bias), scale = 1 + std::sqrt(dot(y, y) * dot(grad, grad));
    for (int64_t i = 0; i < static_cast<int64_t>(weight.size()); ++i) {
      const int64_t tap = i / (inputs * columns), k = i / columns % inputs, column = i % columns;
      along += static_cast<double>(weight[i]) * of_weight[(tap * columns + column) * inputs + k];
    }
    expect_near(along, dot(y, grad), 1e-5 * scale, "gradient of filtering");
  }
}

int frames_of(int samples, int window) { return (samples + window / 4 - 1) / (window / 4); }

// Samples that reach far enough for the window's reflections.
bool long_enough(int64_t samples, int window) {
  const int64_t hop = window / 4;
  return samples > 3 * hop / 2 + (hop - samples % hop) % hop;
}

template <class S>
void stft_bands(int64_t batch, int samples, const std::vector<int>& windows, bool channels_last, double tolerance) {
  std::vector<int> edges;
  std::vector<std::vector<S>> outputs, grads;
  for (int window : windows) {
    const int bins = window / 2 + 1, low = bins / 7, middle = bins / 3;  // A gap at either end, and an empty band.
    for (int edge : {low, middle, middle, middle, middle, bins - 2}) edges.push_back(edge);
    for (int width : {middle - low, 0, bins - 2 - middle}) {
      outputs.emplace_back(batch * 2 * frames_of(samples, window) * width);
      grads.push_back(noise<S>(outputs.back().size()));
    }
  }
  const auto plan = [&](auto& tensors) {
    std::vector<void*> addresses;
    for (auto& tensor : tensors) addresses.push_back(tensor.data());
    return dac::make_plan(batch, samples, channels_last, static_cast<int>(windows.size()), windows.data(), 3,
                          edges.data(), addresses.data());
  };
  const int64_t stride = samples + 5;
  const std::vector<S> x = noise<S>(batch * stride);
  std::vector<S> grad_x(batch * samples), packed;
  for (int64_t b = 0; b < batch; ++b) packed.insert(packed.end(), &x[b * stride], &x[b * stride] + samples);
  dac::stft_bands_forward<S, S>(plan(outputs), x.data(), stride, some_threads());
  dac::stft_bands_backward<S, S>(plan(grads), grad_x.data(), some_threads());
  // The op is linear, and backward its transpose: <A x, g> = <x, A' g>.
  double forward = 0, scale = 0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    forward += dot(outputs[i], grads[i]);
    scale += std::sqrt(dot(outputs[i], outputs[i]) * dot(grads[i], grads[i]));
  }
  expect_near(dot(packed, grad_x), forward, tolerance * scale, "stft_bands");
  if constexpr (sizeof(S) == sizeof(float)) {
    std::vector<std::vector<dac::BFloat16>> rounded;
    for (const auto& output : outputs) rounded.emplace_back(output.size());
    dac::stft_bands_forward<S, dac::BFloat16>(plan(rounded), x.data(), stride, some_threads());
    for (size_t i = 0; i < outputs.size(); ++i) {
      for (size_t j = 0; j < outputs[i].size(); ++j) {
        dac::BFloat16 expected;
        dac::convert(outputs[i][j], expected);
        expect_equal(rounded[i][j].bits, expected.bits, "stft_bands in bfloat16");
      }
    }
  }
}

void stft_bands() {
  const bool channels_last = between(0, 1), single = between(0, 1);
  std::vector<int> windows(between(1, 3));
  for (int& window : windows) window = 32 << between(0, 7);
  const int64_t batch = between(0, 3);
  int samples = 0;
  for (size_t i = 0; i < windows.size();) {
    i = long_enough(samples, windows[i]) ? i + 1 : (samples += static_cast<int>(between(1, 400)), 0);
  }
  if (single) return stft_bands<float>(batch, samples, windows, channels_last, 1e-5);
  stft_bands<double>(batch, samples, windows, channels_last, 1e-13);
}

// The longest signal, of which no memory is needed to see where its frames and reflections are.
void longest_signal() {
  const int64_t samples = dac::kMaxSamples;
  for (int size = dac::kSmallestWindow; size <= dac::kLargestWindow; size *= 2) {
    const int edges[] = {0, 1};
    void* tensor = nullptr;
    const dac::Plan plan = dac::make_plan(1, static_cast<int>(samples), false, 1, &size, 1, edges, &tensor);
    const dac::Spectrogram& s = plan.window[0];
    expect_equal(s.frames, (samples + s.hop - 1) / s.hop, "frames of the longest signal");
    expect_equal(s.start(s.frames - 1), (int64_t{s.frames} - 1) * s.hop - s.pad, "start of the last frame");
    const int end = s.start(s.frames - 1) + s.size;
    expect_equal(dac::reflect(end - 1, s.samples), 2 * (samples - 1) - (int64_t{end} - 1), "sample of the last position");
    const dac::Range whole = {0, s.samples}, last = {s.samples - 1, s.samples};
    expect_equal(dac::frames_over(s, whole).end, s.frames, "frames over the longest signal");
    expect_equal(dac::frames_over(s, last).end, s.frames, "frames over its last sample");
    for (int which = 0; which < dac::kImages; ++which) {
      const dac::Range under = dac::samples_under(s, dac::image(s, which), {0, s.frames}, whole);
      if (under.begin < 0 || under.end > samples) expect_equal(under.end, samples, "samples under its frames");
    }
  }
}

template <class S>
void disc_preprocess(int64_t count, int64_t samples, double tolerance) {
  const dac::Signals signals = {count, samples, samples + 1, 64};
  const std::vector<S> x = noise<S>(count * (samples + 1)), grad = noise<S>(count * samples);
  std::vector<S> y(count * samples), grad_x(count * samples);
  std::vector<dac::Level<S>> levels(count);
  std::vector<dac::Extent<S>> extents(count * signals.chunks());
  std::vector<dac::Slope> slopes(count * signals.chunks());
  dac::disc_preprocess_forward<S>(signals, x.data(), y.data(), levels.data(), extents.data(), some_threads());
  dac::disc_preprocess_backward<S>(signals, grad.data(), x.data(), levels.data(), grad_x.data(), slopes.data(),
                                   some_threads());
  for (int64_t i = 0; i < count; ++i) {
    const S *signal = &x[i * (samples + 1)], *result = &y[i * samples], *gradient = &grad_x[i * samples];
    const double mean = std::accumulate(signal, signal + samples, 0.0) / static_cast<double>(samples);
    // Neither a constant nor (but for the 1e-9 added to the peak) a scale reaches the output, so the gradient is
    // orthogonal to both.
    double before = 0, peak = 0, sum = 0, along = 0;
    for (int64_t n = 0; n < samples; ++n) {
      before = std::fmax(before, std::fabs(signal[n] - mean));
      peak = std::fmax(peak, std::fabs(result[n]));
      sum += gradient[n];
      along += static_cast<double>(gradient[n]) * signal[n];
    }
    // A single sample is its mean.
    if (samples > 1) expect_near(peak, 0.8 * before / (before + 1e-9), tolerance * (1 + 1 / before), "peak");
    // Of the gradients, as large as they can be for such a signal.
    const double scale = static_cast<double>(samples) * std::fmax(1, levels[i].factor());
    expect_near(sum, 0, tolerance * scale * 10, "sum of gradients");
    if (samples > 1) expect_near(along, 0, (tolerance + 1e-6) * scale, "gradient along the signal");
  }
}

void disc_preprocess() {
  const int64_t count = between(0, 4), samples = 1 + size_up_to(3000);
  if (between(0, 1)) return disc_preprocess<float>(count, samples, 2e-6);
  disc_preprocess<double>(count, samples, 1e-13);
}

void awkward_sizes() {
  for (const bool channels_last : {false, true}) {
    for (const int64_t size : {1, 15, 63, 513, 1000}) {
      snake<float>(2, 3, size, channels_last, 4e-7);
      snake<double>(2, 3, size, channels_last, 1e-14);
    }
    snake<float>(1, 200, 700, channels_last, 4e-7);
    stft_bands<double>(3, 3601, {32, 64, 128, 256, 512, 1024, 2048, 4096}, channels_last, 1e-13);
    stft_bands<float>(1, 1024, {2048, 32}, channels_last, 1e-5);
  }
  snake<float>(1, 2, 40000, false, 4e-7);
  stft_bands<float>(1, 40000, {512}, false, 1e-5);
  for (const int64_t samples : {1, 2, 63, 64, 1000}) {
    disc_preprocess<float>(3, samples, 2e-6);
    disc_preprocess<double>(3, samples, 1e-13);
  }
}

void random_op() {
  const int64_t op = between(0, 5);
  if (op == 0) snake(4e-7, 1e-14);
  if (op == 1) stft_bands();
  if (op == 2) disc_preprocess();
  if (op == 3) conv1d();
  if (op == 4) weight_gradient();
  if (op == 5) winograd();
}

// Calls body(number) on threads of their own, with random numbers of their own.
template <class Body>
std::vector<std::thread> callers(int count, const Body& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([i, body] {
      generator.seed(i + 1);
      body(i);
    });
  }
  return threads;
}

void join(std::vector<std::thread>& threads) {
  for (std::thread& thread : threads) thread.join();
}

// Whether a child exits with 0 within half a minute.
bool returns(pid_t child) {
  using clock = std::chrono::steady_clock;
  int status = 0;
  for (const auto end = clock::now() + std::chrono::seconds(30); clock::now() < end;) {
    if (waitpid(child, &status, WNOHANG) == child) return status == 0;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  kill(child, SIGKILL);
  return false;
}

// A child must be able to call the ops, even if other threads of its parent were inside them.
void forks(int count, int others) {
  std::atomic<bool> done{false};
  auto threads = callers(others, [&done](int) {
    // Just enough work for two threads.
    const std::vector<float> x(16400), alpha(2, 1);
    std::vector<float> y(16400);
    const dac::Rows<const float> from = {x.data(), 16400, 8200};
    const dac::Rows<float> to = {y.data(), 16400, 8200};
    const dac::Rows<dac::BFloat16> none = {nullptr, 16400, 8200};
    while (!done) dac::snake_forward<float>({1, 2, 8200, false}, from, alpha.data(), alpha.data(), to, none, 2);
  });
  for (int i = 0; i < count; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      generator.seed(i);
      snake<float>(1, 40, 1000, false, 4e-7);
      stft_bands<float>(1, 1024, {2048}, false, 1e-5);
      conv1d<float>({1, 300, 4, 300, 40, 7, 1, 1, 3, 40, 0}, 1e-5);
      _exit(0);
    }
    if (!returns(child)) {
      std::fprintf(stderr, "fork %d: the child's own calls never returned, or were wrong\n", i);
      std::_Exit(1);
    }
  }
  done = true;
  join(threads);
}

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i) { return i < argc ? std::atoi(argv[i]) : 0; };
  const int trials = number(1), count = std::max(1, number(2)), children = number(3);
  longest_signal();
  awkward_sizes();
  auto threads = callers(count, [trials, count](int i) {
    for (int trial = i; trial < trials; trial += count) random_op();
  });
  join(threads);
  forks(children, count - 1);
  std::printf("%d random calls by %d callers, %d forked children: all right\n", trials, count, children);
  return 0;
}
