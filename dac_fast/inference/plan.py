"""An encoder or decoder as a flat list of fused layers, in one precision, each run by what is fastest for its shape.

A fused layer is a convolution, or a whole residual unit, with all that surrounds it: bias, the Snake that follows, the
residual, the mask of ragged batches. It hands on what the next layer reads and nothing else: its result y, Snake of it,
or both (a residual unit adds the one to what it computes from the other).

There is more than one way to run a layer: the library's convolution followed by plain ops (cuDNN and cuBLAS on CUDA),
or the fused Triton kernels, and a residual unit is one kernel or two layers. Which one is fastest depends on the shape:
while `Choices.timing` is on, each new shape of each layer is timed, and every later input takes what was fastest for
the shape of the nearest size.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dac_fast import ops
from dac_fast.model import folded
from dac_fast.model.layers import Conv1d, ConvTranspose1d, ResidualUnit, Snake, zero_past
from dac_fast.ops.precision import float32_products


@dataclass
class Choices:
    """Which way each layer runs at which shape.

    Attributes:
        timing: whether shapes that were not seen before are timed.
        times: layer name -> shape [B, C, T] of the input -> way -> milliseconds.
    """

    timing: bool = False
    times: dict[str, dict[tuple, dict[str, float]]] = field(default_factory=dict)

    def run(self, layer: str, x: Tensor, ways: dict[str, Callable]):
        """Run the fastest of the layer's ways, the first of which is taken where none was timed."""
        if len(ways) == 1:
            return next(iter(ways.values()))()
        times = self.times.setdefault(layer, {})
        if self.timing and tuple(x.shape) not in times:
            import triton

            # two ways exist only where Triton can run one of them
            times[tuple(x.shape)] = {
                way: triton.testing.do_bench(call, warmup=2, rep=8) for way, call in ways.items()
            }
        if not times:
            return next(iter(ways.values()))()
        # of shapes of one size, this one itself
        nearest = min(
            times,
            key=lambda s: (abs(math.log(math.prod(s) / max(x.numel(), 1))), s != tuple(x.shape)),
        )
        return ways[min(ways, key=lambda way: times[nearest].get(way, math.inf))]()

    def table(self, precision: str) -> list[str]:
        """A line per layer and shape: every way's milliseconds, the fastest first."""
        rows = []
        for layer, shapes in self.times.items():
            for shape, times in shapes.items():
                ways = [f"{way} {times[way]:.4f} ms" for way in sorted(times, key=times.get)]
                rows.append(
                    f"{layer:28} {precision}  {' × '.join(map(str, shape)):18} {', '.join(ways)}"
                )
        return rows


class Convolution:
    """A convolution, then tanh, the mask, the residual, Snake: what of these there is.

    Args:
        name: of the module that it stands for.
        conv: its weights, and how it moves.
        dtype: of weights and activations; biases and alphas stay as they are.
        tf32: see `ops.conv1d`.
        choices: of the plan.
        alpha: of the Snake that follows.
        keep: whether anything reads the result before that Snake.
        tanh: whether one follows.
    """

    def __init__(
        self,
        name: str,
        conv: Conv1d | ConvTranspose1d,
        dtype,
        tf32: bool,
        choices: Choices,
        alpha,
        keep=True,
        tanh=False,
    ):
        self.name, self.tf32, self.choices, self.alpha, self.keep, self.tanh = (
            name,
            tf32,
            choices,
            alpha,
            keep,
            tanh,
        )
        self.transposed = isinstance(conv, ConvTranspose1d)
        self.op = "conv_transpose1d" if self.transposed else "conv1d"
        self.stride, self.padding, self.kernel_size = conv.stride, conv.padding, conv.kernel_size
        self.dilation = 1 if self.transposed else conv.dilation
        self.weight, self.bias = conv.normed_weight().detach().to(dtype), conv.bias.detach()
        self.bias_as_weight = self.bias.to(dtype)

    def output_length(self, length, padded: bool):
        """Positions that come out of `length` (an int or an int tensor, which is given back where it stays so)."""
        padding = self.padding if padded else 0
        if self.transposed:
            return length * self.stride + (self.stride - 2 * padding)
        change = 2 * padding - self.dilation * (self.kernel_size - 1) + self.stride - 1
        if self.stride == 1:
            return length + change if change else length
        return (length + change) // self.stride

    def __call__(
        self, y, snaked, lengths=None, padded=True, residual=None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The layer's result and Snake of it, from those of the layer before. lengths: those of the output."""
        x = y if snaked is None else snaked
        padding = self.padding if padded else 0
        arguments = [x, self.weight, self.bias, self.stride, padding]
        options = {"alpha": self.alpha, "lengths": lengths, "keep": self.keep, "tf32": self.tf32}
        if not self.transposed:
            arguments.append(self.dilation)
            options |= {"residual": residual, "tanh": self.tanh}
        ways = {}
        if ops.backend() != "triton":
            ways["library"] = functools.partial(self._by_library, x, padding, lengths, residual)
        # with the backend named, the op itself says what it cannot run
        if not ways or ops.on_triton(self.op, *arguments, **options):
            ways["triton"] = functools.partial(getattr(ops, self.op), *arguments, **options)
        return self.choices.run(self.name, x, ways)

    def _by_library(self, x, padding, lengths, residual):
        if self.transposed:
            y = folded.conv_transpose1d(x, self.weight, self.bias_as_weight, self.stride, padding)
        else:
            y = folded.conv1d(
                x, self.weight, self.bias_as_weight, self.stride, padding, self.dilation
            )
        # in place: a large tensor's first touch costs more than the computation
        if self.tanh:
            y = y.tanh_()
        if lengths is not None:
            y = zero_past(y, lengths)
        if residual is not None:
            y = y.add_(residual)
        return y if self.keep else None, None if self.alpha is None else ops.snake(y, self.alpha)


class Unit:
    """A residual unit, whose first Snake the layer before has computed: one kernel, or two convolutions."""

    def __init__(
        self, name: str, unit: ResidualUnit, dtype, tf32: bool, choices: Choices, alpha, keep=True
    ):
        self.name, self.choices, self.tf32 = name, choices, tf32
        _, dilated, middle, pointwise = unit.block
        self.first = Convolution(
            f"{name}.block.1", dilated, dtype, tf32, choices, middle.alpha.detach(), keep=False
        )
        self.second = Convolution(f"{name}.block.3", pointwise, dtype, tf32, choices, alpha, keep)

    def output_length(self, length, padded: bool):
        """As that of `Convolution`."""
        return self.first.output_length(length, padded)

    def __call__(self, x, snaked, lengths=None, padded=True) -> tuple[Tensor | None, Tensor | None]:
        """As that of `Convolution`."""
        first, second = self.first, self.second
        padding = first.padding if padded else 0
        weights = (first.weight, first.bias, first.alpha, second.weight, second.bias)
        arguments = (x, snaked, *weights, first.dilation, padding)
        options = {
            "alpha": second.alpha,
            "lengths": lengths,
            "keep": second.keep,
            "tf32": self.tf32,
        }
        ways = {"two layers": functools.partial(self._as_two, x, snaked, lengths, padded)}
        if ops.on_triton("residual_unit", *arguments, **options):
            fused = {"one kernel": functools.partial(ops.residual_unit, *arguments, **options)}
            ways = fused | ways if ops.backend() == "triton" else ways | fused
        return self.choices.run(self.name, x, ways)

    def _as_two(self, x, snaked, lengths, padded):
        # what lies past the lengths cannot spread through a kernel of 1, so the second mask is enough
        _, hidden = self.first(None, snaked, None, padded)
        crop = (x.shape[2] - hidden.shape[2]) // 2
        return self.second(None, hidden, lengths, padded, residual=x[..., crop : x.shape[2] - crop])


class Plan:
    """An encoder or decoder in one precision. Called like the module, with the same results but no gradients.

    Args:
        name: "encoder" or "decoder".
        module: the `Encoder` or `Decoder`, with Snake activations; its weights as they are now are used.
        dtype: of weights and activations.
        tf32: whether products of float32 may be rounded to TF32.
    """

    def __init__(self, name: str, module: nn.Module, dtype: torch.dtype, tf32: bool = False):
        self.dtype, self.tf32, self.choices = dtype, tf32, Choices()
        self.layers: list[Convolution | Unit] = []
        steps = list(_steps(name, module))
        followers = [step for _, step in steps[1:]] + [None]
        with torch.no_grad():
            for (path, step), following in zip(steps, followers, strict=True):
                if isinstance(step, (Snake, nn.Tanh)):
                    continue
                activation = (
                    following.block[0] if isinstance(following, ResidualUnit) else following
                )
                alpha = activation.alpha.detach() if isinstance(activation, Snake) else None
                common = (
                    path,
                    step,
                    dtype,
                    tf32,
                    self.choices,
                    alpha,
                    not isinstance(following, Snake),
                )
                if isinstance(step, ResidualUnit):
                    self.layers.append(Unit(*common))
                else:
                    self.layers.append(Convolution(*common, tanh=isinstance(following, nn.Tanh)))

    def __call__(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        padded: bool = True,
        watch: Callable | None = None,
    ):
        """x [B, C, T] of any float dtype to the module's output, of x's dtype; see `dac_fast.model.layers`.

        watch: called with the name of each layer and each tensor that it gives.
        """
        # channels innermost, as all that follows
        y, snaked = x.to(self.dtype).transpose(1, 2).contiguous().transpose(1, 2), None
        with float32_products(self.tf32):
            for layer in self.layers:
                if lengths is not None:
                    lengths = layer.output_length(lengths, padded)
                y, snaked = layer(y, snaked, lengths, padded)
                if watch is not None:
                    for result in (y, snaked):
                        if result is not None:
                            watch(layer.name, result)
        return y.to(x.dtype)


def _steps(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions, residual units, activations in the order in which a signal meets them."""
    if isinstance(module, (Conv1d, ConvTranspose1d, ResidualUnit, Snake, nn.Tanh)):
        yield name, module
        return
    if not isinstance(module, nn.Module) or not len(list(module.children())):
        raise ValueError(
            f"{name} is a {type(module).__name__}; accepted: convolutions, residual units, Snake, tanh"
        )
    for child_name, child in module.named_children():
        yield from _steps(f"{name}.{child_name}", child)
