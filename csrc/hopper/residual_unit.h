// The residual unit of `dac_fast.ops` at C = 64 and 96 channels, in 16-bit floats, on Hopper's tensor cores.
#pragma once

#include <cstdint>

namespace dac::hopper {

constexpr int kTaps = 7, kMaxDilation = 9;

// Activations are [items, time, C] in memory, `x` and `snaked` of `size` positions, the outputs of `time`.
struct Unit {
  const void *x, *snaked;
  // By `dac_pack_residual_unit`.
  const void* weights;
  // [6, C]: bias, alpha and 1 / (alpha + 1e-9) of the first convolution and of the second; its alpha is that of the
  // Snake that follows.
  const float* factors;
  // Positions of each item beyond which the second convolution gives zeros; null: none.
  const int64_t* lengths;
  // Null where nobody needs it.
  void *y, *y_snaked;
  int items, size, time, dilation, padding;
};

// Weights [C, C, 7] and [C, C, 1] of 16-bit floats, in the host's memory, to 8 C C as the kernel has them.
extern "C" void dac_pack_residual_unit(int channels, const uint16_t* weight1, const uint16_t* weight2, uint16_t* packed);

// Asynchronous, on a stream of the current device, with a CTA per multiprocessor. bfloat16: of the activations and
// weights, else float16. Null, or why it failed.
extern "C" const char* dac_residual_unit(bool bfloat16, int channels, const Unit* unit, int multiprocessors,
                                         void* stream);

}  // namespace dac::hopper
