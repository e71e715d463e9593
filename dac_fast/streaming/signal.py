"""Encoding and decoding of signals that arrive in pieces: one signal, or several in step.

For streams that come and go on their own there are `DecoderStreams` and `EncoderStreams`; they do
the work here too.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dac_fast.streaming.slots import DecoderStreams, EncoderStreams, OptimizableCodec

Streams = TypeVar("Streams", bound=DecoderStreams | EncoderStreams)


class _Signal(Generic[Streams]):
    """One signal in pieces, or several in step: all slots of some streams.

    Args:
        make: a number of slots to streams at their beginning.
    """

    def __init__(self, make: Callable[[int], Streams]):
        self._make = make
        # Active streams, and a cache of idle ones by batch size.
        self._streams: Streams | None = None
        self._by_batch = {1: make(1)}
        self.look_ahead = self._by_batch[1].look_ahead

    def _of(self, batch: int) -> Streams:
        if batch not in self._by_batch:
            self._by_batch[batch] = self._make(batch)
        return self._by_batch[batch]

    def reset(self) -> None:
        """Begin a new signal, of any batch; what was pushed and not returned yet is dropped."""
        if self._streams is not None:
            self._streams.reset(range(self._streams.batch))
            self._streams = None


class StreamingDecoder(_Signal[DecoderStreams]):
    """Decodes codes that arrive piece by piece.

    The results of all pushes and the flush, joined, are what `codec.decode_codes` gives for all
    codes at once, within float rounding. A push returns all samples that are determined so far: of
    F frames, F hop_length - look_ahead.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights, or after
            `codec.optimize()`.
    Attributes:
        look_ahead: samples; a sample depends on codes of frames up to that far ahead of it. 4757
            (108 ms, 9.3 frames) at 44khz.
    """

    def __init__(self, codec: OptimizableCodec):
        super().__init__(lambda batch: DecoderStreams(codec, batch))
        self._hop_length = codec.hop_length

    def capture(self, frames: int, batch: int = 1, n_quantizers: int | None = None) -> None:
        """Record pushes [batch, n_quantizers, frames] as a graph, see `DecoderStreams.capture`.

        Raises:
            ValueError: the codec is not on CUDA, or an argument is out of range.
        """
        self._of(batch).capture(frames, n_quantizers)

    def push(self, codes: Tensor) -> Tensor:
        """Codes [B, N, f] (or latents) of the next f frames to audio [B, channels, n].

        f and n may be 0.

        B stays until the flush.

        Raises:
            ValueError: the shape or a code is out of range; the signal stays as it is.
        """
        streams = self._streams or self._of(_items("codes", codes))
        early = max(-streams._next_output(), 0)
        audio = streams.push(codes)
        self._streams = streams
        return audio[..., early:]

    def flush(self) -> Tensor:
        """The rest of the audio [B, channels, n]: the signal ends; the next push begins one."""
        self._streams = streams = self._streams or self._of(1)
        frames, next_output = streams._frames[0], streams._next_output()
        streams.end(range(streams.batch))
        lag = -(-self.look_ahead // self._hop_length)
        audio = streams.push(streams._blank(lag))
        self.reset()
        return audio[..., max(-next_output, 0) : frames * self._hop_length - next_output]


class StreamingEncoder(_Signal[EncoderStreams]):
    """Encodes audio that arrives piece by piece.

    The results of all pushes and the flush, joined, are what `codec.encode` gives for all samples
    at once, where float rounding does not decide between entries that are equally near. A frame's
    codes come out with the last sample that they depend on.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights, or after
            `codec.optimize()`.
        n_quantizers: use the first that many codebooks; None: all.
    Attributes:
        look_ahead: samples past a frame's own that its codes depend on. 3733 (85 ms, 7.3 frames) at
            44khz.
    Raises:
        ValueError: n_quantizers is out of range.
    """

    def __init__(self, codec: OptimizableCodec, n_quantizers: int | None = None):
        super().__init__(lambda batch: EncoderStreams(codec, batch, n_quantizers))
        self._codec = codec

    def capture(self, frames: int, batch: int = 1) -> None:
        """Record pushes [batch, C, frames hop_length] as a graph, see `EncoderStreams.capture`.

        Pieces of other sizes give as many frames as they fill: the graph is replayed whenever that
        is `frames`.

        Raises:
            ValueError: the codec is not on CUDA, or an argument is out of range.
        """
        self._of(batch).capture(frames)

    @torch.inference_mode()
    def push(self, audio: Tensor) -> Tensor:
        """The next samples [B, channels, n] to codes int64 [B, N, f], or to latents' means.

        n and f may be 0.

        B stays until the flush.

        Raises:
            ValueError: the shape is out of range; the signal stays as it is.
        """
        batch = self._streams.batch if self._streams else _items("audio", audio)
        channels = self._codec.config.channels
        if audio.dim() != 3 or audio.shape[:2] != (batch, channels):
            accepted = f"[{batch}, {channels}, T]"
            raise ValueError(f"audio of shape {list(audio.shape)}; accepted: {accepted}")
        self._streams = self._streams or self._of(batch)
        return _codes(self._streams, audio)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The rest of the codes int64 [B, N, f]: the signal ends here. The next push begins one."""
        self._streams = streams = self._streams or self._of(1)
        hop, pending = self._codec.hop_length, streams._pending
        # As in `codec.encode`, zeros that fill the last frame belong to the signal.
        missing = -(pending.shape[2] + streams._origin) % hop
        last = _codes(streams, pending.new_zeros(*pending.shape[:2], missing))
        streams.end(range(streams.batch))
        frames = self._codec.encoder.output_length(streams._frames[0] * hop)
        after = (frames - streams._next_output()) * hop
        rest = _codes(streams, pending.new_zeros(*pending.shape[:2], after))
        self.reset()
        return torch.cat([last, rest], dim=2)


def _codes(streams: EncoderStreams, audio: Tensor) -> Tensor:
    """The codes that come out for more samples, without those from before the signal."""
    early = max(-streams._next_output(), 0)
    return streams._take(audio, [True] * streams.batch)[..., early:]


def _items(name: str, x: Tensor) -> int:
    """Items of the first push."""
    if x.dim() != 3 or x.shape[0] == 0:
        raise ValueError(
            f"{name} of shape {list(x.shape)}; accepted: three axes, the first one not 0"
        )
    return x.shape[0]
