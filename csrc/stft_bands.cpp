#include "stft_bands.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"

namespace dac {

Plan make_plan(int64_t batch, int samples, bool channels_last, int windows, const int* sizes, int bands,
               const int* edges, void* const* tensors) {
  Plan plan = {};
  plan.batch = batch, plan.windows = windows, plan.channels_last = channels_last;
  for (int w = 0; w < windows; ++w) {
    Spectrogram& s = plan.window[w];
    s.samples = samples, s.size = sizes[w], s.hop = sizes[w] / 4, s.pad = 3 * s.hop / 2;
    s.frames = (samples + s.hop - 1) / s.hop;
    int bin = 0;
    const auto append = [&](int low, int high, void* data) {
      if (low < high) s.segment[s.segments++] = {low, high, data};
      bin = std::max(bin, high);
    };
    for (int i = w * bands; i < (w + 1) * bands; ++i) {
      append(bin, edges[2 * i], nullptr);
      append(edges[2 * i], edges[2 * i + 1], tensors[i]);
    }
    append(bin, s.size / 2 + 1, nullptr);
  }
  return plan;
}

template <class S>
std::unique_ptr<Tables<S>> make_tables() {
  auto tables = std::make_unique<Tables<S>>();
  const double turn = 2 * std::acos(-1.0);
  for (int n = 1; n <= kLargestWindow; n *= 2) {
    for (int k = 0; k < n; ++k) {
      const double angle = turn * k / n;
      tables->root[n + k] = {static_cast<S>(std::cos(angle)), static_cast<S>(-std::sin(angle))};
      tables->half_hann[n + k] = static_cast<S>((1 - std::cos(angle)) / 4);
    }
  }
  return tables;
}

namespace {

// Frames transformed together, one in each lane of a vector.
constexpr int kLanes = 8;
// Groups of frames in a piece of work, and samples whose gradients one owns.
constexpr int64_t kGroups = 4;
constexpr int kSpan = 16384;

template <class S>
struct Vector {
  typedef S type __attribute__((vector_size(kLanes * sizeof(S))));
};

// Made on first use, without a lock, for a process may be forked while another thread is in here.
template <class S>
const Tables<S>& tables() {
  static std::atomic<const Tables<S>*> current{nullptr};
  const Tables<S>* known = current.load();
  if (known) return *known;
  std::unique_ptr<const Tables<S>> made = make_tables<S>();
  return current.compare_exchange_strong(known, made.get()) ? *made.release() : *known;
}

// Room for kLanes frames' transforms.
template <class S>
class Workspace {
  using Element = Complex<typename Vector<S>::type>;
  std::vector<Element> a_, b_;
  Element* spare_;

 public:
  Element* data;

  explicit Workspace(int size) : a_(size / 2 + 1), b_(size / 2 + 1), spare_(b_.data()), data(a_.data()) {}

  // One lane's scalar; part 0 is real, 1 imaginary.
  S& at(int lane, int element, int part) { return reinterpret_cast<S*>(data)[(2 * element + part) * kLanes + lane]; }

  // Complex transform of data[0..m).
  void transform(int m) {
    run(best_instruction_set(), [&]() __attribute__((always_inline)) {
      for (int stride = 1; stride < m; stride *= radix(m, stride)) {
        if (radix(m, stride) == 8) one_pass<8>(m, stride);
        if (radix(m, stride) == 4) one_pass<4>(m, stride);
        if (radix(m, stride) == 2) one_pass<2>(m, stride);
        std::swap(data, spare_);
      }
    });
  }

 private:
  template <int R>
  DAC_HD void one_pass(int m, int stride) {
    const Complex<S>* root = tables<S>().root;
    for (int worker = 0; worker < m / 8; ++worker) {
      Element v[8];
      for (int e = 0; e < 8; ++e) v[e] = data[worker + e * (m / 8)];
      pass<R, S>(v, worker, m, stride, root);
      for (int e = 0; e < 8; ++e) spare_[destination<R>(worker, e, m, stride)] = v[e];
    }
  }
};

template <class S>
void load_frame(const Spectrogram& s, const S* signal, int frame, int lane, Workspace<S>& work) {
  const S* window = tables<S>().half_hann + s.size;
  const int start = s.start(frame);
  const bool inside = start >= 0 && start + s.size <= s.samples;
  for (int n = 0; n < s.size; ++n) {
    const int sample = inside ? start + n : reflect(start + n, s.samples);
    work.at(lane, n / 2, n % 2) = signal[sample] * window[n];
  }
}

// Between one lane's spectrum and the rows of the band tensors.
template <class S, class Out>
void store_spectrum(const Plan& plan, const Spectrogram& s, int64_t item, int frame, int lane, Workspace<S>& work) {
  const int step = plan.channels_last ? 2 : 1;
  for (int i = 0; i < s.segments; ++i) {
    const Segment& segment = s.segment[i];
    if (!segment.data) continue;
    for (int part = 0; part < 2; ++part) {
      Out* row = static_cast<Out*>(segment.data) + row_offset(s, segment, plan.channels_last, item, frame, part);
      for (int k = segment.low; k < segment.high; ++k, row += step) convert(work.at(lane, k, part), *row);
    }
  }
}

template <class S, class Out>
void load_spectrum(const Plan& plan, const Spectrogram& s, int64_t item, int frame, int lane, Workspace<S>& work) {
  const int step = plan.channels_last ? 2 : 1;
  for (int i = 0; i < s.segments; ++i) {
    const Segment& segment = s.segment[i];
    for (int part = 0; part < 2; ++part) {
      if (!segment.data) {
        for (int k = segment.low; k < segment.high; ++k) work.at(lane, k, part) = 0;
        continue;
      }
      const Out* row =
          static_cast<const Out*>(segment.data) + row_offset(s, segment, plan.channels_last, item, frame, part);
      for (int k = segment.low; k < segment.high; ++k, row += step) convert(*row, work.at(lane, k, part));
    }
  }
}

// The gradient of one span of one item's samples: of every window, all frames that touch it.
template <class S, class Out>
void backward_span(const Plan& plan, int64_t item, Range span, S* grad, Workspace<S>& work) {
  for (int w = 0; w < plan.windows; ++w) {
    const Spectrogram& s = plan.window[w];
    const int m = s.size / 2;
    const Complex<S>* root = tables<S>().root + s.size;
    const S* window = tables<S>().half_hann + s.size;
    const Range touching = frames_over(s, span);
    for (int first = touching.begin; first < touching.end; first += kLanes) {
      const Range frames = {first, std::min(first + kLanes, touching.end)};
      for (int t = frames.begin; t < frames.end; ++t) load_spectrum<S, Out>(plan, s, item, t, t - first, work);
      for (int k = 0; k <= m / 2; ++k) {
        auto at_k = work.data[k], at_mirror = work.data[m - k];
        merge(at_k, at_mirror, root[k], k == 0);
        if (k > 0) work.data[m - k] = swapped(at_mirror);
        work.data[k] = swapped(at_k);
      }
      work.transform(m);
      for (int which = 0; which < kImages; ++which) {
        const Image way = image(s, which);
        const Range samples = samples_under(s, way, frames, span);
        for (int i = samples.begin; i < samples.end; ++i) {
          grad[i] += overlap<S>(s, way.shift + way.sign * i, frames, [&](int lane, int n) {
            return work.at(lane, n / 2, 1 - n % 2) * window[n];
          });
        }
      }
    }
  }
}

int largest_window(const Plan& plan) {
  int largest = 0;
  for (int w = 0; w < plan.windows; ++w) largest = std::max(largest, plan.window[w].size);
  return largest;
}

}  // namespace

template <class S, class Out>
void stft_bands_forward(const Plan& plan, const S* x, int64_t stride, int threads) {
  for (int w = 0; w < plan.windows; ++w) {
    const Spectrogram& s = plan.window[w];
    const int m = s.size / 2;
    const Complex<S>* root = tables<S>().root + s.size;
    const int64_t count = plan.batch * s.frames;
    parallel_for((count + kLanes - 1) / kLanes, kGroups, threads, [&](int64_t first_group, int64_t last_group) {
      Workspace<S> work(s.size);
      for (int64_t group = first_group; group < last_group; ++group) {
        const int64_t first = group * kLanes, last = std::min(first + kLanes, count);
        for (int64_t f = first; f < last; ++f) {
          load_frame(s, x + f / s.frames * stride, static_cast<int>(f % s.frames), static_cast<int>(f - first), work);
        }
        work.transform(m);
        work.data[m] = work.data[0];
        for (int k = 0; k <= m / 2; ++k) split(work.data[k], work.data[m - k], root[k]);
        for (int64_t f = first; f < last; ++f) {
          store_spectrum<S, Out>(plan, s, f / s.frames, static_cast<int>(f % s.frames), static_cast<int>(f - first),
                                 work);
        }
      }
    });
  }
}

template <class S, class Out>
void stft_bands_backward(const Plan& plan, S* grad_x, int threads) {
  const int samples = plan.window[0].samples;
  const int64_t spans = (samples + kSpan - 1) / kSpan;
  parallel_for(plan.batch * spans, 1, threads, [&](int64_t index, int64_t) {
    Workspace<S> work(largest_window(plan));
    const int64_t item = index / spans;
    const int begin = static_cast<int>(index % spans * kSpan);
    const Range span = {begin, std::min(begin + kSpan, samples)};
    S* grad = grad_x + item * samples;
    std::fill(grad + span.begin, grad + span.end, S(0));
    backward_span<S, Out>(plan, item, span, grad, work);
  });
}

template std::unique_ptr<Tables<float>> make_tables();
template void stft_bands_forward<float, float>(const Plan&, const float*, int64_t, int);
template void stft_bands_forward<float, BFloat16>(const Plan&, const float*, int64_t, int);
template void stft_bands_forward<double, double>(const Plan&, const double*, int64_t, int);
template void stft_bands_backward<float, float>(const Plan&, float*, int);
template void stft_bands_backward<float, BFloat16>(const Plan&, float*, int);
template void stft_bands_backward<double, double>(const Plan&, double*, int);

}  // namespace dac
