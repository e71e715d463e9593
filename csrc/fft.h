// Real FFTs of power-of-two sizes, one source for the host and the device.
//
// A real transform of `window` samples is a complex one of size m = window / 2 over z[i] = x[2i] + i x[2i+1], and a
// `split` of its result. The complex one is Stockham's self-sorting algorithm in passes of radix 8, the last one of
// radix 8, 4 or 2. m / 8 workers hold 8 elements each: worker j those at j + e m / 8, e = 0..7, before every pass and
// after the last; between passes they exchange elements through memory. A worker is a thread on the device and a loop
// index on the host; V, the type of an element's parts, is a float there, and a vector over several frames here.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace dac {

constexpr int kSmallestWindow = 32, kLargestWindow = 4096;

template <class V>
struct alignas(2 * sizeof(V)) Complex {
  V re, im;
};

template <class V>
DAC_HD Complex<V> operator+(const Complex<V>& a, const Complex<V>& b) {
  return {a.re + b.re, a.im + b.im};
}

template <class V>
DAC_HD Complex<V> operator-(const Complex<V>& a, const Complex<V>& b) {
  return {a.re - b.re, a.im - b.im};
}

// S: V, or the scalar that V is a vector of.
template <class V, class S>
DAC_HD Complex<V> operator*(const Complex<V>& a, const Complex<S>& w) {
  return {a.re * w.re - a.im * w.im, a.re * w.im + a.im * w.re};
}

template <class V>
DAC_HD Complex<V> conjugate(const Complex<V>& a) {
  return {a.re, -a.im};
}

// a times -i.
template <class V>
DAC_HD Complex<V> turn(const Complex<V>& a) {
  return {a.im, -a.re};
}

// Real and imaginary part exchanged: a forward transform between two of these is an inverse one, not scaled.
template <class V>
DAC_HD Complex<V> swapped(const Complex<V>& a) {
  return {a.im, a.re};
}

// What every transform reads, computed in double and rounded once. For each power of two n up to kLargestWindow and
// k < n: root[n + k] = exp(-2 pi i k / n), half_hann[n + k] = (1 - cos(2 pi k / n)) / 4: half a Hann window, because
// `split` and `merge` give twice what they should.
template <class S>
struct Tables {
  Complex<S> root[2 * kLargestWindow];
  S half_hann[2 * kLargestWindow];
};

// Discrete Fourier transform of size R, in place, results in order.
template <int R, class S, class V>
DAC_HD void butterfly(Complex<V> (&v)[R]) {
  if constexpr (R == 2) {
    const Complex<V> a = v[0];
    v[0] = a + v[1];
    v[1] = a - v[1];
  } else {
    Complex<V> even[R / 2], odd[R / 2];
#pragma unroll
    for (int i = 0; i < R / 2; ++i) even[i] = v[2 * i], odd[i] = v[2 * i + 1];
    butterfly<R / 2, S>(even);
    butterfly<R / 2, S>(odd);
    odd[R / 4] = turn(odd[R / 4]);
    if constexpr (R == 8) {
      constexpr S kRootHalf = static_cast<S>(0.70710678118654752440);
      odd[1] = {(odd[1].re + odd[1].im) * kRootHalf, (odd[1].im - odd[1].re) * kRootHalf};
      odd[3] = {(odd[3].im - odd[3].re) * kRootHalf, (odd[3].re + odd[3].im) * -kRootHalf};
    }
#pragma unroll
    for (int i = 0; i < R / 2; ++i) v[i] = even[i] + odd[i], v[i + R / 2] = even[i] - odd[i];
  }
}

// The radix of the pass that follows passes whose radices multiply to `stride`.
DAC_HD constexpr int radix(int m, int stride) { return m / stride < 8 ? m / stride : 8; }

// One pass of radix R over a worker's elements: 8 / R butterflies.
template <int R, class S, class V>
DAC_HD void pass(Complex<V> (&v)[8], int worker, int m, int stride, const Complex<S>* root) {
  constexpr int kButterflies = 8 / R;
#pragma unroll
  for (int q = 0; q < kButterflies; ++q) {
    Complex<V> part[R];
#pragma unroll
    for (int r = 0; r < R; ++r) part[r] = v[q + r * kButterflies];
    if (stride > 1) {
      Complex<S> power[R];
      power[1] = root[stride * R + ((worker + q * (m / 8)) & (stride - 1))];
      part[1] = part[1] * power[1];
#pragma unroll
      for (int r = 2; r < R; ++r) {
        power[r] = r % 2 ? power[r - 1] * power[1] : power[r / 2] * power[r / 2];
        part[r] = part[r] * power[r];
      }
    }
    butterfly<R, S>(part);
#pragma unroll
    for (int r = 0; r < R; ++r) v[q + r * kButterflies] = part[r];
  }
}

// Where element e of a worker belongs after that pass.
template <int R>
DAC_HD int destination(int worker, int e, int m, int stride) {
  constexpr int kButterflies = 8 / R;
  const int index = worker + (e % kButterflies) * (m / 8), inner = index & (stride - 1);
  return (index - inner) * R + inner + (e / kButterflies) * stride;
}

// From z's transform at k and m - k to twice x's there. root: exp(-2 pi i k / window).
template <class V, class S>
DAC_HD void split(Complex<V>& at_k, Complex<V>& at_mirror, const Complex<S>& root) {
  const Complex<V> even = at_k + conjugate(at_mirror);
  const Complex<V> odd = turn(at_k - conjugate(at_mirror)) * root;
  at_k = even + odd;
  at_mirror = conjugate(even - odd);
}

// The way back, for gradients: from those at x's bins k and m - k to twice what an inverse transform of size m turns
// into those of z. Bins 0 and m (`ends`) are real, and count double: they have no mirror image that counts for them.
template <class V, class S>
DAC_HD void merge(Complex<V>& at_k, Complex<V>& at_mirror, const Complex<S>& root, bool ends) {
  if (ends) {
    at_k = {at_k.re + at_k.re, V{}};
    at_mirror = {at_mirror.re + at_mirror.re, V{}};
  }
  const Complex<V> even = at_k + conjugate(at_mirror);
  const Complex<V> odd = conjugate(turn((conjugate(at_k) - at_mirror) * root));
  at_k = even + odd;
  at_mirror = conjugate(even - odd);
}

}  // namespace dac
