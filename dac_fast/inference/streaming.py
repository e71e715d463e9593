"""Encoding and decoding of signals that arrive piece by piece; `stream_layers` has how.

`StreamingDecoder` and `StreamingEncoder` take one signal, or several in step. `DecoderStreams` and `EncoderStreams`
have slots for streams that begin and end at any time and run as one batch.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dac_fast.inference.stream_layers import Span, StreamedChain
from dac_fast.model.codec import DAC

# The length of a signal whose end is not known yet; its products with a hop length fit into int64.
ENDLESS = 1 << 40


class _Streams:
    """Slots for streams through an encoder or decoder, each at its own position.

    Args:
        chain: the layers.
        hop: positions that go in per frame.
        origin: index of the first position to go in: negative where positions before the signal do.
        output: what is given out of the layers' output, position by position.
    Attributes:
        batch: the number of slots.
    """

    def __init__(self, chain: StreamedChain, hop: int, origin: int, output: Callable[[Tensor], Tensor] = lambda y: y):
        self._chain, self._hop, self._origin, self._output = chain, hop, origin, output
        # an empty tensor of the layers' dtype and device
        self._empty = chain.tails[0].kept.new_empty(0)
        self.batch = chain.tails[0].kept.shape[0]
        self._frames = [0] * self.batch
        self._ends: list[int | None] = [None] * self.batch
        first, second = (chain.span(Span(origin + frames * hop, 0)).first for frames in (0, 1))
        self._lag, self._outputs_per_frame = -first, second - first

    def end(self, slots: Iterable[int]):
        """The signals of those streams end with what was pushed so far; what is pushed from now on is ignored."""
        for i in slots:
            if self._ends[i] is None:
                self._ends[i] = self._frames[i]

    def reset(self, slots: Iterable[int]):
        """New streams begin in those slots; what was in them is gone."""
        slots = list(slots)
        for i in slots:
            self._frames[i], self._ends[i] = 0, None
        for tail in self._chain.tails:
            tail.kept[slots] = 0

    def _next_output(self, slot: int = 0) -> int:
        """Index of the slot's next output in its signal, negative before it."""
        return self._frames[slot] * self._outputs_per_frame - self._lag

    def _flags(self, active) -> list[bool]:
        flags = [True] * self.batch if active is None else torch.as_tensor(active).tolist()
        if not isinstance(flags, list) or len(flags) != self.batch or any(type(flag) is not bool for flag in flags):
            raise ValueError(f"active is {flags}; accepted: {self.batch} booleans")
        return flags

    def _step(self, x: Tensor, flags: list[bool]) -> Tensor:
        """Whole frames x [B, C, f hop] through the layers; zeros where a stream is not active or has no output."""
        running = [i for i, flag in enumerate(flags) if flag]
        active = None if len(running) == self.batch else torch.tensor(flags, device=x.device)
        span = None
        if any(self._ends[i] is not None or self._next_output(i) < 0 for i in running):
            ends = [ENDLESS if end is None else end for end in self._ends]
            first, length = torch.tensor([self._frames, ends], device=x.device) * self._hop
            span = Span(first + self._origin, length)
        y, span = self._chain(x, span, active)
        y = self._output(y)
        for i in running:
            self._frames[i] += x.shape[-1] // self._hop
        if span is not None:
            y = span.mask(y)
        return y if active is None else torch.where(active[:, None, None], y, 0)


class DecoderStreams(_Streams):
    """Decodes up to `batch` streams of codes at once; each may begin and end at any push.

    A push of f frames gives f hop_length samples. They lag by `look_ahead` samples: a stream's first that many are
    zeros. After a stream's last codes `end` it, and push on (any codes) until `look_ahead` more samples have come;
    further ones are zeros. Then `reset` frees the slot for a new stream.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights.
        batch: slots.
    Attributes:
        look_ahead: samples; a sample depends on codes of frames up to that far ahead of it. 4757 (108 ms, 9.3
            frames) at 44khz.
    Raises:
        ValueError: batch is not positive.
    """

    def __init__(self, codec: DAC, batch: int):
        super().__init__(StreamedChain(codec.decoder.model, _checked_batch(batch)), hop=1, origin=0)
        self._codec, self.look_ahead = codec, self._lag

    @torch.inference_mode()
    def push(self, codes: Tensor, active=None) -> Tensor:
        """The next frames of the streams.

        Args:
            codes: [B, N, f] of the first N codebooks, any f.
            active: B booleans; what is pushed for the other streams is ignored, and they stay as they are. None: all.
        Returns:
            audio [B, 1, f hop_length].
        Raises:
            ValueError: the shape, a code or active is out of range.
        """
        flags, config = self._flags(active), self._codec.config
        if codes.dim() != 3 or codes.shape[0] != self.batch or not 1 <= codes.shape[1] <= config.n_codebooks:
            accepted = f"[{self.batch}, 1 to {config.n_codebooks}, F]"
            raise ValueError(f"codes of shape {list(codes.shape)}; accepted: {accepted}")
        if codes.shape[2] == 0:
            return self._empty.new_zeros(self.batch, 1, 0)
        low, high = (int(v) for v in codes.aminmax())
        if low < 0 or high >= config.codebook_size:
            raise ValueError(f"code {low if low < 0 else high}; accepted: 0 to {config.codebook_size - 1}")
        return self._step(self._codec.quantizer.from_codes(codes)[0], flags)


class EncoderStreams(_Streams):
    """Encodes up to `batch` streams of audio at once; each may begin and end at any push.

    A push of f hop_length samples gives f frames. They lag by `delay` frames: a stream's first that many are zeros.
    After a stream's last samples `end` it, and push on (anything) until `delay` more frames have come; further ones
    are zeros. Then `reset` frees the slot for a new stream.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights.
        batch: slots.
        n_quantizers: use the first that many codebooks; None: all.
    Attributes:
        look_ahead: samples past a frame's own that its codes depend on. 3733 (85 ms, 7.3 frames) at 44khz.
        delay: frames; the look-ahead, rounded up.
    Raises:
        ValueError: batch or n_quantizers is out of range.
    """

    def __init__(self, codec: DAC, batch: int, n_quantizers: int | None = None):
        available, hop = codec.config.n_codebooks, codec.hop_length
        if not 1 <= (n_quantizers or available) <= available or n_quantizers == 0:
            raise ValueError(f"{n_quantizers} codebooks; accepted: 1 to {available}")
        self._codebooks = n_quantizers or available
        chain = StreamedChain(codec.encoder.block, _checked_batch(batch))
        self.look_ahead = chain.first_input(0)
        self.delay = -(-self.look_ahead // hop)
        # Streams are cut into frames so that the last sample which some frame's codes depend on ends one.
        lead = self.delay * hop - self.look_ahead
        super().__init__(chain, hop, -lead, lambda z: codec.quantizer(z, self._codebooks)[1])
        # the samples [B, 1, n] that fill no frame yet; at first those before the signal
        self._pending = self._empty.new_zeros(batch, 1, lead)

    @torch.inference_mode()
    def push(self, audio: Tensor, active=None) -> Tensor:
        """The next samples of the streams.

        Args:
            audio: [B, 1, f hop_length], of the codec's dtype.
            active: B booleans; what is pushed for the other streams is ignored, and they stay as they are. None: all.
        Returns:
            codes int64 [B, N, f].
        Raises:
            ValueError: the shape or active is out of range.
        """
        flags = self._flags(active)
        if audio.dim() != 3 or audio.shape[:2] != (self.batch, 1) or audio.shape[2] % self._hop:
            accepted = f"[{self.batch}, 1, a multiple of {self._hop}]"
            raise ValueError(f"audio of shape {list(audio.shape)}; accepted: {accepted}")
        return self._take(audio, flags)

    def reset(self, slots: Iterable[int]):
        """New streams begin in those slots; what was in them is gone."""
        slots = list(slots)
        super().reset(slots)
        self._pending[slots] = 0

    def _take(self, audio: Tensor, flags: list[bool]) -> Tensor:
        """The codes [B, N, f] of the frames that the samples fill; with a stream not active, these are whole frames."""
        samples = torch.cat([self._pending, audio], dim=2)
        filled = samples.shape[2] // self._hop * self._hop
        samples, pending = samples.tensor_split([filled], dim=2)
        if not all(flags):
            pending = torch.where(torch.tensor(flags, device=audio.device)[:, None, None], pending, self._pending)
        self._pending = pending.clone()
        if filled == 0:
            return torch.zeros(self.batch, self._codebooks, 0, dtype=torch.int64, device=audio.device)
        return self._step(samples, flags)


class StreamingDecoder:
    """Decodes codes that arrive piece by piece.

    What the pushes and the flush return is, joined, what `codec.decode_codes` gives for all codes at once, within
    float rounding. A push returns all that is determined so far: of F frames, F hop_length - look_ahead samples.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights.
    Attributes:
        look_ahead: samples; a sample depends on codes of frames up to that far ahead of it. 4757 (108 ms, 9.3
            frames) at 44khz.
    """

    def __init__(self, codec: DAC):
        self._codec, self._streams = codec, None
        self.look_ahead = DecoderStreams(codec, 1).look_ahead

    def push(self, codes: Tensor) -> Tensor:
        """Codes [B, N, f] of the next f frames to audio [B, 1, n]; f and n may be 0. B stays until the flush.

        Raises:
            ValueError: the shape or a code is out of range.
        """
        streams = self._streams or DecoderStreams(self._codec, _items("codes", codes))
        early = max(-streams._next_output(), 0)
        audio = streams.push(codes)
        self._streams = streams
        return audio[..., early:]

    def flush(self) -> Tensor:
        """The rest of the audio [B, 1, n], where the signal ends here. The next push begins a new one."""
        streams, self._streams = self._streams or DecoderStreams(self._codec, 1), None
        hop, frames, next_output = self._codec.hop_length, streams._frames[0], streams._next_output()
        streams.end(range(streams.batch))
        after = torch.zeros(streams.batch, 1, -(-self.look_ahead // hop), dtype=torch.int64, device=self._device())
        return streams.push(after)[..., max(-next_output, 0) : frames * hop - next_output]

    def _device(self):
        return next(self._codec.parameters()).device


class StreamingEncoder:
    """Encodes audio that arrives piece by piece.

    What the pushes and the flush return is, joined, what `codec.encode` gives for all samples at once, where float
    rounding does not decide between entries that are equally near. A frame's codes come out with the last sample that
    they depend on.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights.
        n_quantizers: use the first that many codebooks; None: all.
    Attributes:
        look_ahead: samples past a frame's own that its codes depend on. 3733 (85 ms, 7.3 frames) at 44khz.
    Raises:
        ValueError: n_quantizers is out of range.
    """

    def __init__(self, codec: DAC, n_quantizers: int | None = None):
        self._codec, self._n_quantizers, self._streams = codec, n_quantizers, None
        self.look_ahead = EncoderStreams(codec, 1, n_quantizers).look_ahead

    @torch.inference_mode()
    def push(self, audio: Tensor) -> Tensor:
        """The next samples [B, 1, n] to codes int64 [B, N, f]; n and f may be 0. B stays until the flush.

        Raises:
            ValueError: the shape is out of range.
        """
        batch = self._streams.batch if self._streams else _items("audio", audio)
        if audio.dim() != 3 or audio.shape[:2] != (batch, 1):
            raise ValueError(f"audio of shape {list(audio.shape)}; accepted: [{batch}, 1, T]")
        self._streams = self._streams or EncoderStreams(self._codec, batch, self._n_quantizers)
        return _codes(self._streams, audio)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The rest of the codes int64 [B, N, f], where the signal ends here. The next push begins a new one."""
        streams, self._streams = self._streams or EncoderStreams(self._codec, 1, self._n_quantizers), None
        # as in `codec.encode`, zeros that fill the last frame belong to the signal
        missing = -(streams._pending.shape[2] + streams._origin) % self._codec.hop_length
        last = _codes(streams, streams._pending.new_zeros(streams.batch, 1, missing))
        streams.end(range(streams.batch))
        frames = self._codec.encoder.output_length(streams._frames[0] * self._codec.hop_length)
        after = (frames - streams._next_output()) * self._codec.hop_length
        return torch.cat([last, _codes(streams, streams._pending.new_zeros(streams.batch, 1, after))], dim=2)


def _codes(streams: EncoderStreams, audio: Tensor) -> Tensor:
    """The codes that come out for more samples, without those from before the signal."""
    early = max(-streams._next_output(), 0)
    return streams._take(audio, [True] * streams.batch)[..., early:]


def _items(name: str, x: Tensor) -> int:
    """Items of the first push."""
    if x.dim() != 3 or x.shape[0] == 0:
        raise ValueError(f"{name} of shape {list(x.shape)}; accepted: three axes, the first one not 0")
    return x.shape[0]


def _checked_batch(batch: int) -> int:
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {batch!r}; accepted: a positive integer")
    return batch
