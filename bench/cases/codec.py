"""The whole codec, 44.1 kHz preset with random weights: encode, decode, and both in turn.

Providers: the published package in a process of its own (given `--published-python`, on the CPU); our model with the
reference ops and weight norm as trained; the same with weight norm folded; and what a user gets, folded with the
backend `auto`. Single precision, without TF32. Decoding starts from the codes.
"""

import copy
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import parity
from bench.harness import Case, Prepared, Settings
from bench.peers import Peer
from dac_fast import ops
from dac_fast.config import PRESETS
from dac_fast.model import DAC


def cases(device: str, quick: bool) -> list[Case]:
    """On CUDA one second and ten, on the CPU two; `both` first, since it is the number that counts."""
    preset, lengths = ("tiny", [0.2]) if quick else ("44khz", [1.0, 10.0] if device == "cuda" else [2.0])
    return [
        Case(
            "codec", direction, device, "float32", f"{preset}-1x{seconds:g}s",
            partial(prepare, preset, seconds, direction),
        )
        for seconds in lengths
        for direction in ("both", "encode", "decode")
    ]  # fmt: skip


def _run(codec, direction: str, backend: str, source: torch.Tensor):
    """Outputs of one iteration: encode gives z and codes, decode audio, both codes and audio."""
    with torch.no_grad(), ops.use_backend(backend):
        if direction == "decode":
            return (codec.decode_codes(source),)
        encoded = codec.encode(source)
        if direction == "encode":
            return encoded.z, encoded.codes
        return encoded.codes, codec.decode_codes(encoded.codes)


def _flops(config, direction: str, frames: int) -> int:
    """Of the convolutions, counted on a model without data."""
    with torch.device("meta"), ops.use_backend("reference"), FlopCounterMode(display=False) as counter:
        codec = DAC(**config.to_dict())
        if direction != "decode":
            codec.encoder(torch.empty(1, 1, frames * config.hop_length))
        if direction != "encode":
            codec.decoder(torch.empty(1, config.latent_dim, frames))
    return counter.get_total_flops()


def prepare(preset: str, seconds: float, direction: str, settings: Settings) -> Prepared:
    """Model, input, providers and check."""
    torch.manual_seed(0)
    config = PRESETS[preset]
    unfolded = DAC(**config.to_dict()).eval().to(settings.device)
    audio = 0.1 * torch.randn(1, 1, round(seconds * config.sample_rate), device=settings.device)
    codes = _run(unfolded, "encode", "reference", audio)[1]
    source = codes if direction == "decode" else audio
    folded = copy.deepcopy(unfolded).fold_weight_norm()

    providers = {}
    if settings.device == "cpu":
        # The published constructor knows no choice of activation, the last of our arguments.
        kwargs = {k: v for k, v in config.to_dict().items() if k != "activation"}
        kwargs["quantizer_dropout"] = bool(config.quantizer_dropout)
        job = {"kwargs": kwargs, "state": unfolded.state_dict(), "direction": direction, "input": source}
        providers["published"] = (
            partial(Peer, settings.published_python, job)
            if settings.published_python
            else "no --published-python was given"
        )
    for name, codec, backend in (
        ("reference-unfolded", unfolded, "reference"),
        ("reference-folded", folded, "reference"),
        ("auto-folded", folded, "auto"),
    ):
        providers[name] = partial(partial, _run, codec, direction, backend, source)

    check = _checker(unfolded, direction, source)
    return Prepared(providers, check, bytes_moved=None, flops=_flops(config, direction, codes.shape[-1]))


def _checker(codec, direction: str, source: torch.Tensor):
    """Compares with the model in float64: codes, and latent or audio for the codes that they were made from.

    Near ties make single codes differ: half a percent may, beyond twice what the reference in single precision has.
    """
    exact_codec = copy.deepcopy(codec).double()
    same_dtype = _run(codec, direction, "reference", source)
    exact_source = source if direction == "decode" else source.double()
    exact = _run(exact_codec, direction, "reference", exact_source)

    def check_codes(codes, same, truth):
        wrong, allowed = ((c != truth).double().mean().item() for c in (codes, same))
        allowed = 2 * allowed + 0.005
        assert wrong <= allowed, f"{wrong:.2%} of the codes differ from float64's, allowed {allowed:.2%}"

    def check(outputs):
        if direction == "decode":
            return parity.as_good_as(same_dtype, exact)(outputs)
        position = 0 if direction == "both" else 1
        codes, values = outputs[position], outputs[1 - position]
        check_codes(codes, same_dtype[position], exact[position])
        if direction == "encode":
            with torch.no_grad(), ops.use_backend("reference"):
                from_codes = [[c.quantizer.from_codes(codes)[0]] for c in (codec, exact_codec)]
        else:
            from_codes = [_run(c, "decode", "reference", codes) for c in (codec, exact_codec)]
        return parity.as_good_as(*from_codes)([values])

    return check
