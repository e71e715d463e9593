"""The codec outside this package: `torch.export` programs and ONNX models of encoder and decoder.

Both take any batch and length. They are the reference model with each weight stored as one tensor
and each convolution a plain one, which every runtime knows:

    encoder   audio [B, 1, T] in [-1, 1] to codes int64 [B, N, F], F = ceil(T / hop_length)
    decoder   codes int64 [B, N, F] to audio [B, 1, F hop_length]; the codes are not checked

The audio of a stereo codec is [B, 2, T]. A continuous codec has its latents' means [B, D, F] in
place of codes.
"""

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast import ops
from dac_fast.files import atomic_path, make_folder
from dac_fast.model.halves import PARTS, require
from dac_fast.model.interface import Codec
from dac_fast.model.layers import Conv1d, ConvTranspose1d


class Encode(nn.Module):
    """Audio [B, 1, T] to codes [B, N, F]."""

    def __init__(self, codec: Codec, n_quantizers: int | None):
        super().__init__()
        codec = plain_copy(codec)
        self.encoder, self.quantizer = codec.encoder, codec.quantizer
        self.hop_length, self.n_quantizers = codec.hop_length, n_quantizers
        self.channels = codec.config.channels

    def example(self) -> Tensor:
        """An input to trace the module with."""
        return torch.zeros(2, self.channels, 3 * self.hop_length + 1)

    def forward(self, audio: Tensor) -> Tensor:  # noqa: D102
        audio = F.pad(audio, (0, -audio.shape[-1] % self.hop_length))
        return self.quantizer.encode(self.encoder(audio), self.n_quantizers)


class Decode(nn.Module):
    """Codes [B, N, F] to audio [B, 1, F hop_length]."""

    def __init__(self, codec: Codec, n_quantizers: int | None):
        super().__init__()
        # Where a stride is odd, the decoder stops short by the same samples, whatever the length.
        self.missing = codec.hop_length - codec.decoder.output_length(1)
        codec = plain_copy(codec)
        self.quantizer, self.decoder = codec.quantizer, codec.decoder
        self.n_quantizers = n_quantizers

    def example(self) -> Tensor:
        """An input to trace the module with."""
        return self.quantizer.blank(2, 3, self.n_quantizers)

    def forward(self, codes: Tensor) -> Tensor:  # noqa: D102
        return F.pad(self.decoder(self.quantizer.decode(codes)), (0, self.missing))


def plain_copy(codec: Codec) -> Codec:
    """A copy in eval mode: plain convolutions in encoder and decoder, folded ones elsewhere."""
    codec = copy.deepcopy(codec)
    codec.eval()
    for module in [*codec.encoder.modules(), *codec.decoder.modules()]:
        for name, layer in module.named_children():
            if isinstance(layer, Conv1d | ConvTranspose1d):
                setattr(module, name, _plain(layer))
    codec.fold_weight_norm()
    return codec


def _plain(conv: Conv1d | ConvTranspose1d) -> nn.Module:
    """The `torch.nn` module of the same name and function."""
    weight = conv.normed_weight().contiguous()
    first, second, kernel = weight.shape
    plain: nn.Conv1d | nn.ConvTranspose1d
    if isinstance(conv, ConvTranspose1d):
        plain = nn.ConvTranspose1d(first, second, kernel, conv.stride, conv.padding, device="meta")
    else:
        plain = nn.Conv1d(
            second, first, kernel, conv.stride, conv.padding, conv.dilation, device="meta"
        )
    plain.weight = nn.Parameter(weight)
    plain.bias = conv.bias
    return plain


def export(
    codec: Codec, part: str, n_quantizers: int | None = None
) -> torch.export.ExportedProgram:
    """One part as a program for any batch and length, on the codec's device and in its dtype.

    PyTorch guards a program against the single frame, which it could lay out in memory otherwise:
    run that by `program.module(check_guards=False)`.

    Args:
        codec: the `DAC`; it stays as it is.
        part: "encoder" or "decoder", see the top of this file.
        n_quantizers: codebooks N; None: all.
    Raises:
        ValueError: part or n_quantizers is out of range, or the part was not loaded.
    """
    return _traced(_module(codec, part, n_quantizers))


def _module(codec: Codec, part: str, n_quantizers: int | None) -> Encode | Decode:
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; accepted: {' or '.join(PARTS)}")
    require(codec, part)
    # Raises where n_quantizers is out of range, outside of the tracing.
    codec.quantizer.rows(n_quantizers)
    with torch.no_grad():
        module = Encode(codec, n_quantizers) if part == "encoder" else Decode(codec, n_quantizers)
    return module.requires_grad_(False)


@torch.no_grad()
def _traced(module: Encode | Decode) -> torch.export.ExportedProgram:
    parameter, example = next(module.parameters()), module.example()
    example = example.to(parameter if example.is_floating_point() else parameter.device)
    any_size = torch.export.Dim.DYNAMIC
    # `backed_size_oblivious`: else a program that was traced with two items takes no single one.
    with (
        ops.use_backend("reference"),
        torch.fx.experimental._config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
    ):
        return torch.export.export(module, (example,), dynamic_shapes=({0: any_size, 2: any_size},))


def export_onnx(
    codec: Codec, folder: str | os.PathLike[str], n_quantizers: int | None = None
) -> list[Path]:
    """Write encoder.onnx (audio to codes) and decoder.onnx (codes to audio), in float32.

    Of half a codec, it writes the one. They take any batch and length, and have the codec's
    sample_rate and hop_length as metadata.

    Args:
        codec: the `DAC`; it stays as it is.
        folder: is made where it is missing.
        n_quantizers: codebooks N; None: all.
    Returns:
        the paths.
    Raises:
        ValueError: n_quantizers is out of range, or the packages are not installed.
        OSError: the folder cannot be written.
    """
    try:
        from onnxscript import ir
    except ImportError as error:
        raise ValueError(
            "ONNX models need onnx and onnxscript: pip install 'dac-fast[onnx]'"
        ) from error
    programs = {}
    kept = "latents" if codec.config.continuous else "codes"
    for part in [codec.parts] if codec.parts else PARTS:
        module = _module(codec, part, n_quantizers).float().cpu()
        shapes = {
            "audio": ir.Shape(["batch", codec.config.channels, "samples"]),
            kept: ir.Shape(["batch", codec.quantizer.rows(n_quantizers), "frames"]),
        }
        given, result = shapes if part == "encoder" else reversed(shapes)
        with _quiet():
            program = torch.onnx.export(
                _traced(module),
                input_names=[given],
                output_names=[result],
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        program.model.graph.inputs[0].shape = shapes[given]
        program.model.graph.outputs[0].shape = shapes[result]
        program.model.metadata_props.update(
            sample_rate=str(codec.sample_rate), hop_length=str(codec.hop_length)
        )
        programs[part] = program
    folder = Path(folder)
    make_folder(folder)
    paths = []
    for part, program in programs.items():
        paths.append(folder / f"{part}.onnx")
        with atomic_path(paths[-1]) as temporary:
            program.save(temporary)
    return paths


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.onnx on packages that these models do not need, and on its deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
