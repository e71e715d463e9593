// csrc's CUDA kernels on fibers, forward and backward, against the CPU ops in float64: every window, layout and type,
// awkward sizes.
//
//     main SEED [SITE]
//
// SEED: of the order of blocks and threads; 0: by number. SITE: a barrier ("stft_bands.cu:51") to leave out. Prints the
// barriers that were passed, and how often. Exits with 1 and a line on standard error where a result is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "../../csrc/disc_preprocess.h"
#include "../../csrc/stft_bands.h"
#include "fibers.h"

namespace {

std::mt19937 generator(0);
// The kernels run on a stream that waits for no other.
void* const kStream = &generator;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <class To, class From>
To converted(From from) {
  float single;
  To to;
  dac::convert(from, single);
  dac::convert(single, to);
  return to;
}

template <class T>
std::vector<T> noise(size_t size) {
  std::normal_distribution<float> normal;
  std::vector<T> values(size);
  for (T& value : values) value = converted<T>(normal(generator));
  return values;
}

std::vector<double> wide(const std::vector<float>& values) { return {values.begin(), values.end()}; }

double largest(const std::vector<double>& values) {
  double largest = 0;
  for (const double value : values) largest = std::fmax(largest, std::fabs(value));
  return largest;
}

// Infinite where there is NaN in `actual` alone.
double error(const std::vector<float>& actual, const std::vector<double>& exact) {
  double worst = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double difference = std::fabs(actual[i] - exact[i]);
    if (std::isnan(exact[i]) ? std::isnan(actual[i]) : difference <= worst) continue;
    worst = std::isnan(difference) ? std::numeric_limits<double>::infinity() : difference;
  }
  return worst;
}

// The rule of tests/tolerances.py, with the CPU op in float32 as the one to be as good as.
void expect_as_good_as(const std::vector<float>& actual, const std::vector<float>& same,
                       const std::vector<double>& exact, const std::string& what) {
  const double allowed = 2 * error(same, exact) + 2e-6 * largest(exact), found = error(actual, exact);
  if (found <= allowed) return;
  fibers::fail(what + ": error " + std::to_string(found) + ", allowed " + std::to_string(allowed));
}

using Bands = std::vector<std::pair<double, double>>;
const Bands kPublished = {{0, 0.1}, {0.1, 0.25}, {0.25, 0.5}, {0.5, 0.75}, {0.75, 1}};
// A gap at either end and one between, and an empty band.
const Bands kGaps = {{0.07, 0.33}, {0.33, 0.33}, {0.41, 0.9}};

struct Spectra {
  std::vector<int> windows;
  int64_t batch;
  int samples;
  bool channels_last;
  Bands bands;

  std::string name() const {
    std::string name = "stft_bands";
    for (const int window : windows) name += " " + std::to_string(window);
    return name + ", samples " + std::to_string(samples) + ", channels last " + std::to_string(channels_last);
  }
};

// A tensor per window and band. Each begins a few elements past an aligned address, each by another number (channels
// last of pairs: real and imaginary part are one access).
template <class T>
struct Tensors {
  std::vector<std::vector<T>> memory;
  int pair;

  // `fill`: a vector of so many elements.
  template <class Fill>
  Tensors(const Spectra& spectra, const Fill& fill) : pair(spectra.channels_last ? 2 : 1) {
    each(spectra, [&](int window, int low, int high) {
      const int frames = (spectra.samples + window / 4 - 1) / (window / 4);
      memory.push_back(fill(shift(memory.size()) + spectra.batch * 2 * frames * (high - low)));
    });
  }

  size_t shift(size_t tensor) const { return tensor % 5 * pair; }

  template <class Visit>
  static void each(const Spectra& spectra, const Visit& visit) {
    for (const int window : spectra.windows) {
      const auto bin = [&](double fraction) { return static_cast<int>(fraction * (window / 2 + 1)); };
      for (const auto& [low, high] : spectra.bands) visit(window, bin(low), bin(high));
    }
  }

  dac::Plan plan(const Spectra& spectra) {
    std::vector<int> edges;
    each(spectra, [&](int, int low, int high) { edges.push_back(low), edges.push_back(high); });
    std::vector<void*> addresses;
    for (size_t i = 0; i < memory.size(); ++i) addresses.push_back(memory[i].data() + shift(i));
    return dac::make_plan(spectra.batch, spectra.samples, spectra.channels_last,
                          static_cast<int>(spectra.windows.size()), spectra.windows.data(),
                          static_cast<int>(spectra.bands.size()), edges.data(), addresses.data());
  }

  // All elements in float.
  std::vector<float> flat() const {
    std::vector<float> all;
    for (size_t i = 0; i < memory.size(); ++i) {
      for (size_t j = shift(i); j < memory[i].size(); ++j) all.push_back(converted<float>(memory[i][j]));
    }
    return all;
  }
};

template <class T>
std::vector<T> nan(size_t size) {
  return std::vector<T>(size, converted<T>(kNan));
}

void forward(const Spectra& spectra) {
  const int64_t stride = spectra.samples + 3;
  const std::vector<float> x = noise<float>(spectra.batch * stride);
  Tensors<float> actual(spectra, nan<float>), same(spectra, nan<float>);
  Tensors<dac::BFloat16> rounded(spectra, nan<dac::BFloat16>);
  dac::stft_bands_forward_cuda<float>(actual.plan(spectra), x.data(), stride, 0, kStream);
  dac::stft_bands_forward_cuda<dac::BFloat16>(rounded.plan(spectra), x.data(), stride, 0, kStream);
  dac::stft_bands_forward<float, float>(same.plan(spectra), x.data(), stride, 1);
  Tensors<double> exact(spectra, [](size_t size) { return std::vector<double>(size); });
  dac::stft_bands_forward<double, double>(exact.plan(spectra), wide(x).data(), stride, 1);
  std::vector<double> expected;
  for (size_t i = 0; i < exact.memory.size(); ++i) {
    expected.insert(expected.end(), exact.memory[i].begin() + exact.shift(i), exact.memory[i].end());
  }
  const std::vector<float> found = actual.flat(), halves = rounded.flat();
  expect_as_good_as(found, same.flat(), expected, spectra.name());
  // The same numbers, rounded once.
  for (size_t i = 0; i < found.size(); ++i) {
    if (halves[i] != converted<float>(converted<dac::BFloat16>(found[i]))) fibers::fail(spectra.name() + ", bfloat16");
  }
}

template <class In>
void backward(const Spectra& spectra) {
  Tensors<In> grads(spectra, noise<In>);
  Tensors<double> wide_grads(spectra, [](size_t size) { return std::vector<double>(size); });
  for (size_t i = 0; i < grads.memory.size(); ++i) {
    for (size_t j = 0; j < grads.memory[i].size(); ++j) wide_grads.memory[i][j] = converted<float>(grads.memory[i][j]);
  }
  std::vector<float> actual = nan<float>(spectra.batch * spectra.samples), same = actual;
  std::vector<double> exact(actual.size());
  std::vector<float> partial = nan<float>(dac::stft_bands_partial(grads.plan(spectra)));
  dac::stft_bands_backward_cuda<In>(grads.plan(spectra), partial.data(), actual.data(), 0, kStream);
  dac::stft_bands_backward<float, In>(grads.plan(spectra), same.data(), 1);
  dac::stft_bands_backward<double, double>(wide_grads.plan(spectra), exact.data(), 1);
  expect_as_good_as(actual, same, exact, spectra.name() + ", backward");
}

void stft_bands() {
  const std::vector<int> all = {32, 64, 128, 256, 512, 1024, 2048, 4096};
  for (const bool last : {false, true}) {
    // Shorter than the largest window; more than one span of the backward op; many items; a window that comes twice;
    // the shortest signals that reflect; frames that fill whole blocks; nothing.
    for (const Spectra& spectra : {
             Spectra{all, 1, 3121, last, kPublished},
             Spectra{{512, 2048, 1024}, 2, 4999, last, kGaps},
             Spectra{{64, 32}, 21, 121, last, kPublished},
             Spectra{{128, 128}, 3, 64, last, kGaps},
             Spectra{{4096}, 1, 1793, last, kPublished},
             Spectra{{2048}, 1, 897, last, kGaps},
             Spectra{{32}, 1, 15, last, kPublished},
             Spectra{{1024}, 1, 4096, last, kPublished},
             Spectra{{256}, 0, 1000, last, kPublished},
         }) {
      forward(spectra);
      backward<float>(spectra);
      backward<dac::BFloat16>(spectra);
    }
  }
}

// Results for x [count, samples], rows `samples + 1` apart, forward and backward.
template <class S, class Forward, class Backward>
std::pair<std::vector<S>, std::vector<S>> preprocessed(const dac::Signals& signals, const std::vector<S>& x,
                                                       const std::vector<S>& grad, const Forward& forward,
                                                       const Backward& backward) {
  std::vector<S> y(grad.size(), kNan), grad_x(grad.size(), kNan);
  std::vector<dac::Level<S>> levels(signals.count, {kNan, kNan});
  std::vector<dac::Extent<S>> extents(signals.count * signals.chunks(), {kNan, kNan, kNan});
  std::vector<dac::Slope> slopes(signals.count * signals.chunks(), {kNan, kNan, kNan, kNan});
  forward(signals, x.data(), y.data(), levels.data(), extents.data());
  backward(signals, grad.data(), x.data(), levels.data(), grad_x.data(), slopes.data());
  return {y, grad_x};
}

void disc_preprocess(int64_t count, int64_t samples, const std::vector<float>& x) {
  const dac::Signals signals = {count, samples, samples + 1, 512};
  const std::vector<float> grad = noise<float>(count * samples);
  const auto on_cpu = [&](const auto& x, const auto& grad) {
    using S = std::decay_t<decltype(x[0])>;
    return preprocessed<S>(
        signals, x, grad, [](auto... all) { dac::disc_preprocess_forward<S>(all..., 1); },
        [](auto... all) { dac::disc_preprocess_backward<S>(all..., 1); });
  };
  const auto actual = preprocessed<float>(
      signals, x, grad, [](auto... all) { dac::disc_preprocess_forward_cuda(all..., 0, kStream); },
      [](auto... all) { dac::disc_preprocess_backward_cuda(all..., 0, kStream); });
  const auto same = on_cpu(x, grad);
  const auto exact = on_cpu(wide(x), wide(grad));
  const std::string name = "disc_preprocess of " + std::to_string(samples) + " samples";
  expect_as_good_as(actual.first, same.first, exact.first, name);
  expect_as_good_as(actual.second, same.second, exact.second, name + ", backward");
}

void disc_preprocess() {
  for (const int64_t samples : {1, 2, 63, 255, 257, 512, 513, 3001}) {
    disc_preprocess(3, samples, noise<float>(3 * (samples + 1)));
  }
  disc_preprocess(0, 5, {});
  // Samples that share the peak, a signal that is all the same, one with NaN in it.
  disc_preprocess(3, 5, {3, -3, 3, 0, -3, 0, 0.25, 0.25, 0.25, 0.25, 0.25, 0, 1, kNan, 0, 2, 0, 0});
}

}  // namespace

int main(int argc, char** argv) {
  fibers::shuffle(argc > 1 ? std::atoi(argv[1]) : 0);
  if (argc > 2) fibers::leave_out(argv[2]);
  disc_preprocess();
  stft_bands();
  std::printf("%s", fibers::passed().c_str());
  return 0;
}
