// The residual unit for Hopper on fibers, against sums in double.
//
//     unit_main SEED [SITE]
//
// As main.cpp.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/half.h"
#include "../../csrc/hopper/residual_unit.h"
#include "fibers.h"

namespace {

using dac::hopper::kTaps;

std::mt19937 generator(0);

template <class T>
T rounded(double value) {
  T half;
  dac::convert(static_cast<float>(value), half);
  return half;
}

template <class T>
double wide(T half) {
  float value;
  dac::convert(half, value);
  return value;
}

template <class T>
std::vector<T> noise(size_t size, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> values(size);
  for (T& value : values) value = rounded<T>(normal(generator));
  return values;
}

double snake(double x, double alpha) { return x + std::pow(std::sin(alpha * x), 2) / (alpha + 1e-9); }

struct Case {
  int channels, items, size, dilation, padding, multiprocessors;
  std::vector<int64_t> lengths;
  bool keep, snaked;
};

// The inputs of a unit. factors: as the kernel has them.
template <class T>
struct Inputs {
  std::vector<T> x, snaked, weight1, weight2;
  std::vector<float> factors;

  explicit Inputs(const Case& of)
      : x(noise<T>(of.items * of.size * of.channels)),
        snaked(noise<T>(x.size())),
        weight1(noise<T>(of.channels * of.channels * kTaps, 1 / std::sqrt(of.channels * kTaps))),
        weight2(noise<T>(of.channels * of.channels, 1 / std::sqrt(of.channels))) {
    std::uniform_real_distribution<float> uniform(0.5, 1.5);
    for (const int factor : {0, 1, 2, 3, 4, 5}) {
      for (int c = 0; c < of.channels; ++c) {
        const bool inverse = factor % 3 == 2;
        factors.push_back(inverse ? 1 / (factors[factors.size() - of.channels] + 1e-9f) : uniform(generator));
      }
    }
  }
};

// c before it is rounded, [items, time, C].
template <class T>
std::vector<double> exact(const Case& of, const Inputs<T>& in, int time) {
  const int C = of.channels;
  std::vector<double> y(of.items * time * C);
  for (int item = 0; item < of.items; ++item) {
    for (int t = 0; t < time; ++t) {
      std::vector<double> hidden(C);
      for (int out = 0; out < C; ++out) {
        double sum = in.factors[out];
        for (int tap = 0; tap < kTaps; ++tap) {
          const int from = t + tap * of.dilation - of.padding;
          if (from < 0 || from >= of.size) continue;
          for (int i = 0; i < C; ++i) {
            sum += wide(in.weight1[(out * C + i) * kTaps + tap]) * wide(in.snaked[(item * of.size + from) * C + i]);
          }
        }
        hidden[out] = wide(rounded<T>(snake(sum, in.factors[C + out])));
      }
      const int middle = item * of.size + t + 3 * of.dilation - of.padding;
      const bool valid = of.lengths.empty() || t < of.lengths[item];
      for (int out = 0; out < C; ++out) {
        double sum = in.factors[3 * C + out];
        for (int i = 0; i < C; ++i) sum += wide(in.weight2[out * C + i]) * hidden[i];
        y[(item * time + t) * C + out] = (valid ? sum : 0) + wide(in.x[middle * C + out]);
      }
    }
  }
  return y;
}

// Sums in float round the hidden activation another way now and then; T's own rounding is half of the rest.
template <class T>
void expect_near(const std::vector<T>& actual, const std::vector<double>& exact, const std::string& what) {
  const double unit = std::is_same_v<T, dac::Float16> ? 1.0 / 1024 : 1.0 / 128;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double allowed = unit * std::fmax(1.0, std::fabs(exact[i])), error = std::fabs(wide(actual[i]) - exact[i]);
    if (error <= allowed) continue;
    fibers::fail(what + ": error " + std::to_string(error) + " at " + std::to_string(i));
  }
}

template <class T>
void check(const Case& of) {
  const int time = of.size + 2 * of.padding - (kTaps - 1) * of.dilation;
  const Inputs<T> in(of);
  std::vector<uint16_t> packed((kTaps + 1) * of.channels * of.channels);
  dac::hopper::dac_pack_residual_unit(of.channels, &in.weight1[0].bits, &in.weight2[0].bits, packed.data());
  // What is not written is NaN.
  const size_t size = of.items * time * of.channels;
  std::vector<T> y(of.keep * size, T{0xFFFF}), snaked(of.snaked * size, T{0xFFFF});
  dac::hopper::Unit unit = {};
  unit.x = in.x.data();
  unit.snaked = in.snaked.data();
  unit.weights = packed.data();
  unit.factors = in.factors.data();
  unit.lengths = of.lengths.empty() ? nullptr : of.lengths.data();
  unit.y = of.keep ? y.data() : nullptr;
  unit.y_snaked = of.snaked ? snaked.data() : nullptr;
  unit.items = of.items;
  unit.size = of.size;
  unit.time = time;
  unit.dilation = of.dilation;
  unit.padding = of.padding;
  const char* problem =
      dac::hopper::dac_residual_unit(std::is_same_v<T, dac::BFloat16>, of.channels, &unit, of.multiprocessors, nullptr);
  if (problem) fibers::fail(problem);
  std::vector<double> expected = exact(of, in, time);
  const std::string name = std::to_string(of.channels) + " channels, dilation " + std::to_string(of.dilation);
  if (of.keep) expect_near(y, expected, name);
  for (size_t i = 0; i < size; ++i) {
    expected[i] = snake(expected[i], in.factors[4 * of.channels + i % of.channels]);
  }
  if (of.snaked) expect_near(snaked, expected, name + ", snaked");
}

}  // namespace

int main(int argc, char** argv) {
  using dac::BFloat16, dac::Float16;
  fibers::shuffle(argc > 1 ? std::atoi(argv[1]) : 0);
  if (argc > 2) fibers::leave_out(argv[2]);
  // Every stage used several times; a CTA with one tile, and one without; items shorter than the taps reach, and of
  // exactly one tile; results that are shorter than x; lengths, of 0 too.
  check<Float16>({96, 2, 300, 9, 27, 1, {}, true, true});
  check<BFloat16>({96, 1, 700, 3, 9, 1, {500}, true, false});
  check<Float16>({64, 3, 182, 9, 0, 2, {}, false, true});
  check<BFloat16>({64, 4, 5, 9, 27, 132, {3, 0, 5, 4}, true, true});
  check<Float16>({64, 5, 257, 1, 3, 2, {}, true, true});
  std::printf("%s", fibers::passed().c_str());
  return 0;
}
