"""The ops compiled from csrc: Snake on the CPU, the discriminators' input on the CPU and CUDA.

A module for each op, whose function hides it here. The ops are registered with PyTorch, so that
autograd, torch.compile and torch.export see through them; gradients of gradients are not available.
A registered op checks its arguments itself, whoever calls it.
"""

from dac_kernels.native.compiled import extension, status
from dac_kernels.native.disc_preprocess import disc_preprocess, disc_preprocess_unsupported
from dac_kernels.native.snake import snake, snake_unsupported
from dac_kernels.native.stft_bands import BANDS, stft_bands, stft_bands_unsupported

__all__ = [
    "BANDS",
    "disc_preprocess",
    "disc_preprocess_unsupported",
    "extension",
    "snake",
    "snake_unsupported",
    "status",
    "stft_bands",
    "stft_bands_unsupported",
]
