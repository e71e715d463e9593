"""The codec outside this package: `torch.export` programs and ONNX models of encoder and decoder.

Both take any batch and length. They are the reference model with each weight stored as one tensor and each
convolution a plain one, which every runtime knows: "encoder" takes audio [B, 1, T] in [-1, 1] to codes int64 [B, N, F],
F = ceil(T / hop_length); "decoder" takes codes int64 [B, N, F] to audio [B, 1, F hop_length]. Codes are not checked.
"""

import contextlib
import copy
import logging
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast import ops
from dac_fast.files import atomic_path, make_folder
from dac_fast.model.interface import Codec
from dac_fast.model.layers import Conv1d, ConvTranspose1d

PARTS = ("encoder", "decoder")


class Encode(nn.Module):
    """Audio [B, 1, T] to codes [B, N, F], without checks."""

    def __init__(self, codec: Codec, n_quantizers: int):
        super().__init__()
        codec = plain_copy(codec)
        self.encoder, self.quantizer = codec.encoder, codec.quantizer
        self.hop_length, self.n_quantizers = codec.hop_length, n_quantizers

    def forward(self, audio: Tensor) -> Tensor:  # noqa: D102
        audio = F.pad(audio, (0, -audio.shape[-1] % self.hop_length))
        return self.quantizer(self.encoder(audio), self.n_quantizers)[1]


class Decode(nn.Module):
    """Codes [B, N, F] to audio [B, 1, F hop_length], without checks."""

    def __init__(self, codec: Codec):
        super().__init__()
        # where a stride is odd, the decoder stops short by the same number of samples, whatever the length
        self.missing = codec.hop_length - codec.decoder.output_length(1)
        codec = plain_copy(codec)
        self.quantizer, self.decoder = codec.quantizer, codec.decoder

    def forward(self, codes: Tensor) -> Tensor:  # noqa: D102
        return F.pad(self.decoder(self.quantizer.from_codes(codes)[0]), (0, self.missing))


def plain_copy(codec: Codec) -> Codec:
    """A copy of the codec in eval mode, with plain convolutions in encoder and decoder, and folded ones elsewhere."""
    codec = copy.deepcopy(codec).eval().requires_grad_(False)
    for module in [*codec.encoder.modules(), *codec.decoder.modules()]:
        for name, layer in module.named_children():
            if isinstance(layer, (Conv1d, ConvTranspose1d)):
                setattr(module, name, _plain(layer))
    return codec.fold_weight_norm()


def _plain(conv: Conv1d | ConvTranspose1d) -> nn.Module:
    """The `torch.nn` module of the same name and function."""
    weight = conv.normed_weight().contiguous()
    transposed = isinstance(conv, ConvTranspose1d)
    channels = weight.shape[:2] if transposed else (weight.shape[1], weight.shape[0])
    options = {"stride": conv.stride, "padding": conv.padding, "device": "meta"}
    if transposed:
        plain = nn.ConvTranspose1d(*channels, conv.kernel_size, **options)
    else:
        plain = nn.Conv1d(*channels, conv.kernel_size, dilation=conv.dilation, **options)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = conv.bias
    return plain


@torch.no_grad()
def export(
    codec: Codec, part: str, n_quantizers: int | None = None
) -> torch.export.ExportedProgram:
    """One part as a program for any batch and length, on the codec's device and in its dtype.

    PyTorch guards a program against the single frame, which it could lay out in memory otherwise: run that by
    `program.module(check_guards=False)`.

    Args:
        codec: the `DAC`; it stays as it is.
        part: "encoder" or "decoder", see the top of this file.
        n_quantizers: codebooks N; None: all.
    Raises:
        ValueError: part or n_quantizers is out of range.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; accepted: {' or '.join(PARTS)}")
    available = codec.config.n_codebooks
    count = available if n_quantizers is None else n_quantizers
    if not 1 <= count <= available:
        raise ValueError(f"{count} codebooks; accepted: 1 to {available}")
    parameter = next(codec.parameters())
    if part == "encoder":
        module = Encode(codec, count)
        example = torch.zeros(
            2, 1, 3 * codec.hop_length + 1, dtype=parameter.dtype, device=parameter.device
        )
    else:
        module = Decode(codec)
        example = torch.zeros(2, count, 3, dtype=torch.int64, device=parameter.device)
    any_size = torch.export.Dim.DYNAMIC
    # `backed_size_oblivious`: else a program that was traced with two items takes no single one
    with (
        ops.use_backend("reference"),
        torch.fx.experimental._config.patch(backed_size_oblivious=True),
    ):
        return torch.export.export(module, (example,), dynamic_shapes=({0: any_size, 2: any_size},))


def export_onnx(
    codec: Codec, folder: str | os.PathLike, n_quantizers: int | None = None
) -> list[Path]:
    """Write encoder.onnx (audio -> codes) and decoder.onnx (codes -> audio), float32, for any batch and length.

    Each has the codec's sample_rate and hop_length in its metadata.

    Args:
        codec: the `DAC`; it stays as it is.
        folder: is made where it is missing.
        n_quantizers: codebooks N; None: all.
    Returns:
        the two paths.
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
    codec = copy.deepcopy(codec).float().cpu()
    count = codec.config.n_codebooks if n_quantizers is None else n_quantizers
    audio, codes = ("audio", ["batch", 1, "samples"]), ("codes", ["batch", count, "frames"])
    programs = {}
    for part, (given, result) in {"encoder": (audio, codes), "decoder": (codes, audio)}.items():
        with _quiet():
            program = torch.onnx.export(
                export(codec, part, n_quantizers), input_names=[given[0]], output_names=[result[0]], dynamo=True,
                verbose=False,
            )  # fmt: skip
        program.model.graph.inputs[0].shape = ir.Shape(given[1])
        program.model.graph.outputs[0].shape = ir.Shape(result[1])
        program.model.metadata_props.update(
            sample_rate=str(codec.sample_rate), hop_length=str(codec.hop_length)
        )
        programs[part] = program
    folder = Path(folder)
    make_folder(folder)
    paths = [folder / f"{part}.onnx" for part in PARTS]
    for path, part in zip(paths, PARTS, strict=True):
        with atomic_path(path) as temporary:
            programs[part].save(temporary)
    return paths


@contextlib.contextmanager
def _quiet():
    """Silence torch.onnx on packages that these models do not need, and on its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
