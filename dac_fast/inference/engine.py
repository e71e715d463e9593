"""The codec in the precision asked for, its layers fused, with CUDA graphs of listed sizes: see `DAC.optimize`.

Encoder and decoder run as `Plan`s, the sizes as `Graphs`. The quantizer always computes in IEEE single precision, since
small differences decide a search.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from dac_fast.inference.buckets import Bucket, Graphs
from dac_fast.inference.plan import Plan
from dac_fast.model.layers import zero_past
from dac_fast.model.quantize import Encoded
from dac_fast.ops.precision import float32_products

# dtype of weights and activations, and whether products of float32 may be rounded to TF32
PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
}
STAGES = ("encode", "decode")


class PrecisionError(ValueError):
    """Values went out of range in the precision that was asked for."""


class Engine:
    """Runs a codec's encoder, quantizer and decoder. Made by `DAC.optimize`, which says what the arguments are.

    It keeps the weights as they were when it was made. Threads may share it; the graphs serve one at a time.

    Attributes:
        precision: {"encode": ..., "decode": ...}.
        plans: of the same keys, the fused layers.
        graphs: the captured sizes.
        hits, misses: requests to encode or decode codes that a graph served, and others.
        stale: what happened to the codec since, so that the engine is no longer of it; "": nothing.
    """

    def __init__(self, codec, precision=None, shapes=(), memory: int = 4 << 30):
        parameter = next(codec.parameters())
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"the codec's parameters are {parameter.dtype}; accepted: torch.float32"
            )
        if codec.config.activation != "snake":
            raise ValueError(
                f"the codec's activation is {codec.config.activation!r}; accepted by the engine: 'snake'"
            )
        self.device, self.stale = parameter.device, ""
        self.precision, shapes = _checked_precision(precision, self.device), _checked_shapes(shapes)
        # frees what an earlier engine holds, now that the arguments are in order
        codec.engine = None
        self.graphs, self.hits, self.misses = Graphs(self.device, memory), 0, 0
        # the stages whose precision had the range for a first input
        self._proven = set()
        # tensors made in inference mode could not be written to outside of it, nor watched for changes
        with torch.inference_mode(False):
            self._codec = codec.eval().fold_weight_norm()
            self.plans = {
                "encode": Plan("encoder", codec.encoder, *PRECISIONS[self.precision["encode"]]),
                "decode": Plan("decoder", codec.decoder, *PRECISIONS[self.precision["decode"]]),
            }
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    self._warm_up(shapes)

    def __reduce__(self):
        # graphs cannot be copied or pickled: a copy of the codec has no engine
        return type(None), ()

    @torch.no_grad()
    def encode(
        self, audio: Tensor, lengths: Tensor | None = None, n_quantizers: int | None = None
    ) -> Encoded:
        """As `DAC.encode`, of checked arguments."""
        batch, _, samples = audio.shape
        if bucket := self._bucket(
            "encode", batch, -(-samples // self._codec.hop_length), n_quantizers
        ):
            return self._replay_encode(bucket, audio, lengths)
        with float32_products(tf32=False):
            return self._codec.encode_by(self.encoder, audio, lengths, n_quantizers)

    @torch.no_grad()
    def decode(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """As `DAC.decode`, of checked arguments."""
        return self._codec.decode_by(self.decoder, z, lengths)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """As `DAC.decode_codes`, of checked arguments; but a code out of range counts as the nearest one inside."""
        batch, stages, frames = codes.shape
        if bucket := self._bucket("decode", batch, frames, stages):
            with self._replayed("decode", bucket, codes, lengths) as (audio,):
                return audio[:batch, :, : frames * self._codec.hop_length].clone()
        return self.decode(self._latent(codes), lengths)

    def encoder(self, x: Tensor, lengths: Tensor | None = None, padded: bool = True) -> Tensor:
        """As `DAC.encoder`."""
        return self._run("encode", x, lengths, padded)

    def decoder(self, x: Tensor, lengths: Tensor | None = None, padded: bool = True) -> Tensor:
        """As `DAC.decoder`."""
        return self._run("decode", x, lengths, padded)

    @torch.no_grad()
    def _run(self, stage: str, x: Tensor, lengths: Tensor | None, padded: bool) -> Tensor:
        """A stage's plan; its first run looks at what every layer gives.

        Raises:
            PrecisionError: a layer gives infinity or NaN.
        """
        if stage in self._proven:
            return self.plans[stage](x, lengths, padded)
        names, finite = ["the input"], [x.isfinite().all()]

        def watch(name, tensor):
            names.append(name)
            finite.append(tensor.isfinite().all())

        y = self.plans[stage](x, lengths, padded, watch)
        input_finite, *finite = torch.stack(finite).tolist()
        # an input that is not finite says nothing about the precision
        if input_finite and not all(finite):
            remedy = (
                "try precision bf16 or fp32"
                if self.precision[stage] == "fp16"
                else "weights or input are too large"
            )
            layer = names[1 + finite.index(False)]
            raise PrecisionError(
                f"{stage} in {self.precision[stage]}: {layer} gives infinity or NaN; {remedy}"
            )
        if input_finite:
            self._proven.add(stage)
        return y

    def _bucket(self, stage: str, batch: int, frames: int, codebooks: int | None) -> Bucket | None:
        """The graph that serves such a request, or None; counts it. Graphs have all codebooks."""
        whole = codebooks in (None, self._codec.config.n_codebooks)
        bucket = self.graphs.find(stage, batch, frames) if whole else None
        self.hits += bucket is not None
        self.misses += bucket is None
        return bucket

    def _encode_bucket(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """What a graph of encode does. lengths: samples, 0 for an item that is not there, which no loss counts."""
        hop, stages = self._codec.hop_length, self._codec.config.n_codebooks
        frames = (lengths + (hop - 1)) // hop
        z = self.encoder(zero_past(audio, lengths), frames * hop)
        with float32_products(tf32=False):
            return self._codec.quantizer(z, None, frames.clamp(min=1), stages * (lengths > 0))

    def _decode_bucket(self, codes: Tensor, lengths: Tensor) -> tuple[Tensor]:
        """What a graph of decode does. lengths: frames, 0 for an item that is not there."""
        return (self._codec.decode_by(self.decoder, self._latent(codes), lengths),)

    def _latent(self, codes: Tensor) -> Tensor:
        # a code out of range is found meanwhile; looking it up could end the process's work on the GPU
        codes = codes.clamp(0, self._codec.config.codebook_size - 1)
        with float32_products(tf32=False):
            return self._codec.quantizer.decode(codes)

    @contextlib.contextmanager
    def _replayed(self, stage: str, bucket: Bucket, x: Tensor, lengths: Tensor | None):
        """The bucket's outputs of a request, until the next one: to be copied."""
        batch, _, size = x.shape
        static, static_lengths = bucket.inputs
        with self.graphs.turn():
            static[:batch, :, :size].copy_(x)
            static_lengths[batch:] = 0
            static_lengths[:batch] = size if lengths is None else lengths
            if stage not in self._proven:
                bucket.run(*bucket.inputs)
            bucket.replay()
            yield bucket.outputs

    def _replay_encode(self, bucket: Bucket, audio: Tensor, lengths: Tensor | None) -> Encoded:
        batch, _, samples = audio.shape
        hop = self._codec.hop_length
        frames = -(-samples // hop)
        with self._replayed("encode", bucket, audio, lengths) as (z, codes, latents, *losses):
            cropped = [output[:batch, :, :frames].clone() for output in (z, codes, latents)]
            # means over the bucket's items, of which those that are not there count as 0
            losses = [loss * (bucket.batch / batch) for loss in losses]
        if lengths is None:
            return Encoded(*cropped, *losses, torch.full((batch,), frames, device=audio.device))
        return Encoded(*cropped, *losses, -(-lengths // hop))

    def _warm_up(self, shapes: dict[str, list[tuple[int, int]]]):
        """Let the layers choose at these sizes, then capture them, the largest first."""
        # the examples prove nothing
        self._proven.update(STAGES)
        cudnn_chose, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            with torch.no_grad():
                sizes = [(stage, *shape) for stage in STAGES for shape in shapes[stage]]
                for stage, batch, frames in sorted(sizes, key=lambda size: -size[1] * size[2]):
                    run, inputs = self._example(stage, batch, frames)
                    self.plans[stage].choices.timing = True
                    run(*inputs)
                    self.plans[stage].choices.timing = False
                    self.graphs.add(stage, batch, frames, run, inputs)
        finally:
            torch.backends.cudnn.benchmark = cudnn_chose
            self._proven.clear()

    def _example(
        self, stage: str, batch: int, frames: int
    ) -> tuple[Callable, tuple[Tensor, Tensor]]:
        """What a graph runs, and inputs of a size: not zeros, on which processors are quicker."""
        config, hop = self._codec.config, self._codec.hop_length
        if stage == "encode":
            audio = torch.linspace(-1, 1, batch * frames * hop, device=self.device).view(
                batch, 1, -1
            )
            return self._encode_bucket, (
                audio,
                torch.full((batch,), frames * hop, device=self.device),
            )
        codes = (
            torch.arange(batch * config.n_codebooks * frames, device=self.device)
            % config.codebook_size
        )
        lengths = torch.full((batch,), frames, device=self.device)
        return self._decode_bucket, (codes.view(batch, config.n_codebooks, frames), lengths)

    def __str__(self) -> str:
        graphs, mebibyte = self.graphs, 1 << 20
        lines = [f"{stage} in {self.precision[stage]} on {self.device}" for stage in STAGES]
        for stage in STAGES:
            sizes = [
                f"{bucket.batch} × {bucket.frames}" for bucket in graphs.buckets.get(stage, ())
            ]
            lines.append(f"graphs of {stage} (items × frames): {', '.join(sizes) or 'none'}")
        lines.append(
            f"graph memory: {graphs.used / mebibyte:.0f} MiB of at most {graphs.memory / mebibyte:.0f}"
        )
        for stage, batch, frames, needed in graphs.left_eager:
            lines.append(
                f"not captured: {stage} of {batch} × {frames}, which needs {needed / mebibyte:.0f} MiB"
            )
        lines.append(f"requests: {self.hits} by graphs, {self.misses} eagerly")
        for stage in STAGES:
            lines += self.plans[stage].choices.table(self.precision[stage])
        return "\n".join(lines)


def _checked_precision(precision, device: torch.device) -> dict[str, str]:
    """The precision of each stage."""
    default = {"encode": "fp32", "decode": "fp16" if device.type == "cuda" else "fp32"}
    if not isinstance(precision, dict):
        precision = dict.fromkeys(STAGES, precision)
    for stage, name in precision.items():
        if stage not in STAGES or name not in (None, *PRECISIONS):
            raise ValueError(
                f"precision is {name!r} for {stage!r}; accepted: {', '.join(PRECISIONS)} for {' and '.join(STAGES)}"
            )
    return {stage: precision.get(stage) or default[stage] for stage in STAGES}


def _checked_shapes(shapes) -> dict[str, list[tuple[int, int]]]:
    """The shapes of each stage."""
    if not isinstance(shapes, dict):
        shapes = dict.fromkeys(STAGES, tuple(shapes))
    for stage, pairs in shapes.items():
        for pair in pairs:
            fits = len(pair) == 2 and all(isinstance(size, int) and size > 0 for size in pair)
            if stage not in STAGES or not fits:
                raise ValueError(
                    f"shapes has {pair} for {stage!r}; accepted: pairs of positive integers, (batch, frames), for "
                    f"{' and '.join(STAGES)}"
                )
    return {stage: list(shapes.get(stage, ())) for stage in STAGES}
