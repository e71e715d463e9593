"""The codec's layers on streams: blocks of a signal in, blocks out, each position of each layer computed once.

A convolution that sees its input on both sides runs late instead: it keeps the last inputs that it still needs, and
of every block of inputs it gives the outputs that these complete. That is the padded convolution's output, delayed by
its right reach; a residual unit delays its input by as much before it adds it. The delays of all layers add up to the
look-ahead of encoder or decoder.

Where a signal has no positions, the whole signal's layers see zeros. A stream's layers have computed something there,
since every layer has a bias, and each convolution that looks around itself puts zeros in its place. So it must know
which positions a block holds (`Span`). Once a stream is past its beginning, and before its end is known, all are the
signal's: nothing is replaced, and a block is one computation of fixed shapes, on states that stay where they are in
memory.

B: streams, each at its own position. `active`: booleans [B]; the states of the other streams stay as they are; None:
all are active.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dac_fast.model.layers import Block, Chain, Conv1d, ConvTranspose1d, ResidualUnit


class Span(NamedTuple):
    """Which positions of their signals a block x [B, C, T] holds; None in its place: all of it are such positions.

    Attributes:
        first: index of the block's first position, negative before the signal: int64 [B], or a number.
        length: positions of the signal, likewise.
    """

    first: Tensor | int
    length: Tensor | int

    def mask(self, x: Tensor) -> Tensor:
        """x with zeros where it holds no positions of the signals."""
        index = self.first[:, None] + torch.arange(x.shape[-1], device=x.device)
        return torch.where(((index >= 0) & (index < self.length[:, None]))[:, None], x, 0)


class Tail:
    """The last `size` positions of a stream x [B, C, T], zeros at first: `kept` [B, size, C], never another tensor.

    Channels lie innermost, as the folded convolutions like it.
    """

    def __init__(self, size: int, channels: int, batch: int, like: Tensor):
        self.kept = torch.zeros(batch, size, channels, dtype=like.dtype, device=like.device)

    def join(self, x: Tensor, active: Tensor | None) -> Tensor:
        """x [B, C, T] with the kept positions before it; its last ones are kept now."""
        joined = torch.cat([self.kept, x.transpose(1, 2)], dim=1)
        last = joined[:, x.shape[-1] :]
        self.kept.copy_(last if active is None else torch.where(active[:, None, None], last, self.kept))
        return joined.transpose(1, 2)


class StreamedConv:
    """`Conv1d` or `ConvTranspose1d` of a stream: of a block of inputs, the outputs that it completes.

    Attributes:
        tails: the states, as of every streamed layer.
    """

    def __init__(self, conv: Conv1d | ConvTranspose1d, batch: int):
        self.conv, self.transposed = conv, isinstance(conv, ConvTranspose1d)
        # a transposed convolution has a kernel of two strides: every output sees two inputs
        self.context = 1 if self.transposed else conv.dilation * (conv.kernel_size - 1) + 1 - conv.stride
        weight = conv.weight if conv.folded else conv.weight_v
        channels = weight.shape[0 if self.transposed else 1]
        self.tails = [Tail(self.context, channels, batch, weight)] if self.context else []

    def span(self, span: Span) -> Span:
        """What the outputs are, where the inputs are `span`."""
        conv = self.conv
        if self.transposed:
            first = span.first * conv.stride - conv.padding
        else:
            first = (span.first - self.context + conv.padding) // conv.stride
        return Span(first, conv.output_length(span.length))

    def first_input(self, first: int) -> int:
        """The opposite, for the first position and a `Conv1d`: where the inputs begin."""
        return first * self.conv.stride - self.conv.padding + self.context

    def __call__(self, x: Tensor, span: Span | None, active: Tensor | None) -> tuple[Tensor, Span | None]:
        """A block x [B, C, T], which is `span`, to the outputs that it completes, and what they are."""
        for tail in self.tails:
            x = tail.join(x if span is None else span.mask(x), active)
        y = self.conv(x, padded=False)
        if self.transposed:
            # the first `stride` outputs lack the input before the kept one, the last ones lack the next input
            y = y[..., self.conv.stride : -self.conv.stride]
        return y, None if span is None else self.span(span)


class StreamedChain:
    """`Chain` of a stream; methods as those of `StreamedConv`."""

    def __init__(self, chain: Chain, batch: int):
        self.layers = [_streamed(layer, batch) for layer in chain]
        self.moving = [layer for layer in self.layers if not isinstance(layer, nn.Module)]
        self.tails = [tail for layer in self.moving for tail in layer.tails]

    def span(self, span: Span) -> Span:  # noqa: D102
        for layer in self.moving:
            span = layer.span(span)
        return span

    def first_input(self, first: int) -> int:  # noqa: D102
        for layer in reversed(self.moving):
            first = layer.first_input(first)
        return first

    def __call__(self, x: Tensor, span: Span | None, active: Tensor | None) -> tuple[Tensor, Span | None]:  # noqa: D102
        for layer in self.layers:
            if isinstance(layer, nn.Module):
                x = layer(x)
            else:
                x, span = layer(x, span, active)
        return x, span


class StreamedResidualUnit(StreamedChain):
    """`ResidualUnit` of a stream: the input waits for the convolutions before it is added."""

    def __init__(self, unit: ResidualUnit, batch: int):
        super().__init__(unit.block, batch)
        like = self.tails[0].kept
        self.waiting = Tail(-self.span(Span(0, 0)).first, like.shape[2], batch, like)
        self.tails.append(self.waiting)

    def __call__(self, x: Tensor, span: Span | None, active: Tensor | None) -> tuple[Tensor, Span | None]:  # noqa: D102
        added = self.waiting.join(x, active)[..., : x.shape[-1]]
        y, span = super().__call__(x, span, active)
        return added + y, span


def _streamed(layer: nn.Module, batch: int):
    """The layer for that many streams; the module itself where it looks at one position at a time."""
    if isinstance(layer, (Conv1d, ConvTranspose1d)):
        return StreamedConv(layer, batch)
    if isinstance(layer, ResidualUnit):
        return StreamedResidualUnit(layer, batch)
    return StreamedChain(layer.block, batch) if isinstance(layer, Block) else layer
