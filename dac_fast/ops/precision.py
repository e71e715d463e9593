"""torch's process-wide switches of float32 precision, for the duration of a block."""

import contextlib
import threading

import torch

_switching = threading.RLock()


@contextlib.contextmanager
def float32_products(tf32: bool):
    """Products of float32 on CUDA in TF32, or in IEEE single precision, whatever torch's switches say.

    These are the process's: one thread at a time.
    """
    if not torch.cuda.is_initialized():
        yield
        return
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    with _switching:
        before = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "tf32" if tf32 else "ieee"
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value


@contextlib.contextmanager
def convolutions_in(tf32: bool):
    """Convolutions of float32 on CUDA in TF32, or not, whatever torch's switch says."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
