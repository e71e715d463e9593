// The 16-bit floats, and conversions between them and float that a compiler can vectorise.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace dac {

// The upper half of a float, rounded to nearest even.
struct BFloat16 {
  uint16_t bits;
};

// IEEE binary16: 5 bits of exponent, 10 of mantissa.
struct Float16 {
  uint16_t bits;
};

union Word {
  float value;
  uint32_t bits;
};

DAC_HD void convert(float from, float& to) { to = from; }
DAC_HD void convert(double from, double& to) { to = from; }

DAC_HD void convert(float from, BFloat16& to) {
  Word word = {from};
  const uint32_t rounded = (word.bits + 0x7FFF + ((word.bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(from == from ? rounded : 0x7FC0);
}

DAC_HD void convert(BFloat16 from, float& to) {
  Word word;
  word.bits = static_cast<uint32_t>(from.bits) << 16;
  to = word.value;
}

// Rounded to nearest even. Exponents are rebiased by 112 = 127 - 15; numbers below 2^-14 are rounded by adding 1/2, whose
// last bit is worth 2^-24 as theirs is.
DAC_HD void convert(float from, Float16& to) {
  Word word = {from}, small;
  const uint32_t sign = (word.bits >> 16) & 0x8000;
  word.bits &= 0x7FFFFFFF;
  small.value = word.value + 0.5f;
  const uint32_t subnormal = small.bits - 0x3F000000;
  const uint32_t normal = (word.bits - (112u << 23) + 0xFFF + ((word.bits >> 13) & 1)) >> 13;
  const uint32_t large = word.bits > 0x7F800000 ? 0x7E00 : 0x7C00;
  // From 65520 on, the nearest is infinity.
  const uint32_t magnitude = word.bits < 0x38800000 ? subnormal : word.bits < 0x477FF000 ? normal : large;
  to.bits = static_cast<uint16_t>(sign | magnitude);
}

DAC_HD void convert(Float16 from, float& to) {
  Word word, scale;
  word.bits = static_cast<uint32_t>(from.bits & 0x7FFF) << 13;
  scale.bits = (127u + 112u) << 23;
  word.value *= scale.value;
  // What had the largest exponent is infinity or NaN.
  const uint32_t special = word.value >= 65536.0f ? 0x7F800000 : 0;
  word.bits |= special | static_cast<uint32_t>(from.bits & 0x8000) << 16;
  to = word.value;
}

}  // namespace dac
