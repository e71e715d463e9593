"""Tables derived from weights, computed once for each version of them."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class PerVersion:
    """The result of `build` on groups of tensors, kept while those very tensors, or those they are views of, live.

    Kept while they are unchanged, as autograd counts it: an in-place change is seen, and so is assigning to `.data`;
    one made through `.data` in place is not. Nothing is kept where gradients must flow through the result, and under
    torch.compile. An entry dies with the first of its tensors; but a CUDA graph reads what it was captured with as
    long as it lives, so what a capture was given stays for good, and what is built during one belongs to its graph.
    """

    def __init__(self, build: Callable):
        self.build, self.entries = build, {}
        # by id, so that each is there once
        self.captured = {}

    def __call__(self, *groups: Sequence[Tensor]):
        """`build(*groups)`, remembered where that is safe."""
        tensors = [tensor for group in groups for tensor in group]
        if (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            or any(t.is_inference() for t in tensors)
        ):
            return self.build(*groups)
        # Views, such as a 1x1 convolution's weight without its last axis, are made anew for every call.
        owners = [t if t._base is None else t._base for t in tensors]
        key = tuple(map(id, owners))
        version = [(t._version, t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]
        known, capturing = (
            key in self.entries and self.entries[key][0] == version,
            _capturing(tensors[0]),
        )
        if capturing and not known:
            return self.build(*groups)
        if not known:
            # Also usable by later calls that do record gradients of their input.
            with torch.inference_mode(False), torch.no_grad():
                tables = self.build(*groups)
            references = [weakref.ref(t, lambda _: self.entries.pop(key, None)) for t in owners]
            self.entries[key] = version, tables, references
        tables = self.entries[key][1]
        if capturing:
            self.captured[id(tables)] = tables
        return tables


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
