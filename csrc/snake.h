// Snake activation on the CPU: y = x + sin(alpha x)^2 / (alpha + 1e-9), and its gradients.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace dac {

// A tensor [B, C, T] seen as `batch` x `rows` runs of `size` elements that lie next to each other in memory:
// rows are the channels and runs go over time, or, channels last, rows are time steps and runs go over channels.
struct SnakeShape {
  int64_t batch, rows, size;
  bool channels_last;
  int64_t channels() const { return channels_last ? size : rows; }
};

template <class T>
struct Rows {
  T* data;
  int64_t batch_stride, row_stride;
  T* at(int64_t batch, int64_t row) const { return data + batch * batch_stride + row * row_stride; }
};

// alpha: one value per channel. T is float or double.
template <class T>
void snake_forward(const SnakeShape& shape, Rows<const T> x, const T* alpha, Rows<T> y, int threads,
                   InstructionSet set = best_instruction_set());

// From the gradient of y, those of x and of alpha. The latter's bits do not depend on the number of threads.
template <class T>
void snake_backward(const SnakeShape& shape, Rows<const T> grad, Rows<const T> x, const T* alpha, Rows<T> grad_x,
                    T* grad_alpha, int threads, InstructionSet set = best_instruction_set());

}  // namespace dac
