// dac_kernels._C. Tensors come as addresses and strides: no torch headers, so one build serves every torch.
// dac_kernels/native/ checks the arguments; nothing here does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "conv1d.h"
#include "disc_preprocess.h"
#include "snake.h"
#include "stft_bands.h"
#include "weight_gradient.h"
#include "winograd.h"
#ifdef DAC_KERNELS_CUDA
#include "cuda_check.h"
#endif

namespace py = pybind11;

namespace dac {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Rows of any type of element: see snake.h.
struct AnyRows {
  Address data;
  int64_t batch_stride, row_stride;

  template <class T>
  Rows<T> of() const {
    return {at<T>(data), batch_stride, row_stride};
  }
};

// A layer of any type of element: see conv1d.h.
struct AnyLayer {
  Address weight, bias, alpha, lengths;
  bool tanh;
  AnyRows residual, y, snaked;

  template <class S>
  Layer<S> of() const {
    return {at<const S>(weight),        at<const float>(bias), at<const float>(alpha), at<const int64_t>(lengths), tanh,
            residual.of<const S>(), y.of<S>(),             snaked.of<S>()};
  }
};

Plan plan_of(int64_t batch, int samples, bool channels_last, const std::vector<int>& windows,
             const std::vector<int>& edges, const std::vector<Address>& tensors) {
  std::vector<void*> addresses;
  for (Address tensor : tensors) addresses.push_back(at<void>(tensor));
  return make_plan(batch, samples, channels_last, static_cast<int>(windows.size()), windows.data(),
                   static_cast<int>(tensors.size() / windows.size()), edges.data(), addresses.data());
}

// Every function's name ends in its types. The lock of the interpreter is free while one runs.
template <class S>
void bind_snake(py::module_& m, const std::string& type) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(("snake_forward_" + type).c_str(),
        [](const SnakeShape& shape, const AnyRows& x, Address alpha, Address beta, const AnyRows& y,
           const AnyRows& rounded, int threads) {
          snake_forward<S>(shape, x.of<const S>(), at<const Wide<S>>(alpha), at<const Wide<S>>(beta), y.of<S>(),
                           rounded.of<BFloat16>(), threads);
        },
        unlocked);
}

template <class G, class S, class R>
void bind_snake_backward(py::module_& m, const std::string& types) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(("snake_backward_" + types).c_str(),
        [](const SnakeShape& shape, const AnyRows& grad, const AnyRows& x, Address alpha, const AnyRows& grad_x,
           Address grad_alpha, int threads) {
          snake_backward<G, S, R>(shape, grad.of<const G>(), x.of<const S>(), at<const Wide<S>>(alpha), grad_x.of<R>(),
                                  at<Wide<S>>(grad_alpha), threads);
        },
        unlocked);
}

template <class S>
void bind_conv1d(py::module_& m, const std::string& type) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(("conv1d_" + type).c_str(),
        [](const ConvShape& shape, const AnyRows& x, const AnyLayer& layer, int threads) {
          conv1d<S>(shape, x.of<const S>(), layer.of<S>(), threads);
        },
        unlocked);
  m.def(("residual_unit_" + type).c_str(),
        [](const ConvShape& shape, const AnyRows& x, const AnyLayer& first, const AnyLayer& second, int threads) {
          residual_unit<S>(shape, x.of<const S>(), first.of<S>(), second.of<S>(), threads);
        },
        unlocked);
  m.def(("conv1d_lacks_" + type).c_str(), [] { return conv1d_lacks<S>(); });
}

void bind_weight_gradient(py::module_& m) {
  m.def("conv1d_weight_gradient_float32",
        [](const ConvShape& shape, const AnyRows& grad, const AnyRows& x, Address weight, int threads) {
          conv1d_weight_gradient(shape, grad.of<const float>(), x.of<const float>(), at<float>(weight), threads);
        },
        py::call_guard<py::gil_scoped_release>());
}

void bind_winograd(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("winograd_float32",
        [](const ConvShape& shape, const AnyRows& x, Address weight, Address bias, const AnyRows& y, int threads) {
          winograd(shape, x.of<const float>(), at<const float>(weight), at<const float>(bias), y.of<float>(), threads);
        },
        unlocked);
  m.def("winograd_weight_gradient_float32",
        [](const ConvShape& shape, const AnyRows& grad, const AnyRows& x, Address weight, Address bias, int threads) {
          winograd_weight_gradient(shape, grad.of<const float>(), x.of<const float>(), at<float>(weight),
                                   at<float>(bias), threads);
        },
        unlocked);
}

template <class S>
void bind_disc_preprocess(py::module_& m, const std::string& type) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(("disc_preprocess_forward_" + type).c_str(),
        [](const Signals& signals, Address x, Address y, Address levels, Address partial, int threads) {
          disc_preprocess_forward<S>(signals, at<const S>(x), at<S>(y), at<Level<S>>(levels), at<Extent<S>>(partial),
                                     threads);
        },
        unlocked);
  m.def(("disc_preprocess_backward_" + type).c_str(),
        [](const Signals& signals, Address grad, Address x, Address levels, Address grad_x, Address partial,
           int threads) {
          disc_preprocess_backward<S>(signals, at<const S>(grad), at<const S>(x), at<const Level<S>>(levels),
                                      at<S>(grad_x), at<Slope>(partial), threads);
        },
        unlocked);
}

// S: of the signal, Out: of the bands.
template <class S, class Out>
void bind_bands(py::module_& m, const std::string& types) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(("stft_bands_forward_" + types).c_str(),
        [](const Plan& plan, Address x, int64_t stride, int threads) {
          stft_bands_forward<S, Out>(plan, at<const S>(x), stride, threads);
        },
        unlocked);
  m.def(("stft_bands_backward_" + types).c_str(),
        [](const Plan& plan, Address grad_x, int threads) { stft_bands_backward<S, Out>(plan, at<S>(grad_x), threads); },
        unlocked);
}

#ifdef DAC_KERNELS_CUDA

template <class Out>
void bind_bands_cuda(py::module_& m, const std::string& types) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(("stft_bands_forward_cuda_" + types).c_str(),
        [](const Plan& plan, Address x, int64_t stride, int device, Address stream) {
          stft_bands_forward_cuda<Out>(plan, at<const float>(x), stride, device, at<void>(stream));
        },
        unlocked);
  m.def(("stft_bands_backward_cuda_" + types).c_str(),
        [](const Plan& plan, Address partial, Address grad_x, int device, Address stream) {
          stft_bands_backward_cuda<Out>(plan, at<float>(partial), at<float>(grad_x), device, at<void>(stream));
        },
        unlocked);
}

void bind_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("disc_preprocess_forward_cuda_float32",
        [](const Signals& signals, Address x, Address y, Address levels, Address partial, int device,
           Address stream) {
          disc_preprocess_forward_cuda(signals, at<const float>(x), at<float>(y), at<Level<float>>(levels),
                                       at<Extent<float>>(partial), device, at<void>(stream));
        },
        unlocked);
  m.def("disc_preprocess_backward_cuda_float32",
        [](const Signals& signals, Address grad, Address x, Address levels, Address grad_x, Address partial,
           int device, Address stream) {
          disc_preprocess_backward_cuda(signals, at<const float>(grad), at<const float>(x),
                                        at<const Level<float>>(levels), at<float>(grad_x), at<Slope>(partial), device,
                                        at<void>(stream));
        },
        unlocked);
  m.def("cuda_devices", [] {
    int count = 0;
    check_cuda(cudaGetDeviceCount(&count), "CUDA devices");
    return count;
  });
  m.def("stft_bands_partial", &stft_bands_partial);
  bind_bands_cuda<float>(m, "float32_float32");
  bind_bands_cuda<BFloat16>(m, "float32_bfloat16");
}

#endif

PYBIND11_MODULE(_C, m) {
  py::class_<SnakeShape>(m, "SnakeShape").def(py::init([](int64_t batch, int64_t rows, int64_t size, bool last) {
    return SnakeShape{batch, rows, size, last};
  }));
  py::class_<AnyRows>(m, "Rows").def(py::init([](Address data, int64_t batch_stride, int64_t row_stride) {
    return AnyRows{data, batch_stride, row_stride};
  }));
  using Size = int64_t;
  py::class_<ConvShape>(m, "ConvShape")
      .def(py::init([](Size batch, Size positions, Size inputs, Size rows, Size columns, Size taps, Size stride,
                       Size dilation, Size padding, Size channels, Size crop) {
        return ConvShape{batch, positions, inputs, rows, columns, taps, stride, dilation, padding, channels, crop};
      }));
  py::class_<AnyLayer>(m, "ConvLayer")
      .def(py::init([](Address weight, Address bias, Address alpha, Address lengths, bool tanh, const AnyRows& residual,
                       const AnyRows& y, const AnyRows& snaked) {
        return AnyLayer{weight, bias, alpha, lengths, tanh, residual, y, snaked};
      }));
  py::class_<Signals>(m, "Signals").def(py::init([](int64_t count, int64_t samples, int64_t stride, int64_t chunk) {
    return Signals{count, samples, stride, chunk};
  }));
  py::class_<Plan>(m, "Plan").def(py::init(&plan_of));
  m.attr("panel") = kPanel;
  m.attr("max_windows") = kMaxWindows;
  m.attr("max_bands") = kMaxBands;
  m.attr("max_samples") = kMaxSamples;
  bind_snake<float>(m, "float32");
  bind_snake<double>(m, "float64");
  bind_snake<BFloat16>(m, "bfloat16");
  bind_snake<Float16>(m, "float16");
  bind_snake_backward<float, float, float>(m, "float32_float32_float32");
  bind_snake_backward<double, double, double>(m, "float64_float64_float64");
  bind_snake_backward<BFloat16, BFloat16, BFloat16>(m, "bfloat16_bfloat16_bfloat16");
  bind_snake_backward<Float16, Float16, Float16>(m, "float16_float16_float16");
  bind_snake_backward<BFloat16, float, float>(m, "bfloat16_float32_float32");
  bind_snake_backward<BFloat16, float, BFloat16>(m, "bfloat16_float32_bfloat16");
  bind_conv1d<float>(m, "float32");
  bind_conv1d<BFloat16>(m, "bfloat16");
  bind_weight_gradient(m);
  bind_winograd(m);
  bind_disc_preprocess<float>(m, "float32");
  bind_disc_preprocess<double>(m, "float64");
  bind_bands<float, float>(m, "float32_float32");
  bind_bands<float, BFloat16>(m, "float32_bfloat16");
  bind_bands<double, double>(m, "float64_float64");
#ifdef DAC_KERNELS_CUDA
  m.attr("cuda_architectures") = DAC_KERNELS_CUDA;
  bind_cuda(m);
#else
  m.attr("cuda_architectures") = "";
#endif
}

}  // namespace
}  // namespace dac
