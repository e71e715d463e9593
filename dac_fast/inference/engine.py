"""The codec in the precision asked for, its layers fused, with CUDA graphs of listed sizes.

Encoder and decoder run as `Plan`s, the listed sizes as `Graphs`; see `DAC.optimize`. The quantizer
always computes in IEEE single precision, since small differences decide a search.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from dac_kernels import native
from torch import Tensor

from dac_fast.inference.buckets import Bucket, Graphs, Request
from dac_fast.inference.choices import choosing
from dac_fast.inference.plan import Plan
from dac_fast.model.frames import encoded
from dac_fast.model.halves import DIRECTIONS, directions_of
from dac_fast.model.interface import Codec
from dac_fast.model.quantize import Encoded
from dac_fast.ops import BackendError, use_backend
from dac_fast.ops.precision import float32_products

MEBIBYTE = 1 << 20


class Precision(NamedTuple):
    """How convolutions compute.

    Attributes:
        dtype: of weights and activations.
        products: of float32, see `ops.conv1d`.
    """

    dtype: torch.dtype
    products: str


PRECISIONS = {
    "fp32": Precision(torch.float32, "ieee"),
    "tf32x3": Precision(torch.float32, "tf32x3"),
    "tf32": Precision(torch.float32, "tf32"),
    "fp16": Precision(torch.float16, "ieee"),
    "bf16": Precision(torch.bfloat16, "ieee"),
}

# Of both directions, or by direction.
PrecisionOption = str | Mapping[str, str | None] | None
Shapes = Iterable[tuple[int, int]]
ShapesOption = Shapes | Mapping[str, Shapes]


class PrecisionError(ValueError):
    """Values went out of range in the precision that was asked for."""


@dataclass(frozen=True)
class Options:
    """What `DAC.optimize` was asked for, checked and complete.

    Attributes:
        precision: by direction, the name of a precision.
        shapes: by direction, (batch, frames) pairs.
        memory: bytes that the graphs may hold.
        invariant: whether bits must not depend on the batch, nor on the size.
    """

    precision: dict[str, str]
    shapes: dict[str, list[tuple[int, int]]]
    memory: int
    invariant: bool

    @classmethod
    def checked(
        cls,
        codec: Codec,
        precision: PrecisionOption = None,
        shapes: ShapesOption = (),
        memory: int = 0,
        invariant: bool = False,
    ) -> "Options":
        """The options of `DAC.optimize` for that codec.

        Raises:
            BackendError: `invariant`, and the quantizer has no fused kernel.
            ValueError: an option is out of range, or the codec is none that an engine runs.
        """
        parameter = next(codec.parameters())
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"the codec's parameters are {parameter.dtype}; accepted: torch.float32"
            )
        if codec.config.activation != "snake":
            raise ValueError(
                f"the codec's activation is {codec.config.activation!r}; "
                "accepted by the engine: 'snake'"
            )
        directions = directions_of(codec)
        form = "factorized" if codec.config.continuous else codec.config.quantizer
        if invariant and parameter.is_cuda and "encode" in directions and form != "factorized":
            raise BackendError(
                f"no kernel runs the quantizer {form!r} whatever the batch; accepted: 'factorized'"
            )
        precisions = _precisions(precision, directions, parameter.device)
        return cls(precisions, _shapes(shapes, directions), memory, invariant)


def _precisions(
    precision: PrecisionOption, directions: Sequence[str], device: torch.device
) -> dict[str, str]:
    default = {"encode": "fp32", "decode": "fp16" if device.type == "cuda" else "fp32"}
    if not isinstance(precision, Mapping):
        precision = dict.fromkeys(directions, precision)
    for direction, name in precision.items():
        if direction not in directions or name not in (None, *PRECISIONS):
            raise ValueError(
                f"precision is {name!r} for {direction!r}; "
                f"accepted: {', '.join(PRECISIONS)} for {' and '.join(directions)}"
            )
    return {direction: precision.get(direction) or default[direction] for direction in directions}


def _shapes(shapes: ShapesOption, directions: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    if not isinstance(shapes, Mapping):
        shapes = dict.fromkeys(directions, tuple(shapes))
    for direction, pairs in shapes.items():
        for pair in pairs:
            fits = len(pair) == 2 and all(isinstance(size, int) and size > 0 for size in pair)
            if direction not in directions or not fits:
                raise ValueError(
                    f"shapes has {pair} for {direction!r}; accepted: pairs of positive integers, "
                    f"(batch, frames), for {' and '.join(directions)}"
                )
    return {direction: list(shapes.get(direction, ())) for direction in directions}


class Engine:
    """Runs a codec's encoder, quantizer and decoder. Made by `DAC.optimize`.

    The engine keeps the encoder's and decoder's weights as they were when it was made. Threads may
    share it; the graphs serve one at a time.

    Args:
        codec: in eval mode; quicker with folded weights.
        options: of `DAC.optimize`.

    Attributes:
        precision: by direction, "encode" and "decode" or the one that the codec has a half for, the
            name of its precision.
        plans: by direction, the fused layers.
        graphs: the captured sizes.
        hits, misses: requests to encode or to decode codes that a graph served, and others.
        stale: what has happened to the codec that the engine no longer fits; "" for nothing.
    """

    def __init__(self, codec: Codec, options: Options):
        self.device = next(codec.parameters()).device
        self.precision = options.precision
        self.graphs = Graphs(self.device, options.memory)
        self.hits = self.misses = 0
        self._kernels_alone = options.invariant and self.device.type == "cuda"
        self.stale = ""
        # Directions whose first finite input gave finite results.
        self._proven: set[str] = set()
        # Tensors made in inference mode cannot be changed outside of it, nor watched for changes.
        with torch.inference_mode(False):
            self._config, self._quantizer = codec.config, codec.quantizer
            self.plans: dict[str, Plan] = {}
            for direction in directions_of(codec):
                part, precision = DIRECTIONS[direction], PRECISIONS[self.precision[direction]]
                module = getattr(codec, part)
                self.plans[direction] = Plan(part, module, *precision, options.invariant)
            with torch.cuda.device_of(next(codec.parameters())):
                if options.invariant:
                    # Now rather than later, a layer without a kernel says so.
                    self._warm_up({name: [(1, 1)] for name in self.plans}, capture=False)
                self._warm_up(options.shapes, capture=self.device.type == "cuda")

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Graphs cannot be copied or pickled: a copy of the codec has no engine.
        return type(None), ()

    @native.torch_on_one_thread()
    @torch.no_grad()
    def encode(
        self,
        audio: Tensor,
        lengths: Tensor | None,
        n_quantizers: int | None,
        padded: bool,
    ) -> Encoded:
        """As `DAC.encode`, of checked arguments."""
        batch, _, samples = audio.shape
        frames = -(-samples // self._config.hop_length)
        if padded and (bucket := self._bucket("encode", batch, frames, n_quantizers)):
            return self._encode_in(bucket, audio, lengths)
        z = self._run("encode", audio, lengths, padded)
        lengths = self._frames(lengths)
        with self._quantizing():
            return encoded(self._quantizer(z, n_quantizers, lengths), lengths)

    @native.torch_on_one_thread()
    @torch.no_grad()
    def features(self, audio: Tensor, lengths: Tensor | None = None, padded: bool = True) -> Tensor:
        """The encoder's output [B, E, F] for audio; the arguments are those of `DAC.encode`."""
        batch, _, samples = audio.shape
        frames = -(-samples // self._config.hop_length)
        # The graphs of other codecs go on to codes.
        graphed = self._config.continuous and padded
        if graphed and (bucket := self._bucket("encode", batch, frames, None)):
            with self._replayed("encode", bucket, audio, lengths) as (features,):
                return features[:batch, :, :frames].clone()
        return self._run("encode", audio, lengths, padded)

    @torch.no_grad()
    def decode(self, z: Tensor, lengths: Tensor | None, padded: bool) -> Tensor:
        """As `DAC.decode`, of checked arguments."""
        if self._config.continuous:
            return self._restored(z, None, lengths, padded)
        return self._run("decode", z, lengths, padded)

    @native.torch_on_one_thread()
    @torch.no_grad()
    def decode_codes(self, codes: Tensor, lengths: Tensor | None, padded: bool) -> Tensor:
        """As `DAC.decode_codes`, of checked arguments.

        But a code out of range counts as the nearest one inside: the caller finds it meanwhile.
        """
        return self._restored(codes, codes.shape[1], lengths, padded)

    def _restored(
        self, kept: Tensor, codebooks: int | None, lengths: Tensor | None, padded: bool
    ) -> Tensor:
        """Codes or latents to audio, by a graph where one fits."""
        batch, _, frames = kept.shape
        if padded and (bucket := self._bucket("decode", batch, frames, codebooks)):
            with self._replayed("decode", bucket, kept, lengths) as (audio,):
                return audio[:batch, :, : frames * self._config.hop_length].clone()
        return self._run("decode", self._latent(kept, lengths), lengths, padded, masked=True)

    @contextlib.contextmanager
    def _quantizing(self) -> Iterator[None]:
        """Inside, products are float32's, and made by kernels alone where bits must not vary."""
        backend = use_backend("triton") if self._kernels_alone else contextlib.nullcontext()
        with float32_products(tf32=False), backend:
            yield

    def _frames(self, lengths: Tensor | None) -> Tensor | None:
        """Lengths in samples to lengths in frames."""
        return None if lengths is None else -(-lengths // self._config.hop_length)

    def _latent(self, kept: Tensor, lengths: Tensor | None) -> Tensor:
        """Codes to the quantised latent, with codes out of range clamped; or latents.

        Looking such a code up could end the process's work on the GPU.
        """
        if not self._config.continuous:
            kept = kept.clamp(0, self._config.codebook_size - 1)
        with self._quantizing():
            return self._quantizer.decode(kept, lengths)

    def _run(
        self,
        direction: str,
        x: Tensor,
        lengths: Tensor | None,
        padded: bool = True,
        masked: bool = False,
    ) -> Tensor:
        """A direction's plan; its first run looks at what every layer gives.

        Raises:
            PrecisionError: a layer gives infinity or NaN.
        """
        plan = self.plans[direction]
        if direction in self._proven:
            return plan(x, lengths, padded, masked)
        names: list[str] = []
        finite: list[Tensor] = []

        def watch(name: str, tensor: Tensor) -> None:
            names.append(name)
            finite.append(tensor.isfinite().all())

        y = plan(x, lengths, padded, masked, watch)
        is_finite = torch.stack(finite).tolist()
        # An input that is not finite says nothing about the precision.
        if not is_finite[0]:
            return y
        if not all(is_finite):
            precision = self.precision[direction]
            remedy = (
                "try precision bf16 or fp32"
                if precision == "fp16"
                else "weights or input are too large"
            )
            layer = names[is_finite.index(False)]
            raise PrecisionError(
                f"{direction} in {precision}: {layer} gives infinity or NaN; {remedy}"
            )
        self._proven.add(direction)
        return y

    def _bucket(
        self, direction: str, batch: int, frames: int, codebooks: int | None
    ) -> Bucket | None:
        """The graph that serves such a request, or None; counts it. Graphs have all codebooks."""
        whole = codebooks in (None, self._config.n_codebooks)
        bucket = self.graphs.find(direction, batch, frames) if whole else None
        self.hits += bucket is not None
        self.misses += bucket is None
        return bucket

    def _encode_request(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """What a graph of encode captures.

        Args:
            audio: [B, 1, T].
            lengths: samples; 0 for an item that is not there, which no loss counts.
        """
        z = self._run("encode", audio, lengths)
        if self._config.continuous:
            return (z,)
        frames = (-(-lengths // self._config.hop_length)).clamp(min=1)
        counts = self._config.n_codebooks * (lengths > 0)
        with self._quantizing():
            outputs: tuple[Tensor, ...] = self._quantizer(z, None, frames, counts)
        return outputs

    def _decode_request(self, kept: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """What a graph of decode captures. lengths: frames, 0 for an item that is not there."""
        return (self._run("decode", self._latent(kept, lengths), lengths, masked=True),)

    @contextlib.contextmanager
    def _replayed(
        self, direction: str, bucket: Bucket, x: Tensor, lengths: Tensor | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """The bucket's outputs for a request; to be copied, since the next request changes them."""
        batch, _, size = x.shape
        inputs, input_lengths = bucket.graph.inputs
        with bucket.turn():
            inputs[:batch, :, :size].copy_(x)
            input_lengths[batch:] = 0
            input_lengths[:batch] = size if lengths is None else lengths
            if direction not in self._proven:
                bucket.run(inputs, input_lengths)
            bucket.graph.replay()
            yield bucket.graph.outputs

    def _encode_in(self, bucket: Bucket, audio: Tensor, lengths: Tensor | None) -> Encoded:
        batch, _, samples = audio.shape
        frames = -(-samples // self._config.hop_length)
        with self._replayed("encode", bucket, audio, lengths) as outputs:
            z, codes, latents = (output[:batch, :, :frames].clone() for output in outputs[:3])
            # Means over the bucket's items, of which those that are not there count as 0.
            commitment, codebook = (loss * (bucket.batch / batch) for loss in outputs[3:])
        return encoded((z, codes, latents, commitment, codebook), self._frames(lengths))

    def _warm_up(self, shapes: dict[str, list[tuple[int, int]]], capture: bool = True) -> None:
        """Let the layers choose at these sizes, and capture them, the largest first."""
        # The examples prove nothing.
        self._proven.update(self.plans)
        sizes = [(direction, *shape) for direction in shapes for shape in shapes[direction]]
        try:
            with torch.no_grad():
                for direction, batch, frames in sorted(sizes, key=lambda size: -size[1] * size[2]):
                    run, inputs = self._example(direction, batch, frames)
                    with choosing(self.plans[direction].choices):
                        run(*inputs)
                        if capture:
                            self.graphs.add(direction, batch, frames, run, inputs)
        finally:
            self._proven.clear()

    def _example(
        self, direction: str, batch: int, frames: int
    ) -> tuple[Request, tuple[Tensor, Tensor]]:
        """What a graph captures, and inputs: not zeros, on which processors are quicker."""
        config = self._config
        if direction == "encode":
            samples = frames * config.hop_length
            shape = (batch, config.channels, samples)
            audio = torch.linspace(-1, 1, math.prod(shape), device=self.device).view(shape)
            lengths = torch.full((batch,), samples, device=self.device)
            return self._encode_request, (audio, lengths)
        kept = self._quantizer.blank(batch, frames).to(self.device)
        numbers = torch.arange(kept.numel(), device=self.device) % config.codebook_size
        lengths = torch.full((batch,), frames, device=self.device)
        return self._decode_request, (numbers.view(kept.shape).to(kept.dtype), lengths)

    def __str__(self) -> str:
        graphs = self.graphs
        lines = [
            f"{direction} in {precision} on {self.device}"
            + ", invariant" * self.plans[direction].choices.invariant
            for direction, precision in self.precision.items()
        ]
        for direction in self.plans:
            buckets = graphs.buckets.get(direction, ())
            sizes = ", ".join(f"{bucket.batch} × {bucket.frames}" for bucket in buckets)
            lines.append(f"graphs of {direction} (items × frames): {sizes or 'none'}")
        lines.append(
            f"graph memory: {graphs.used / MEBIBYTE:.0f} MiB "
            f"of at most {graphs.memory / MEBIBYTE:.0f}"
        )
        for direction, batch, frames, needed in graphs.left_eager:
            lines.append(
                f"not captured: {direction} of {batch} × {frames}, "
                f"which needs {needed / MEBIBYTE:.0f} MiB"
            )
        lines.append(f"requests: {self.hits} by graphs, {self.misses} eagerly")
        for direction, plan in self.plans.items():
            lines += plan.choices.table(self.precision[direction])
        return "\n".join(lines)
