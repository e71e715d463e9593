"""The precision of float32 products on CUDA: torch's two process-wide switches, set for a block."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_switching = threading.RLock()


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Convolutions and matrix products of float32 on CUDA run in TF32, or in IEEE precision.

    The block overrides what the user has set, and puts it back. The switches belong to the process,
    so threads take turns: a block begins when the blocks of other threads have ended. Meanwhile
    torch's older getters (`allow_tf32` of `torch.backends.cudnn` and `torch.backends.cuda.matmul`)
    may raise in other threads: they refuse to read switches that were set by their newer names.
    """
    if not torch.cuda.is_initialized():
        yield
        return
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    with _switching:
        before = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "tf32" if tf32 else "ieee"
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
