// Sums of products that stay in registers, for any instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#define INLINE inline __attribute__((always_inline))

namespace dac {

template <int kLanes>
struct Lanes {
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
};

template <int kLanes>
INLINE typename Lanes<kLanes>::Vector load(const float* from) {
  return *reinterpret_cast<const typename Lanes<kLanes>::Vector*>(from);
}

template <int kLanes>
INLINE void store(float* to, typename Lanes<kLanes>::Vector value) {
  *reinterpret_cast<typename Lanes<kLanes>::Vector*>(to) = value;
}

// Vectors that are multiplied at once.
constexpr int64_t kMostVectors = 3;

// Channels as vectors, in groups of almost equal sizes. The last vector holds the last channels, some of which the one
// before may hold as well.
struct VectorGroups {
  const int64_t channels, lanes, vectors, count;
  VectorGroups(int64_t channels, int64_t lanes)
      : channels(channels),
        lanes(lanes),
        vectors((channels + lanes - 1) / lanes),
        count((vectors + kMostVectors - 1) / kMostVectors) {}

  int64_t width() const { return vectors * lanes; }
  // Vectors before a group, and in it.
  int64_t before(int64_t group) const { return vectors * group / count; }
  int64_t size(int64_t group) const { return before(group + 1) - before(group); }
  // Where a vector begins; and the last one of a group, from where the first one does.
  int64_t channel(int64_t vector) const { return std::min(vector * lanes, channels - lanes); }
  int64_t last(int64_t group) const { return channel(before(group + 1) - 1) - before(group) * lanes; }
};

// One value for each scalar and term of the sums.
struct Scalars {
  const float* data;
  int64_t step, term;  // From one to the next.
};

// Vectors for each term: one after the other, but for the last one, which begins at `last`.
struct Vectors {
  const float* data;
  int64_t count, last, term;
};

// [scalars, stride], added to or filled.
struct Sums {
  float* data;
  int64_t stride;
  bool add;
};

template <int kLanes, int kScalars, int kVectors>
INLINE void multiply(Scalars left, Vectors right, int64_t terms, Sums sums) {
  using Vector = typename Lanes<kLanes>::Vector;
  Vector total[kScalars][kVectors] = {};
  for (int64_t term = 0; term < terms; ++term, left.data += left.term, right.data += right.term) {
    Vector value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      value[v] = load<kLanes>(right.data + (v + 1 < kVectors ? v * kLanes : right.last));
    }
#pragma GCC unroll 8
    for (int s = 0; s < kScalars; ++s) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[s][v] += left.data[s * left.step] * value[v];
    }
  }
  for (int s = 0; s < kScalars; ++s) {
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums.data + s * sums.stride + v * kLanes;
      store<kLanes>(to, sums.add ? load<kLanes>(to) + total[s][v] : total[s][v]);
    }
  }
}

// Twelve sums at once hide the time that one takes, and leave registers for what they are made of; fewer for the rest.
template <int kLanes, int kVectors, int kScalars = kVectors == 1 ? 8 : 12 / kVectors>
INLINE void multiply_vectors(Scalars left, int64_t scalars, Vectors right, int64_t terms, Sums sums) {
  for (; scalars >= kScalars; scalars -= kScalars) {
    multiply<kLanes, kScalars, kVectors>(left, right, terms, sums);
    left.data += kScalars * left.step;
    sums.data += kScalars * sums.stride;
  }
  if constexpr (kScalars > 1) multiply_vectors<kLanes, kVectors, kScalars * 2 / 3>(left, scalars, right, terms, sums);
}

// Sums, over the terms, of each scalar times each vector, of which there are kMostVectors or fewer.
template <int kLanes>
INLINE void multiply_all(Scalars left, int64_t scalars, Vectors right, int64_t terms, Sums sums) {
  if (right.count == 1) multiply_vectors<kLanes, 1>(left, scalars, right, terms, sums);
  if (right.count == 2) multiply_vectors<kLanes, 2>(left, scalars, right, terms, sums);
  if (right.count == 3) multiply_vectors<kLanes, 3>(left, scalars, right, terms, sums);
}

}  // namespace dac
