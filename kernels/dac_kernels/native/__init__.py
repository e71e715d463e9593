"""The ops compiled from csrc.

Snake, convolutions and residual units on the CPU; the discriminators' input on the CPU and CUDA.

A module for each op, whose function hides it here. The ops are registered with PyTorch, so that
autograd, torch.compile and torch.export see through them; gradients of gradients are not available.
A registered op checks its arguments itself, whoever calls it. `snake_rounded`, `snake_gradients`,
`conv1d_weight_gradient`, `winograd` and `winograd_gradients` are not registered: they are parts of
steps of autograd (`dac_fast.model.activated`, `dac_fast.model.cpu_gradients`).
"""

from dac_kernels.native.compiled import extension, status
from dac_kernels.native.conv1d import (
    conv1d,
    conv1d_unsupported,
    conv_transpose1d,
    conv_transpose1d_unsupported,
    residual_unit,
    residual_unit_unsupported,
)
from dac_kernels.native.disc_preprocess import disc_preprocess, disc_preprocess_unsupported
from dac_kernels.native.memory import Memory
from dac_kernels.native.snake import (
    snake,
    snake_beta,
    snake_beta_unsupported,
    snake_gradients,
    snake_rounded,
    snake_unsupported,
)
from dac_kernels.native.stft_bands import BANDS, stft_bands, stft_bands_unsupported
from dac_kernels.native.threads import torch_on_all_threads, torch_on_one_thread
from dac_kernels.native.weight_gradient import (
    conv1d_weight_gradient,
    conv1d_weight_gradient_unsupported,
)
from dac_kernels.native.winograd import (
    winograd,
    winograd_gradients,
    winograd_unsupported,
)

__all__ = [
    "BANDS",
    "Memory",
    "conv1d",
    "conv1d_unsupported",
    "conv1d_weight_gradient",
    "conv1d_weight_gradient_unsupported",
    "conv_transpose1d",
    "conv_transpose1d_unsupported",
    "disc_preprocess",
    "disc_preprocess_unsupported",
    "extension",
    "residual_unit",
    "residual_unit_unsupported",
    "snake",
    "snake_beta",
    "snake_beta_unsupported",
    "snake_gradients",
    "snake_rounded",
    "snake_unsupported",
    "status",
    "stft_bands",
    "stft_bands_unsupported",
    "torch_on_all_threads",
    "torch_on_one_thread",
    "winograd",
    "winograd_gradients",
    "winograd_unsupported",
]
