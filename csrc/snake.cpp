#include "snake.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "snake_math.h"

#define INLINE inline __attribute__((always_inline))

namespace dac {
namespace {

// Elements of one piece of work: large enough to hide the cost of handing it out.
constexpr int64_t kPiece = 16384;

template <class T>
struct Gradients {
  T x, alpha;
};

// From sin and cos of alpha x (both negated is as good: only their products enter).
template <class T>
INLINE Gradients<T> gradients(T grad, T x, T alpha, T inverse, T sin, T cos) {
  const T double_angle = 2 * sin * cos;
  return {grad * (1 + alpha * inverse * double_angle), grad * inverse * (x * double_angle - inverse * sin * sin)};
}

// sum: to it, each element adds its part of the gradient of its alpha.
template <int kStep, class G, class S>
INLINE void backward_block(const G* __restrict grad, const S* __restrict x, const float* __restrict alpha,
                           const float* __restrict inverse, float* __restrict grad_x, float* __restrict sum, int64_t n) {
  int far = 0;
  for (int64_t i = 0; i < n; ++i) {
    float upstream, value;
    convert(grad[i], upstream);
    convert(x[i], value);
    const float t = alpha[i * kStep] * value, r = reduce(t);
    const bool is_far = std::fabs(t) > kFar;
    far |= is_far;
    const auto result = gradients(upstream, value, alpha[i * kStep], inverse[i * kStep], sine(r), cosine(r));
    grad_x[i] = result.x;
    sum[i] += is_far ? 0 : result.alpha;
  }
  if (!far) return;
  for (int64_t i = 0; i < n; ++i) {
    float upstream, value;
    convert(grad[i], upstream);
    convert(x[i], value);
    const float t = alpha[i * kStep] * value;
    if (!(std::fabs(t) > kFar)) continue;
    const float s = static_cast<float>(std::sin(static_cast<double>(t)));
    const float c = static_cast<float>(std::cos(static_cast<double>(t)));
    const auto result = gradients(upstream, value, alpha[i * kStep], inverse[i * kStep], s, c);
    grad_x[i] = result.x;
    sum[i] += result.alpha;
  }
}

template <int kStep, class G, class S, class R>
INLINE void backward_block(const G* grad, const S* x, const float* alpha, const float* inverse, R* grad_x, float* sum,
                           int64_t n) {
  float result[kBlock];
  backward_block<kStep>(grad, x, alpha, inverse, result, sum, n);
  for (int64_t i = 0; i < n; ++i) convert(result[i], grad_x[i]);
}

template <int kStep>
INLINE void backward_block(const double* grad, const double* x, const double* alpha, const double* inverse,
                           double* grad_x, double* sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double t = alpha[i * kStep] * x[i];
    const auto result = gradients(grad[i], x[i], alpha[i * kStep], inverse[i * kStep], std::sin(t), std::cos(t));
    grad_x[i] = result.x, sum[i] += result.alpha;
  }
}

template <class S>
INLINE void round(const S* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float wide;
    convert(from[i], wide);
    convert(wide, to[i]);
  }
}

// The runs that the loops go over. Channels last, runs over few channels would be too short for vectors: where nothing
// lies between them, several time steps are one run, and the last run of an item may be shorter.
struct Runs {
  template <class... S>
  explicit Runs(const SnakeShape& shape, Rows<S>&... rows_of) : channels(shape.channels()), batch(shape.batch) {
    const bool dense = shape.channels_last && ((rows_of.row_stride == shape.size) && ...);
    steps = dense ? std::max<int64_t>(1, kBlock / std::max<int64_t>(1, channels)) : 1;
    rows = (shape.rows + steps - 1) / steps, size = shape.size * steps;
    elements = shape.rows * shape.size;
    if (steps > 1) ((rows_of.row_stride = size), ...);
  }

  int64_t length(int64_t row) const { return std::min(size, elements - row * size); }

  // Of one value per channel, what a run needs, or a run's channel.
  template <class T>
  std::vector<T> repeated(const T* values) const {
    std::vector<T> result;
    for (int64_t step = 0; step < steps; ++step) result.insert(result.end(), values, values + channels);
    return result;
  }

  int64_t channels, batch, steps, rows, size, elements;
};

// 1 / (beta + 1e-9).
template <class T>
std::vector<T> inverses(std::vector<T> beta) {
  for (T& value : beta) value = 1 / (value + static_cast<T>(1e-9));
  return beta;
}

// Work is dealt out in segments of a run, so that few long runs keep all threads busy as well as many short ones.
struct Segments {
  explicit Segments(const Runs& runs)
      : runs(runs),
        per_run((runs.size + kPiece - 1) / kPiece),
        count(runs.batch * runs.rows * per_run),
        grain(std::max<int64_t>(1, kPiece / std::max<int64_t>(1, runs.size))) {}

  template <class Body>
  INLINE void each_block(int64_t segment, const Body& body) const {
    const int64_t run = segment / per_run, row = run % runs.rows;
    const int64_t begin = segment % per_run * kPiece;
    const int64_t end = std::min(begin + kPiece, runs.length(row));
    for (int64_t i = begin; i < end; i += kBlock) body(run / runs.rows, row, i, std::min<int64_t>(kBlock, end - i));
  }

  const Runs& runs;
  int64_t per_run, count, grain;
};

template <class G, class S, class R, class T>
void backward_channels_first(const Runs& runs, Rows<const G> grad, Rows<const S> x, const T* alpha, const T* inverse,
                             Rows<R> grad_x, T* grad_alpha, int threads, InstructionSet set) {
  const Segments segments(runs);
  std::vector<double> partial(segments.count);
  parallel_for(segments.count, segments.grain, threads, [&](int64_t first, int64_t last) {
    run(set, [&]() __attribute__((always_inline)) {
      for (int64_t segment = first; segment < last; ++segment) {
        T sum[kBlock] = {};
        segments.each_block(segment, [&](int64_t b, int64_t c, int64_t i, int64_t n)
                                         __attribute__((always_inline)) {
          backward_block<0>(grad.at(b, c) + i, x.at(b, c) + i, alpha + c, inverse + c, grad_x.at(b, c) + i, sum, n);
        });
        partial[segment] = std::accumulate(sum, sum + kBlock, 0.0);
      }
    });
  });
  for (int64_t c = 0; c < runs.channels; ++c) {
    double total = 0;
    for (int64_t b = 0; b < runs.batch; ++b) {
      const double* of_run = partial.data() + (b * runs.channels + c) * segments.per_run;
      for (int64_t s = 0; s < segments.per_run; ++s) total += of_run[s];
    }
    grad_alpha[c] = static_cast<T>(total);
  }
}

template <class G, class S, class R, class T>
void backward_channels_last(const Runs& runs, Rows<const G> grad, Rows<const S> x, const T* alpha, const T* inverse,
                            Rows<R> grad_x, T* grad_alpha, int threads, InstructionSet set) {
  const int64_t count = runs.batch * runs.rows;
  // Runs of one partial sum: many beside its cost, and few enough for a float.
  constexpr int64_t group = 128;
  const int64_t groups = (count + group - 1) / group;
  std::vector<T> partial(groups * runs.size);
  parallel_for(groups, 1, threads, [&](int64_t first, int64_t) {
    run(set, [&]() __attribute__((always_inline)) {
      T* sum = partial.data() + first * runs.size;
      for (int64_t index = first * group; index < std::min((first + 1) * group, count); ++index) {
        const int64_t b = index / runs.rows, t = index % runs.rows;
        const int64_t length = runs.length(t);
        for (int64_t c = 0; c < length; c += kBlock) {
          const int64_t n = std::min<int64_t>(kBlock, length - c);
          backward_block<1>(grad.at(b, t) + c, x.at(b, t) + c, alpha + c, inverse + c, grad_x.at(b, t) + c, sum + c, n);
        }
      }
    });
  });
  for (int64_t c = 0; c < runs.channels; ++c) {
    double total = 0;
    for (int64_t i = c; i < groups * runs.size; i += runs.channels) total += partial[i];
    grad_alpha[c] = static_cast<T>(total);
  }
}

}  // namespace

template <class S>
void snake_forward(const SnakeShape& shape, Rows<const S> x, const Wide<S>* alpha, const Wide<S>* beta, Rows<S> y,
                   Rows<BFloat16> rounded, int threads, InstructionSet set) {
  const Runs runs(shape, x, y, rounded);
  const std::vector<Wide<S>> frequency = runs.repeated(alpha), inverse = inverses(runs.repeated(beta));
  const Segments segments(runs);
  parallel_for(segments.count, segments.grain, threads, [&](int64_t first, int64_t last) {
    run(set, [&]() __attribute__((always_inline)) {
      for (int64_t segment = first; segment < last; ++segment) {
        segments.each_block(segment, [&](int64_t b, int64_t r, int64_t i, int64_t n) __attribute__((always_inline)) {
          if (shape.channels_last) {
            forward_block<1>(x.at(b, r) + i, frequency.data() + i, inverse.data() + i, y.at(b, r) + i, n);
          } else {
            forward_block<0>(x.at(b, r) + i, frequency.data() + r, inverse.data() + r, y.at(b, r) + i, n);
          }
          if (rounded.data) round(y.at(b, r) + i, rounded.at(b, r) + i, n);
        });
      }
    });
  });
}

template <class G, class S, class R>
void snake_backward(const SnakeShape& shape, Rows<const G> grad, Rows<const S> x, const Wide<S>* alpha, Rows<R> grad_x,
                    Wide<S>* grad_alpha, int threads, InstructionSet set) {
  const Runs runs(shape, grad, x, grad_x);
  const std::vector<Wide<S>> frequency = runs.repeated(alpha), inverse = inverses(frequency);
  const auto backward = shape.channels_last ? backward_channels_last<G, S, R, Wide<S>>
                                            : backward_channels_first<G, S, R, Wide<S>>;
  backward(runs, grad, x, frequency.data(), inverse.data(), grad_x, grad_alpha, threads, set);
}

#define DAC_SNAKE_BACKWARD(G, S, R)                                                                               \
  template void snake_backward(const SnakeShape&, Rows<const G>, Rows<const S>, const Wide<S>*, Rows<R>, Wide<S>*, \
                               int, InstructionSet)
#define DAC_SNAKE(S)                                                                                          \
  template void snake_forward(const SnakeShape&, Rows<const S>, const Wide<S>*, const Wide<S>*, Rows<S>,       \
                              Rows<BFloat16>, int, InstructionSet);                                           \
  DAC_SNAKE_BACKWARD(S, S, S)
DAC_SNAKE(float);
DAC_SNAKE(double);
DAC_SNAKE(BFloat16);
DAC_SNAKE(Float16);
DAC_SNAKE_BACKWARD(BFloat16, float, float);
DAC_SNAKE_BACKWARD(BFloat16, float, BFloat16);

}  // namespace dac
