"""Convolutions along time that keep channels innermost in memory: x [B, C, T] lies as [B, T, C].

This is the layout in which GPUs multiply matrices in half precision: in the other one, cuDNN copies every input and
output. Differentiable, so training runs them too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def set_channels_last(network: nn.Module):
    """Have the network's convolutions, those that can, return their outputs with channels innermost in memory."""
    for module in network.modules():
        if hasattr(module, "channels_last"):
            module.channels_last = True


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    """`torch.nn.functional.conv1d` with channels innermost, whatever the layout of its arguments."""
    # PyTorch knows this layout for two axes of space only; the first one has size 1 here.
    x, weight = innermost(x.unsqueeze(2)), innermost(weight.unsqueeze(2))
    return innermost(F.conv2d(x, weight, bias, (1, stride), (0, padding), (1, dilation))).squeeze(2)


def conv_transpose1d(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """`torch.nn.functional.conv_transpose1d`, likewise."""
    x, weight = innermost(x.unsqueeze(2)), innermost(weight.unsqueeze(2))
    return innermost(F.conv_transpose2d(x, weight, bias, (1, stride), (0, padding))).squeeze(2)


def innermost(x: Tensor) -> Tensor:
    """x [B, C, H, W] with channels innermost; itself where it is."""
    return x.contiguous(memory_format=torch.channels_last)
