// Convolutions along time on the CPU, with channels innermost in memory, and what follows them in a codec.
//
// A convolution is a product of matrices whose left one is never stored: a row is one output position, and its inputs
// are `taps` runs of `inputs` elements of x, each the row of x at one position, zeros outside of the signal. A
// transposed one, whose kernel is two strides long, is a convolution of two taps as well: its row t is the `stride`
// output positions that the inputs t - 1 and t reach, one after the other, so it has stride * channels columns.
#pragma once

#include <cstdint>

#include "half.h"
#include "instruction_set.h"
#include "rows.h"

namespace dac {

// Columns of a panel: the packed weight is [panels, taps, inputs, kPanel], zeros beyond the last column. Of BFloat16
// the inputs come in pairs, [panels, taps, inputs / 2, kPanel, 2].
constexpr int kPanel = 32;

struct ConvShape {
  int64_t batch, positions, inputs;  // Of x.
  int64_t rows, columns;             // Of the product, for each item.
  int64_t taps, stride, dilation, padding;
  // Of the result: a row holds columns / channels of its positions, and the first row begins `crop` positions early.
  int64_t channels, crop;
};

// c = product + bias, tanh where wanted, zero from each item's length on, plus the residual; y = c, snaked = Snake of c.
// Rows without data are left out. S is float or BFloat16, which is computed in float.
template <class S>
struct Layer {
  const S* weight;  // Packed.
  // One value for each column, and zeros up to a whole panel; no alpha: no Snake.
  const float *bias, *alpha;
  const int64_t* lengths;  // Positions of each item's result, or null.
  bool tanh;
  Rows<const S> residual;
  Rows<S> y, snaked;
};

// What the processor lacks for `conv1d`, or null.
template <class S>
const char* conv1d_lacks();

// The bits of a result depend on its own inputs alone: not on the batch, its place in it, or the number of threads.
template <class S>
void conv1d(const ConvShape& shape, Rows<const S> x, const Layer<S>& layer, int threads,
            InstructionSet set = best_instruction_set());

// Snake of the first layer's result, rounded to S, is the second one's input. The second one has a single tap.
template <class S>
void residual_unit(const ConvShape& shape, Rows<const S> x, const Layer<S>& first, const Layer<S>& second, int threads,
                   InstructionSet set = best_instruction_set());

}  // namespace dac
