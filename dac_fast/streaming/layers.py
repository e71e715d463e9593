"""The codec's layers on streams: blocks of a signal in, blocks out, each position of each layer computed once.

A layer that sees its input on both sides runs late instead: it keeps the last inputs that it still needs, and of every
block of inputs it gives the outputs that these complete. That is the padded layer's output, delayed by its right
reach. The delays of all layers add up to the look-ahead of encoder or decoder.

Where a signal has no positions, the whole signal's layers see zeros. A stream's layers have computed something there,
since every layer has a bias, and each layer that looks around itself puts zeros in its place. So it must know which
positions a block holds (`Span`). Once a stream is past its beginning, and before its end is known, all are the
signal's: nothing is replaced, and a block is one computation of fixed shapes, on states that stay where they are in
memory.

The layers are the modules, or the fused ones of a `Plan`, which hand on two tensors: y, and Snake of it, each None
where the next layer does not read it. Modules hand on y alone.

B: streams, each at its own position. `active`: booleans [B], or the indices of the streams that a block holds, which
then has fewer items; the states of the other streams stay as they are. None: all are active.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dac_fast.inference.plan import Plan, Unit
from dac_fast.model.layers import Block, Chain, Conv1d, ConvTranspose1d, ResidualUnit
from dac_fast.ops.precision import float32_products


class Span(NamedTuple):
    """Which positions of their signals a block x [B, C, T] holds; None in its place: all of it are such positions.

    Attributes:
        first: index of the block's first position, negative before the signal: int64 [B], or a number.
        length: positions of the signal, likewise.
    """

    first: Tensor | int
    length: Tensor | int

    def of(self, rows: Tensor | slice) -> "Span":
        """The span of those items of the block."""
        return Span(self.first[rows], self.length[rows])

    def mask(self, x: Tensor) -> Tensor:
        """x with zeros where it holds no positions of the signals."""
        index = self.first[:, None] + torch.arange(x.shape[-1], device=x.device)
        return torch.where(((index >= 0) & (index < self.length[:, None]))[:, None], x, 0)


class StreamedLayer:
    """A convolution or residual unit of a stream: of a block of inputs, the outputs that it completes.

    It keeps the last `context` positions of its inputs, zeros at first.

    Args:
        layer: a module, or a layer of a `Plan`.
        batch: streams.
    Attributes:
        tails: [kept], kept [B, inputs, context, C] and never another tensor; empty without context. Channels lie
            innermost, as folded and fused convolutions like it.
    """

    def __init__(self, layer, batch: int):
        self.layer, self.fused = layer, not isinstance(layer, nn.Module)
        inputs = 1
        # a residual unit looks around itself with its first convolution only, and a fused one reads y and Snake of y
        if isinstance(layer, ResidualUnit):
            conv = layer.block[1]
        elif isinstance(layer, Unit):
            conv, inputs = layer.first, 2
        else:
            conv = layer
        self.transposed = conv.transposed if self.fused else isinstance(conv, ConvTranspose1d)
        self.stride, self.padding = conv.stride, conv.padding
        # a transposed convolution has a kernel of two strides: every output sees two inputs
        self.context = (
            1 if self.transposed else conv.dilation * (conv.kernel_size - 1) + 1 - conv.stride
        )
        weight = conv.weight if self.fused or conv.folded else conv.weight_v
        size = batch, inputs, self.context, weight.shape[0 if self.transposed else 1]
        self.tails = [weight.new_zeros(size)] if self.context else []

    def span(self, span: Span) -> Span:
        """What the outputs are, where the inputs are `span`."""
        if self.transposed:
            first = span.first * self.stride - self.padding
        else:
            first = (span.first - self.context + self.padding) // self.stride
        return Span(first, self.layer.output_length(span.length, True))

    def first_input(self, first: int) -> int:
        """The opposite, for the first position and no transposed convolution: where the inputs begin."""
        return first * self.stride - self.padding + self.context

    def __call__(self, y, snaked, span: Span | None, active: Tensor | None):
        """A block y, snaked [B, C, T], which is `span`, to the outputs that it completes, and what they are."""
        inputs = [x for x in (y, snaked) if x is not None]
        for kept in self.tails:
            blocks = [(x if span is None else span.mask(x)).transpose(1, 2) for x in inputs]
            # the inputs in one tensor: where a step is short, what counts is how few kernels it launches
            rows = held_rows(active)
            pieces = [piece for i, block in enumerate(blocks) for piece in (kept[rows, i], block)]
            joined = torch.cat(pieces, dim=1).unflatten(1, (len(inputs), -1))
            last = joined[:, :, -self.context :]
            if rows is active or active is None:
                kept[rows] = last
            else:
                torch.where(active[:, None, None, None], last, kept, out=kept)
            inputs = [joined[:, i].transpose(1, 2) for i in range(len(inputs))]
        if self.fused:
            outputs = self.layer(*inputs, *[None] * (2 - len(inputs)), padded=False)
        else:
            outputs = self.layer(*inputs, padded=False), None
        if self.transposed:
            # the first `stride` outputs lack the input before the kept one, the last ones lack the next input
            outputs = [x if x is None else x[..., self.stride : -self.stride] for x in outputs]
        return *outputs, None if span is None else self.span(span)


class StreamedChain:
    """An encoder's or decoder's layers for streams, called and asked as `StreamedLayer` is.

    Args:
        chain: the modules, or a plan of fused layers.
        batch: streams.
    Attributes:
        tails: of all layers.
    """

    def __init__(self, chain: Chain | Plan, batch: int):
        plan = chain if isinstance(chain, Plan) else None
        self.choices, self.tf32 = (plan.choices, plan.tf32) if plan else (None, None)
        moving = (Conv1d, ConvTranspose1d, ResidualUnit)
        self.layers = [
            layer
            if isinstance(layer, nn.Module) and not isinstance(layer, moving)
            else StreamedLayer(layer, batch)
            for layer in (plan.layers if plan else _flat(chain))
        ]
        self.moving = [layer for layer in self.layers if isinstance(layer, StreamedLayer)]
        self.tails = [kept for layer in self.moving for kept in layer.tails]

    def span(self, span: Span) -> Span:  # noqa: D102
        return functools.reduce(lambda span, layer: layer.span(span), self.moving, span)

    def first_input(self, first: int) -> int:  # noqa: D102
        return functools.reduce(
            lambda first, layer: layer.first_input(first), reversed(self.moving), first
        )

    def __call__(
        self, x: Tensor, span: Span | None, active: Tensor | None
    ) -> tuple[Tensor, Span | None]:
        """A block x [B, C, T] to the outputs that it completes, of x's dtype, and what they are."""
        y, snaked = x.to(self.tails[0].dtype), None
        with contextlib.nullcontext() if self.tf32 is None else float32_products(self.tf32):
            for layer in self.layers:
                if isinstance(layer, StreamedLayer):
                    y, snaked, span = layer(y, snaked, span, active)
                else:
                    y = layer(y)
        return y.to(x.dtype), span


def held_rows(active: Tensor | None) -> Tensor | slice:
    """The streams that a block holds: all of them, or those whose indices `active` has."""
    return slice(None) if active is None or active.dtype == torch.bool else active


def _flat(chain: Chain) -> Iterator[nn.Module]:
    """Convolutions, residual units and activations in the order in which a signal meets them."""
    for layer in chain:
        if isinstance(layer, Block) and not isinstance(layer, ResidualUnit):
            yield from _flat(layer.block)
        else:
            yield layer
