// Complex spectrograms of several windows, cut into frequency bands: see dac_kernels/native/stft_bands.py for the
// definition.
#pragma once

#include <memory>

#include "bands.h"

namespace dac {

// Layout of every window's spectrogram. samples: at most kMaxSamples; sizes: of the windows, powers of two from 32 to
// 4096; edges: per window, per band, first and one-past-last bin, disjoint and in order; tensors: as many addresses.
Plan make_plan(int64_t batch, int samples, bool channels_last, int windows, const int* sizes, int bands,
               const int* edges, void* const* tensors);

template <class S>
std::unique_ptr<Tables<S>> make_tables();

// x: `batch` rows of samples, `stride` elements apart. S, Out: float, float; float, BFloat16; or double, double.
// The plan's tensors receive the spectrograms.
template <class S, class Out>
void stft_bands_forward(const Plan& plan, const S* x, int64_t stride, int threads);

// The plan's tensors hold gradients; grad_x: [batch, samples], contiguous. The bits do not depend on `threads`.
template <class S, class Out>
void stft_bands_backward(const Plan& plan, S* grad_x, int threads);

// The same on a CUDA device, asynchronous on the stream. Channels last, tensors are aligned to pairs of elements;
// partial: room for stft_bands_partial(plan) elements. Throw std::runtime_error where CUDA reports an error. The first
// call on a device copies the tables there, which a CUDA graph cannot capture.
template <class Out>
void stft_bands_forward_cuda(const Plan& plan, const float* x, int64_t stride, int device, void* stream);

template <class Out>
void stft_bands_backward_cuda(const Plan& plan, float* partial, float* grad_x, int device, void* stream);

int64_t stft_bands_partial(const Plan& plan);

}  // namespace dac
