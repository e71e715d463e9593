"""Convolutions of the folded model, with channels innermost: x [B, C, T] lies as [B, T, C].

In this layout the positions of a signal are rows of a matrix. Most of the codec's convolutions are
then one or two matrix products on views of input and weight, which is what every processor's
library does best. Weights have their input channels innermost (those of `conv_transpose1d` their
output channels), as `WeightNorm.fold` leaves them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dac_fast.model import channels_last


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    """`torch.nn.functional.conv1d` of x [B, in, T] and weight [out, in, kernel]: [B, out, T']."""
    channels, kernel = weight.shape[1:]
    if not is_product(weight, stride, dilation):
        return channels_last.conv1d(x, weight, bias, stride, padding, dilation)
    if kernel != 1 and channels != 1:
        return _conv1d_of_two_strides(x, weight, bias, stride, padding)
    # One product. A row holds all channels of one position, or one window of the only channel.
    padded = F.pad(x, (padding, padding)) if padding else x
    if kernel == 1:
        rows = padded.transpose(1, 2)[:, ::stride]
    else:
        rows = padded[:, 0].unfold(1, kernel, stride)
    return F.linear(rows, weight.flatten(1), bias).transpose(1, 2)


def is_product(weight: Tensor, stride: int, dilation: int) -> bool:
    """Whether `conv1d` by such a weight [out, in, kernel] is one or two matrix products."""
    channels, kernel = weight.shape[1:]
    return kernel == 1 or (dilation == 1 and (channels == 1 or kernel == 2 * stride))


def _conv1d_of_two_strides(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int
) -> Tensor:
    """Two products on the input cut into blocks of `stride` positions.

    Output t is the first half of the taps on block t plus the second half on block t + 1.
    """
    batch, channels = x.shape[:2]
    size = (x.shape[2] + 2 * padding) // stride - 1
    missing = (size + 1) * stride - x.shape[2] - padding
    rows = F.pad(x.transpose(1, 2), (0, 0, padding, missing))
    blocks = rows.reshape(batch, size + 1, stride * channels)
    # The halves of the taps, each a view [stride in, out].
    first, second = weight.permute(2, 1, 0).reshape(2, stride * channels, -1)
    y = torch.baddbmm(bias, blocks[:, :-1], first.expand(batch, -1, -1))
    return y.baddbmm_(blocks[:, 1:], second.expand(batch, -1, -1)).transpose(1, 2)


def conv_transpose1d(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """`torch.nn.functional.conv_transpose1d` by weight [in, out, kernel], a kernel of two strides.

    Two products: block t of `stride` outputs is the first half of the taps on input t plus the
    second half on input t - 1.
    """
    batch, positions = x.shape[0], x.shape[2]
    outputs = weight.shape[1]
    rows = F.pad(x.transpose(1, 2), (0, 0, 1, 1))
    # The halves of the taps, each a view [in, stride out].
    first, second = weight.transpose(1, 2).unflatten(1, (2, stride)).flatten(2).unbind(1)
    y = torch.baddbmm(bias.repeat(stride), rows[:, 1:], first.expand(batch, -1, -1))
    y.baddbmm_(rows[:, :-1], second.expand(batch, -1, -1))
    length = (positions + 1) * stride
    return y.view(batch, length, outputs)[:, padding : length - padding].transpose(1, 2)
