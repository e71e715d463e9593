"""What autograd keeps for the backward pass, in bytes."""

from collections import Counter
from types import TracebackType

import torch
from torch import Tensor


class SavedBytes:
    """While active, counts the tensors that autograd keeps, those of one storage once.

    Attributes:
        live: bytes kept now.
        peak: the most bytes kept at once.
        moved: bytes kept so far, plus those that the backward pass took back so far.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.moved = 0
        self._kept: Counter[int] = Counter()
        self._taken: set[int] = set()

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, self._take)
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)

    def _keep(self, tensor: Tensor) -> "_Kept":
        return _Kept(tensor, self)

    def _take(self, kept: "_Kept") -> Tensor:
        if kept.key not in self._taken:
            self._taken.add(kept.key)
            self.moved += kept.size
        return kept.tensor

    def add(self, key: int, size: int) -> None:
        """Counts a tensor in the storage at that address."""
        self._kept[key] += 1
        if self._kept[key] == 1:
            self.live += size
            self.moved += size
            self.peak = max(self.peak, self.live)

    def remove(self, key: int, size: int) -> None:
        """Takes such a tensor off the count."""
        self._kept[key] -= 1
        if not self._kept[key]:
            self.live -= size
            self._taken.discard(key)


class _Kept:
    """A tensor that autograd keeps; it is counted while this object lives."""

    def __init__(self, tensor: Tensor, counts: SavedBytes):
        storage = tensor.untyped_storage()
        # A parameter takes no memory beyond its own.
        self.size = 0 if isinstance(tensor, torch.nn.Parameter) else storage.nbytes()
        self.key = storage.data_ptr()
        self.tensor = tensor
        self.counts = counts
        counts.add(self.key, self.size)

    def __del__(self) -> None:
        self.counts.remove(self.key, self.size)
