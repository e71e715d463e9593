// Convolutions of seven taps along time on the CPU, with channels innermost in memory, by minimal filtering (Winograd).
//
// Four rows of a result take 10 products for each pair of channels, where the sum over taps has 28: the rows are
// coefficients of a polynomial, which is found from its values at 10 points. The points are chosen for little rounding:
// errors are some millionths of the largest result. For training alone.
#pragma once

#include "conv1d.h"

namespace dac {

// y = convolution + bias (null: none), with weight [7, inputs, columns] and stride 1. x and y have 8 channels or more.
// The bits of an item's result depend on its own inputs alone.
void winograd(const ConvShape& shape, Rows<const float> x, const float* weight, const float* bias, Rows<float> y,
              int threads, InstructionSet set = best_instruction_set());

// Fills weight [7, columns, inputs] and bias [columns] with the gradients of the same, for the gradient of y. Their
// bits do not depend on the number of threads.
void winograd_weight_gradient(const ConvShape& shape, Rows<const float> grad, Rows<const float> x, float* weight,
                              float* bias, int threads, InstructionSet set = best_instruction_set());

}  // namespace dac
