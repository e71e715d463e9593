"""Tables derived from weights, computed once for each version of them."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Tables = TypeVar("Tables")


@dataclass(frozen=True)
class _Entry(Generic[Tables]):
    # Of each tensor, what changes when its values do.
    version: Sequence[tuple[object, ...]]
    tables: Tables
    # One for each tensor; it removes the entry when the tensor dies.
    owners: Sequence[weakref.ref[Tensor]]


class PerVersion(Generic[Tables]):
    """The result of `build` on groups of tensors, remembered while these tensors live unchanged.

    A view counts as the tensor that it views. Changes are those that autograd counts: an in-place
    change and an assignment to `.data` are seen, an in-place change of `.data` is not. Nothing is
    remembered where gradients must flow through the result, nor under torch.compile.

    An entry dies with the first of its tensors. But a CUDA graph reads the tables that it was
    captured with for as long as it lives, so tables once handed to a capture are kept for good, and
    tables built during a capture belong to its graph alone.
    """

    def __init__(self, build: Callable[..., Tables]) -> None:
        self.build = build
        self.entries: dict[tuple[int, ...], _Entry[Tables]] = {}
        # By id, so that each is there once.
        self.captured: dict[int, Tables] = {}

    def __call__(self, *groups: Sequence[Tensor]) -> Tables:
        """`build(*groups)`, remembered where that is safe."""
        tensors = [tensor for group in groups for tensor in group]
        if (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            or any(t.is_inference() for t in tensors)
        ):
            return self.build(*groups)
        # Views, such as a 1x1 convolution's weight without its last axis, are new for every call.
        owners = [t if t._base is None else t._base for t in tensors]
        key = tuple(map(id, owners))
        version = [(t._version, t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]
        entry, capturing = self.entries.get(key), _capturing(tensors[0])
        if entry is None or entry.version != version:
            if capturing:
                return self.build(*groups)
            # Later calls that do record gradients of their input can use these tables, too.
            with torch.inference_mode(False), torch.no_grad():
                tables = self.build(*groups)
            references = [weakref.ref(t, lambda _: self.entries.pop(key, None)) for t in owners]
            entry = self.entries[key] = _Entry(version, tables, references)
        if capturing:
            self.captured[id(entry.tables)] = entry.tables
        return entry.tables


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
