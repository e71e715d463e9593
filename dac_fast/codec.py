"""The codec: encoder, quantizer and decoder in one module, with the published state-dict keys."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dac_fast.config import PRESETS, Config
from dac_fast.inference.engine import Engine, Options, PrecisionOption, ShapesOption
from dac_fast.model.autoencoder import Decoder, Encoder
from dac_fast.model.bottleneck import VAE, Bottleneck, Latents
from dac_fast.model.checks import check_shape, check_signal, checked_lengths, range_check
from dac_fast.model.frames import encoded, filled_up, whole_frames
from dac_fast.model.halves import check_parts, keep_half, key_filter, require
from dac_fast.model.layers import WeightNorm
from dac_fast.model.quantize import Encoded, ResidualVectorQuantizer
from dac_fast.recordings import compress
from dac_fast.storage import checkpoint, download
from dac_fast.storage.dac2 import DACFile

# Held while an engine for the time of some recordings begins or ends.
_lending = threading.Lock()


class DAC(nn.Module):
    """Descript Audio Codec (arXiv 2306.06546). Arguments: those of `dac_fast.config.Config`.

    Audio is [B, 1, T] in what follows, and [B, 2, T] of a stereo codec (`config.channels` is 2). A
    continuous codec (`config.bottleneck` is "vae") has `encode_latents` and `decode`, no codes.

    Attributes:
        config: the `Config`.
        sample_rate: in Hz.
        hop_length: samples per latent frame.
        name: preset name where the weights came by one ("44khz"), else "".
        parts: "encoder" or "decoder" where only that half was loaded; None: both.
        engine: what runs encode and decode after `optimize`, else None. Setting it to None goes
            back to the modules.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        c = Config(*args, **kwargs)
        assert c.latent_dim is not None
        self.config = c
        self.sample_rate = c.sample_rate
        self.hop_length = c.hop_length
        self.name = ""
        self.parts: str | None = None
        self.engine: Engine | None = None
        # See `_engine_for_now`.
        self._lent: Engine | None = None
        self._borrowers = 0
        features = 2 * c.latent_dim if c.continuous else c.latent_dim
        self.encoder = Encoder(c.encoder_dim, c.encoder_rates, features, c.activation, c.channels)
        self.quantizer: Bottleneck
        if c.continuous:
            self.quantizer = VAE(c.latent_dim)
        else:
            self.quantizer = ResidualVectorQuantizer(
                c.latent_dim, c.codebook_size, c.codebook_dims, c.quantizer_dropout, c.quantizer
            )
        self.decoder = Decoder(
            c.latent_dim, c.decoder_dim, c.decoder_rates, c.activation, c.channels
        )

    def encode(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        n_quantizers: int | None = None,
        padded: bool = True,
    ) -> Encoded:
        """Audio to codes. An item gets what it would get alone, without the padding after it.

        Args:
            audio: [B, 1, T] in [-1, 1] at `sample_rate`; padded here to whole frames.
            lengths: samples of each item, B integers; None: T for all.
            n_quantizers: use the first that many codebooks; None: all.
            padded: False runs every convolution without its padding, as the published package's
                chunk mode does: fewer frames come out. Without `lengths`.
        Raises:
            ValueError: the dtype, the shape, a length or n_quantizers is out of range, or the codec
                is continuous.
        """
        require(self, "encoder")
        self._require_codes()
        check_signal("audio", audio, self.config.channels)
        lengths = checked_lengths(lengths, audio, padded)
        if engine := self.engine_for(audio):
            return engine.encode(audio, lengths, n_quantizers, padded)
        z, frames = self._features(audio, lengths, padded)
        return encoded(self.quantizer(z, n_quantizers, frames), frames)

    def encode_latents(
        self, audio: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Latents:
        """Audio to the latents of a continuous codec; `decode` takes their mean, or a sample.

        Args:
            audio, lengths, padded: those of `encode`.
        Raises:
            ValueError: the dtype, the shape or a length is out of range, or the codec has codes.
        """
        if not isinstance(self.quantizer, VAE):
            raise ValueError("the codec has codes, no continuous latents; accepted: encode")
        require(self, "encoder")
        check_signal("audio", audio, self.config.channels)
        lengths = checked_lengths(lengths, audio, padded)
        if engine := self.engine_for(audio):
            frames = None if lengths is None else -(-lengths // self.hop_length)
            return self.quantizer.latents(engine.features(audio, lengths, padded), frames)
        return self.quantizer.latents(*self._features(audio, lengths, padded))

    def _features(
        self, audio: Tensor, lengths: Tensor | None, padded: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The encoder's output for checked arguments, by the modules, and the frames of items."""
        if padded:
            audio, lengths = whole_frames(audio, lengths, self.hop_length)
        frames = None if lengths is None else lengths // self.hop_length
        return self.encoder(audio, lengths, padded), frames

    def _require_codes(self) -> None:
        if self.config.continuous:
            raise ValueError(
                "the codec is continuous: it has latents, no codes; "
                "accepted: encode_latents and decode"
            )

    def decode(self, z: Tensor, lengths: Tensor | None = None, padded: bool = True) -> Tensor:
        """Quantised latent [B, D, F] to audio [B, 1, F hop_length].

        Where a stride is odd, the published decoder stops a few samples short of the last frame's
        end (8 at 24 and 16 kHz). Those samples are zeros here; all before them are as published.

        Args:
            z: the latent.
            lengths: frames of each item, B integers; an item's audio is zero past its last frame.
            padded: False runs every convolution without its padding, as the published package's
                chunk mode does: less audio comes out. Without `lengths`.
        Raises:
            ValueError: the dtype, the shape or a length is out of range.
        """
        require(self, "decoder")
        check_signal("latent", z, self.config.latent_dim)
        lengths = checked_lengths(lengths, z, padded)
        if engine := self.engine_for(z):
            return engine.decode(z, lengths, padded)
        return self._decode(z, lengths, padded)

    def decode_codes(
        self, codes: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor:
        """Codes [B, N, F] of the first N codebooks to audio [B, 1, F hop_length], see `decode`.

        Codes are int64 or int32.

        Raises:
            ValueError: the dtype, the shape, a code or a length is out of range, or the codec is
                continuous.
        """
        require(self, "decoder")
        self._require_codes()
        check_shape("codes", codes)
        lengths = checked_lengths(lengths, codes, padded)
        check_range = range_check(codes, self.config.codebook_size)
        if engine := self.engine_for(codes):
            audio = engine.decode_codes(codes, lengths, padded)
            check_range()
            return audio
        check_range()
        return self._decode(self.quantizer.decode(codes), lengths, padded)

    def _decode(self, z: Tensor, lengths: Tensor | None, padded: bool) -> Tensor:
        """`decode` of checked arguments, by the modules."""
        z, lengths = whole_frames(z, lengths, 1)
        audio = self.decoder(z, lengths, padded)
        return filled_up(audio, z.shape[2] * self.hop_length) if padded else audio

    def forward(self, audio: Tensor, n_quantizers: int | None = None) -> dict[str, Tensor]:
        """Audio [B, 1, T] through the whole codec.

        Returns:
            "audio" [B, 1, T], and "z", "codes", "latents", "vq/commitment_loss" and
            "vq/codebook_loss" (see `Encoded`). Of a continuous codec "audio", "z" (a sample in
            training mode, else the mean) and "vae/kl_loss" (see `Latents`).
        """
        if self.config.continuous and n_quantizers is None:
            latents = self.encode_latents(audio)
            z = latents.sample() if self.training else latents.mean
            return {
                "audio": self.decode(z)[..., : audio.shape[-1]],
                "z": z,
                "vae/kl_loss": latents.kl_loss(),
            }
        latent = self.encode(audio, n_quantizers=n_quantizers)
        return {
            "audio": self.decode(latent.z)[..., : audio.shape[-1]],
            "z": latent.z,
            "codes": latent.codes,
            "latents": latent.latents,
            "vq/commitment_loss": latent.commitment_loss,
            "vq/codebook_loss": latent.codebook_loss,
        }

    def fold_weight_norm(self) -> "DAC":
        """Store every weight as one tensor: quicker, but not for training. Returns self."""
        for module in self.modules():
            if isinstance(module, WeightNorm):
                module.fold()
        return self

    def optimize(
        self,
        precision: PrecisionOption = None,
        shapes: ShapesOption = (),
        memory: int = 4 << 30,
        invariant: bool = False,
    ) -> "DAC":
        """Have an engine run `encode`, `decode` and what uses them. Returns self.

        The engine has fused layers and, on a GPU, CUDA graphs. The codec is folded and in eval mode
        from then on, and its parameters stay float32. The engine runs what needs no gradients: in
        training mode, or for an input that requires a gradient, the modules run as they do without
        an engine. Other threads may use the codec meanwhile. The codec's own methods that move,
        convert, load or train the weights end the engine: the next call says so. It does not notice
        what changes them otherwise, in place or by a part (`codec.decoder.load_state_dict`): call
        `optimize` again then. The engine is not saved, and a copy of the codec has none.
        `str(codec.engine)` says what it does.

        Args:
            precision: of the convolutions, "fp32" (no TF32), "tf32x3" (three products of TF32 for
                each of float32, on CUDA), "tf32", "fp16" or "bf16", or {"encode": one of these,
                "decode": one of these}. None: fp32 for encode, so that
                codes are the reference's; for decode fp16 on CUDA, fp32 on the CPU. The quantizer
                computes in fp32 in any case.
            shapes: (batch, frames) pairs, or {"encode": pairs, "decode": pairs}. At each size, the
                ways to run each layer are timed (on CUDA, kernels are compiled the first time:
                minutes), and on CUDA encode and decode_codes, with all codebooks, become a graph. A
                graph serves requests of its size and smaller ones, down to half of it, ragged
                batches too. Without shapes, layers run on cuDNN and cuBLAS; on a CPU by the
                compiled kernels where the processor has what they need, else on oneDNN and MKL.
            memory: bytes that the graphs may hold; shapes beyond are timed but not captured.
            invariant: whether, on CUDA, an item's codes and audio have the same bits whatever
                batch, chunk, neighbours and graph they meet: every layer is a fused kernel then,
                and none is chosen by timing. On a CPU this goes for encoder and decoder: there the
                last bit of the quantizer's products may depend on the shape.
        Raises:
            BackendError: `invariant`, and a layer, or on CUDA the quantizer, has no fused kernel.
            ValueError: an argument is out of range, the codec is not in float32, or its activation
                is not Snake.
        """
        options = Options.checked(self, precision, shapes, memory, invariant)
        # Frees what an earlier engine holds.
        self.engine = None
        # Parameters made in inference mode could not be changed outside of it.
        with torch.inference_mode(False):
            self.eval()
            self.fold_weight_norm()
        self.engine = Engine(self, options)
        return self

    @contextlib.contextmanager
    def _engine_for_now(self) -> Iterator[None]:
        """Inside, recordings are run by an engine, on a CPU by one made for the purpose.

        That engine sees the weights as they are now, serves all threads that come meanwhile, and
        leaves the codec as it is. Where hooks watch the modules, they run.
        """
        with _lending:
            lent = self._lent
            if lent is None and self._lacks_engine():
                lent = self._lent = self.engine = Engine(self, Options.checked(self))
            if lent:
                self._borrowers += 1
        try:
            yield
        finally:
            with _lending:
                if lent:
                    self._borrowers -= 1
                    if not self._borrowers:
                        self._lent = None
                        # Unless somebody has called `optimize` meanwhile.
                        if self.engine is lent:
                            self.engine = None

    def _lacks_engine(self) -> bool:
        """Whether recordings would gain by an engine that nobody has made."""
        parameter = next(self.parameters())
        suits = parameter.dtype == torch.float32 and self.config.activation == "snake"
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
        on_cpu = parameter.device.type == "cpu"
        return not (self.engine or self.training or hooked) and on_cpu and suits

    def engine_for(self, x: Tensor | None = None) -> Engine | None:
        """The engine, if there is one and it is to run x.

        Raises:
            RuntimeError: the engine is of weights that the codec no longer has.
        """
        # Read once, here and below: another thread may end it meanwhile.
        engine = self.engine
        needs_gradient = x is not None and x.requires_grad and torch.is_grad_enabled()
        if engine is None or self.training or needs_gradient:
            return None
        if engine.stale:
            raise RuntimeError(
                f"the codec was {engine.stale} after optimize(); call optimize() again"
            )
        return engine

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DAC":
        before = next(self.parameters()).data_ptr()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        engine = self.engine
        if engine and next(self.parameters()).data_ptr() != before:
            engine.stale = "moved or converted"
        return self

    def load_state_dict(  # noqa: D102
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        if engine := self.engine:
            engine.stale = "given other weights"
        return super().load_state_dict(state_dict, strict, assign)

    def train(self, mode: bool = True) -> "DAC":  # noqa: D102
        engine = self.engine
        if mode and engine:
            engine.stale = "in training"
        return super().train(mode)

    def compress(
        self,
        source: str | os.PathLike[str] | tuple[np.ndarray, int],
        chunk_seconds: float | None = None,
        n_quantizers: int | None = None,
        normalize_db: float | None = -16.0,
        padding: bool = True,
    ) -> DACFile:
        """A recording to a `DACFile`, in constant memory; see `recordings.compress.compress`."""
        require(self, "encoder")
        with self._engine_for_now():
            return compress.compress(
                self, source, chunk_seconds, n_quantizers, normalize_db, padding
            )

    def decompress(self, file: DACFile | str | os.PathLike[str]) -> tuple[np.ndarray, int]:
        """A `DACFile` or its path to (float32 array [C, T], rate in Hz).

        See `recordings.compress.decompress`.
        """
        require(self, "decoder")
        with self._engine_for_now():
            return compress.decompress(self, file)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, see `storage.checkpoint.save`; of a whole codec."""
        require(self, "encoder", "decoder")
        checkpoint.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], parts: str | None = None) -> "DAC":
        """Read a checkpoint in any of the formats of `storage.checkpoint.read`; in eval mode.

        Args:
            path: of the checkpoint.
            parts: "encoder" or "decoder": read and hold that half alone; None: both.
        Raises:
            CheckpointError: it is no codec checkpoint, or damaged.
            ValueError: `parts` is something else.
        """
        check_parts(parts)
        config, state = checkpoint.read(path, key_filter(parts))
        with torch.device("meta"):
            codec = cls(**config.to_dict())
        keep_half(codec, parts)
        checkpoint.restore(codec, state, path)
        return codec.eval()


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    engine: bool | dict[str, Any] | None = None,
    parts: str | None = None,
) -> DAC:
    """A codec in eval mode.

    Args:
        name_or_path: a preset ("tiny" is bundled; "44khz", "44khz_16kbps", "24khz" and "16khz" are
            downloaded when they are not in the cache), or a checkpoint: ours, a published .pth, or
            a Hugging Face folder.
        device, dtype: of the parameters.
        engine: True, or arguments of `DAC.optimize`, which is called then.
        parts: "encoder" (for `encode`, `compress`, `StreamingEncoder`) or "decoder" (for `decode`,
            `decode_codes`, `decompress`, `StreamingDecoder`): the other half is neither read nor
            held, and whatever needs it raises a `MissingPartError`. Both have the quantizer. None:
            the whole codec.
    Raises:
        ValueError: no such preset, path or half, the checkpoint is damaged or no codec's, or as
            `DAC.optimize` says.
        OSError: the weights cannot be downloaded.
    """
    check_parts(parts)
    path = Path(name_or_path)
    # A preset's name means the preset; ./44khz is the folder of that name.
    is_path = str(name_or_path) not in PRESETS and (
        path.exists() or bool(path.suffix) or len(path.parts) > 1
    )
    name = "" if is_path else str(name_or_path)
    codec = DAC.load(download.download(name) if name else path, parts)
    codec.name = name
    codec = codec.to(device=device, dtype=dtype)
    if engine is None or engine is False:
        return codec
    return codec.optimize() if engine is True else codec.optimize(**engine)
