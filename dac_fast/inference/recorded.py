"""What a module does to a signal of any length, recorded from one run as a list of steps.

A step is a convolution, an operation on every position by itself, or one that adds or takes as many
positions at the ends of any signal. What is neither (attention, noise, a sum over time) stays
inside the smallest submodule that contains it, and that submodule is one step as a whole. The steps
are PyTorch's own operations, so they do not depend on how a module is written: weight norm is done
once, and a Snake is a sine, a square and a sum.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
# Operations that pad the end of a tensor's last axis, and how `torch.nn.functional.pad` calls them.
PADDING = {
    aten.constant_pad_nd.default: "constant",
    aten.replication_pad1d.default: "replicate",
    aten.reflection_pad1d.default: "reflect",
}
# As a slice has it.
NO_END = 2**63 - 1


@dataclass(eq=False)
class Signal:
    """A tensor that depends on the module's input, of this shape in the recorded run."""

    shape: torch.Size


@dataclass(eq=False)
class Step:
    """An operation or a submodule that makes signals of signals.

    Attributes:
        name: of the module in which it ran, as `named_modules` has it.
        run: the operation or the submodule.
        args, kwargs: of `run`, with signals in place of tensors; other tensors are constants.
        outputs: what it makes; one signal, unless the operation is one that no record keeps.
    """

    name: str
    run: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Signal]

    @property
    def inputs(self) -> list[Signal]:
        """The signals among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if _is_signal(leaf)]

    @property
    def output(self) -> Signal:
        """What it makes."""
        return self.outputs[0]


@dataclass(eq=False)
class Recording:
    """The steps of a module, in order."""

    steps: list[Step]
    input: Signal
    output: Signal


def record(module: nn.Module, example: Tensor) -> Recording:
    """Runs a module on an example, and records what it does.

    Args:
        module: of one tensor, which gives one.
        example: [2, C, T]. Two items, so that a value for each is told from one for all.
    Raises:
        ValueError: the module does something that holds for one length only, in no submodule.
    """
    recorder = _Recorder()
    whole = _Call("", module, Signal(example.shape))
    recorder.name(example, whole.input)
    recorder.open = [whole]
    # TorchScript's compiler would hide what it has fused.
    as_written = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
    with torch.no_grad(), as_written, _watched(module, recorder), recorder:
        output = recorder.signal_of(module.forward(example))
    if not isinstance(output, Signal):
        raise ValueError(f"{type(module).__name__} makes no tensor of its input; accepted: one")
    whole.output = output
    steps = _steps(whole, _readers(whole))
    for step in steps:
        if not _is_known(step):
            where = f"in {step.name}" if step.name else "outside of any submodule"
            raise ValueError(
                f"{type(module).__name__} runs {step.run} {where}; accepted there: convolutions "
                "and operations on each position by itself"
            )
    return Recording(steps, whole.input, output)


@dataclass(eq=False)
class _Call:
    """A submodule's forward pass; `parts` are the steps and calls inside, in order."""

    name: str
    module: nn.Module
    input: Signal
    output: Any = None
    parts: list["Step | _Call"] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    """Notes every operation that depends on the input."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.open: list[_Call] = []
        # Weak, so that the run takes no more memory than another.
        self._signals = WeakTensorKeyDictionary()

    def name(self, tensor: Tensor, signal: Signal) -> None:
        """The tensor is that signal from here on."""
        self._signals[tensor] = signal

    def signal_of(self, value: Any) -> Any:
        """The signal that a value is; itself, where it is none."""
        return self._signals.get(value, value) if isinstance(value, Tensor) else value

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given, named = tree_map(self.signal_of, (args, kwargs))
        step = Step(self.open[-1].name, _functional(op), given, named, [])
        made = op(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        if not step.inputs:
            return made
        first = args[0] if args else None
        if len(tensors) == 1 and _is_same(op, first, tensors[0]):
            self.name(tensors[0], step.inputs[0])
            return made
        for tensor in tensors:
            step.outputs.append(Signal(tensor.shape))
            self.name(tensor, step.outputs[-1])
        self.open[-1].parts.append(step)
        return made


@contextlib.contextmanager
def _watched(module: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Inside, the recorder knows which submodule runs."""
    hooks = []

    def watch(name: str, submodule: nn.Module) -> None:
        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = recorder.signal_of(args[0]) if len(args) == 1 and not kwargs else None
            call = _Call(name, submodule, given)  # type: ignore[arg-type]
            recorder.open[-1].parts.append(call)
            recorder.open.append(call)

        def end(_: nn.Module, args: Any, output: Any) -> None:
            recorder.open.pop().output = recorder.signal_of(output)

        hooks.append(submodule.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(submodule.register_forward_hook(end))

    try:
        for name, submodule in module.named_modules():
            # TorchScript's modules take no hooks of Python's.
            if submodule is not module and not isinstance(submodule, torch.jit.ScriptModule):
                watch(name, submodule)
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _steps(call: _Call, readers: dict[Signal, list[Step]]) -> list[Step]:
    """The steps of a call; one for all of it, where that is needed and can be."""
    steps: list[Step] = []
    for part in call.parts:
        steps += [part] if isinstance(part, Step) else _steps(part, readers)
    if all(map(_is_known, steps)) or not _is_closed(call, readers):
        return steps
    return [Step(call.name, call.module, (call.input,), {}, [call.output])]


def _is_closed(call: _Call, readers: dict[Signal, list[Step]]) -> bool:
    """Whether a submodule reads its argument alone, and others read its result alone."""
    if not (call.name and _is_signal(call.input) and _is_signal(call.output)):
        return False
    inside = _all_steps(call)
    made = {signal for step in inside for signal in step.outputs}
    read = {signal for step in inside for signal in step.inputs}
    escaped = {
        signal for signal in made if any(step not in inside for step in readers.get(signal, ()))
    }
    return read - made <= {call.input} and escaped <= {call.output} and call.output in made


def _all_steps(call: _Call) -> list[Step]:
    nested = ([part] if isinstance(part, Step) else _all_steps(part) for part in call.parts)
    return [step for steps in nested for step in steps]


def _readers(call: _Call) -> dict[Signal, list[Step]]:
    """By signal, the steps that read it."""
    readers: dict[Signal, list[Step]] = {}
    for step in _all_steps(call):
        for signal in step.inputs:
            readers.setdefault(signal, []).append(step)
    return readers


def _is_signal(value: Any) -> bool:
    return isinstance(value, Signal)


def _is_same(op: Any, given: Any, made: Tensor) -> bool:
    """Whether an operation did nothing to what it was given: a copy, or a view of the whole."""
    if op in (aten.clone.default, aten.detach.default):
        return True
    if not isinstance(given, Tensor) or op._schema.is_mutable:
        return False
    place = (made.data_ptr(), made.shape, made.stride(), made.dtype)
    return place == (given.data_ptr(), given.shape, given.stride(), given.dtype)


def _functional(op: Any) -> Any:
    """The operation that makes a new tensor of what this one would change."""
    if not op._schema.is_mutable:
        return op
    packet = getattr(aten, op._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, op._overloadname, op)


def _is_known(step: Step) -> bool:
    """Whether the step holds for signals [B, C, T] of any length."""
    if isinstance(step.run, nn.Module):
        return True
    shapes = [signal.shape for signal in (*step.inputs, *step.outputs)]
    if len(step.outputs) != 1 or any(len(shape) != 3 for shape in shapes):
        return False
    if step.run is aten.convolution.default:
        return step.inputs == [step.args[0]]
    if step.run in PADDING:
        return len(step.args[1]) == 2
    if step.run is aten.slice.Tensor:
        return _is_crop(*step.args)
    tags = step.run.tags
    by_position = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    constants = [leaf for leaf in tree_leaves((step.args, step.kwargs)) if _is_tensor(leaf)]
    return by_position and not step.run._schema.is_mutable and all(map(_is_for_all, constants))


def _is_crop(x: Signal, axis: int = 0, begin: int = 0, end: int = NO_END, step: int = 1) -> bool:
    """Whether a slice takes as many positions off both ends of a signal of any length."""
    return axis == 2 and begin >= 0 and (end < 0 or end == NO_END) and step == 1


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_for_all(constant: Tensor) -> bool:
    """Whether it is the same for all items and positions: [], [1], [C, 1], [1, C, 1]."""
    return constant.dim() == 0 or (constant.shape[-1] == 1 and constant.shape[:-2].numel() == 1)
