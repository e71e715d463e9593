"""Convolutions with channels innermost in memory, and residual units, on the CPU: csrc/conv1d.cpp.

What follows a convolution in a codec (bias, tanh, mask, residual, Snake) is computed while its sums
are in the first-level cache. The bits of an item's result depend on its own inputs alone. Weights
are packed once for each version of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dac_kernels.conv1d import arguments_unsupported
from dac_kernels.native.compiled import call, extension, require, unsupported
from dac_kernels.native.memory import empty
from dac_kernels.per_version import PerVersion
from dac_kernels.residual_unit import KERNEL, unit_arguments_unsupported
from dac_kernels.tiles import channels_innermost, existing, output_length, pair

DTYPES = {"cpu": (torch.float32, torch.bfloat16)}


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    *,
    alpha: Tensor | None = None,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    tanh: bool = False,
    keep: bool = True,
    products: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """As `dac_kernels.conv1d.conv1d`, on the CPU, in float32 or bfloat16.

    In bfloat16 the number of input channels is even. `products` changes nothing.

    Raises:
        RuntimeError: see `conv1d_unsupported`.
    """
    tensors = (x, weight, bias, alpha, residual, lengths)
    made = _conv1d(*tensors, stride, padding, dilation, False, tanh, keep)
    return pair(made, keep)


def conv1d_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    *,
    alpha: Tensor | None = None,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    tanh: bool = False,
    keep: bool = True,
    products: str = "ieee",
) -> str | None:
    """Why `conv1d` cannot run on these arguments, or None."""
    tensors = (x, weight, bias, alpha, residual, lengths)
    return _unsupported(*tensors, stride, padding, dilation, False, tanh, keep)


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int = 0,
    *,
    alpha: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: bool = True,
    products: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """As `dac_kernels.conv1d.conv_transpose1d`, with what `conv1d` above says.

    Raises:
        RuntimeError: see `conv_transpose1d_unsupported`.
    """
    tensors = (x, weight, bias, alpha, None, lengths)
    return pair(_conv1d(*tensors, stride, padding, 1, True, False, keep), keep)


def conv_transpose1d_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int = 0,
    *,
    alpha: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: bool = True,
    products: str = "ieee",
) -> str | None:
    """Why `conv_transpose1d` cannot run on these arguments, or None."""
    tensors = (x, weight, bias, alpha, None, lengths)
    return _unsupported(*tensors, stride, padding, 1, True, False, keep)


def residual_unit(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    dilation: int,
    padding: int,
    *,
    alpha: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: bool = True,
    products: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """As `dac_kernels.residual_unit.residual_unit`, of any number of channels.

    The result has the bits that the two convolutions give.

    Raises:
        RuntimeError: see `residual_unit_unsupported`.
    """
    tensors = (x, snaked, weight1, bias1, alpha1, weight2, bias2, alpha, lengths)
    return pair(_residual_unit(*tensors, dilation, padding, keep), keep)


def residual_unit_unsupported(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    dilation: int,
    padding: int,
    *,
    alpha: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: bool = True,
    products: str = "ieee",
) -> str | None:
    """Why `residual_unit` cannot run on these arguments, or None."""
    tensors = (x, snaked, weight1, bias1, alpha1, weight2, bias2, alpha, lengths)
    return _unit_unsupported(*tensors, dilation, padding, keep)


def _processor_unsupported(x: Tensor) -> str | None:
    """Why the processor, or what is compiled for it, does not multiply with x, or None."""
    if reason := unsupported(x, DTYPES):
        return reason
    dtype = str(x.dtype).removeprefix("torch.")
    if lack := getattr(extension, f"conv1d_lacks_{dtype}")():
        return f"the processor lacks {lack}"
    if x.dtype == torch.bfloat16 and x.dim() == 3 and x.shape[1] % 2:
        return f"x has {x.shape[1]} channels; accepted in bfloat16: an even number"
    return None


def _unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    transposed: bool,
    tanh: bool,
    keep: bool,
) -> str | None:
    return _processor_unsupported(x) or arguments_unsupported(
        x, weight, bias, stride, padding, dilation, alpha, residual, lengths, keep, transposed
    )


def _unit_unsupported(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    dilation: int,
    padding: int,
    keep: bool,
) -> str | None:
    tensors = (x, snaked, weight1, bias1, alpha1, weight2, bias2)
    return _processor_unsupported(x) or unit_arguments_unsupported(
        *tensors, dilation, padding, alpha, lengths, keep
    )


def _panels(weight: Tensor) -> Tensor:
    """A weight [columns, inputs, taps] in the order of csrc/conv1d.h."""
    columns, inputs, _ = weight.shape
    panels = -(-columns // extension.panel)
    rows = F.pad(weight.permute(2, 1, 0), (0, panels * extension.panel - columns))
    packed: Tensor = rows.unflatten(2, (panels, extension.panel)).permute(2, 0, 1, 3)
    if weight.dtype == torch.bfloat16:
        packed = packed.unflatten(2, (inputs // 2, 2)).transpose(3, 4)
    return packed.contiguous()


def _per_column(vector: Tensor, columns: int) -> Tensor:
    """A value for each channel to float32 for each column, and zeros up to a whole panel."""
    values = vector.flatten().float().repeat(columns // vector.numel())
    return F.pad(values, (0, -columns % extension.panel))


def _pack(weights: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """What the extension reads of a layer: its weight, bias and, where there is one, alpha."""
    (weight,) = weights
    return [_panels(weight), *(_per_column(vector, weight.shape[0]) for vector in vectors)]


def _pack_transposed(weights: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """As `_pack`; columns are (position, channel), taps are on the inputs before and at t."""
    (weight,) = weights
    at, before = weight.permute(2, 1, 0).unflatten(0, (2, -1)).flatten(1, 2).unbind(0)
    return _pack([torch.stack([before, at], dim=2)], vectors)


_packed, _packed_transposed = PerVersion(_pack), PerVersion(_pack_transposed)


class _Outputs(NamedTuple):
    """Memory [B, rows, columns] for c and snake(c), where they are wanted."""

    c: Tensor | None
    snaked: Tensor | None


def _outputs(x: Tensor, rows: int, columns: int, keep: bool, snake: bool) -> _Outputs:
    def made(wanted: bool) -> Tensor | None:
        return empty(x, x.shape[0], rows, columns) if wanted else None

    return _Outputs(made(keep), made(snake))


def _results(outputs: _Outputs, channels: int, crop: int) -> list[Tensor]:
    """Outputs as [B, channels, T], without `crop` positions at either end."""

    def cropped(rows: Tensor) -> Tensor:
        # Not -1: an empty batch has no size to tell it by.
        batch, count, columns = rows.shape
        flat = rows.view(batch, count * columns // channels, channels)
        return flat[:, crop : flat.shape[1] - crop].transpose(1, 2)

    return [cropped(output) for output in existing(*outputs)]


def _rows(tensor: Tensor | None) -> extension.Rows:
    """Rows of a tensor [B, rows, columns]."""
    if tensor is None:
        return extension.Rows(0, 0, 0)
    return extension.Rows(tensor.data_ptr(), tensor.stride(0), tensor.shape[2])


def _layer(
    packed: list[Tensor],
    lengths: Tensor | None,
    tanh: bool,
    residual: Tensor | None,
    outputs: _Outputs,
) -> extension.ConvLayer:
    weight, bias, *alphas = (tensor.data_ptr() for tensor in packed)
    alpha = alphas[0] if alphas else 0
    added = None if residual is None else residual.transpose(1, 2)
    return extension.ConvLayer(
        weight,
        bias,
        alpha,
        0 if lengths is None else lengths.data_ptr(),
        tanh,
        _rows(added),
        *map(_rows, outputs),
    )


def _product_size(
    x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, transposed: bool
) -> tuple[int, int]:
    """Rows and columns of the product."""
    if transposed:
        return x.shape[2] + 1, stride * weight.shape[1]
    rows = output_length(x.shape[2], weight.shape[2], stride, padding, dilation, False)
    return rows, weight.shape[0]


@torch.library.custom_op("dac_native::conv1d", mutates_args=())
def _conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    transposed: bool,
    tanh: bool,
    keep: bool,
) -> list[Tensor]:
    """c, if wanted, and snake(c), if there is an alpha."""
    options = (stride, padding, dilation, transposed, tanh, keep)
    require("conv1d", _unsupported(x, weight, bias, alpha, residual, lengths, *options))
    if tanh:
        # The result is in float32, as all of a layer is here.
        x, weight = x.float(), weight.float()
        residual = None if residual is None else residual.float()
    x = channels_innermost(x)
    residual = None if residual is None else channels_innermost(residual)
    lengths = None if lengths is None else lengths.contiguous()
    batch, inputs, positions = x.shape
    rows, columns = _product_size(x, weight, stride, padding, dilation, transposed)
    outputs = _outputs(x, rows, columns, keep, alpha is not None)
    packed = (_packed_transposed if transposed else _packed)([weight], existing(bias, alpha))
    if transposed:
        geometry, channels, crop = (2, 1, 1, 1), weight.shape[1], padding
    else:
        geometry, channels, crop = (weight.shape[2], stride, dilation, padding), columns, 0
    sizes = (batch, positions, inputs, rows, columns)
    shape = extension.ConvShape(*sizes, *geometry, channels, crop)
    layer = _layer(packed, lengths, tanh, residual, outputs)
    call("conv1d", x, [x.dtype], shape, _rows(x.transpose(1, 2)), layer)
    return _results(outputs, channels, crop)


@_conv1d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    transposed: bool,
    tanh: bool,
    keep: bool,
) -> list[Tensor]:
    rows, columns = _product_size(x, weight, stride, padding, dilation, transposed)
    x = x.float() if tanh else x
    outputs = _outputs(x, rows, columns, keep, alpha is not None)
    return _results(outputs, *((weight.shape[1], padding) if transposed else (columns, 0)))


@torch.library.custom_op("dac_native::residual_unit", mutates_args=())
def _residual_unit(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    dilation: int,
    padding: int,
    keep: bool,
) -> list[Tensor]:
    """c, if wanted, and snake(c), if there is an alpha."""
    tensors = (x, snaked, weight1, bias1, alpha1, weight2, bias2, alpha, lengths)
    require("residual_unit", _unit_unsupported(*tensors, dilation, padding, keep))
    x, snaked = channels_innermost(x), channels_innermost(snaked)
    lengths = None if lengths is None else lengths.contiguous()
    batch, channels, positions = x.shape
    crop = 3 * dilation - padding
    rows = positions - 2 * crop
    outputs = _outputs(x, rows, channels, keep, alpha is not None)
    # Named, since the extension reads their memory.
    packed1, packed2 = (
        _packed([weight1], [bias1, alpha1]),
        _packed([weight2], existing(bias2, alpha)),
    )
    first = _layer(packed1, None, False, None, _Outputs(None, None))
    second = _layer(packed2, lengths, False, x[..., crop : positions - crop], outputs)
    sizes = (batch, positions, channels, rows, channels)
    shape = extension.ConvShape(*sizes, KERNEL, 1, dilation, padding, channels, 0)
    call("residual_unit", x, [x.dtype], shape, _rows(snaked.transpose(1, 2)), first, second)
    return _results(outputs, channels, 0)


@_residual_unit.register_fake
def _(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    dilation: int,
    padding: int,
    keep: bool,
) -> list[Tensor]:
    rows = x.shape[2] - 2 * (3 * dilation - padding)
    outputs = _outputs(x, rows, x.shape[1], keep, alpha is not None)
    return _results(outputs, x.shape[1], 0)
