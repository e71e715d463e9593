"""The codec's layers on streams: blocks of a signal in, blocks out, every position computed once.

A layer that sees its input on both sides runs late: it keeps the last inputs that it still needs,
and gives the outputs that a block of inputs completes. That is the padded layer's output, delayed
by its right reach. The delays of all layers add up to the look-ahead of encoder or decoder.

Outside the signal, whole-file layers see zeros. Biases would leak in there, so each layer masks by
`Span`, which tells the positions of a block that are the signal's. Once a stream is past its
beginning, and before its end is known, all positions are the signal's and nothing is masked: a
block is then one computation of fixed shapes, on states that stay where they are in memory.

The layers are the modules, or the fused ones of a `Plan`, which hand on two tensors: y, and Snake
of y, each None where the next layer does not read it. Modules hand on y alone.

Shapes: B streams, each at its own position. `active`: booleans [B], or the indices of the streams
that a block holds, which then has fewer items; the states of the other streams stay as they are.
None: all are active.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dac_fast.inference.choices import Choices, Result
from dac_fast.inference.plan import Convolution, Length, Plan, Unit
from dac_fast.model.layers import Block, Chain, Conv1d, ConvTranspose1d, ResidualUnit
from dac_fast.ops.precision import float32_products

# Layers whose outputs depend on several positions, or are at other positions; not an activation.
Moving = Conv1d | ConvTranspose1d | ResidualUnit | Convolution | Unit


class Span(NamedTuple):
    """Which positions of their signals a block x [B, C, T] holds; None in its place: all are such.

    Attributes:
        first: index of the block's first position, negative before the signal: int64 [B].
        length: positions of the signal, int64 [B].
    """

    first: Tensor
    length: Tensor

    def of(self, rows: Tensor | slice) -> "Span":
        """The span of those items of the block."""
        return Span(self.first[rows], self.length[rows])

    def mask(self, x: Tensor) -> Tensor:
        """x with zeros where it holds no positions of the signals."""
        index = self.first[:, None] + torch.arange(x.shape[-1], device=x.device)
        return torch.where(((index >= 0) & (index < self.length[:, None]))[:, None], x, 0)


class StreamedLayer:
    """A convolution or residual unit of streams: gives the outputs that a block completes.

    Args:
        layer: a module, or a layer of a `Plan`.
        batch: streams.
    Attributes:
        tails: at most one tensor [B, inputs, context, C], always the same one: the last `context`
            positions of the inputs, zeros at first. Channels lie innermost, as folded and fused
            convolutions like it. Without context there is none.
    """

    def __init__(self, layer: Moving, batch: int):
        self.layer = layer
        # A residual unit looks around itself with its first convolution only.
        conv: Conv1d | ConvTranspose1d | Convolution
        if isinstance(layer, ResidualUnit):
            dilated = layer.block[1]
            assert isinstance(dilated, Conv1d)
            conv = dilated
        elif isinstance(layer, Unit):
            conv = layer.first
        else:
            conv = layer
        self.stride, self.padding = conv.stride, conv.padding
        if isinstance(conv, Convolution):
            self.transposed, weight = conv.transposed, conv.weight
        else:
            self.transposed = isinstance(conv, ConvTranspose1d)
            weight = conv.weight if conv.folded else conv.weight_v
        if isinstance(conv, ConvTranspose1d) or self.transposed:
            # The kernel is two strides long: every output sees two inputs.
            self.context = 1
        else:
            self.context = conv.dilation * (conv.kernel_size - 1) + 1 - conv.stride
        # A fused unit reads y and Snake of y.
        inputs = 2 if isinstance(layer, Unit) else 1
        channels = weight.shape[0 if self.transposed else 1]
        size = (batch, inputs, self.context, channels)
        self.tails = [weight.new_zeros(size)] if self.context else []

    def first_output(self, first: Length) -> Length:
        """Where the outputs of a block begin whose inputs begin at `first`."""
        if self.transposed:
            return first * self.stride - self.padding
        late = first - (self.context - self.padding)
        return late // self.stride if self.stride > 1 else late

    def first_input(self, first: int) -> int:
        """The opposite, but for transposed convolutions: where a block must begin."""
        return first * self.stride - self.padding + self.context

    def span(self, span: Span) -> Span:
        """The span of a block's outputs, where the inputs are `span`."""
        length = self.layer.output_length(span.length, True)
        return Span(self.first_output(span.first), length)

    def __call__(
        self, y: Tensor | None, snaked: Tensor | None, span: Span | None, active: Tensor | None
    ) -> Result:
        """A block y, snaked [B, C, T], which holds `span`, to the outputs that it completes."""
        inputs = [x for x in (y, snaked) if x is not None]
        for kept in self.tails:
            blocks = [(x if span is None else span.mask(x)).transpose(1, 2) for x in inputs]
            # All inputs in one tensor: a step is short, so few kernels matter more than few bytes.
            rows = held_rows(active)
            pieces = [piece for i, block in enumerate(blocks) for piece in (kept[rows, i], block)]
            joined = torch.cat(pieces, dim=1).unflatten(1, (len(inputs), -1))
            last = joined[:, :, -self.context :]
            if rows is active or active is None:
                kept[rows] = last
            else:
                torch.where(active[:, None, None, None], last, kept, out=kept)
            inputs = [joined[:, i].transpose(1, 2) for i in range(len(inputs))]
        outputs: Result
        if isinstance(self.layer, Convolution | Unit):
            first, second = (*inputs, None)[:2]
            outputs = self.layer(first, second, padded=False)
        else:
            outputs = self.layer(*inputs, padded=False), None
        if not self.transposed:
            return outputs
        # The first `stride` outputs lack the input before the kept one, the last ones the next.
        y, snaked = (x if x is None else x[..., self.stride : -self.stride] for x in outputs)
        return y, snaked


class StreamedChain:
    """An encoder's or decoder's layers for streams, asked and called as a `StreamedLayer` is.

    Args:
        chain: the modules, or a plan of fused layers.
        batch: streams.
    Attributes:
        choices: of the plan; None for modules.
        tails: of all layers.
    """

    def __init__(self, chain: Chain | Plan, batch: int):
        self.choices: Choices | None = None
        # None: as the user has set the switches.
        self._tf32: bool | None = None
        layers: Iterable[Convolution | Unit | nn.Module]
        if isinstance(chain, Plan):
            layers = chain.layers
            self.choices, self._tf32 = chain.choices, chain.products == "tf32"
        else:
            layers = _flat(chain)
        self._layers = [
            StreamedLayer(layer, batch) if isinstance(layer, Moving) else layer for layer in layers
        ]
        self._moving = [layer for layer in self._layers if isinstance(layer, StreamedLayer)]
        self.tails = [kept for layer in self._moving for kept in layer.tails]

    def set_tails(self, tails: Iterable[Tensor]) -> None:
        """Go on from these tails, of any batch; the chain writes to them from now on."""
        self.tails = list(tails)
        rest = iter(self.tails)
        for layer in self._moving:
            layer.tails = [next(rest) for _ in layer.tails]

    def first_output(self, first: Length) -> Length:
        """Where the outputs of a block begin whose inputs begin at `first`."""
        for layer in self._moving:
            first = layer.first_output(first)
        return first

    def first_input(self, first: int) -> int:
        """The opposite, for an encoder: where a block must begin."""
        for layer in reversed(self._moving):
            first = layer.first_input(first)
        return first

    def __call__(
        self, x: Tensor, span: Span | None, active: Tensor | None
    ) -> tuple[Tensor, Span | None]:
        """A block x [B, C, T] to the outputs that it completes, of x's dtype, and their span."""
        y: Tensor | None = x.to(self.tails[0].dtype)
        snaked: Tensor | None = None
        switches = contextlib.nullcontext() if self._tf32 is None else float32_products(self._tf32)
        with switches:
            for layer in self._layers:
                if isinstance(layer, StreamedLayer):
                    y, snaked = layer(y, snaked, span, active)
                    span = None if span is None else layer.span(span)
                else:
                    y = layer(y)
        assert y is not None
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
