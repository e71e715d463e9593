// Where a tensor's elements are.
#pragma once

#include <cstdint>

namespace dac {

// Runs of elements that lie next to each other in memory, by item of a batch and row.
template <class T>
struct Rows {
  T* data;
  int64_t batch_stride, row_stride;
  T* at(int64_t batch, int64_t row) const { return data + batch * batch_stride + row * row_stride; }
};

}  // namespace dac
