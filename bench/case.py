"""A case to time: what it computes, at which size, and the peers that compute it.

A peer is one way to compute a case, ours or somebody else's. Each is started right before its
outputs are checked, so that one that fails takes down no other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from bench import timing
from bench.document import Json

Outputs = Sequence[Tensor]


class Unavailable(Exception):  # noqa: N818 (nothing went wrong)
    """Something that a peer needs is not there; the message says what."""


class Run:
    """A peer that has been started; a call returns its outputs.

    Attributes:
        precision: of the computation, "float32/float16" where encoding and decoding differ; None:
            the case's dtype.
        facts: more for the peer's row, complete after the first call.
    """

    def __init__(self, call: Callable[[], Outputs], precision: str | None = None):
        self.call = call
        self.precision = precision
        self.facts: Json = {}

    def __call__(self) -> Outputs:
        """The outputs."""
        return self.call()

    def sampler(self, device: str, requests: bool) -> timing.Sampler:
        """A function that times a number of calls, as requests or by the device's clock."""
        make = timing.request_sampler if requests else timing.sampler
        return make(self.call, device)

    def close(self) -> None:
        """Ends what the peer started outside this process, which is nothing here."""


# A function that starts a peer, or the reason why it cannot run.
Peer = Callable[[], Run] | str
# Judges outputs in a precision: returns their error, or several facts for the row; raises
# AssertionError where they are wrong.
Check = Callable[[Outputs, str], float | Json]


@dataclass(frozen=True)
class Settings:
    """How to run cases.

    Attributes:
        device: "cpu" or "cuda".
        seconds: of timing per peer and case, about.
        rounds: in which the peers take turns.
        peers: names of those to run; empty: all.
        published_python: a Python that can `import dac`, the published package; None: it is left
            out.
        quick: shapes that run in a moment, for the test of the benchmark itself.
        peer_seconds: after this long a case starts no more peers.
    """

    device: str
    seconds: float = 1.0
    rounds: int = 7
    peers: Sequence[str] = ()
    published_python: str | None = None
    quick: bool = False
    peer_seconds: float = float("inf")


@dataclass
class Prepared:
    """A case ready to run.

    Attributes:
        peers: by name, the baseline first.
        check: of every peer's outputs.
        bytes_moved: that no implementation can do without: each input and output tensor once; None:
            memory does not limit this case.
        flops: of matrix products and convolutions.
        audio_seconds: that one call goes through; None: the case is no codec.
    """

    peers: dict[str, Peer]
    check: Check
    bytes_moved: int | None
    flops: int = 0
    audio_seconds: float | None = None


@dataclass(frozen=True)
class Case:
    """One thing to compute, at one size.

    Attributes:
        op: name in `dac_fast.ops`, or "codec" or "stream".
        direction: forward or backward; of a codec encode, decode or both.
        device: "cpu" or "cuda".
        dtype: "float32", ….
        shape: of the input, and the layer that has it.
        prepare: makes inputs, peers and check.
        priority: cases run in ascending order.
        requests: whether calls are timed as a user waits for them, one after the other and for
            longer, together with each peer's start and memory; else the device's time is taken.
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
        """The name that `--case` patterns match."""
        return "/".join((self.op, self.direction, self.device, self.dtype, self.shape))
