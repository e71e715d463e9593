#include "weight_gradient.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "products.h"

namespace dac {
namespace {

// Rows of one partial sum: many beside its cost, few enough that all threads have some. And scalars, for the same.
constexpr int64_t kGroup = 4096, kSlice = 64;
// Floats of both operands that are multiplied while they are in the first-level cache, and rows of it at least.
constexpr int64_t kBlockFloats = 8192, kLeastBlockRows = 16;

// Some of an operand's channels, row by row.
struct Run {
  const float* data;
  int64_t stride;
};

// Two operands, of which a row of the left one meets, for each tap, a row of the right one.
class Product {
 public:
  Product(const ConvShape& shape, Rows<const float> grad, Rows<const float> x, bool swapped, int lanes)
      : shape_(shape),
        grad_(grad),
        x_(x),
        swapped_(swapped),
        scalars_(swapped ? shape.inputs : shape.columns),
        channels_(swapped ? shape.columns : shape.inputs, lanes) {}

  // Sums [taps, scalars, width]: what one group of rows adds up to.
  int64_t size() const { return shape_.taps * scalars_ * channels_.width(); }

  // Where the product of two channels of grad and x is in them, for the first tap.
  int64_t place(int64_t of_grad, int64_t of_x) const {
    const int64_t scalar = swapped_ ? of_x : of_grad, channel = swapped_ ? of_grad : of_x;
    const int64_t vector = channel / channels_.lanes;
    return scalar * channels_.width() + vector * channels_.lanes + channel - channels_.channel(vector);
  }

  int64_t slices() const { return (scalars_ + kSlice - 1) / kSlice; }

  // Adds what rows [begin, end) of an item give, for one slice of the scalars.
  template <int kLanes>
  INLINE void add(int64_t item, int64_t begin, int64_t end, int64_t slice, float* sums) const {
    const int64_t floats = shape_.columns + shape_.stride * shape_.inputs;
    const int64_t size = std::max(kLeastBlockRows, kBlockFloats / floats);
    for (int64_t row = begin; row < end; row += size) {
      for (int64_t tap = 0; tap < shape_.taps; ++tap) {
        add_tap<kLanes>(item, row, std::min(row + size, end), tap, slice, sums + tap * scalars_ * channels_.width());
      }
    }
  }

 private:
  template <int kLanes>
  INLINE void add_tap(int64_t item, int64_t begin, int64_t end, int64_t tap, int64_t slice, float* sums) const {
    // Row t meets x's row t * stride + offset, where there is one.
    const int64_t offset = tap * shape_.dilation - shape_.padding, stride = shape_.stride;
    const int64_t room = shape_.positions - 1 - offset;
    begin = std::max(begin, offset < 0 ? (-offset + stride - 1) / stride : 0);
    end = std::min(end, room < 0 ? 0 : room / stride + 1);
    if (begin >= end) return;
    Run left = {grad_.at(item, begin), grad_.row_stride};
    Run right = {x_.at(item, begin * stride + offset), stride * x_.row_stride};
    if (swapped_) std::swap(left, right);
    const int64_t skipped = slice * kSlice, scalars = std::min(kSlice, scalars_ - skipped);
    sums += skipped * channels_.width();
    for (int64_t group = 0; group < channels_.count; ++group) {
      const int64_t first = channels_.before(group) * kLanes;
      const Vectors vectors = {right.data + first, channels_.size(group), channels_.last(group), right.stride};
      multiply_all<kLanes>({left.data + skipped, 1, left.stride}, scalars, vectors, end - begin,
                           {sums + first, channels_.width(), true});
    }
  }

  const ConvShape& shape_;
  const Rows<const float> grad_, x_;
  const bool swapped_;
  const int64_t scalars_;
  const VectorGroups channels_;
};

}  // namespace

void conv1d_weight_gradient(const ConvShape& shape, Rows<const float> grad, Rows<const float> x, float* weight,
                            int threads, InstructionSet set) {
  // Vectors are of the operand that fills them.
  const bool swapped = shape.inputs < 8 && shape.columns > shape.inputs;
  const int64_t channels = swapped ? shape.columns : shape.inputs;
  const int lanes = channels >= 16 && set == InstructionSet::avx512 ? 16 : channels >= 8 ? 8 : 1;
  const Product product(shape, grad, x, swapped, lanes);
  // Groups of the rows of all items, one after the other.
  const int64_t total = shape.batch * shape.rows, groups = (total + kGroup - 1) / kGroup;
  const int64_t slices = product.slices();
  std::vector<float> sums(groups * product.size());
  parallel_for(groups * slices, 1, threads, [&](int64_t index, int64_t) {
    const int64_t group = index / slices, slice = index % slices;
    const int64_t past = total * (group + 1) / groups;
    float* to = sums.data() + group * product.size();
    run(set, [&]() __attribute__((always_inline)) {
      for (int64_t row = total * group / groups; row < past;) {
        const int64_t item = row / shape.rows, begin = row % shape.rows;
        const int64_t end = std::min(shape.rows, begin + past - row);
        if (lanes == 16) product.add<16>(item, begin, end, slice, to);
        if (lanes == 8) product.add<8>(item, begin, end, slice, to);
        if (lanes == 1) product.add<1>(item, begin, end, slice, to);
        row += end - begin;
      }
    });
  });
  // A few channels at a time: those of one tap are in one line of the cache.
  constexpr int64_t few = 16;
  const int64_t per_tap = product.size() / shape.taps;
  for (int64_t of_grad = 0; of_grad < shape.columns; ++of_grad) {
    for (int64_t first = 0; first < shape.inputs; first += few) {
      for (int64_t tap = 0; tap < shape.taps; ++tap) {
        for (int64_t of_x = first; of_x < std::min(first + few, shape.inputs); ++of_x) {
          const float* place = sums.data() + tap * per_tap + product.place(of_grad, of_x);
          float sum = 0;
          for (int64_t group = 0; group < groups; ++group) sum += place[group * product.size()];
          weight[(of_grad * shape.inputs + of_x) * shape.taps + tap] = sum;
        }
      }
    }
  }
}

}  // namespace dac
