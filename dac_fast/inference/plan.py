"""An encoder or decoder as a flat list of fused layers, in one precision.

A fused layer is a convolution with optional tanh, mask, residual and Snake, in this order, or a
whole residual unit. It computes what the next layer reads and nothing else: its result y, Snake of
y, or both. (A residual unit reads both: it adds y to what it computes from Snake of y.)

A layer can run in several ways, of which `Choices` takes one: by the library (cuDNN and cuBLAS on
CUDA, oneDNN and MKL on the CPU) followed by plain ops, on CUDA both as matrix products and as a
convolution in two dimensions, or by a fused kernel (Triton's or cuDNN's on CUDA, the compiled one
on the CPU); a residual unit as one kernel or as two layers.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import TypeVar

import torch
from dac_kernels import native
from torch import Tensor, nn

from dac_fast import ops
from dac_fast.inference.choices import CONV2D, CUDNN, LIBRARY, Choices, Result, Way
from dac_fast.inference.cudnn_graphs import CudnnGraphs
from dac_fast.model import channels_last, folded
from dac_fast.model.frames import filled_up, whole_frames
from dac_fast.model.layers import Conv1d, ConvTranspose1d, ResidualUnit, Snake, zero_past
from dac_fast.ops.precision import float32_products
from dac_fast.spectral import full_precision

# What a call on the CPU leaves for the next one: enough for three seconds of float32 at 44khz.
KEPT_BYTES = 256 << 20

# A number of positions, or one per item of a batch.
Length = TypeVar("Length", int, Tensor)


def _constant(tensor: Tensor) -> Tensor:
    """The tensor without its gradient, and with the count of changes that packed copies go by."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


class Convolution:
    """A convolution with optional tanh, mask, residual and Snake, in this order.

    Args:
        name: of the module that the layer stands for.
        conv: the module; its weights as they are now are used.
        dtype: of weights and activations; biases and alphas stay as they are.
        products: of float32, see `ops.conv1d`.
        choices: of the plan.
        alpha: [1, out, 1], of the Snake that follows.
        keep: whether anything reads the result before that Snake.
        tanh: whether a tanh follows.
    """

    def __init__(
        self,
        name: str,
        conv: Conv1d | ConvTranspose1d,
        dtype: torch.dtype,
        products: str,
        choices: Choices,
        alpha: Tensor | None,
        keep: bool = True,
        tanh: bool = False,
    ):
        self.name = name
        self.products = products
        self.choices = choices
        self.alpha = alpha
        self.keep = keep
        self.tanh = tanh
        self.transposed = isinstance(conv, ConvTranspose1d)
        self.kernel_size = conv.kernel_size
        self.stride = conv.stride
        self.padding = conv.padding
        self.dilation = conv.dilation if isinstance(conv, Conv1d) else 1
        self.weight = _constant(conv.normed_weight()).to(dtype)
        self.bias = _constant(conv.bias)
        self._bias_as_weight = self.bias.to(dtype)
        self._cudnn_graphs = CudnnGraphs()
        # Whether the library computes it by products, rather than by a convolution.
        self._products = self.transposed or folded.is_product(
            self.weight, self.stride, self.dilation
        )

    def output_length(self, length: Length, padded: bool) -> Length:
        """Positions that come out of `length`; the very tensor where the number stays the same."""
        padding = self.padding if padded else 0
        if self.transposed:
            scaled = length * self.stride
            change = self.stride - 2 * padding
            return scaled + change if change else scaled
        change = 2 * padding - self.dilation * (self.kernel_size - 1) + self.stride - 1
        moved = length + change if change else length
        return moved // self.stride if self.stride > 1 else moved

    def __call__(
        self,
        y: Tensor | None,
        snaked: Tensor | None,
        lengths: Tensor | None = None,
        padded: bool = True,
        residual: Tensor | None = None,
    ) -> Result:
        """The layer's result and Snake of it, from the result of the layer before.

        Args:
            y, snaked: [B, in, T]; a convolution reads Snake of y where there is one.
            lengths: int64 [B], valid positions of each item in the output.
            padded: False runs the convolution without its padding.
            residual: [B, out, T'], is added before the last Snake.
        """
        x = y if snaked is None else snaked
        assert x is not None
        padding = self.padding if padded else 0
        arguments = [x, self.weight, self.bias, self.stride, padding]
        epilogue = {"alpha": self.alpha, "lengths": lengths, "keep": self.keep}
        if not self.transposed:
            arguments.append(self.dilation)
            epilogue |= {"residual": residual, "tanh": self.tanh}
        options = epilogue | {"products": self.products}
        op = "conv_transpose1d" if self.transposed else "conv1d"
        if ops.backend() in ("triton", "native"):
            # The op itself says what it cannot run.
            result: Result = getattr(ops, op)(*arguments, **options)
            return result

        def library(by: ModuleType) -> Way:
            return functools.partial(self._by_library, by, x, padding, lengths, residual)

        others = {LIBRARY: library(folded)}
        if x.is_cuda and self._products:
            others[CONV2D] = library(channels_last)
        if not self.transposed:
            checked_by = others[LIBRARY] if self.choices.timing else None
            if way := self._cudnn_graphs.way(arguments, epilogue, checked_by):
                others[CUDNN] = way
        ways = self.choices.ways(op, arguments, options, others)
        return self.choices.run(self.name, x, ways)

    @native.torch_on_all_threads()
    def _by_library(
        self,
        by: ModuleType,
        x: Tensor,
        padding: int,
        lengths: Tensor | None,
        residual: Tensor | None,
    ) -> Result:
        weight, bias = self.weight, self._bias_as_weight
        if self.tanh:
            # What comes out is float32, which a library makes of float32 alone.
            x, weight = full_precision(x), full_precision(weight)
            bias = self.bias.to(x)
        if self.transposed:
            y = by.conv_transpose1d(x, weight, bias, self.stride, padding)
        else:
            y = by.conv1d(x, weight, bias, self.stride, padding, self.dilation)
        # In place: a large tensor's first touch costs more than the computation.
        if self.tanh:
            y = y.tanh_()
        if lengths is not None:
            y = zero_past(y, lengths)
        if residual is not None:
            y = y.add_(residual)
        return y if self.keep else None, None if self.alpha is None else ops.snake(y, self.alpha)


class Unit:
    """A residual unit without its first Snake, which the layer before has computed.

    It runs as one kernel, or as two convolutions.

    Args:
        name: of the module that the unit stands for.
        first: the dilated convolution, with the Snake in the middle, which is all that it gives.
        second: the convolution of 1, with the Snake that follows the unit.
    """

    def __init__(self, name: str, first: Convolution, second: Convolution):
        self.name = name
        self.choices = first.choices
        self.first, self.second = first, second

    @classmethod
    def of(
        cls,
        name: str,
        unit: ResidualUnit,
        dtype: torch.dtype,
        products: str,
        choices: Choices,
        alpha: Tensor | None,
        keep: bool,
    ) -> "Unit":
        """The unit of a module; the other arguments are those of `Convolution`."""
        _, dilated, middle, pointwise = unit.block
        assert isinstance(dilated, Conv1d)
        assert isinstance(middle, Snake)
        assert isinstance(pointwise, Conv1d)
        common, between = (dtype, products, choices), _constant(middle.alpha)
        first = Convolution(f"{name}.block.1", dilated, *common, between, keep=False)
        return cls(name, first, Convolution(f"{name}.block.3", pointwise, *common, alpha, keep))

    def output_length(self, length: Length, padded: bool) -> Length:
        """Positions that come out of `length`."""
        return self.first.output_length(length, padded)

    def __call__(
        self,
        x: Tensor | None,
        snaked: Tensor | None,
        lengths: Tensor | None = None,
        padded: bool = True,
    ) -> Result:
        """The unit's result and Snake of it; x and Snake of x: [B, C, T]."""
        assert x is not None
        assert snaked is not None
        first, second = self.first, self.second
        padding = first.padding if padded else 0
        weights = (first.weight, first.bias, first.alpha, second.weight, second.bias)
        arguments = [x, snaked, *weights, first.dilation, padding]
        options = {
            "alpha": second.alpha,
            "lengths": lengths,
            "keep": second.keep,
            "products": first.products,
        }
        two = functools.partial(self._as_two, x, snaked, lengths, padded)
        ways = self.choices.ways("residual_unit", arguments, options, {"two layers": two})
        return self.choices.run(self.name, x, ways)

    def _as_two(self, x: Tensor, snaked: Tensor, lengths: Tensor | None, padded: bool) -> Result:
        # A kernel of 1 spreads nothing from past the lengths, so the second mask is enough.
        _, hidden = self.first(None, snaked, None, padded)
        assert hidden is not None
        crop = (x.shape[2] - hidden.shape[2]) // 2
        return self.second(None, hidden, lengths, padded, residual=x[..., crop : x.shape[2] - crop])


class Scratch:
    """Memory on the CPU for the results of layers; threads have some each."""

    def __init__(self) -> None:
        # That no call uses at the moment.
        self._idle: list[native.Memory] = []

    @contextlib.contextmanager
    def lent(self) -> Iterator[native.Memory]:
        """Inside, results on the CPU lie in memory that this call has for itself."""
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = native.Memory()
        with memory.in_force():
            yield memory
        if memory.size <= KEPT_BYTES:
            self._idle.append(memory)


class Plan:
    """An encoder or decoder in one precision, for inference: its results have no gradients.

    Args:
        name: "encoder" or "decoder".
        module: the `Encoder` or `Decoder`, with Snake activations; its weights as they are now are
            used.
        dtype: of weights and activations.
        products: of float32, see `ops.conv1d`.
        invariant: see `Choices`.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        dtype: torch.dtype,
        products: str = "ieee",
        invariant: bool = False,
    ):
        self.dtype = dtype
        self.products = products
        self.choices = Choices(invariant)
        self.layers: list[Convolution | Unit] = []
        self._scratch = Scratch()
        # Positions of a frame in the input, and in the output: a hop and 1, or 1 and a hop.
        self._frame_in = self._frame_out = 1
        steps = list(_steps(name, module))
        followers = [step for _, step in steps[1:]] + [None]
        common = (dtype, products, self.choices)
        with torch.no_grad():
            for (path, step), following in zip(steps, followers, strict=True):
                activation = (
                    following.block[0] if isinstance(following, ResidualUnit) else following
                )
                alpha = _constant(activation.alpha) if isinstance(activation, Snake) else None
                keep = not isinstance(following, Snake)
                if isinstance(step, ResidualUnit):
                    self.layers.append(Unit.of(path, step, *common, alpha, keep))
                elif isinstance(step, Conv1d | ConvTranspose1d):
                    tanh = isinstance(following, nn.Tanh)
                    self.layers.append(Convolution(path, step, *common, alpha, keep, tanh))
                if isinstance(step, Conv1d):
                    self._frame_in *= step.stride
                elif isinstance(step, ConvTranspose1d):
                    self._frame_out *= step.stride
        # What the layers give of whole frames: so many positions for each, and so many more.
        one, two = (list(self._output_lengths(n * self._frame_in, True)) for n in (1, 2))
        each = [more - less for less, more in zip(one, two, strict=True)]
        device = next(module.parameters()).device
        self._each = torch.tensor(each, device=device)[:, None]
        self._more = torch.tensor(one, device=device)[:, None] - self._each

    def _output_lengths(self, length: Length, padded: bool) -> Iterator[Length]:
        """Positions that come out of each layer in turn."""
        for layer in self.layers:
            length = layer.output_length(length, padded)
            yield length

    def __call__(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        padded: bool = True,
        masked: bool = False,
        watch: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """Audio [B, 1, T] to the latent [B, D, F], or the latent to audio [B, 1, F hop].

        Args:
            x: of any float dtype.
            lengths: int64 [B], positions of each item in x, for padded convolutions. What lies past
                them does not matter; the result is zero past the frames that they reach into.
            padded: False runs every convolution without its padding.
            masked: whether x is zero past the lengths, and its frames are whole.
            watch: called with x as the layers read it, and each tensor that they compute; before it
                with "the input", or the layer's name.
        Returns:
            of x's dtype. Audio that does not fill its last frame is filled up with zeros; and so is
            the audio of the last frame, since the module stops short where a stride is odd.
        """
        if padded and not masked:
            x, lengths = whole_frames(x, lengths, self._frame_in)
        after: Iterable[Tensor | None] = [None] * len(self.layers)
        if lengths is not None and padded:
            # All in one step.
            frames = lengths // self._frame_in if self._frame_in > 1 else lengths
            after = torch.addcmul(self._more, self._each, frames).unbind()
        elif lengths is not None:
            after = self._output_lengths(lengths, padded)
        if watch is not None:
            watch("the input", x)
        # Channels innermost, as in all that follows.
        y: Tensor | None = x.to(self.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        snaked: Tensor | None = None
        with float32_products(tf32=self.products == "tf32"), self._scratch.lent() as memory:
            for layer, valid in zip(self.layers, after, strict=True):
                read = y, snaked
                y, snaked = layer(y, snaked, valid, padded)
                memory.give_back(*read)
                if watch is not None:
                    for result in (y, snaked):
                        if result is not None:
                            watch(layer.name, result)
            assert y is not None
            if padded:
                y = filled_up(y, x.shape[2] // self._frame_in * self._frame_out)
            # On a CPU the next call writes where y lies.
            return y.to(x.dtype, copy=x.device.type == "cpu")


def _steps(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions, residual units, activations in the order in which a signal meets them."""
    if isinstance(module, Conv1d | ConvTranspose1d | ResidualUnit | Snake | nn.Tanh):
        yield name, module
        return
    if not isinstance(module, nn.Module) or not len(list(module.children())):
        raise ValueError(
            f"{name} is a {type(module).__name__}; "
            "accepted: convolutions, residual units, Snake, tanh"
        )
    for child_name, child in module.named_children():
        yield from _steps(f"{name}.{child_name}", child)
