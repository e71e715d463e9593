#include "winograd.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "products.h"

namespace dac {
namespace {

// A tile is kOutputs rows, `dilation` apart. Points: 0, p and -p for each pair, infinity.
constexpr int kTaps = 7, kPairs = 4, kPoints = 2 * kPairs + 2, kOutputs = kPoints + 1 - kTaps, kLast = kPoints - 1;
constexpr double kPlus[kPairs] = {2. / 5, 4. / 5, 5. / 4, 5. / 2};
// Tiles that are transformed before they are multiplied: enough to fetch weights for.
constexpr int64_t kBlock = 48;
// Tiles of one partial sum, at least, and partial sums, at most.
constexpr int64_t kPart = 96, kMostParts = 8;
// Floats between points, which would else lie at distances that share lines of the cache.
constexpr int64_t kPad = 16;
// Products of one sum: with more, what is added last would round more than all else does.
constexpr int64_t kTerms = 16;

// What the transforms between rows and points multiply with.
struct Factors {
  float powers[kPairs][kOutputs] = {};  // Of p.
  float others[kPairs][kPairs] = {};    // Coefficients of the product of x^2 - q^2 over the other pairs,
  float all[kPairs + 1] = {};           // and over all of them.
  float weights[kPoints][kTaps] = {};

  constexpr Factors() {
    double product[kPairs + 1] = {1};
    for (int i = 0; i < kPairs; ++i) multiply(product, i, kPlus[i] * kPlus[i]);
    for (int i = 0; i <= kPairs; ++i) all[i] = static_cast<float>(product[i]);
    weights[0][0] = static_cast<float>(1 / product[0]);
    weights[kLast][kTaps - 1] = 1;
    for (int i = 0; i < kPairs; ++i) {
      const double square = kPlus[i] * kPlus[i];
      double rest[kPairs + 1] = {1}, scale = 2 * square, power = 1;
      for (int j = 0, degree = 0; j < kPairs; ++j) {
        if (j == i) continue;
        multiply(rest, degree++, kPlus[j] * kPlus[j]);
        scale *= square - kPlus[j] * kPlus[j];
      }
      for (int j = 0; j < kPairs; ++j) others[i][j] = static_cast<float>(rest[j]);
      for (int k = 0; k < kTaps; ++k, power *= kPlus[i]) {
        if (k < kOutputs) powers[i][k] = static_cast<float>(power);
        weights[1 + 2 * i][k] = static_cast<float>(power / scale);
        weights[2 + 2 * i][k] = static_cast<float>((k % 2 ? -power : power) / scale);
      }
    }
  }

  // A polynomial of x^2, times x^2 - square.
  static constexpr void multiply(double* polynomial, int degree, double square) {
    for (int k = degree + 1; k > 0; --k) polynomial[k] = polynomial[k - 1] - square * polynomial[k];
    polynomial[0] *= -square;
  }
};
constexpr Factors kFactors;

template <int kLanes>
using Vector = typename Lanes<kLanes>::Vector;

// The sum of kCount factors times every other row.
template <int kCount, class V>
INLINE V sum(const float* factors, const V* row) {
  V total = factors[0] * row[0];
#pragma GCC unroll 16
  for (int i = 1; i < kCount; ++i) total += factors[i] * row[2 * i];
  return total;
}

// A tile's rows.
struct Tile {
  const float* data;
  int64_t stride;
};

// What the tile behind this one has more, to be read or written: where rows are `dilation` apart, the processor does not
// see what comes next.
template <int kWritten>
INLINE void prefetch(const float* row, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < kOutputs; ++i) __builtin_prefetch(row + i * stride, kWritten);
}

// kCount rows of a tile, of the channels from c on.
template <int kLanes, int kCount>
INLINE void load_rows(Tile tile, int64_t c, Vector<kLanes>* row) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) row[i] = load<kLanes>(tile.data + i * tile.stride + c);
  prefetch<0>(tile.data + kCount * tile.stride + c, tile.stride);
}

// From kPoints rows of x to the points.
template <int kLanes>
INLINE void transform_inputs(Tile x, const VectorGroups& channels, float* points, int64_t plane) {
  for (int64_t vector = 0; vector < channels.vectors; ++vector) {
    const int64_t c = channels.channel(vector);
    Vector<kLanes> row[kPoints];
    load_rows<kLanes, kPoints>(x, c, row);
    store<kLanes>(points + c, sum<kPairs + 1>(kFactors.all, row));
    store<kLanes>(points + kLast * plane + c, sum<kPairs + 1>(kFactors.all, row + 1));
#pragma GCC unroll 16
    for (int i = 0; i < kPairs; ++i) {
      const Vector<kLanes> even = sum<kPairs>(kFactors.others[i], row + 2);
      const Vector<kLanes> odd = kFactors.powers[i][1] * sum<kPairs>(kFactors.others[i], row + 1);
      store<kLanes>(points + (1 + 2 * i) * plane + c, even + odd);
      store<kLanes>(points + (2 + 2 * i) * plane + c, even - odd);
    }
  }
}

// From kOutputs rows of a result's gradient to the points; adds the rows to `bias`.
template <int kLanes>
INLINE void transform_gradients(Tile grad, const VectorGroups& channels, float* points, int64_t plane, float* bias) {
  for (int64_t vector = 0; vector < channels.vectors; ++vector) {
    const int64_t c = channels.channel(vector);
    Vector<kLanes> row[kOutputs];
    load_rows<kLanes, kOutputs>(grad, c, row);
    float* to = bias + vector * kLanes;
    store<kLanes>(to, load<kLanes>(to) + ((row[0] + row[1]) + (row[2] + row[3])));
    store<kLanes>(points + c, row[0]);
    store<kLanes>(points + kLast * plane + c, row[kOutputs - 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kPairs; ++i) {
      const float* power = kFactors.powers[i];
      const Vector<kLanes> even = row[0] + power[2] * row[2], odd = power[1] * row[1] + power[3] * row[3];
      store<kLanes>(points + (1 + 2 * i) * plane + c, even + odd);
      store<kLanes>(points + (2 + 2 * i) * plane + c, even - odd);
    }
  }
}

// From the points to kOutputs rows of a result, of some vectors of channels.
template <int kLanes>
INLINE void transform_outputs(const float* points, int64_t plane, const float* bias, const VectorGroups& channels,
                              int64_t group, float* y, int64_t stride) {
  for (int64_t v = 0; v < channels.size(group); ++v, points += kLanes) {
    const int64_t c = channels.channel(channels.before(group) + v);
    Vector<kLanes> start = {};
    if (bias) start = load<kLanes>(bias + c);
    Vector<kLanes> row[kOutputs] = {start + load<kLanes>(points), start, start,
                                    start + load<kLanes>(points + kLast * plane)};
#pragma GCC unroll 16
    for (int i = 0; i < kPairs; ++i) {
      const Vector<kLanes> plus = load<kLanes>(points + (1 + 2 * i) * plane);
      const Vector<kLanes> minus = load<kLanes>(points + (2 + 2 * i) * plane);
      const Vector<kLanes> even = plus + minus, odd = plus - minus;
#pragma GCC unroll 16
      for (int k = 0; k < kOutputs; ++k) row[k] += kFactors.powers[i][k] * (k % 2 ? odd : even);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kOutputs; ++k) store<kLanes>(y + k * stride + c, row[k]);
    prefetch<1>(y + kOutputs * stride + c, stride);
  }
}

// From weights to the points, [groups, kPoints, inputs, vectors of the group].
template <int kLanes>
INLINE void transform_weight(const float* weight, int64_t inputs, const VectorGroups& columns, float* to) {
  for (int64_t group = 0; group < columns.count; ++group) {
    const int64_t vectors = columns.size(group);
    for (int64_t row = 0; row < inputs; ++row) {
      for (int64_t v = 0; v < vectors; ++v) {
        const float* from = weight + row * columns.channels + columns.channel(columns.before(group) + v);
        Vector<kLanes> tap[kTaps];
#pragma GCC unroll 16
        for (int k = 0; k < kTaps; ++k) tap[k] = load<kLanes>(from + k * inputs * columns.channels);
#pragma GCC unroll 16
        for (int p = 0; p < kPoints; ++p) {
          Vector<kLanes> total = {};
#pragma GCC unroll 16
          for (int k = 0; k < kTaps; ++k) total += kFactors.weights[p][k] * tap[k];
          store<kLanes>(to + ((p * inputs + row) * vectors + v) * kLanes, total);
        }
      }
    }
    to += kPoints * inputs * vectors * kLanes;
  }
}

// As multiply_all, kTerms terms at a time.
template <int kLanes>
INLINE void multiply_in_parts(Scalars left, int64_t scalars, Vectors right, int64_t terms, Sums sums) {
  for (; terms > 0; terms -= kTerms) {
    multiply_all<kLanes>(left, scalars, right, std::min(terms, kTerms), sums);
    left.data += kTerms * left.term;
    right.data += kTerms * right.term;
    sums.add = true;
  }
}

// Which rows a tile has.
struct Tiling {
  int64_t rows, dilation, span, per_item;

  explicit Tiling(const ConvShape& shape)
      : rows(shape.rows),
        dilation(shape.dilation),
        span(kOutputs * dilation),
        per_item((rows + span - 1) / span * dilation) {}

  struct Place {
    int64_t item, row;
  };

  // Its first row; 64 bits would take long to divide.
  INLINE Place place(int64_t tile) const {
    const uint32_t item = static_cast<uint32_t>(tile) / static_cast<uint32_t>(per_item);
    const uint32_t index = static_cast<uint32_t>(tile) % static_cast<uint32_t>(per_item);
    return {item, index + index / static_cast<uint32_t>(dilation) * (span - dilation)};
  }
};

// kCount rows from `row` on, where they are; with zeros for those outside of [0, rows), a copy.
template <int kCount>
INLINE Tile rows_from(Rows<const float> from, int64_t rows, int64_t channels, int64_t item, int64_t row,
                      int64_t dilation, float* copy) {
  if (row >= 0 && row + (kCount - 1) * dilation < rows) return {from.at(item, row), dilation * from.row_stride};
  for (int i = 0; i < kCount; ++i, row += dilation) {
    float* to = copy + i * channels;
    if (row >= 0 && row < rows) {
      std::copy_n(from.at(item, row), channels, to);
    } else {
      std::fill_n(to, channels, 0.0f);
    }
  }
  return {copy, channels};
}

// Memory that a thread keeps.
INLINE float* scratch(int64_t size) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < size) kept.resize(size);
  return kept.data();
}

template <int kLanes>
void convolve(const ConvShape& shape, Rows<const float> x, const float* weight, const float* bias, Rows<float> y,
              int threads, InstructionSet set) {
  const Tiling tiling(shape);
  const VectorGroups inputs(shape.inputs, kLanes), columns(shape.columns, kLanes);
  std::vector<float> weights(kPoints * shape.inputs * columns.width());
  run(set, [&]() __attribute__((always_inline)) {
    transform_weight<kLanes>(weight, shape.inputs, columns, weights.data());
  });
  const int64_t plane = kBlock * shape.inputs + kPad, dilation = shape.dilation;
  const int64_t most_width = kMostVectors * kLanes;
  parallel_for(shape.batch * tiling.per_item, kBlock, threads, [&](int64_t begin, int64_t end) {
    float* points = scratch(kPoints * (plane + kBlock * most_width + kPad + shape.inputs) + kOutputs * shape.columns);
    float* products = points + kPoints * plane;
    float* copy = products + kPoints * (kBlock * most_width + kPad);
    float* last_rows = copy + kPoints * shape.inputs;
    run(set, [&]() __attribute__((always_inline)) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const auto place = tiling.place(tile);
        const Tile rows = rows_from<kPoints>(x, shape.positions, shape.inputs, place.item, place.row - shape.padding,
                                             dilation, copy);
        transform_inputs<kLanes>(rows, inputs, points + (tile - begin) * shape.inputs, plane);
      }
      const float* at = weights.data();
      for (int64_t group = 0; group < columns.count; ++group) {
        const int64_t vectors = columns.size(group), width = vectors * kLanes, product_plane = kBlock * width + kPad;
        for (int p = 0; p < kPoints; ++p, at += shape.inputs * width) {
          multiply_in_parts<kLanes>({points + p * plane, shape.inputs, 1}, end - begin,
                                    {at, vectors, width - kLanes, width}, shape.inputs,
                                    {products + p * product_plane, width, false});
        }
        for (int64_t tile = begin; tile < end; ++tile) {
          const float* from = products + (tile - begin) * width;
          const auto place = tiling.place(tile);
          if (place.row + (kOutputs - 1) * dilation < shape.rows) {
            transform_outputs<kLanes>(from, product_plane, bias, columns, group, y.at(place.item, place.row),
                                      dilation * y.row_stride);
            continue;
          }
          transform_outputs<kLanes>(from, product_plane, bias, columns, group, last_rows, shape.columns);
          const int64_t first = columns.before(group) * kLanes, channels = columns.last(group) + kLanes;
          for (int k = 0; k < kOutputs && place.row + k * dilation < shape.rows; ++k) {
            std::copy_n(last_rows + k * shape.columns + first, channels,
                        y.at(place.item, place.row + k * dilation) + first);
          }
        }
      }
    });
  });
}

template <int kLanes>
void differentiate(const ConvShape& shape, Rows<const float> grad, Rows<const float> x, float* weight, float* bias,
                   int threads, InstructionSet set) {
  const Tiling tiling(shape);
  const VectorGroups columns(shape.columns, kLanes), inputs(shape.inputs, kLanes);
  const int64_t count = shape.batch * tiling.per_item, parts = std::clamp<int64_t>(count / kPart, 1, kMostParts);
  // Sums [parts]: of products [kPoints, columns, vectors of the inputs], then of rows [vectors of the columns].
  const int64_t per_point = shape.columns * inputs.width(), per_part = kPoints * per_point + columns.width();
  std::vector<float> sums(parts * per_part);
  const int64_t x_plane = kBlock * shape.inputs + kPad, grad_plane = kBlock * shape.columns + kPad;
  parallel_for(parts, 1, threads, [&](int64_t part, int64_t) {
    float* of_x = scratch(kPoints * (x_plane + grad_plane + std::max(shape.inputs, shape.columns)));
    float* of_grad = of_x + kPoints * x_plane;
    float* copy = of_grad + kPoints * grad_plane;
    float* to = sums.data() + part * per_part;
    run(set, [&]() __attribute__((always_inline)) {
      const int64_t past = count * (part + 1) / parts;
      for (int64_t begin = count * part / parts, end; begin < past; begin = end) {
        end = std::min(begin + kBlock, past);
        for (int64_t tile = begin; tile < end; ++tile) {
          const auto place = tiling.place(tile);
          Tile rows = rows_from<kPoints>(x, shape.positions, shape.inputs, place.item, place.row - shape.padding,
                                         shape.dilation, copy);
          transform_inputs<kLanes>(rows, inputs, of_x + (tile - begin) * shape.inputs, x_plane);
          rows = rows_from<kOutputs>(grad, shape.rows, shape.columns, place.item, place.row, shape.dilation, copy);
          transform_gradients<kLanes>(rows, columns, of_grad + (tile - begin) * shape.columns, grad_plane,
                                      to + kPoints * per_point);
        }
        for (int p = 0; p < kPoints; ++p) {
          for (int64_t group = 0; group < inputs.count; ++group) {
            const int64_t first = inputs.before(group) * kLanes;
            multiply_in_parts<kLanes>(
                {of_grad + p * grad_plane, 1, shape.columns}, shape.columns,
                {of_x + p * x_plane + first, inputs.size(group), inputs.last(group), shape.inputs}, end - begin,
                {to + p * per_point + first, inputs.width(), true});
          }
        }
      }
    });
  });
  run(set, [&]() __attribute__((always_inline)) {
    const auto total = [&](const float* of_first_part) __attribute__((always_inline)) {
      Vector<kLanes> sum = load<kLanes>(of_first_part);
      for (int64_t part = 1; part < parts; ++part) sum += load<kLanes>(of_first_part + part * per_part);
      return sum;
    };
    for (int64_t column = 0; column < shape.columns; ++column) {
      for (int64_t vector = 0; vector < inputs.vectors; ++vector) {
        Vector<kLanes> tap[kTaps] = {};
#pragma GCC unroll 16
        for (int p = 0; p < kPoints; ++p) {
          const Vector<kLanes> sum = total(sums.data() + p * per_point + column * inputs.width() + vector * kLanes);
#pragma GCC unroll 16
          for (int k = 0; k < kTaps; ++k) tap[k] += kFactors.weights[p][k] * sum;
        }
        float* to = weight + column * shape.inputs + inputs.channel(vector);
        for (int k = 0; k < kTaps; ++k) store<kLanes>(to + k * shape.columns * shape.inputs, tap[k]);
      }
    }
    for (int64_t vector = 0; vector < columns.vectors; ++vector) {
      store<kLanes>(bias + columns.channel(vector), total(sums.data() + kPoints * per_point + vector * kLanes));
    }
  });
}

// Whether wide vectors are full.
bool wide(const ConvShape& shape, InstructionSet set) {
  return set == InstructionSet::avx512 && shape.inputs % 16 == 0 && shape.columns % 16 == 0;
}

}  // namespace

void winograd(const ConvShape& shape, Rows<const float> x, const float* weight, const float* bias, Rows<float> y,
              int threads, InstructionSet set) {
  (wide(shape, set) ? convolve<16> : convolve<8>)(shape, x, weight, bias, y, threads, set);
}

void winograd_weight_gradient(const ConvShape& shape, Rows<const float> grad, Rows<const float> x, float* weight,
                              float* bias, int threads, InstructionSet set) {
  (wide(shape, set) ? differentiate<16> : differentiate<8>)(shape, grad, x, weight, bias, threads, set);
}

}  // namespace dac
