// The arithmetic of Snake: sines within about 1e-7, in loops that a compiler can vectorise.
#pragma once

#include <cmath>
#include <cstdint>

#include "half.h"

namespace dac {

// Elements handled at a time: small enough that a block stays in the first-level cache.
constexpr int kBlock = 512;

// Largest |alpha x| that `reduce` handles; beyond it std::sin and std::cos of the same product, in double.
constexpr float kFar = 25000.0f;

// sin^2 has period pi: t minus the nearest multiple of pi. pi is split in three (Cody and Waite): the first two parts
// have 8 and 11 significant bits, so their products with a multiple below 2^13 are exact in float.
DAC_HD float reduce(float t) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer.
  const float multiple = (t * 0.318309886f + kRound) - kRound;
  return ((t - multiple * 3.140625f) - multiple * 9.67502594e-4f) - multiple * 1.50995803e-7f;
}

// Minimax polynomials on [-pi/2, pi/2]; absolute errors 5e-9 and 5e-10 before rounding.
DAC_HD float sine(float r) {
  const float q = r * r;
  return r + r * q * (-0.166666567f + q * (0.00833300874f + q * (-1.98060152e-4f + q * 2.59875742e-6f)));
}

DAC_HD float cosine(float r) {
  const float q = r * r;
  return 1.0f +
         q * (-0.5f + q * (0.0416666567f + q * (-0.00138885854f + q * (2.47701792e-5f - q * 2.62090168e-7f))));
}

// Blocks of n <= kBlock elements. kStep: 1 for an alpha per element, 0 for the same one throughout.
// inverse: 1 / (alpha + 1e-9).

template <int kStep>
DAC_HD void forward_block(const float* __restrict x, const float* alpha, const float* inverse, float* __restrict y,
                          int64_t n) {
  int far = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float t = alpha[i * kStep] * x[i];
    const float s = sine(reduce(t));
    far |= std::fabs(t) > kFar;
    y[i] = x[i] + inverse[i * kStep] * (s * s);
  }
  if (!far) return;
  for (int64_t i = 0; i < n; ++i) {
    const float t = alpha[i * kStep] * x[i];
    if (!(std::fabs(t) > kFar)) continue;
    const float s = static_cast<float>(std::sin(static_cast<double>(t)));
    y[i] = x[i] + inverse[i * kStep] * (s * s);
  }
}

template <int kStep>
DAC_HD void forward_block(const double* x, const double* alpha, const double* inverse, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double s = std::sin(alpha[i * kStep] * x[i]);
    y[i] = x[i] + inverse[i * kStep] * (s * s);
  }
}

template <int kStep, class S>
DAC_HD void forward_block(const S* x, const float* alpha, const float* inverse, S* y, int64_t n) {
  float wide[kBlock], result[kBlock];
  for (int64_t i = 0; i < n; ++i) convert(x[i], wide[i]);
  forward_block<kStep>(wide, alpha, inverse, result, n);
  for (int64_t i = 0; i < n; ++i) convert(result[i], y[i]);
}

}  // namespace dac
