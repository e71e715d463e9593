// Snake activation on the CPU: y = x + sin(alpha x)^2 / (beta + 1e-9). Where beta is alpha, also its gradients.
#pragma once

#include <cstdint>
#include <type_traits>

#include "half.h"
#include "instruction_set.h"
#include "rows.h"

namespace dac {

// A tensor [B, C, T] seen as `batch` x `rows` runs of `size` elements that lie next to each other in memory:
// rows are the channels and runs go over time, or, channels last, rows are time steps and runs go over channels.
struct SnakeShape {
  int64_t batch, rows, size;
  bool channels_last;
  int64_t channels() const { return channels_last ? size : rows; }
};

// What values of type S are computed in: float for the 16-bit types, else S.
template <class S>
using Wide = std::conditional_t<(sizeof(S) > 2), S, float>;

// alpha, beta: one value per channel. S is float, double, BFloat16 or Float16. `rounded` gets y in bfloat16, unless its
// data is null; its strides are needed then, too.
template <class S>
void snake_forward(const SnakeShape& shape, Rows<const S> x, const Wide<S>* alpha, const Wide<S>* beta, Rows<S> y,
                   Rows<BFloat16> rounded, int threads, InstructionSet set = best_instruction_set());

// From the gradient of y, those of x and of alpha. The latter's bits do not depend on the number of threads. G and R are
// S, or, where S is float, G is BFloat16 and R either.
template <class G, class S, class R>
void snake_backward(const SnakeShape& shape, Rows<const G> grad, Rows<const S> x, const Wide<S>* alpha, Rows<R> grad_x,
                    Wide<S>* grad_alpha, int threads, InstructionSet set = best_instruction_set());

}  // namespace dac
