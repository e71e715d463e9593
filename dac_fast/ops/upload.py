"""Copies from pinned memory to a GPU that wait for nothing the GPU is computing."""

import functools

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on that device; from pinned memory to CUDA, copied on a stream of its own.

    The host does not wait, and what it launches afterwards finds the copy complete.
    """
    if device.type != "cuda":
        return x.to(device)
    stream = _upload_stream(device)
    with torch.cuda.stream(stream):
        copy = x.to(device, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    # The copy's memory belongs to the other stream, which must not reuse it while this one reads.
    copy.record_stream(current)
    return copy


@functools.cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all uploads: memory that one upload frees serves the next."""
    return torch.cuda.Stream(device)
