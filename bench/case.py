"""A case to run and time: what it computes, at which size, by which providers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


class Unavailable(Exception):  # noqa: N818 (nothing went wrong)
    """Raised by a provider's start: what it needs is not there; the message says what."""


# Starts a provider and returns the function to time; or says why it cannot run.
Provider = Callable[[], Callable] | str


@dataclass(frozen=True)
class Settings:
    """How to run cases.

    Attributes:
        device: "cpu" or "cuda".
        seconds: of timing per provider and case, about.
        rounds: in which the providers take turns.
        providers: names to run; empty: all.
        published_python: a Python that can `import dac`, the published package; None: leave it out.
        quick: shapes that run in a moment, for the harness's own test.
        provider_seconds: a case starts no more providers after that long.
    """

    device: str
    seconds: float = 1.0
    rounds: int = 7
    providers: Sequence[str] = ()
    published_python: str | None = None
    quick: bool = False
    provider_seconds: float = float("inf")


@dataclass
class Prepared:
    """A case ready to run.

    Attributes:
        providers: by name, the baseline first. What one starts may have `precision`, where that is not the case's
            dtype ("tf32", "float16", ...); `sample` and `close`, see `bench.peers.Peer`; `facts`, more for its row.
        check: of a provider's outputs, and its precision: returns their error, or several facts for the row; raises
            AssertionError where they are wrong.
        bytes_moved: that the op cannot do without: each input and output tensor once; None: not of interest.
        flops: of its matrix products and convolutions; 0: it has none.
        audio_seconds: of audio that one call goes through; None: not of interest.
    """

    providers: dict[str, Provider]
    check: Callable[[Sequence, str], float | dict]
    bytes_moved: int | None
    flops: int = 0
    audio_seconds: float | None = None


@dataclass(frozen=True)
class Case:
    """One thing to compute, at one size.

    Attributes:
        op: name in `dac_fast.ops`, or "codec".
        direction: what of it: forward, backward; encode, decode, both.
        device: "cpu" or "cuda". dtype: "float32", ….
        shape: of the input, and where it occurs.
        prepare: makes the inputs, of `Settings`.
        priority: 0 is run first.
        requests: time calls as a user waits for them, one after the other, and longer; also measure each provider's
            start and memory. Else the device's time is measured.
    """

    op: str
    direction: str
    device: str
    dtype: str
    shape: str
    prepare: Callable[[Settings], Prepared] = field(repr=False)
    priority: int = 1
    requests: bool = False

    @property
    def name(self) -> str:
        """What `--case` patterns match."""
        return "/".join((self.op, self.direction, self.device, self.dtype, self.shape))
