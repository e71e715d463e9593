"""Streams that begin and end at any time and run as one batch; see `layers` for how they run.

They run the layers of the codec's engine, in its precision, where there is one (`DAC.optimize`).
The push of a fixed number of frames can be captured as a CUDA graph.
"""

import contextlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, SupportsIndex

import torch
from dac_kernels import native
from torch import Tensor

from dac_fast.inference.choices import choosing
from dac_fast.inference.engine import Engine
from dac_fast.inference.plan import Plan
from dac_fast.model.halves import DIRECTIONS, Direction, require
from dac_fast.model.interface import Codec
from dac_fast.model.layers import Chain
from dac_fast.ops import cuda_graph
from dac_fast.ops.precision import float32_products
from dac_fast.streaming.layers import Span, StreamedChain, held_rows

# The length of a signal whose end is not known yet; its products with a hop length fit into int64.
ENDLESS = 1 << 40


class OptimizableCodec(Codec, Protocol):
    """A codec that an engine may run."""

    def engine_for(self) -> Engine | None: ...  # noqa: D102


def layers_of(codec: OptimizableCodec, direction: Direction) -> Plan | Chain:
    """The layers that run a direction: the engine's where the codec has one, else the modules.

    Raises:
        MissingPartError: the direction's part was not loaded.
        RuntimeError: the engine is of weights that the codec no longer has.
    """
    require(codec, DIRECTIONS[direction])
    if engine := codec.engine_for():
        return engine.plans[direction]
    return codec.encoder.block if direction == "encode" else codec.decoder.model


class RecordedStep:
    """A step of streams for blocks of one shape, as a CUDA graph.

    Args:
        compute: block [B, ...] and active [B] to a new tensor; it may change tensors that stay
            where they are.
        block: of the shape; on the device.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor], block: Tensor):
        capturer = cuda_graph.Capturer(block.device)
        active = torch.ones(block.shape[0], dtype=torch.bool, device=block.device)
        # The first call compiles and chooses kernels; the second one runs as the capture will.
        for _ in range(2):
            capturer.run(compute, block, active)
        self._graph = capturer.capture(compute, block.clone(), active)
        self._flags = [True] * block.shape[0]

    def __call__(self, block: Tensor, flags: list[bool]) -> Tensor:
        """The result for a block on any device, and the streams whose flag is True."""
        static_block, active = self._graph.inputs
        static_block.copy_(block)
        if flags != self._flags:
            active.copy_(torch.tensor(flags))
            self._flags = flags
        self._graph.replay()
        # The next replay writes to the same memory.
        return self._graph.outputs.clone()


class _Streams(ABC):
    """Slots for streams through an encoder or decoder, each at its own position.

    Args:
        codec: the `DAC`.
        chain: the layers.
        hop: positions of a block per frame, and of what goes into the layers.
        origin: index of the first position to go in: negative where positions before the signal do.
    Attributes:
        batch: the number of slots.
        look_ahead: positions past an output's own that the output depends on.
    """

    look_ahead: int

    def __init__(self, codec: Codec, chain: StreamedChain, hop: int, origin: int):
        self._codec = codec
        self._chain = chain
        self._hop = hop
        self._origin = origin
        # An empty tensor of the codec's dtype and device.
        self._empty = next(codec.parameters()).new_empty(0)
        self.batch = chain.tails[0].shape[0]
        self._frames = [0] * self.batch
        self._ends: list[int | None] = [None] * self.batch
        # By the shape of a block.
        self._recorded: dict[torch.Size, RecordedStep] = {}
        first, second = (chain.first_output(origin + frames * hop) for frames in (0, 1))
        self._lag, self._outputs_per_frame = -first, second - first

    @abstractmethod
    def _input(self, block: Tensor) -> Tensor:
        """A block on the layers' device, to what goes into the layers."""

    @abstractmethod
    def _output(self, y: Tensor) -> Tensor:
        """What comes out of the layers, to what is given out, position by position."""

    @abstractmethod
    def _zeros(self, frames: int) -> Tensor:
        """What a push of so many frames gives where no stream runs."""

    def end(self, slots: Iterable[int]) -> None:
        """The signals of those slots end with what was pushed so far; later pushes are ignored.

        Raises:
            ValueError: there is no such slot.
        """
        for i in self._checked_slots(slots):
            if self._ends[i] is None:
                self._ends[i] = self._frames[i]

    @torch.inference_mode()
    def reset(self, slots: Iterable[int]) -> None:
        """New streams begin in those slots; what was in them is gone.

        Raises:
            ValueError: there is no such slot.
        """
        self._reset(self._checked_slots(slots))

    def _reset(self, slots: list[int]) -> None:
        for i in slots:
            self._frames[i], self._ends[i] = 0, None
        for kept in self._chain.tails:
            kept[slots] = 0

    def _checked_slots(self, slots: Iterable[int]) -> list[int]:
        checked = []
        for slot in slots:
            is_number = isinstance(slot, SupportsIndex) and not isinstance(slot, bool)
            if not is_number or not 0 <= operator.index(slot) < self.batch:
                raise ValueError(f"slot is {slot!r}; accepted: 0 to {self.batch - 1}")
            checked.append(operator.index(slot))
        return checked

    def _next_output(self, slot: int = 0) -> int:
        """Index of the slot's next output in its signal, negative before it."""
        return self._frames[slot] * self._outputs_per_frame - self._lag

    def _flags(self, active: Sequence[bool] | Tensor | None) -> list[bool]:
        flags = [True] * self.batch if active is None else torch.as_tensor(active).tolist()
        if (
            not isinstance(flags, list)
            or len(flags) != self.batch
            or any(type(flag) is not bool for flag in flags)
        ):
            raise ValueError(f"active is {flags}; accepted: {self.batch} booleans")
        return flags

    def _record(self, block: Tensor) -> None:
        """Record the steady step for blocks of that shape; the streams stay as they are."""
        states = [kept.clone() for kept in self._chain.tails]
        with choosing(self._chain.choices):
            self._recorded[block.shape] = RecordedStep(self._compute, block.to(self._empty.device))
        for kept, state in zip(self._chain.tails, states, strict=True):
            kept.copy_(state)

    def _compute(self, block: Tensor, active: Tensor | None, span: Span | None = None) -> Tensor:
        """Whole frames [B, C, f hop] through the layers.

        Outputs are zeros where a stream is not active or has none.
        """
        # The engine's layers have threads of their own.
        fused = self._chain.choices is not None
        with native.torch_on_one_thread() if fused else contextlib.nullcontext():
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
        frames = block.shape[-1] // self._hop
        if not running:
            return self._zeros(frames)
        steady = all(self._ends[i] is None and self._next_output(i) >= 0 for i in running)
        if steady and block.shape in self._recorded:
            y = self._recorded[block.shape](block, flags)
        else:
            # Without a graph, streams that are not active cost nothing.
            device = self._empty.device
            span = None
            active = None
            if len(running) < self.batch:
                active = torch.tensor(running, dtype=torch.int64, device=device)
            if not steady:
                ends = [ENDLESS if end is None else end for end in self._ends]
                first, length = torch.tensor([self._frames, ends], device=device) * self._hop
                span = Span(first + self._origin, length).of(held_rows(active))
            y = self._compute(block.to(device)[held_rows(active)], active, span)
        for i in running:
            self._frames[i] += frames
        return y


class DecoderStreams(_Streams):
    """Decodes up to `batch` streams of codes at once; each may begin and end at any push.

    A push of f frames gives f hop_length samples. They lag by `look_ahead` samples: a stream's
    first that many are zeros. After a stream's last codes `end` it, and push on (any codes) until
    `look_ahead` more samples have come; further ones are zeros. Then `reset` frees the slot for a
    new stream.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights, or after
            `codec.optimize()`.
        batch: slots.
    Attributes:
        look_ahead: samples; a sample depends on codes of frames up to that far ahead of it. 4757
            (108 ms, 9.3 frames) at 44khz.
    Raises:
        ValueError: batch is not positive.
    """

    def __init__(self, codec: OptimizableCodec, batch: int):
        chain = StreamedChain(layers_of(codec, "decode"), _positive("batch", batch))
        super().__init__(codec, chain, hop=1, origin=0)
        self.look_ahead = self._lag

    @torch.inference_mode()
    def push(self, codes: Tensor, active: Sequence[bool] | Tensor | None = None) -> Tensor:
        """The next frames of the streams.

        Args:
            codes: [B, N, f] of the first N codebooks, any f; of a continuous codec latents
                [B, D, f]. Codes from the CPU are checked without waiting for a GPU.
            active: B booleans. What is pushed for the other streams is ignored, and they stay as
                they are. None: all are active.
        Returns:
            audio [B, channels, f hop_length].
        Raises:
            ValueError: the shape, an active stream's code or `active` is out of range; all streams
                stay as they are.
        """
        flags, config = self._flags(active), self._codec.config
        most = self._codec.quantizer.rows()
        least = most if config.continuous else 1
        fits = codes.dim() == 3 and codes.shape[0] == self.batch
        if not fits or not least <= codes.shape[1] <= most:
            accepted = f"[{self.batch}, {least} to {most}, F]"
            raise ValueError(f"codes of shape {list(codes.shape)}; accepted: {accepted}")
        if codes.shape[2] == 0:
            return self._zeros(0)
        idle = [i for i, flag in enumerate(flags) if not flag]
        if idle:
            codes = codes.index_fill(0, torch.tensor(idle, device=codes.device), 0)
        if not config.continuous:
            _check_codes(codes, config.codebook_size)
        return self._step(codes, flags)

    @torch.inference_mode()
    def capture(self, frames: int, n_quantizers: int | None = None) -> None:
        """Record the push of that many frames as a CUDA graph; may be called for several numbers.

        The graph is replayed while no active stream is in its first `look_ahead` samples or has
        ended. Other pushes run without it. The streams stay as they are.

        Args:
            frames: f of a push.
            n_quantizers: N of its codes; None: all codebooks.
        Raises:
            ValueError: the codec is not on CUDA, or an argument is out of range.
        """
        self._record(self._blank(_positive("frames", frames), n_quantizers))

    def _blank(self, frames: int, n_quantizers: int | None = None) -> Tensor:
        """What is pushed, as zeros."""
        return self._codec.quantizer.blank(self.batch, frames, n_quantizers)

    def _input(self, block: Tensor) -> Tensor:
        with float32_products(tf32=False):
            return self._codec.quantizer.decode(block).to(self._empty)

    def _output(self, y: Tensor) -> Tensor:
        return y

    def _zeros(self, frames: int) -> Tensor:
        samples = frames * self._outputs_per_frame
        return self._empty.new_zeros(self.batch, self._codec.config.channels, samples)


class EncoderStreams(_Streams):
    """Encodes up to `batch` streams of audio at once; each may begin and end at any push.

    A push of f hop_length samples gives f frames. They lag by `delay` frames: a stream's first that
    many are zeros. After a stream's last samples `end` it, and push on (anything) until `delay`
    more frames have come; further ones are zeros. Then `reset` frees the slot for a new stream.

    Args:
        codec: the `DAC`, on any device, of any dtype; quicker with folded weights, or after
            `codec.optimize()`.
        batch: slots.
        n_quantizers: use the first that many codebooks; None: all.
    Attributes:
        look_ahead: samples past a frame's own that its codes depend on. 3733 (85 ms, 7.3 frames) at
            44khz.
        delay: frames; the look-ahead, rounded up.
    Raises:
        ValueError: batch or n_quantizers is out of range.
    """

    def __init__(self, codec: OptimizableCodec, batch: int, n_quantizers: int | None = None):
        # Raises where n_quantizers is out of range.
        codec.quantizer.rows(n_quantizers)
        self._n_quantizers = n_quantizers
        chain = StreamedChain(layers_of(codec, "encode"), _positive("batch", batch))
        hop = codec.hop_length
        self.look_ahead = chain.first_input(0)
        self.delay = -(-self.look_ahead // hop)
        # Streams are cut into frames so that one ends with the last sample that a frame's codes
        # depend on.
        lead = self.delay * hop - self.look_ahead
        super().__init__(codec, chain, hop, origin=-lead)
        # The samples that fill no frame yet; at first those before the signal.
        self._pending = self._empty.new_zeros(batch, codec.config.channels, lead)

    @torch.inference_mode()
    def push(self, audio: Tensor, active: Sequence[bool] | Tensor | None = None) -> Tensor:
        """The next samples of the streams.

        Args:
            audio: [B, channels, f hop_length].
            active: B booleans. What is pushed for the other streams is ignored, and they stay as
                they are. None: all are active.
        Returns:
            codes int64 [B, N, f]; of a continuous codec the means of the latents [B, D, f].
        Raises:
            ValueError: the shape or `active` is out of range; all streams stay as they are.
        """
        flags, expected = self._flags(active), self._pending.shape[:2]
        if audio.dim() != 3 or audio.shape[:2] != expected or audio.shape[2] % self._hop:
            accepted = f"[{self.batch}, {expected[1]}, a multiple of {self._hop}]"
            raise ValueError(f"audio of shape {list(audio.shape)}; accepted: {accepted}")
        return self._take(audio, flags)

    @torch.inference_mode()
    def capture(self, frames: int) -> None:
        """Record the push of that many frames as a CUDA graph, see `DecoderStreams.capture`.

        The graph is replayed while no active stream is in its first `delay` frames or has ended.

        Raises:
            ValueError: the codec is not on CUDA, or frames is not positive.
        """
        samples = _positive("frames", frames) * self._hop
        self._record(self._empty.new_zeros(self.batch, self._pending.shape[1], samples))

    def _reset(self, slots: list[int]) -> None:
        super()._reset(slots)
        pending = self._empty.new_zeros(self.batch, self._pending.shape[1], -self._origin)
        others = [i for i in range(self.batch) if i not in slots]
        # Signals in step, which may have pushed parts of a frame, are all reset at once.
        if others:
            pending[others] = self._pending[others]
        self._pending = pending

    def _input(self, block: Tensor) -> Tensor:
        return block

    def _output(self, y: Tensor) -> Tensor:
        # Small differences decide a search.
        with float32_products(tf32=False):
            return self._codec.quantizer.encode(y, self._n_quantizers)

    def _zeros(self, frames: int) -> Tensor:
        zeros = self._codec.quantizer.blank(self.batch, frames, self._n_quantizers)
        return zeros.to(self._empty if zeros.is_floating_point() else self._empty.device)

    def _take(self, audio: Tensor, flags: list[bool]) -> Tensor:
        """The codes [B, N, f] of the frames that the samples fill.

        Where a stream is not active, the samples are whole frames.
        """
        samples = torch.cat([self._pending, audio.to(self._pending)], dim=2)
        filled = samples.shape[2] // self._hop * self._hop
        samples, pending = samples.tensor_split([filled], dim=2)
        if not all(flags):
            active = torch.tensor(flags, device=samples.device)
            pending = torch.where(active[:, None, None], pending, self._pending)
        self._pending = pending.clone()
        if filled == 0:
            return self._zeros(0)
        return self._step(samples, flags)


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; accepted: a positive integer")
    return value


def _check_codes(codes: Tensor, size: int) -> None:
    low, high = torch.stack(codes.aminmax()).tolist()
    if low < 0 or high >= size:
        slot, book, frame = ((codes < 0) | (codes >= size)).nonzero()[0].tolist()
        code = int(codes[slot, book, frame])
        raise ValueError(f"slot {slot}: code {code}; accepted: 0 to {size - 1}")
