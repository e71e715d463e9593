"""How far a codec in some precision is from the same one in float64: codes that agree, and audio in decibels.

Of a long or large input only two pieces are computed in float64: the beginning of the first item and the end of the
last one. Frames at a piece's inner edge do not count, which see what lies beyond it.
"""

import copy

import torch
from torch import Tensor

from dac_fast import ops
from dac_fast.codec import DAC

# Least signal-to-noise ratio of audio, in dB, that a precision must reach. Half of bfloat16's is what it is.
LEAST_SNR = {"float32": 90, "tf32": 50, "float16": 40, "bfloat16": 15}
# Least share of codes that must agree. float32: as many as the reference in float32, see `Truth`.
LEAST_AGREEMENT = {"tf32": 0.8, "float16": 0.8, "bfloat16": 0.4}
# Frames: more than an output of any preset's encoder or decoder sees on a side, and a piece's size.
MARGIN, PIECE = 16, 48


def decibels(actual: Tensor, exact: Tensor) -> float:
    """Signal-to-noise ratio of all values together; -inf where one is not finite."""
    noise = (actual.double() - exact).square().mean().item()
    signal = exact.square().mean().item()
    if not noise < float("inf"):
        return float("-inf")
    return 10 * torch.log10(torch.tensor(signal / max(noise, 1e-300), dtype=torch.float64)).item()


def agreement(codes: Tensor, exact: Tensor) -> float:
    """Share of codes that are equal."""
    return (codes == exact).double().mean().item()


class Truth:
    """The codec in float64, for one input.

    Args:
        codec: its weights; on the input's device.
        audio: [B, 1, T], T a multiple of the hop.
    """

    def __init__(self, codec: DAC, audio: Tensor):
        self._hop, self._codec = codec.hop_length, copy.deepcopy(codec).double()
        frames = audio.shape[2] // self._hop
        whole = frames <= 2 * PIECE and audio.shape[0] == 1
        spans = (
            [(0, 0, frames)]
            if whole
            else [(0, 0, min(PIECE, frames)), (-1, max(frames - PIECE, 0), frames)]
        )
        self._pieces = [
            (
                item,
                begin,
                end,
                MARGIN if begin else 0,
                end - begin - (MARGIN if end < frames else 0),
            )
            for item, begin, end in spans
        ]
        self._audio, self._decoded = audio, {}
        same = [self._encode(codec, *piece) for piece in self._pieces]
        self._codes = [self._encode(self._codec, *piece) for piece in self._pieces]
        self._float32 = agreement(torch.cat(same, dim=2), torch.cat(self._codes, dim=2))

    @torch.no_grad()
    def _encode(self, codec: DAC, item: int, begin: int, end: int, first: int, last: int) -> Tensor:
        piece = self._audio[item, :, begin * self._hop : end * self._hop][None]
        with ops.use_backend("reference"):
            return codec.encode(piece.to(next(codec.parameters()).dtype)).codes[..., first:last]

    @torch.no_grad()
    def _decode(self, codes: Tensor, first: int, last: int) -> Tensor:
        # most providers have the same codes
        key = codes.cpu().numpy().tobytes()
        if key not in self._decoded:
            with ops.use_backend("reference"):
                self._decoded[key] = self._codec.decode_codes(codes)
        return self._decoded[key][..., first * self._hop : last * self._hop]

    def check_codes(self, codes: Tensor, precision: str) -> dict:
        """Codes [B, N, F] of the audio. Returns {"agreement"}.

        Raises:
            AssertionError: fewer agree than the precision should have.
        """
        pieces = [
            codes[item, :, begin + a : begin + b][None] for item, begin, _, a, b in self._pieces
        ]
        share = agreement(torch.cat(pieces, dim=2), torch.cat(self._codes, dim=2))
        # near ties make single codes differ: twice what the reference has, and half a percent
        least = LEAST_AGREEMENT.get(precision, 1 - 2 * (1 - self._float32) - 0.005)
        assert share >= least, (
            f"{share:.2%} of the codes are float64's, at least {least:.2%} expected"
        )
        return {"agreement": share}

    def check_audio(self, codes: Tensor, audio: Tensor, precision: str) -> dict:
        """Audio [B, 1, T] of these codes. Returns {"snr_db"}.

        Raises:
            AssertionError: the precision should have more.
        """
        actual, exact = [], []
        for item, begin, end, first, last in self._pieces:
            truth = self._decode(codes[item, :, begin:end][None], first, last)
            inside = audio[item, :, (begin + first) * self._hop : (begin + last) * self._hop][None]
            # the published package's audio may end a few samples early
            actual.append(inside)
            exact.append(truth[..., : inside.shape[2]])
        assert all(t.shape[2] for t in actual), f"audio of shape {list(audio.shape)}"
        value = decibels(torch.cat(actual, dim=2), torch.cat(exact, dim=2))
        assert value >= LEAST_SNR[precision], (
            f"{value:.1f} dB, at least {LEAST_SNR[precision]} expected"
        )
        return {"snr_db": value}
