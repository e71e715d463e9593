// The CPU half of csrc without Python, for sanitizers: every op, forward and backward, on awkward sizes and values.
// Exits with 1 and a line on standard error where a result is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "../csrc/disc_preprocess.h"
#include "../csrc/snake.h"
#include "../csrc/stft_bands.h"

namespace {

std::mt19937 generator(0);

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

template <class S>
double dot(const std::vector<S>& a, const std::vector<S>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// Every instruction set of this CPU, against the formula.
template <class S>
void snake(int64_t batch, int64_t rows, int64_t size, bool channels_last, double tolerance) {
  const dac::SnakeShape shape = {batch, rows, size, channels_last};
  const int64_t count = batch * rows * size, stride = size + 3;  // Rows with room between them.
  std::vector<S> x = noise<S>(batch * rows * stride, 30), alpha = noise<S>(shape.channels());
  const S odd[] = {std::numeric_limits<S>::quiet_NaN(), std::numeric_limits<S>::infinity(), static_cast<S>(1e30),
                   static_cast<S>(-3e5), static_cast<S>(0)};
  for (size_t i = 0; i < 5 && static_cast<int64_t>(i) < size; ++i) x[i] = odd[i];
  const std::vector<S> grad = noise<S>(count);
  for (const auto set : {dac::InstructionSet::portable, dac::InstructionSet::avx2, dac::InstructionSet::avx512}) {
    if (!dac::supported(set)) continue;
    std::vector<S> y(count), grad_x(count), grad_alpha(shape.channels()), again(shape.channels());
    const dac::Rows<const S> in = {x.data(), rows * stride, stride}, upstream = {grad.data(), rows * size, size};
    dac::snake_forward<S>(shape, in, alpha.data(), {y.data(), rows * size, size}, 2, set);
    dac::snake_backward<S>(shape, upstream, in, alpha.data(), {grad_x.data(), rows * size, size}, grad_alpha.data(), 2,
                           set);
    dac::snake_backward<S>(shape, upstream, in, alpha.data(), {grad_x.data(), rows * size, size}, again.data(), 1, set);
    for (size_t c = 0; c < again.size(); ++c) expect_near(again[c], grad_alpha[c], 0, "gradient of alpha, threads");
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i / size, channel = channels_last ? i % size : row % rows;
      const S value = x[row * stride + i % size], a = alpha[channel];
      const double t = a * value, inverse = 1 / (a + static_cast<S>(1e-9)), sine = std::sin(t);
      const double scale = std::fabs(value) + std::fabs(inverse) + 1;
      expect_near(y[i], value + inverse * sine * sine, tolerance * scale, "snake");
      expect_near(grad_x[i], grad[i] * (1 + a * inverse * std::sin(2 * t)), tolerance * 10 * std::fabs(grad[i]) + 1e-30,
                  "gradient of x");
    }
  }
}

template <class S>
void stft_bands(int64_t batch, int samples, const std::vector<int>& windows, bool channels_last, double tolerance) {
  std::vector<int> edges;
  std::vector<std::vector<S>> outputs, grads;
  for (int window : windows) {
    const int bins = window / 2 + 1, low = bins / 7, middle = bins / 3;  // A gap at either end, and an empty band.
    for (int edge : {low, middle, middle, middle, middle, bins - 2}) edges.push_back(edge);
    for (int width : {middle - low, 0, bins - 2 - middle}) {
      const int64_t frames = (samples + window / 4 - 1) / (window / 4);
      outputs.emplace_back(batch * 2 * frames * width);
      grads.push_back(noise<S>(outputs.back().size()));
    }
  }
  const auto plan = [&](std::vector<std::vector<S>>& tensors) {
    std::vector<void*> addresses;
    for (auto& tensor : tensors) addresses.push_back(tensor.data());
    return dac::make_plan(batch, samples, channels_last, static_cast<int>(windows.size()), windows.data(), 3,
                          edges.data(), addresses.data());
  };
  const int64_t stride = samples + 5;
  const std::vector<S> x = noise<S>(batch * stride);
  std::vector<S> grad_x(batch * samples), packed;
  for (int64_t b = 0; b < batch; ++b) packed.insert(packed.end(), &x[b * stride], &x[b * stride] + samples);
  dac::stft_bands_forward<S, S>(plan(outputs), x.data(), stride, 2);
  dac::stft_bands_backward<S, S>(plan(grads), grad_x.data(), 2);
  // The op is linear, and backward its transpose: <A x, g> = <x, A' g>.
  double forward = 0, scale = 0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    forward += dot(outputs[i], grads[i]);
    scale += std::sqrt(dot(outputs[i], outputs[i]) * dot(grads[i], grads[i]));
  }
  expect_near(dot(packed, grad_x), forward, tolerance * scale, "stft_bands");
}

template <class S>
void disc_preprocess(int64_t count, int64_t samples, double tolerance) {
  const dac::Signals signals = {count, samples, samples + 1, 64};
  const std::vector<S> x = noise<S>(count * (samples + 1)), grad = noise<S>(count * samples);
  std::vector<S> y(count * samples), grad_x(count * samples);
  std::vector<dac::Level<S>> levels(count);
  std::vector<dac::Extent<S>> extents(count * signals.chunks());
  std::vector<dac::Slope> slopes(count * signals.chunks());
  dac::disc_preprocess_forward<S>(signals, x.data(), y.data(), levels.data(), extents.data(), 2);
  dac::disc_preprocess_backward<S>(signals, grad.data(), x.data(), levels.data(), grad_x.data(), slopes.data(), 2);
  for (int64_t i = 0; i < count; ++i) {
    // Neither a constant nor (but for the 1e-9 added to the peak) a scale reaches the output, so the gradient is
    // orthogonal to both.
    double peak = 0, sum = 0, along = 0;
    for (int64_t n = 0; n < samples; ++n) {
      peak = std::fmax(peak, std::fabs(y[i * samples + n]));
      sum += grad_x[i * samples + n];
      along += static_cast<double>(grad_x[i * samples + n]) * x[i * (samples + 1) + n];
    }
    expect_near(peak, samples > 1 ? 0.8 : 0, tolerance + 1e-6, "peak");
    expect_near(sum, 0, tolerance * static_cast<double>(samples) * 10, "sum of gradients");
    if (samples > 1) expect_near(along, 0, (tolerance + 1e-6) * static_cast<double>(samples), "gradient along the signal");
  }
}

}  // namespace

int main() {
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
  return 0;
}
