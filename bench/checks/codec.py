"""How far a codec in some precision is from float64: codes that agree, and audio in decibels.

Of a long or large input only two pieces are computed in float64, the beginning of the first item
and the end of the last one. Frames at the inner edge of a piece do not count, since they depend on
what lies beyond it.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.document import Json
from dac_fast import ops
from dac_fast.codec import DAC

# The least signal-to-noise ratio of audio, in dB, that a precision must reach.
LEAST_SNR = {"float32": 90, "tf32x3": 90, "tf32": 50, "float16": 40, "bfloat16": 15}
# The least share of codes that must agree; in float32 it depends on the reference, see `Truth`.
LEAST_AGREEMENT = {"tf32": 0.8, "float16": 0.8, "bfloat16": 0.4}
# Frames of a piece.
PIECE = 48
# Frames: no output of any preset's encoder or decoder depends on more of them on a side.
MARGIN = 16


def decibels(actual: Tensor, exact: Tensor) -> float:
    """The signal-to-noise ratio of all values together; -inf where one is not finite."""
    noise = (actual.double() - exact).square().mean().item()
    signal = exact.square().mean().item()
    if not noise < float("inf"):
        return float("-inf")
    return 10 * torch.log10(torch.tensor(signal / max(noise, 1e-300), dtype=torch.float64)).item()


def agreement(codes: Tensor, exact: Tensor) -> float:
    """The share of codes that are equal."""
    return (codes == exact).double().mean().item()


def assert_snr(value: float, precision: str) -> None:
    """Raises AssertionError where that many decibels are too few for the precision."""
    least = LEAST_SNR[precision]
    assert value >= least, f"{value:.1f} dB, at least {least} expected"


@dataclass(frozen=True)
class Piece:
    """Frames `begin` to `end` of an item, of which those from `first` to before `last` count."""

    item: int
    begin: int
    end: int
    first: int
    last: int

    def of(self, signal: Tensor, hop: int = 1) -> Tensor:
        """The piece of a signal [B, C, frames * hop], as one item."""
        return signal[self.item, :, self.begin * hop : self.end * hop][None]

    def counted(self, piece: Tensor, hop: int = 1) -> Tensor:
        """The frames of the piece that count."""
        return piece[..., self.first * hop : self.last * hop]


def pieces(items: int, frames: int) -> list[Piece]:
    """The pieces of a batch that are compared; one short item is a single piece."""
    if items == 1 and frames <= 2 * PIECE:
        return [Piece(0, 0, frames, 0, frames)]
    size = min(PIECE, frames)
    # A piece that is the whole item has no inner edge.
    margin = MARGIN if size < frames else 0
    beginning = Piece(0, 0, size, 0, size - margin)
    return [beginning, Piece(-1, frames - size, frames, margin, size)]


class Truth:
    """The codec in float64, for one input.

    Args:
        codec: its weights; on the input's device.
        audio: [B, 1, T], T a multiple of the hop.
    """

    def __init__(self, codec: DAC, audio: Tensor):
        self._hop = codec.hop_length
        self._codec = copy.deepcopy(codec).double()
        self._pieces = pieces(audio.shape[0], audio.shape[2] // self._hop)
        self._decoded: dict[bytes, Tensor] = {}
        self._codes = self._encode(self._codec, audio.double())
        self._float32 = agreement(self._encode(codec, audio), self._codes)

    @torch.no_grad()
    def _encode(self, codec: DAC, audio: Tensor) -> Tensor:
        with ops.use_backend("reference"):
            found = [
                piece.counted(codec.encode(piece.of(audio, self._hop)).codes)
                for piece in self._pieces
            ]
        return torch.cat(found, dim=2)

    @torch.no_grad()
    def _decode(self, codes: Tensor) -> Tensor:
        # Most peers have the same codes.
        key = codes.cpu().numpy().tobytes()
        if key not in self._decoded:
            with ops.use_backend("reference"):
                self._decoded[key] = self._codec.decode_codes(codes)
        return self._decoded[key]

    def check_codes(self, codes: Tensor, precision: str) -> Json:
        """Judges codes [B, N, F] of the audio; returns {"agreement"}.

        Raises:
            AssertionError: fewer agree than the precision should have.
        """
        found = [piece.counted(piece.of(codes)) for piece in self._pieces]
        share = agreement(torch.cat(found, dim=2), self._codes)
        # Near ties make single codes differ: twice as many as the reference has, and half a
        # percent.
        least = LEAST_AGREEMENT.get(precision, 1 - 2 * (1 - self._float32) - 0.005)
        assert share >= least, (
            f"{share:.2%} of the codes are float64's, at least {least:.2%} expected"
        )
        return {"agreement": share}

    def check_audio(self, codes: Tensor, audio: Tensor, precision: str) -> Json:
        """Judges audio [B, 1, T] of these codes; returns {"snr_db"}.

        Raises:
            AssertionError: the signal-to-noise ratio is below the precision's.
        """
        actual, exact = [], []
        for piece in self._pieces:
            inside = piece.counted(piece.of(audio, self._hop), self._hop)
            truth = piece.counted(self._decode(piece.of(codes)), self._hop)
            # The published package's audio may end a few samples early.
            actual.append(inside)
            exact.append(truth[..., : inside.shape[2]])
        assert all(part.shape[2] for part in actual), f"audio of shape {list(audio.shape)}"
        value = decibels(torch.cat(actual, dim=2), torch.cat(exact, dim=2))
        assert_snr(value, precision)
        return {"snr_db": value}
