"""Convolutions of the folded model, with channels innermost in memory: x [B, C, T] lies as [B, T, C].

In this layout rows of inputs are rows of a matrix, and most of the codec's convolutions are one or two matrix
products on views of input and weight, which every processor's library does best. Weights lie with their input (for
`conv_transpose1d`: output) channels innermost, as `WeightNorm.fold` puts them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dac_fast.model import channels_last


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    """`torch.nn.functional.conv1d`. x: [B, in, T]; weight: [out, in, kernel]; result [B, out, T']."""
    _, channels, kernel = weight.shape
    if kernel == 1 or (channels == 1 and dilation == 1):
        # one product: a row is a position's channels, or the one channel's window
        padded = F.pad(x, (padding, padding)) if padding else x
        rows = (
            padded.transpose(1, 2)[:, ::stride]
            if kernel == 1
            else padded[:, 0].unfold(1, kernel, stride)
        )
        return F.linear(rows, weight.flatten(1), bias).transpose(1, 2)
    if kernel == 2 * stride and dilation == 1:
        return _conv1d_of_two_strides(x, weight, bias, stride, padding)
    return channels_last.conv1d(x, weight, bias, stride, padding, dilation)


def _conv1d_of_two_strides(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int
) -> Tensor:
    """Two products: output t sees the `stride` inputs of block t by the first half of the taps, t + 1 by the rest."""
    batch, channels, samples = x.shape
    size = (samples + 2 * padding) // stride - 1
    rows = F.pad(x.transpose(1, 2), (0, 0, padding, (size + 1) * stride - samples - padding))
    blocks = rows.reshape(batch, size + 1, stride * channels)
    # [stride in, out] each, views
    first, second = weight.permute(2, 1, 0).unflatten(0, (2, stride)).flatten(1, 2)
    y = torch.baddbmm(bias, blocks[:, :-1], first.expand(batch, -1, -1))
    return y.baddbmm_(blocks[:, 1:], second.expand(batch, -1, -1)).transpose(1, 2)


def conv_transpose1d(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """`torch.nn.functional.conv_transpose1d` of a kernel of two strides. weight: [in, out, kernel].

    Two products: block t of `stride` outputs sees input t through the first half of the taps, t - 1 through the rest.
    """
    batch, _, positions = x.shape
    outputs = weight.shape[1]
    rows = F.pad(x.transpose(1, 2), (0, 0, 1, 1))
    # [in, stride out] each, views
    first, second = weight.transpose(1, 2).unflatten(1, (2, stride)).flatten(2).unbind(1)
    y = torch.baddbmm(bias.repeat(stride), rows[:, 1:], first.expand(batch, -1, -1))
    y.baddbmm_(rows[:, :-1], second.expand(batch, -1, -1))
    length = (positions + 1) * stride
    return y.view(batch, length, outputs)[:, padding : length - padding].transpose(1, 2)
