"""The two directions of a codec as modules that other runtimes can have.

A `Part` is the reference model with each weight stored as one tensor and each convolution a plain
one, which every runtime knows. It takes any batch and length:

    Encode    audio [B, 1, T] in [-1, 1] to codes int64 [B, N, F], F = ceil(T / hop_length)
    Decode    codes int64 [B, N, F] to audio [B, 1, F hop_length]; the codes are not checked

The audio of a stereo codec is [B, 2, T]. A continuous codec has its latents' means [B, D, F] in
place of codes.

Audio and latents are float32. In fp16, encoder and decoder compute as the engine does in that
precision: weights and activations are float16, Snake is computed in float32; and so are the last
convolution, whose result is the audio, and the quantizer, where small differences decide a search.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast import ops
from dac_fast.model.halves import require
from dac_fast.model.interface import Codec
from dac_fast.model.layers import WeightNorm

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Port(NamedTuple):
    """A tensor that goes into a part, or comes out.

    Attributes:
        name: of the tensor.
        shape: a size that varies is a word.
        dtype: of the tensor.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32


class Varying(NamedTuple):
    """A size that varies.

    Attributes:
        example: what it is in the tensors that a part is traced with.
        dim: what is told of it.
    """

    example: int
    dim: Any = torch.export.Dim.DYNAMIC


def plain_copy(codec: Codec, dtype: torch.dtype) -> Codec:
    """A copy in eval mode, of float32; encoder and decoder have plain convolutions of `dtype`."""
    codec = copy.deepcopy(codec)
    codec.eval()
    codec.fold_weight_norm()
    for module in (codec.encoder, codec.quantizer, codec.decoder):
        module.float()
    for layer in [*codec.encoder.modules(), *codec.decoder.modules()]:
        if isinstance(layer, WeightNorm):
            layer.plain = True
            layer.weight = nn.Parameter(layer.weight.contiguous().to(dtype))
            layer.bias = nn.Parameter(layer.bias.to(dtype))
    return codec


class Part(nn.Module):
    """A direction of a codec, which it copies.

    Args:
        codec: the `DAC`; it stays as it is.
        part: "encoder" or "decoder".
        n_quantizers: codebooks N; None: all.
        precision: "fp32" or "fp16", see the top of this file.
    Attributes:
        part, n_quantizers: as given.
        audio, kept: the ports of audio, and of codes or latents.
        inputs, outputs: the ports, in order.
        samples: of audio that goes in.
        numbers: what a caller needs to know.
    Raises:
        ValueError: an argument is out of range, or the part was not loaded.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __init__(self, codec: Codec, part: str, n_quantizers: int | None, precision: str):
        super().__init__()
        if precision not in DTYPES:
            raise ValueError(f"precision is {precision!r}; accepted: {' or '.join(DTYPES)}")
        require(codec, part)
        self.part, self.n_quantizers = part, n_quantizers
        rows, dtype = codec.quantizer.rows(n_quantizers), codec.quantizer.kept_dtype
        self.audio = Port("audio", ("batch", codec.config.channels, "samples"))
        name = "latents" if codec.config.continuous else "codes"
        self.kept = Port(name, ("batch", rows, "frames"), dtype)
        self.dtype = DTYPES[precision]
        with torch.no_grad():
            codec = plain_copy(codec, self.dtype)
        self.quantizer = codec.quantizer
        if part == "encoder":
            self.encoder = codec.encoder
        else:
            self.decoder = codec.decoder
            *_, last, _tanh = self.decoder.near_audio()
            last.float().register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))
        self.requires_grad_(False)
        self.hop_length = codec.hop_length
        # Not whole frames: else the padding of the last one could be left out of what is traced.
        self.samples = Varying(3 * self.hop_length + 1)
        self.numbers = {"sample_rate": codec.sample_rate, "hop_length": codec.hop_length}

    @torch.no_grad()
    def traced(self) -> torch.export.ExportedProgram:
        """The part as a program for any batch and length, on the codec's device."""
        device = next(self.parameters()).device
        # One item or frame could be laid out in memory otherwise.
        varying = {"batch": Varying(2), "samples": self.samples, "frames": Varying(3)}
        example, dynamic = [], []
        for port in self.inputs:
            sizes = [varying[size] if isinstance(size, str) else size for size in port.shape]
            shape = [size.example if isinstance(size, Varying) else size for size in sizes]
            example.append(torch.zeros(shape, dtype=port.dtype, device=device))
            dynamic.append(
                {i: size.dim for i, size in enumerate(sizes) if isinstance(size, Varying)}
            )
        # `backed_size_oblivious`: else a program traced with two items takes no single one.
        with (
            ops.use_backend("reference"),
            torch.fx.experimental._config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
        ):
            return torch.export.export(self, tuple(example), dynamic_shapes=tuple(dynamic))


class Encode(Part):
    """Audio [B, 1, T] to codes [B, N, F]. Args: those of `Part`."""

    def __init__(self, codec: Codec, n_quantizers: int | None = None, precision: str = "fp32"):
        super().__init__(codec, "encoder", n_quantizers, precision)
        self.inputs, self.outputs = (self.audio,), (self.kept,)

    def forward(self, audio: Tensor) -> Tensor:  # noqa: D102
        audio = F.pad(audio, (0, -audio.shape[-1] % self.hop_length))
        z = self.encoder(audio.to(self.dtype)).float()
        return self.quantizer.encode(z, self.n_quantizers)


class Decode(Part):
    """Codes [B, N, F] to audio [B, 1, F hop_length]. Args: those of `Part`."""

    def __init__(self, codec: Codec, n_quantizers: int | None = None, precision: str = "fp32"):
        super().__init__(codec, "decoder", n_quantizers, precision)
        self.inputs, self.outputs = (self.kept,), (self.audio,)
        # Where a stride is odd, the decoder stops short by the same samples, whatever the length.
        self.missing = self.hop_length - self.decoder.output_length(1)

    def forward(self, codes: Tensor) -> Tensor:  # noqa: D102
        z = self.quantizer.decode(codes).to(self.dtype)
        return F.pad(self.decoder(z), (0, self.missing))


MODULES: dict[str, Callable[..., Part]] = {"encoder": Encode, "decoder": Decode}
