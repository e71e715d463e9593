"""Every launch of a Triton kernel at the real sizes of the 44khz codec, recorded on a CPU.

The engine itself makes them: its plans and the quantizer run on tensors whose memory nothing
touches, with recorders in place of the launch and of the choice of a configuration. So each layer
gives a launch for every configuration that it could take on a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from dac_kernels import conv1d, residual_unit, rvq, rvq_kernels, snake
from dac_kernels.launch import INTERPRETED, Config
from torch import Tensor

from dac_fast import DAC, PRESETS, use_backend
from dac_fast.inference.engine import PRECISIONS
from dac_fast.inference.plan import Plan

MODULES = (snake, rvq, rvq_kernels, conv1d, residual_unit)

# Items and frames of 512 samples.
SIZES = {"16 × 10 s": (16, 862), "1 × 1 s": (1, 87), "1 × 1 frame": (1, 1)}
# Of the training step: items of 0.38 s, times, channels.
TRAINING = (72, 16758, 96)
# What is compiled into a kernel beside its arguments.
COMPILER_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """A launch that the engine would make.

    Attributes:
        size: a key of `SIZES`, or "training" or "other".
        precision: a key of `PRECISIONS`.
        op: what it computes, by name and shape.
        kernel: Triton's function.
        programs: CTAs.
        arguments: by name, compile-time constants too; tensors are on the meta device.
        options: of the compiler.
        tile: the configuration.
    """

    size: str
    precision: str
    op: str
    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: Config
    tile: str

    @property
    def name(self) -> str:
        """What the launch is called in a table; launches of several sizes share it."""
        group = "other/" if self.size == "other" else ""
        return f"{group}{self.precision}/{self.op}/{self.tile}"


class Recorder:
    """Stands in for launches while code runs in `recording`.

    Attributes:
        launches: those of every configuration, in order.
        count: of the launches that there would be with one configuration each.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.count = 0
        self._size = self._precision = ""
        self._trying = self._known = False

    @contextlib.contextmanager
    def recording(self, size: str, precision: str) -> Iterator[None]:
        """Inside, Triton's ops run on CPU tensors and compute nothing.

        Raises:
            RuntimeError: this process has Triton's interpreter, which compiles nothing.
        """
        if INTERPRETED:
            raise RuntimeError("TRITON_INTERPRET is set; kernels compile only without it")
        self._size, self._precision = size, precision
        replaced: dict[str, Callable[..., Any]] = {
            "launch": self._launch,
            "tuned": self._tuned,
            "device_unsupported": lambda x: None,
        }
        before = [
            (module, name, getattr(module, name))
            for module in MODULES
            for name in replaced
            if hasattr(module, name)
        ]
        for module, name, _ in before:
            setattr(module, name, replaced[name])
        try:
            with torch.no_grad(), use_backend("triton"):
                yield
        finally:
            for module, name, function in before:
                setattr(module, name, function)

    def _launch(self, kernel: Any, programs: int, *values: Any, **options: Any) -> None:
        self.count += not self._trying
        if self._known:
            self._known = False
            return
        compiler = {name: options.pop(name) for name in COMPILER_OPTIONS if name in options}
        arguments = dict(zip(kernel.arg_names, values, strict=False)) | options
        arguments = {name: _outline(value) for name, value in arguments.items()}
        blocks = [str(v) for name, v in arguments.items() if name.startswith("BLOCK")]
        rest = [f"{number} {name[4:]}" for name, number in compiler.items()]
        op, tile = describe(kernel, arguments), ", ".join(["×".join(blocks), *rest])
        self.launches.append(
            Launch(self._size, self._precision, op, kernel, programs, arguments, compiler, tile)
        )

    def _tuned(
        self, op: str, x: Tensor, shape: object, configs: Sequence[Config], run: Callable[..., None]
    ) -> Config:
        self._trying = True
        for config in configs:
            run(config)
        self._trying = False
        # The op now launches what it takes to be chosen.
        self._known = True
        return configs[0]


def _outline(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if torch.is_tensor(value) else value


def describe(kernel: Any, arguments: dict[str, Any]) -> str:
    """An op's name and shape."""
    kind = kernel.__name__.removeprefix("_").removesuffix("_kernel")
    if kind == "conv1d":
        weight = arguments["weight"]
        if arguments["TRANSPOSED"]:
            channels, out, stride = weight.shape
            name = f"transposed {2 * stride} stride {stride}"
        else:
            out, channels, taps = weight.shape
            stride = arguments["step"] // channels
            name = f"conv {taps}" + (f" stride {stride}" if stride > 1 else "")
            # One run of inputs, or one for each tap.
            name += " dilated" if arguments["RUNS"] > 1 else ""
        residual = " + residual" if arguments["residual"] is not None else ""
        return f"{name}, {channels} to {out}{residual}{_results(arguments)}"
    if kind == "residual_unit":
        return f"unit, {arguments['x'].shape[1]}{_results(arguments)}"
    if kind in ("forward", "backward"):
        layout = "last" if arguments["C_FAST"] else "first"
        return f"snake {kind}, channels {layout}"
    return f"rvq {kind}"


def _results(arguments: dict[str, Any]) -> str:
    """What is stored: y, Snake of y, or both."""
    snaked = arguments["y_snaked" if "y_snaked" in arguments else "snaked"]
    found = {"y": arguments["y"], "snake": snaked}
    return ": " + " and ".join(name for name, tensor in found.items() if tensor is not None)


def every_launch() -> list[Launch]:
    """Those of encoding and decoding at all sizes, of training's Snakes, and of other shapes."""
    recorder = Recorder()
    codec = unwritten("44khz")
    # bfloat16 differs from float16 in nothing but the products' type.
    for precision in ("fp16", "tf32", "tf32x3", "fp32"):
        _layers(recorder, codec, precision, ragged=True)
    _quantizer(recorder, codec)
    _training(recorder)
    _others(recorder)
    return recorder.launches


def benchmarked_launches(quick: bool = False) -> list[Launch]:
    """Those of the benchmark's cases for a GPU, the more important precisions first.

    Args:
        quick: of a small codec alone.
    """
    recorder = Recorder()
    codec = unwritten("tiny" if quick else "44khz")
    for precision in ("fp16",) if quick else ("fp16", "fp32", "tf32", "bf16", "tf32x3"):
        _layers(recorder, codec, precision, ragged=False)
    if not quick:
        _quantizer(recorder, codec)
        _training(recorder)
    return recorder.launches


def unwritten(preset: str) -> DAC:
    """A codec for inference whose weights are memory that nothing touched."""
    with torch.device("meta"):
        codec = DAC(**asdict(PRESETS[preset]))
    return codec.to_empty(device="cpu").eval().fold_weight_norm()


def _layers(recorder: Recorder, codec: DAC, precision: str, ragged: bool) -> None:
    """Encoder and decoder at all sizes; `ragged`: with the length of each item."""
    dtype, products = PRECISIONS[precision]
    encoder = Plan("encoder", codec.encoder, dtype, products)
    decoder = Plan("decoder", codec.decoder, dtype, products)
    hop, latent = codec.hop_length, codec.config.latent_dim
    for size, (items, frames) in SIZES.items():
        lengths = torch.full((items,), frames) if ragged else None
        samples = None if lengths is None else lengths * hop
        with recorder.recording(size, precision):
            encoder(torch.empty(items, 1, frames * hop), samples)
            decoder(torch.empty(items, latent, frames), lengths)


def _quantizer(recorder: Recorder, codec: DAC) -> None:
    """Codes of a latent and back, at all sizes."""
    for size, (items, frames) in SIZES.items():
        with recorder.recording(size, "fp32"):
            codes = codec.quantizer(torch.empty(items, codec.config.latent_dim, frames))[1]
            codec.quantizer.decode(codes)


def _training(recorder: Recorder) -> None:
    """Snake of the training step in every precision and layout."""
    for precision in ("fp16", "bf16", "fp32"):
        for layout in (torch.preserve_format, torch.contiguous_format):
            with recorder.recording("training", precision):
                x = torch.empty(*TRAINING, dtype=PRECISIONS[precision].dtype)
                x = x.mT if layout is torch.preserve_format else x.mT.contiguous()
                _snakes(x)


def _snakes(x: Tensor, beta: bool = False) -> None:
    """Snake of x [B, C, T], or its variant with a beta, forward and backward."""
    alpha = torch.empty(1, x.shape[1], 1)
    arguments = alpha, alpha if beta else None
    snake._snake(x, *arguments)
    snake._snake_backward(x, x, *arguments)


def _others(recorder: Recorder) -> None:
    """Shapes of no preset: few channels, an odd number of times, codes of other dimensions."""
    with recorder.recording("other", "fp32"):
        _snakes(torch.empty(2, 64, 33))
        _snakes(torch.empty(1, 64, 512), beta=True)
        for dim in (5, 16, 32):
            rvq.warmup([(1, 64, 33)], 3, 100, dim, torch.float32, "cpu")
    with recorder.recording("other", "fp16"):
        _snakes(torch.empty(1, 96, 1000, dtype=torch.float16))
    for precision, (dtype, products) in PRECISIONS.items():
        with recorder.recording("other", precision):
            x = torch.empty(2, 128, 24, dtype=dtype).mT
            weight = torch.empty(24, 7, 24, dtype=dtype).mT
            bias, alpha, lengths = torch.empty(24), torch.empty(1, 24, 1), torch.empty(2).long()
            conv1d.conv1d(x, weight, bias, 1, 3, alpha=alpha, lengths=lengths, products=products)
            point = torch.empty(24, 1, 24, dtype=dtype).mT
            arguments = x, x, weight, bias, alpha, point, bias, 1, 3
            options = {"alpha": alpha, "lengths": lengths, "products": products}
            if not residual_unit.residual_unit_unsupported(*arguments, **options):
                residual_unit.residual_unit(*arguments, **options)
