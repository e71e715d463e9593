// The gradient of a convolution along time for its weight, on the CPU, with channels innermost in memory.
//
// Of a transposed convolution it is the same, with the gradient of its result as x.
#pragma once

#include "conv1d.h"

namespace dac {

// Fills weight [columns, inputs, taps] with the sum, over items and rows, of grad's row times the row of x that the tap
// meets there. Its bits do not depend on the number of threads.
void conv1d_weight_gradient(const ConvShape& shape, Rows<const float> grad, Rows<const float> x, float* weight,
                            int threads, InstructionSet set = best_instruction_set());

}  // namespace dac
