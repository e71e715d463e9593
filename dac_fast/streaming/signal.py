"""Encoding and decoding of signals that arrive in pieces of any size: one signal, or several in step.

For streams that come and go on their own there are `DecoderStreams` and `EncoderStreams`, which do the work here too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dac_fast.model.interface import Codec
from dac_fast.streaming.slots import DecoderStreams, EncoderStreams


class _Signal:
    """One signal in pieces, or several in step: all slots of some streams.

    Args:
        make: a number of slots to streams at their beginning.
    """

    def __init__(self, make: Callable[[int], DecoderStreams | EncoderStreams]):
        # those under way; and all that there are, by their slots, at their beginning unless under way
        self._streams, self._by_batch, self._make = None, {1: make(1)}, make
        self.look_ahead = self._by_batch[1].look_ahead

    def _of(self, batch: int):
        if batch not in self._by_batch:
            self._by_batch[batch] = self._make(batch)
        return self._by_batch[batch]


class StreamingDecoder(_Signal):
    """Decodes codes that arrive piece by piece.

    What the pushes and the flush return is, joined, what `codec.decode_codes` gives for all codes at once, within
    float rounding. A push returns all that is determined so far: of F frames, F hop_length - look_ahead samples.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights, or after `codec.optimize()`.
    Attributes:
        look_ahead: samples; a sample depends on codes of frames up to that far ahead of it. 4757 (108 ms, 9.3
            frames) at 44khz.
    """

    def __init__(self, codec: Codec):
        super().__init__(lambda batch: DecoderStreams(codec, batch))
        self._hop = codec.hop_length

    def capture(self, frames: int, batch: int = 1, n_quantizers: int | None = None):
        """Record pushes [batch, n_quantizers, frames] as a CUDA graph, see `DecoderStreams.capture`.

        Raises:
            ValueError: the codec is not on CUDA, or an argument is out of range.
        """
        self._of(batch).capture(frames, n_quantizers)

    def push(self, codes: Tensor) -> Tensor:
        """Codes [B, N, f] of the next f frames to audio [B, 1, n]; f and n may be 0. B stays until the flush.

        Raises:
            ValueError: the shape or a code is out of range.
        """
        streams = self._streams or self._of(_items("codes", codes))
        early = max(-streams._next_output(), 0)
        audio = streams.push(codes)
        self._streams = streams
        return audio[..., early:]

    def flush(self) -> Tensor:
        """The rest of the audio [B, 1, n], where the signal ends here. The next push begins a new one."""
        streams, self._streams = self._streams or self._of(1), None
        frames, next_output = streams._frames[0], streams._next_output()
        streams.end(range(streams.batch))
        after = torch.zeros(streams.batch, 1, -(-self.look_ahead // self._hop), dtype=torch.int64)
        audio = streams.push(after)[..., max(-next_output, 0) : frames * self._hop - next_output]
        streams.reset(range(streams.batch))
        return audio


class StreamingEncoder(_Signal):
    """Encodes audio that arrives piece by piece.

    What the pushes and the flush return is, joined, what `codec.encode` gives for all samples at once, where float
    rounding does not decide between entries that are equally near. A frame's codes come out with the last sample that
    they depend on.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights, or after `codec.optimize()`.
        n_quantizers: use the first that many codebooks; None: all.
    Attributes:
        look_ahead: samples past a frame's own that its codes depend on. 3733 (85 ms, 7.3 frames) at 44khz.
    Raises:
        ValueError: n_quantizers is out of range.
    """

    def __init__(self, codec: Codec, n_quantizers: int | None = None):
        super().__init__(lambda batch: EncoderStreams(codec, batch, n_quantizers))
        self._codec = codec

    def capture(self, frames: int, batch: int = 1):
        """Record pushes [batch, 1, frames hop_length] as a CUDA graph, see `EncoderStreams.capture`.

        Pieces of other sizes give as many frames as they fill: it is replayed whenever that is `frames`.

        Raises:
            ValueError: the codec is not on CUDA, or an argument is out of range.
        """
        self._of(batch).capture(frames)

    @torch.inference_mode()
    def push(self, audio: Tensor) -> Tensor:
        """The next samples [B, 1, n] to codes int64 [B, N, f]; n and f may be 0. B stays until the flush.

        Raises:
            ValueError: the shape is out of range.
        """
        batch = self._streams.batch if self._streams else _items("audio", audio)
        if audio.dim() != 3 or audio.shape[:2] != (batch, 1):
            raise ValueError(f"audio of shape {list(audio.shape)}; accepted: [{batch}, 1, T]")
        self._streams = self._streams or self._of(batch)
        return _codes(self._streams, audio)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The rest of the codes int64 [B, N, f], where the signal ends here. The next push begins a new one."""
        streams, self._streams = self._streams or self._of(1), None
        hop = self._codec.hop_length
        # as in `codec.encode`, zeros that fill the last frame belong to the signal
        missing = -(streams._pending.shape[2] + streams._origin) % hop
        last = _codes(streams, streams._pending.new_zeros(streams.batch, 1, missing))
        streams.end(range(streams.batch))
        frames = self._codec.encoder.output_length(streams._frames[0] * hop)
        after = (frames - streams._next_output()) * hop
        codes = torch.cat(
            [last, _codes(streams, streams._pending.new_zeros(streams.batch, 1, after))], dim=2
        )
        streams.reset(range(streams.batch))
        return codes


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
