"""What autograd keeps for the backward pass, in bytes."""

from collections import Counter

import torch
from torch import Tensor


class SavedBytes:
    """While active, counts the memory of the tensors that autograd keeps, each storage once however often it is kept.

    Attributes:
        live, peak: bytes kept now, and at most.
        moved: bytes kept so far, plus bytes of what the backward pass took back so far.
    """

    def __init__(self):
        self.live = self.peak = self.moved = 0
        self._kept, self._taken = Counter(), set()

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, self._take)
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised):
        self._hooks.__exit__(*raised)

    def _keep(self, tensor: Tensor) -> "_Kept":
        return _Kept(tensor, self)

    def _take(self, kept: "_Kept") -> Tensor:
        if kept.key not in self._taken:
            self._taken.add(kept.key)
            self.moved += kept.size
        return kept.tensor

    def add(self, key: int, size: int):
        """A tensor in that storage is kept."""
        self._kept[key] += 1
        if self._kept[key] == 1:
            self.live += size
            self.moved += size
            self.peak = max(self.peak, self.live)

    def remove(self, key: int, size: int):
        """One no longer is."""
        self._kept[key] -= 1
        if not self._kept[key]:
            self.live -= size
            self._taken.discard(key)


class _Kept:
    """A tensor that autograd keeps; counted while this object lives."""

    def __init__(self, tensor: Tensor, counts: SavedBytes):
        storage = tensor.untyped_storage()
        # Parameters are there anyway.
        self.size = 0 if isinstance(tensor, torch.nn.Parameter) else storage.nbytes()
        self.tensor, self.key, self.counts = tensor, storage.data_ptr(), counts
        counts.add(self.key, self.size)

    def __del__(self):
        self.counts.remove(self.key, self.size)
