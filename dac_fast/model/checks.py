"""Checks of what a caller gives a codec: shapes, dtypes, lengths, codes."""

from collections.abc import Callable

import torch
from torch import Tensor

CODE_DTYPES = (torch.int64, torch.int32)


def check_signal(name: str, x: Tensor, channels: int | None) -> None:
    """Raises ValueError unless x is in floating point and `check_shape` accepts it."""
    check_shape(name, x, channels)
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; accepted: a floating-point dtype")


def check_shape(name: str, x: Tensor, channels: int | None = None) -> None:
    """Raises ValueError unless x has three axes, none of them 0, and so many channels."""
    fits = x.dim() == 3 and min(x.shape) > 0 and channels in (None, x.shape[1])
    if not fits:
        expected = f"[B, {channels or 'N'}, T]"
        raise ValueError(f"{name} of shape {list(x.shape)}; accepted: {expected}, none of them 0")


def checked_lengths(lengths: Tensor | None, x: Tensor, padded: bool) -> Tensor | None:
    """The lengths of x's items, int64 [B] on its device.

    Raises:
        ValueError: they are not as many, out of range, or given where nothing is padded.
    """
    if lengths is None:
        return None
    if not padded:
        raise ValueError("lengths are given without padding; accepted: with padded=True")
    items, _, longest = x.shape
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    # Where they are, and at once: reading from a GPU waits for all that it was given to do.
    fits = lengths.shape == (items,)
    low, high = torch.stack(lengths.aminmax()).tolist() if fits else (0, 0)
    if low < 1 or high > longest:
        raise ValueError(
            f"lengths are {lengths.tolist()}; accepted: {items} numbers from 1 to {longest}"
        )
    return lengths.to(x.device, non_blocking=True)


def range_check(codes: Tensor, size: int) -> Callable[[], None]:
    """A function that raises ValueError where a code is not below `size`.

    To be called after what is to run meanwhile: a GPU finds the bounds before that, and the call
    waits for the bounds only.

    Raises:
        ValueError: at once, the dtype is not one of `CODE_DTYPES`.
    """
    if codes.dtype not in CODE_DTYPES:
        accepted = " or ".join(map(str, CODE_DTYPES))
        raise ValueError(f"codes are {codes.dtype}; accepted: {accepted}")
    bounds = torch.stack(codes.aminmax()).to("cpu", non_blocking=True)
    event = torch.cuda.current_stream(codes.device).record_event() if codes.is_cuda else None

    def check() -> None:
        if event is not None:
            event.synchronize()
        low, high = bounds.tolist()
        if low < 0 or high >= size:
            raise ValueError(f"code {low if low < 0 else high}; accepted: 0 to {size - 1}")

    return check
