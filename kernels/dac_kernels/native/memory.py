"""Memory that the results of ops on the CPU are written to, time and again.

Fresh memory is slow: the system hands it out page by page at the first touch, and takes large
pieces back when they are freed, so that the next call waits for its pages again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor


class Memory:
    """Buffers for results that are soon given back. Serves one thread at a time."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        # By address.
        self._taken: dict[int, Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() for buffer in (*self._free, *self._taken.values()))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU, in the smallest buffer that is large enough, or in a new one."""
        size = math.prod(shape) * dtype.itemsize
        fitting = [i for i, buffer in enumerate(self._free) if buffer.numel() >= size]
        if fitting:
            best = min(fitting, key=lambda i: self._free[i].numel())
            buffer = self._free.pop(best)
        else:
            # Room for this one, rather than more and more buffers that are too small.
            if self._free:
                self._free.pop()
            # Of at least one byte: nothing has no address of its own.
            buffer = torch.empty(max(size, 1), dtype=torch.uint8)
        self._taken[buffer.data_ptr()] = buffer
        return buffer[:size].view(dtype).view(shape)

    def give_back(self, *tensors: Tensor | None) -> None:
        """Nobody reads these any more; tensors of other memory are passed over."""
        for tensor in tensors:
            if tensor is not None:
                buffer = self._taken.pop(tensor.untyped_storage().data_ptr(), None)
                if buffer is not None:
                    self._free.append(buffer)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, in this thread, results of ops lie here; afterwards all count as given back."""
        token = _in_force.set(self)
        try:
            yield
        finally:
            _in_force.reset(token)
            self._free += self._taken.values()
            self._taken.clear()


_in_force: ContextVar[Memory | None] = ContextVar("dac_kernels.memory", default=None)


def empty(like: Tensor, *shape: int) -> Tensor:
    """As `like.new_empty(shape)`, in the memory in force if there is one."""
    memory = _in_force.get()
    if memory is None or like.device.type != "cpu" or torch.compiler.is_compiling():
        return like.new_empty(shape)
    return memory.take(shape, like.dtype)
