"""What is done around encoder, quantizer and decoder, whoever runs their layers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dac_fast.model.layers import zero_past
from dac_fast.model.quantize import Encoded


def whole_frames(x: Tensor, lengths: Tensor | None, frame: int) -> tuple[Tensor, Tensor | None]:
    """A batch with zeros past each item's length, and at its end, so that frames are whole.

    Args:
        x: [B, C, T].
        lengths: int64 [B], positions of each item; None: T for all.
        frame: positions of a frame.
    Returns:
        x, T now a multiple of `frame`; and the lengths, likewise.
    """
    if lengths is not None:
        x = zero_past(x, lengths)
        lengths = -(-lengths // frame) * frame if frame > 1 else lengths
    return filled_up(x, -(-x.shape[2] // frame) * frame), lengths


def filled_up(x: Tensor, size: int) -> Tensor:
    """x [B, C, T] with zeros after its end up to `size` positions; itself where it has as many."""
    missing = size - x.shape[2]
    return F.pad(x, (0, missing)) if missing > 0 else x


def encoded(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], lengths: Tensor | None
) -> Encoded:
    """The quantizer's outputs with the frames of each item: `lengths`, or all of them."""
    z = outputs[0]
    if lengths is None:
        lengths = torch.full((z.shape[0],), z.shape[2], device=z.device)
    return Encoded(*outputs, lengths)
