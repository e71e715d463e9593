"""Streams that begin and end at any time and run as one batch; `stream_layers` has how.

They run the layers of the codec's engine, in its precision, where it has one (`DAC.optimize`). The push of a fixed
number of frames can be captured as a CUDA graph.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dac_fast.inference.plan import Plan
from dac_fast.model.interface import Codec
from dac_fast.ops.cuda_graph import RecordedStep
from dac_fast.ops.precision import float32_products
from dac_fast.streaming.layers import Span, StreamedChain, held_rows

# The length of a signal whose end is not known yet; its products with a hop length fit into int64.
ENDLESS = 1 << 40


class _Streams:
    """Slots for streams through an encoder or decoder, each at its own position.

    Subclasses have `_input`, a block on the layers' device to what goes into the layers, and `_output`, which is
    given out of what comes out of them, position by position.

    Args:
        codec: the `DAC`.
        chain: the layers.
        hop: positions of a block per frame, and of what goes into the layers.
        origin: index of the first position to go in: negative where positions before the signal do.
    Attributes:
        batch: the number of slots.
    """

    def __init__(self, codec: Codec, chain: StreamedChain, hop: int, origin: int):
        self._codec, self._chain, self._hop, self._origin = codec, chain, hop, origin
        # an empty tensor of the codec's dtype and device
        self._empty = next(codec.parameters()).new_empty(0)
        self.batch = chain.tails[0].shape[0]
        self._frames = [0] * self.batch
        self._ends: list[int | None] = [None] * self.batch
        # by the shape of a block
        self._recorded: dict[torch.Size, RecordedStep] = {}
        first, second = (chain.span(Span(origin + frames * hop, 0)).first for frames in (0, 1))
        self._lag, self._outputs_per_frame = -first, second - first

    def end(self, slots: Iterable[int]):
        """The signals of those streams end with what was pushed so far; what is pushed from now on is ignored."""
        for i in slots:
            if self._ends[i] is None:
                self._ends[i] = self._frames[i]

    @torch.inference_mode()
    def reset(self, slots: Iterable[int]):
        """New streams begin in those slots; what was in them is gone."""
        slots = list(slots)
        for i in slots:
            self._frames[i], self._ends[i] = 0, None
        for kept in self._chain.tails:
            kept[slots] = 0

    def _next_output(self, slot: int = 0) -> int:
        """Index of the slot's next output in its signal, negative before it."""
        return self._frames[slot] * self._outputs_per_frame - self._lag

    def _flags(self, active) -> list[bool]:
        flags = [True] * self.batch if active is None else torch.as_tensor(active).tolist()
        if (
            not isinstance(flags, list)
            or len(flags) != self.batch
            or any(type(flag) is not bool for flag in flags)
        ):
            raise ValueError(f"active is {flags}; accepted: {self.batch} booleans")
        return flags

    def _record(self, block: Tensor):
        """Record the steady step for blocks of that shape; the streams stay as they are."""
        states, choices = [kept.clone() for kept in self._chain.tails], self._chain.choices
        block = block.to(self._empty.device)
        cudnn_chose, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        if choices:
            # of the ways to run a layer, the fastest for this shape is taken
            choices.timing = block.is_cuda
        try:
            self._recorded[block.shape] = RecordedStep(self._compute, block)
        finally:
            torch.backends.cudnn.benchmark = cudnn_chose
            if choices:
                choices.timing = False
        for kept, state in zip(self._chain.tails, states, strict=True):
            kept.copy_(state)

    def _compute(self, block: Tensor, active: Tensor | None, span: Span | None = None) -> Tensor:
        """Whole frames [B, C, f hop] through the layers; zeros where a stream is not active or has no output."""
        y, span = self._chain(self._input(block), span, active)
        y = self._output(y)
        if span is not None:
            y = span.mask(y)
        if active is None:
            return y
        if held_rows(active) is active:
            return y.new_zeros(self.batch, *y.shape[1:]).index_copy_(0, active, y)
        return torch.where(active[:, None, None], y, 0)

    def _step(self, block: Tensor, flags: list[bool]) -> Tensor:
        """`_compute` for a block on any device, and the streams whose flag is True."""
        running = [i for i, flag in enumerate(flags) if flag]
        steady = all(self._ends[i] is None and self._next_output(i) >= 0 for i in running)
        if steady and block.shape in self._recorded:
            y = self._recorded[block.shape](block, flags)
        else:
            # Without a graph, streams that are not active cost nothing.
            device, span, active = self._empty.device, None, None
            if len(running) < self.batch:
                active = torch.tensor(running, dtype=torch.int64, device=device)
            if not steady:
                ends = [ENDLESS if end is None else end for end in self._ends]
                first, length = torch.tensor([self._frames, ends], device=device) * self._hop
                span = Span(first + self._origin, length).of(held_rows(active))
            y = self._compute(block.to(device)[held_rows(active)], active, span)
        for i in running:
            self._frames[i] += block.shape[-1] // self._hop
        return y


class DecoderStreams(_Streams):
    """Decodes up to `batch` streams of codes at once; each may begin and end at any push.

    A push of f frames gives f hop_length samples. They lag by `look_ahead` samples: a stream's first that many are
    zeros. After a stream's last codes `end` it, and push on (any codes) until `look_ahead` more samples have come;
    further ones are zeros. Then `reset` frees the slot for a new stream.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights, or after `codec.optimize()`.
        batch: slots.
    Attributes:
        look_ahead: samples; a sample depends on codes of frames up to that far ahead of it. 4757 (108 ms, 9.3
            frames) at 44khz.
    Raises:
        ValueError: batch is not positive.
    """

    def __init__(self, codec: Codec, batch: int):
        layers = _plan(codec, "decode") or codec.decoder.model
        super().__init__(codec, StreamedChain(layers, _checked_batch(batch)), hop=1, origin=0)
        self.look_ahead = self._lag

    @torch.inference_mode()
    def push(self, codes: Tensor, active=None) -> Tensor:
        """The next frames of the streams.

        Args:
            codes: [B, N, f] of the first N codebooks, any f; from the CPU they are checked without waiting for a GPU.
            active: B booleans; what is pushed for the other streams is ignored, and they stay as they are. None: all.
        Returns:
            audio [B, 1, f hop_length].
        Raises:
            ValueError: the shape, a code or active is out of range.
        """
        flags, config = self._flags(active), self._codec.config
        if (
            codes.dim() != 3
            or codes.shape[0] != self.batch
            or not 1 <= codes.shape[1] <= config.n_codebooks
        ):
            accepted = f"[{self.batch}, 1 to {config.n_codebooks}, F]"
            raise ValueError(f"codes of shape {list(codes.shape)}; accepted: {accepted}")
        if codes.shape[2] == 0:
            return self._empty.new_zeros(self.batch, 1, 0)
        low, high = torch.stack(codes.aminmax()).tolist()
        if low < 0 or high >= config.codebook_size:
            raise ValueError(
                f"code {low if low < 0 else high}; accepted: 0 to {config.codebook_size - 1}"
            )
        return self._step(codes, flags)

    @torch.inference_mode()
    def capture(self, frames: int, n_quantizers: int | None = None):
        """Record the push of that many frames as a CUDA graph; may be called for several numbers.

        It is replayed while no active stream is in its first `look_ahead` samples or has ended. Other pushes run as
        without it. The streams stay as they are.

        Args:
            frames: f of a push.
            n_quantizers: N of its codes; None: all codebooks.
        Raises:
            ValueError: the codec is not on CUDA, or an argument is out of range.
        """
        n = _checked_count(n_quantizers, self._codec.config.n_codebooks)
        self._record(torch.zeros(self.batch, n, _checked_frames(frames), dtype=torch.int64))

    def _input(self, codes: Tensor) -> Tensor:
        with float32_products(tf32=False):
            return self._codec.quantizer.decode(codes)

    def _output(self, audio: Tensor) -> Tensor:
        return audio


class EncoderStreams(_Streams):
    """Encodes up to `batch` streams of audio at once; each may begin and end at any push.

    A push of f hop_length samples gives f frames. They lag by `delay` frames: a stream's first that many are zeros.
    After a stream's last samples `end` it, and push on (anything) until `delay` more frames have come; further ones
    are zeros. Then `reset` frees the slot for a new stream.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights, or after `codec.optimize()`.
        batch: slots.
        n_quantizers: use the first that many codebooks; None: all.
    Attributes:
        look_ahead: samples past a frame's own that its codes depend on. 3733 (85 ms, 7.3 frames) at 44khz.
        delay: frames; the look-ahead, rounded up.
    Raises:
        ValueError: batch or n_quantizers is out of range.
    """

    def __init__(self, codec: Codec, batch: int, n_quantizers: int | None = None):
        self._codebooks = _checked_count(n_quantizers, codec.config.n_codebooks)
        layers, hop = _plan(codec, "encode") or codec.encoder.block, codec.hop_length
        chain = StreamedChain(layers, _checked_batch(batch))
        self.look_ahead = chain.first_input(0)
        self.delay = -(-self.look_ahead // hop)
        # Streams are cut into frames so that the last sample which some frame's codes depend on ends one.
        lead = self.delay * hop - self.look_ahead
        super().__init__(codec, chain, hop, origin=-lead)
        # the samples [B, 1, n] that fill no frame yet; at first those before the signal
        self._pending = self._empty.new_zeros(batch, 1, lead)

    @torch.inference_mode()
    def push(self, audio: Tensor, active=None) -> Tensor:
        """The next samples of the streams.

        Args:
            audio: [B, 1, f hop_length].
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

    @torch.inference_mode()
    def reset(self, slots: Iterable[int]):
        """New streams begin in those slots; what was in them is gone."""
        slots = list(slots)
        super().reset(slots)
        self._pending[slots] = 0

    @torch.inference_mode()
    def capture(self, frames: int):
        """Record the push of that many frames as a CUDA graph, see `DecoderStreams.capture`.

        It is replayed while no active stream is in its first `delay` frames or has ended.

        Raises:
            ValueError: the codec is not on CUDA, or frames is not positive.
        """
        self._record(self._empty.new_zeros(self.batch, 1, _checked_frames(frames) * self._hop))

    def _input(self, audio: Tensor) -> Tensor:
        return audio

    def _output(self, z: Tensor) -> Tensor:
        # small differences decide a search
        with float32_products(tf32=False):
            return self._codec.quantizer(z, self._codebooks)[1]

    def _take(self, audio: Tensor, flags: list[bool]) -> Tensor:
        """The codes [B, N, f] of the frames that the samples fill; with a stream not active, these are whole frames."""
        samples = torch.cat([self._pending, audio.to(self._pending)], dim=2)
        filled = samples.shape[2] // self._hop * self._hop
        samples, pending = samples.tensor_split([filled], dim=2)
        if not all(flags):
            pending = torch.where(
                torch.tensor(flags, device=samples.device)[:, None, None], pending, self._pending
            )
        self._pending = pending.clone()
        if filled == 0:
            return torch.zeros(
                self.batch, self._codebooks, 0, dtype=torch.int64, device=samples.device
            )
        return self._step(samples, flags)


def _checked_batch(batch: int) -> int:
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {batch!r}; accepted: a positive integer")
    return batch


def _checked_frames(frames: int) -> int:
    if not isinstance(frames, int) or frames < 1:
        raise ValueError(f"frames is {frames!r}; accepted: a positive integer")
    return frames


def _checked_count(n_quantizers: int | None, available: int) -> int:
    if n_quantizers is None:
        return available
    if not 1 <= n_quantizers <= available:
        raise ValueError(f"{n_quantizers} codebooks; accepted: 1 to {available}")
    return n_quantizers


def _plan(codec: Codec, stage: str) -> Plan | None:
    """The fused layers of the codec's engine, if it has one. Raises RuntimeError where that is out of date."""
    engine = codec._engine_for(torch.empty(0))
    return engine.plans[stage] if engine else None
