"""What Triton's `tf32x3` products give, emulated on a CPU: convolutions as its kernel sums them.

A tensor core multiplies factors of 11 bits exactly and adds eight products to a sum at a time,
which it cuts off at 24 bits. Each factor is split into a rounded one and the rounded rest, and the
products of both but rest times rest are added, the small ones first, over `BLOCK` elements of the
sum. Those sums are then added up in float32 as usual.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

# BLOCK_K of the kernel's tiles; elements that one instruction sums.
BLOCK, STEP = 32, 8
# Output positions at a time.
ROWS = 8192


@contextlib.contextmanager
def emulated_convolutions() -> Iterator[None]:
    """Inside, `torch.nn.functional.conv1d` of one item computes as described above."""
    with mock.patch.object(F, "conv1d", _conv1d):
        yield


def _conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    out, channels, kernel = weight.shape
    times = F.pad(x[0].t(), (0, 0, padding, padding)).contiguous()
    windows = times.unfold(0, dilation * (kernel - 1) + 1, stride)[:, :, ::dilation]
    # The kernel's order: tap by tap, all channels of each.
    factors = weight.permute(2, 1, 0).reshape(kernel * channels, out)
    parts = [
        product(rows.transpose(1, 2).reshape(len(rows), kernel * channels), factors)
        for rows in windows.split(ROWS)
    ]
    return (torch.cat(parts) + bias).t()[None]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N], float32, by three products of TF32."""
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    total = a.new_zeros(a.shape[0], b.shape[1])
    for start in range(0, a.shape[1], BLOCK):
        sums = torch.zeros_like(total, dtype=torch.float64)
        for x, y in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
            for k in range(start, min(start + BLOCK, a.shape[1]), STEP):
                sums.addmm_(x[:, k : k + STEP].double(), y[k : k + STEP].double())
                # Cut off at float32's 24 bits, in place.
                sums.view(torch.int64).bitwise_and_(-1 << 29)
        total += sums.float()
    return total


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the sum of two numbers of 11 bits, but for what both lack."""
    high = rounded(x)
    return high, rounded(x - high)


def rounded(x: Tensor) -> Tensor:
    """float32 rounded to TF32's 11 bits, the nearest one and of two the larger."""
    return ((x.view(torch.int32) + (1 << 12)) & (-1 << 13)).view(torch.float32)
