"""The codec: encoder, quantizer and decoder in one module, with the published state-dict keys."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast.config import PRESETS, Config
from dac_fast.inference.engine import Engine
from dac_fast.model.autoencoder import Decoder, Encoder
from dac_fast.model.layers import WeightNorm, zero_past
from dac_fast.model.quantize import Encoded, ResidualVectorQuantizer
from dac_fast.recordings import compress
from dac_fast.storage import checkpoint, download


class DAC(nn.Module):
    """Descript Audio Codec. Arguments: those of `dac_fast.config.Config`, under their published names.

    Attributes:
        config: the `Config`.
        sample_rate: in Hz.
        hop_length: samples per latent frame.
        name: preset name where the weights came by one ("44khz"), else "".
        engine: what runs encode and decode after `optimize`, else None. Setting it to None goes back to the modules.
    """

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.config = c = Config(*args, **kwargs)
        self.sample_rate, self.hop_length, self.name = c.sample_rate, c.hop_length, ""
        self.engine = None
        self.encoder = Encoder(c.encoder_dim, c.encoder_rates, c.latent_dim, c.activation)
        self.quantizer = ResidualVectorQuantizer(
            c.latent_dim, c.codebook_size, c.codebook_dims, c.quantizer_dropout, c.quantizer
        )
        self.decoder = Decoder(c.latent_dim, c.decoder_dim, c.decoder_rates, c.activation)

    def encode(
        self, audio: Tensor, lengths: Tensor | None = None, n_quantizers: int | None = None
    ) -> Encoded:
        """Audio to codes. Each item gets what it would get alone, without the padding after its length.

        Args:
            audio: [B, 1, T] in [-1, 1] at `sample_rate`; zero-padded here to a multiple of `hop_length`.
            lengths: samples of each item, B integers; None: T for all.
            n_quantizers: use the first that many codebooks; None: all.
        Raises:
            ValueError: the shape, a length or n_quantizers is out of range.
        """
        _check_shape("audio", audio, channels=1)
        if lengths is not None:
            lengths = _checked_lengths(lengths, audio.shape[0], audio.shape[-1], audio.device)
        if engine := self._engine_for(audio):
            return engine.encode(audio, lengths, n_quantizers)
        return self.encode_by(self.encoder, audio, lengths, n_quantizers)

    def encode_by(
        self, encoder: Callable, audio: Tensor, lengths: Tensor | None, n_quantizers: int | None
    ) -> Encoded:
        """`encode` of checked arguments, by another `encoder` that is called like the module."""
        audio = F.pad(audio, (0, -audio.shape[-1] % self.hop_length))
        if lengths is None:
            z, frames = encoder(audio), None
        else:
            frames = -(-lengths // self.hop_length)
            z = encoder(zero_past(audio, lengths), frames * self.hop_length)
        outputs = self.quantizer(z, n_quantizers, frames)
        if frames is None:
            frames = torch.full((z.shape[0],), z.shape[-1], device=z.device)
        return Encoded(*outputs, frames)

    def decode(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Quantised latent [B, D, F] to audio [B, 1, F hop_length].

        Where a stride is odd, the published decoder stops a few samples short of the last frame's end (8 at 24 and
        16 kHz); those samples are zeros here, all before them are as published.

        Args:
            z: the latent.
            lengths: frames of each item, B integers; an item's audio is zero past its last frame.
        Raises:
            ValueError: the shape or a length is out of range.
        """
        _check_shape("latent", z, channels=self.config.latent_dim)
        if lengths is not None:
            lengths = _checked_lengths(lengths, z.shape[0], z.shape[-1], z.device)
        if engine := self._engine_for(z):
            return engine.decode(z, lengths)
        return self.decode_by(self.decoder, z, lengths)

    def decode_by(self, decoder: Callable, z: Tensor, lengths: Tensor | None) -> Tensor:
        """`decode` of checked arguments, by another `decoder` that is called like the module."""
        if lengths is not None:
            z = zero_past(z, lengths)
        audio = decoder(z, lengths)
        return F.pad(audio, (0, z.shape[-1] * self.hop_length - audio.shape[-1]))

    def decode_codes(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes [B, N, F] of the first N codebooks to audio [B, 1, F hop_length], see `decode`.

        Raises:
            ValueError: the shape, a code or a length is out of range.
        """
        _check_shape("codes", codes)
        check = _range_check(codes, self.config.codebook_size)
        if engine := self._engine_for(codes):
            if lengths is not None:
                lengths = _checked_lengths(lengths, codes.shape[0], codes.shape[-1], codes.device)
            audio = engine.decode_codes(codes, lengths)
            check()
            return audio
        check()
        return self.decode(self.quantizer.decode(codes), lengths)

    def run_encoder(self, x: Tensor, padded: bool = True) -> Tensor:
        """`self.encoder(x, padded=padded)`, by the engine if there is one."""
        return (self._engine_for(x) or self).encoder(x, padded=padded)

    def run_decoder(self, z: Tensor, padded: bool = True) -> Tensor:
        """`self.decoder(z, padded=padded)`, by the engine if there is one."""
        return (self._engine_for(z) or self).decoder(z, padded=padded)

    def forward(self, audio: Tensor, n_quantizers: int | None = None) -> dict[str, Tensor]:
        """Audio [B, 1, T] through the whole codec.

        Returns:
            "audio" [B, 1, T], "z", "codes", "latents", "vq/commitment_loss", "vq/codebook_loss" (see `Encoded`).
        """
        encoded = self.encode(audio, n_quantizers=n_quantizers)
        return {
            "audio": self.decode(encoded.z)[..., : audio.shape[-1]],
            "z": encoded.z,
            "codes": encoded.codes,
            "latents": encoded.latents,
            "vq/commitment_loss": encoded.commitment_loss,
            "vq/codebook_loss": encoded.codebook_loss,
        }

    def fold_weight_norm(self) -> "DAC":
        """Store every weight as one tensor, for inference: quicker, and not for training. Returns self."""
        for module in self.modules():
            if isinstance(module, WeightNorm):
                module.fold()
        return self

    def optimize(self, precision=None, shapes=(), memory: int = 4 << 30) -> "DAC":
        """Have `encode` and `decode` (and what uses them) run by an engine: fused layers, CUDA graphs. Returns self.

        The codec is folded and in eval mode from then on, and its parameters stay float32. The engine runs what needs
        no gradients: its results have none. In training mode, or for an input that requires a gradient, the modules
        run as they do without an engine. Whatever moves, converts or replaces the weights ends the engine: the next
        call says so. It is not saved, and a copy of the codec has none. `str(codec.engine)` says how it stands.

        Args:
            precision: of the convolutions, "fp32" (no TF32), "tf32", "fp16" or "bf16", or {"encode": one of these,
                "decode": one of these}. None: fp32 for encode, so that codes are the reference's; for decode fp16 on
                CUDA, fp32 on the CPU. The quantizer computes in fp32 in any case.
            shapes: (batch, frames) pairs, or {"encode": pairs, "decode": pairs}, for CUDA: the ways to run each layer
                are timed at these (which compiles kernels at the first time: minutes), and each becomes a graph of
                encode and one of decode_codes, with all codebooks. A graph serves requests of its size and smaller
                ones, down to half of it, ragged batches too. Without shapes, layers run on cuDNN and cuBLAS.
            memory: bytes that the graphs may hold; shapes beyond are timed but not captured.
        Raises:
            ValueError: an argument is out of range, the codec is not in float32, or its activation is not Snake.
        """
        self.engine = Engine(self, precision, shapes, memory)
        return self

    def _engine_for(self, x: Tensor):
        """The engine, if it is to run x."""
        if self.engine is None or self.training or (x.requires_grad and torch.is_grad_enabled()):
            return None
        if self.engine.stale:
            raise RuntimeError(
                f"the codec was {self.engine.stale} after optimize(); call optimize() again"
            )
        return self.engine

    def _apply(self, *args, **kwargs):
        before = self.engine and next(self.parameters()).data_ptr()
        super()._apply(*args, **kwargs)
        if self.engine and next(self.parameters()).data_ptr() != before:
            self.engine.stale = "moved or converted"
        return self

    def load_state_dict(self, *args, **kwargs):  # noqa: D102
        if self.engine is not None:
            self.engine.stale = "given other weights"
        return super().load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True):  # noqa: D102
        if mode and self.engine is not None:
            self.engine.stale = "in training"
        return super().train(mode)

    def compress(
        self, source, chunk_seconds=None, n_quantizers=None, normalize_db=-16.0, padding=True
    ):
        """A recording to a `DACFile`, in constant memory; see `dac_fast.model.recordings.compress`."""
        return compress.compress(self, source, chunk_seconds, n_quantizers, normalize_db, padding)

    def decompress(self, file):
        """A `DACFile` or its path to (float32 array [C, T], rate); see `dac_fast.model.recordings.decompress`."""
        return compress.decompress(self, file)

    def save(self, path):
        """Write a checkpoint, see `dac_fast.checkpoint.save`."""
        checkpoint.save(self, path)

    @classmethod
    def load(cls, path) -> "DAC":
        """Read a checkpoint in any of the formats of `dac_fast.checkpoint.read`; in eval mode.

        Raises:
            CheckpointError: it is no codec checkpoint, or damaged.
        """
        config, state = checkpoint.read(path)
        with torch.device("meta"):
            codec = cls(**config.to_dict())
        checkpoint.restore(codec, state, path)
        return codec.eval()


def load(
    name_or_path,
    *,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    engine: bool | dict | None = None,
) -> DAC:
    """A codec in eval mode.

    Args:
        name_or_path: a preset ("tiny" is bundled; "44khz", "44khz_16kbps", "24khz", "16khz" are downloaded when they
            are not in the cache), or a checkpoint: ours, a published .pth, or a Hugging Face folder.
        device, dtype: of the parameters.
        engine: True, or arguments of `DAC.optimize`, which is called then.
    Raises:
        ValueError: no such preset or path, the checkpoint is damaged or no codec's, or as `DAC.optimize` says.
        OSError: the weights cannot be downloaded.
    """
    path = Path(name_or_path)
    # a preset's name means the preset; ./44khz is the folder of that name
    is_path = str(name_or_path) not in PRESETS and (
        path.exists() or path.suffix or len(path.parts) > 1
    )
    name = "" if is_path else str(name_or_path)
    codec = DAC.load(download.download(name) if name else path)
    codec.name = name
    codec = codec.to(device=device, dtype=dtype)
    return (
        codec if engine in (None, False) else codec.optimize(**({} if engine is True else engine))
    )


def _check_shape(name: str, x: Tensor, channels: int | None = None):
    expected = ("B", "N" if channels is None else channels, "T")
    fits = x.dim() == 3 and min(x.shape) > 0 and channels in (None, x.shape[1])
    if not fits:
        raise ValueError(
            f"{name} of shape {list(x.shape)}; accepted: [{', '.join(map(str, expected))}], none of them 0"
        )


def _checked_lengths(lengths, items: int, longest: int, device) -> Tensor:
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    # where they are, and at once: reading from a GPU waits for all that it was given to do
    fits = lengths.shape == (items,)
    low, high = torch.stack(lengths.aminmax()).tolist() if fits else (0, 0)
    if low < 1 or high > longest:
        raise ValueError(
            f"lengths are {lengths.tolist()}; accepted: {items} numbers from 1 to {longest}"
        )
    return lengths.to(device, non_blocking=True)


def _range_check(codes: Tensor, size: int) -> Callable[[], None]:
    """A function that raises ValueError where a code is not below `size`.

    Call it after what is to run meanwhile: a GPU finds the bounds before, and the call waits for these only.
    """
    bounds = torch.stack(codes.aminmax()).to("cpu", non_blocking=True)
    event = torch.cuda.current_stream(codes.device).record_event() if codes.is_cuda else None

    def check():
        if event is not None:
            event.synchronize()
        low, high = bounds.tolist()
        if low < 0 or high >= size:
            raise ValueError(f"code {low if low < 0 else high}; accepted: 0 to {size - 1}")

    return check
