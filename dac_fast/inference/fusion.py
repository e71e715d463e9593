"""A recorded module's steps, fused into the layers that a `Plan` of the codec has.

A convolution takes in the tanh, the sum with an earlier signal and the Snake that follow it, and a
pair of them becomes a residual unit. Everything else runs by PyTorch as it was recorded.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from dac_kernels import native
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dac_fast import ops
from dac_fast.inference.choices import Choices, Result
from dac_fast.inference.plan import Convolution, Unit
from dac_fast.inference.recorded import PADDING, Recording, Signal, Step, aten
from dac_fast.model import channels_last
from dac_fast.model.layers import Conv1d, ConvTranspose1d

# In the formula of Snake, beside its frequency.
EPSILON = 1e-9
# How the kind of what stays as it was recorded begins.
BY_TORCH = "PyTorch:"


@dataclass(eq=False)
class Node:
    """Something that runs as a whole.

    Attributes:
        kind: what it is, for people.
        run: of tensors, the inputs' in order, to those of both outputs.
        inputs: signals.
        outputs: the result and Snake of it; None where nobody reads it.
        layer: where it is a convolution of ours.
        last: inputs that no later node reads.
    """

    kind: str
    run: Callable[..., Result]
    inputs: list[Signal]
    outputs: tuple[Signal | None, Signal | None]
    layer: Convolution | None = None
    last: list[Signal] = field(default_factory=list)


def fused(recording: Recording, dtype: torch.dtype, products: str, choices: Choices) -> list[Node]:
    """The nodes of a recording, in an order in which each finds its inputs.

    Args:
        recording: of a module; its weights as they are now are used.
        dtype, products, choices: of the layers, see `Convolution`.
    """
    nodes = list(_Nodes(recording, dtype, products, choices))
    nodes = list(_with_units(nodes))
    read = {recording.output}
    for node in reversed(nodes):
        node.last = [signal for signal in dict.fromkeys(node.inputs) if signal not in read]
        read.update(node.inputs)
    return nodes


class _Nodes:
    """The nodes of a recording, before residual units are put together."""

    def __init__(self, recording: Recording, dtype: torch.dtype, products: str, choices: Choices):
        self._dtype, self._common = dtype, (dtype, products, choices)
        self._output = recording.output
        self._steps = _with_snakes(recording)
        self._place = {step.output: place for place, step in enumerate(self._steps)}
        self._readers: dict[Signal, list[Step]] = {}
        for step in self._steps:
            for signal in step.inputs:
                self._readers.setdefault(signal, []).append(step)
        # Steps that a convolution before them has taken in.
        self._taken: set[Step] = set()

    def __iter__(self) -> Iterator[Node]:
        for step in self._steps:
            if step not in self._taken:
                yield self._convolution(step) if _is_ours(step) else self._alone(step)

    def _convolution(self, step: Step) -> Node:
        """A convolution with what follows it."""
        conv, skipped = _module(step)
        result = step.output
        inputs = list(step.inputs)
        tanh = False
        if isinstance(conv, Conv1d) and (follower := self._only_reader(result)):
            # Its result is in float32, which other steps do not take.
            tanh = follower.run is aten.tanh.default and follower.output is self._output
            if tanh:
                result = self._take(follower)
            elif other := self._added(follower, step):
                inputs.append(other)
                result = self._take(follower)
        readers = self._readers.get(result, [])
        snake = next((reader for reader in readers if reader.run is ops.snake), None)
        keep = result is self._output or len(readers) > 1 or snake is None
        alpha = snake.args[1] if snake else None
        layer = Convolution(step.name, conv, *self._common, alpha, keep, tanh)

        def run(x: Tensor, residual: Tensor | None = None) -> Result:
            y, snaked = layer(x, None, residual=residual)
            return _without(y, skipped), _without(snaked, skipped)

        snaked = self._take(snake) if snake else None
        return Node("convolution", run, inputs, (result if keep else None, snaked), layer)

    def _take(self, step: Step) -> Signal:
        """The output of a step that is now part of another one."""
        self._taken.add(step)
        return step.output

    def _only_reader(self, signal: Signal) -> Step | None:
        readers = self._readers.get(signal, [])
        return readers[0] if len(readers) == 1 and signal is not self._output else None

    def _added(self, step: Step, conv: Step) -> Signal | None:
        """What a step adds to the convolution's result, if that is there before the convolution."""
        if step.run is not aten.add.Tensor or step.kwargs or len(step.inputs) != 2:
            return None
        others = [signal for signal in step.inputs if self._before(signal, conv)]
        fits = len(others) == 1 and others[0].shape == step.output.shape
        return others[0] if fits else None

    def _before(self, signal: Signal, step: Step) -> bool:
        return self._place.get(signal, -1) < self._place[step.output]

    def _alone(self, step: Step) -> Node:
        """A step that runs as it was recorded."""
        run, outputs = step.run, (step.output, None)
        if run in (ops.snake, ops.snake_beta):
            constants = step.args[1:]
            return Node("Snake", lambda x: (run(x, *constants), None), step.inputs, outputs)
        by_torch = _by_torch(step, self._dtype)
        what = type(run).__name__ if isinstance(run, nn.Module) else run

        def on_all_threads(*tensors: Tensor) -> Result:
            with native.torch_on_all_threads():
                return by_torch(*tensors).to(self._dtype), None

        where = f"{step.name} ({what})" if step.name else f"{what}"
        return Node(f"{BY_TORCH} {where}", on_all_threads, step.inputs, outputs)


def _by_torch(step: Step, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A step as a function of its inputs, by PyTorch."""
    run = step.run
    if isinstance(run, nn.Module):
        return lambda x: run(x.float().contiguous())
    # PyTorch is several times as fast on these where it knows that channels are innermost.
    if run is aten.convolution.default:
        return _convolution_by_torch(step, dtype)
    if run in PADDING:
        _, ends, *value = step.args
        return lambda x: channels_last.pad(x, ends, PADDING[run], *value)

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) else leaf

    args, kwargs = tree_map(cast, (step.args, step.kwargs))

    def call(*tensors: Tensor) -> Tensor:
        given = dict(zip(step.inputs, tensors, strict=True))

        def filled(leaf: Any) -> Any:
            return given[leaf] if isinstance(leaf, Signal) else leaf

        y: Tensor = run(*tree_map(filled, args), **tree_map(filled, kwargs))
        return y

    return call


def _convolution_by_torch(step: Step, dtype: torch.dtype) -> Callable[..., Tensor]:
    _, weight, bias, (stride,), (padding,), (dilation,), transposed, (more,), groups = step.args
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if transposed:
        sizes = (stride, padding, more, groups, dilation)
        return lambda x: channels_last.conv_transpose1d(x, weight, bias, *sizes)

    def call(x: Tensor) -> Tensor:
        # oneDNN has quick code for grouped convolutions that are dilated or padded, not both.
        x = channels_last.pad(x, (padding, padding)) if padding and dilation > 1 else x
        left = padding if dilation == 1 else 0
        return channels_last.conv1d(x, weight, bias, stride, left, dilation, groups)

    return call


def _is_ours(step: Step) -> bool:
    """Whether our layers compute that convolution."""
    if step.run is not aten.convolution.default:
        return False
    _, weight, _, stride, padding, dilation, transposed, output_padding, groups = step.args
    if groups != 1 or not transposed:
        return bool(groups == 1)
    return bool(
        weight.shape[2] == 2 * stride[0] and dilation == [1] and output_padding[0] <= padding[0]
    )


def _module(step: Step) -> tuple[Conv1d | ConvTranspose1d, int]:
    """A convolution as a module of ours, and how many of its first outputs are too many."""
    _, weight, bias, (stride,), (padding,), (dilation,), transposed, (more,), _ = step.args
    with torch.device("meta"):
        first, second, kernel = weight.shape
        conv: Conv1d | ConvTranspose1d
        if transposed:
            # More outputs at the end are less padding there. The beginning's has to be the same.
            conv = ConvTranspose1d(first, second, stride, padding - more)
        else:
            conv, more = Conv1d(second, first, kernel, stride, padding, dilation), 0
    if bias is None:
        bias = weight.new_zeros(second if transposed else first)
    conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    conv.hold(weight.detach())
    return conv, more


def _without(y: Tensor | None, first: int) -> Tensor | None:
    """y [B, C, T] without its first positions."""
    return y[..., first:] if y is not None and first else y


def _with_units(nodes: list[Node]) -> Iterator[Node]:
    """The nodes, pairs of convolutions that are residual units put together."""
    readers = Counter(signal for node in nodes for signal in node.inputs)
    makers = {node.outputs[1]: node for node in nodes if node.layer}
    firsts: dict[Node, Node] = {}
    for node in nodes:
        first = makers.get(node.inputs[0])
        if first and readers[node.inputs[0]] == 1 and _is_unit(first, node):
            firsts[node] = first
    for node in nodes:
        if first := firsts.get(node):
            yield _unit(first, node)
        elif node not in firsts.values():
            yield node


def _is_unit(first: Node, second: Node) -> bool:
    """Whether two convolutions, the second of which reads Snake of the first alone, are a unit."""
    if not (first.layer and second.layer) or first.outputs[0] or len(second.inputs) != 2:
        return False
    dilated, pointwise = first.layer, second.layer
    same_length = 2 * dilated.padding == dilated.dilation * (dilated.kernel_size - 1)
    plain = all(c.stride == 1 and not (c.transposed or c.tanh) for c in (dilated, pointwise))
    return (
        len(first.inputs) == 1
        and plain
        and same_length
        and (pointwise.kernel_size, pointwise.padding) == (1, 0)
        and dilated.weight.shape[:2] == pointwise.weight.shape[:2]
    )


def _unit(first: Node, second: Node) -> Node:
    assert first.layer
    assert second.layer
    unit = Unit(second.layer.name, first.layer, second.layer)
    return Node("residual unit", unit, [second.inputs[1], first.inputs[0]], second.outputs)


def _with_snakes(recording: Recording) -> list[Step]:
    """The steps, with each Snake as one, and without what nobody reads then."""
    makers = {step.output: step for step in recording.steps}
    steps: list[Step] = []
    read = {recording.output}
    for step in reversed(recording.steps):
        if step.output in read:
            steps.append(_snake(step, makers) or step)
            read.update(steps[-1].inputs)
    return steps[::-1]


def _snake(step: Step, makers: dict[Signal, Step]) -> Step | None:
    """The Snake x + gain sin(alpha x)^2 that ends with this sum, if one does."""
    if step.run is not aten.add.Tensor or step.kwargs or len(step.inputs) != 2:
        return None
    for x, term in permutations(step.inputs):
        gain, square = _factor(term, makers, x)
        root = _root(makers.get(square))
        sine = makers.get(root) if root else None
        if sine and sine.run is aten.sin.default:
            alpha, base = _factor(sine.inputs[0], makers, x)
            if base is x:
                return _snake_of(step, x, alpha, gain)
    return None


def _snake_of(step: Step, x: Signal, alpha: Tensor, gain: Tensor) -> Step:
    alpha, gain = (value.float().expand(1, x.shape[1], 1).contiguous() for value in (alpha, gain))
    if torch.allclose(gain * (alpha + EPSILON), torch.ones_like(gain)):
        return Step(step.name, ops.snake, (x, alpha), {}, step.outputs)
    return Step(step.name, ops.snake_beta, (x, alpha, 1 / gain - EPSILON), {}, step.outputs)


def _factor(signal: Signal, makers: dict[Signal, Step], x: Signal) -> tuple[Tensor, Signal]:
    """A constant and a signal, whose product the signal is; x, if that is such a signal."""
    factor = torch.ones(())
    while signal is not x and (step := makers.get(signal)) and len(step.inputs) == 1:
        if step.run is aten.mul.Tensor:
            (constant,) = (value for value in step.args if value is not step.inputs[0])
        elif step.run is aten.div.Tensor and step.args[0] is step.inputs[0]:
            constant = 1 / step.args[1]
        else:
            break
        factor, signal = constant * factor, step.inputs[0]
    return factor, signal


def _root(step: Step | None) -> Signal | None:
    """The signal whose square a step makes."""
    if step and step.run is aten.pow.Tensor_Scalar and step.args[1] == 2:
        return step.inputs[0]
    if step and step.run is aten.mul.Tensor and step.inputs == [step.inputs[0]] * 2:
        return step.inputs[0]
    return None
