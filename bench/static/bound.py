"""How fast a launch can be at best, from its machine code: analysis, not a measurement.

A CTA needs its warps' instructions issued, its products computed, its operands brought from L2, and
its share of HBM's traffic; and of the blocks of operands that it copies to shared memory only as
many are under way as it has stages, and each of them takes a while. Were all five to overlap
perfectly, the slowest of them would set the time, and that is the bound: the real time is longer.
Loads that hit L1 are not told apart, and all CTAs that an SM holds share its rates.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from bench.document import Json
from bench.static.launches import Launch
from bench.static.sass import Program


@dataclass(frozen=True)
class SM:
    """What one SM of an architecture holds: registers of 4 bytes, bytes of shared memory."""

    shared: int
    warps: int
    ctas: int
    registers: int = 65536


# CUDA C++ Programming Guide, technical specifications per compute capability.
SMS = {
    80: SM(164 << 10, 64, 32),
    86: SM(100 << 10, 48, 16),
    89: SM(100 << 10, 48, 24),
    90: SM(228 << 10, 64, 32),
    100: SM(228 << 10, 64, 32),
}
# That the system takes of each CTA's shared memory.
RESERVED = 1 << 10

# An H100 SXM: SMs, assumed clock, and per SM and clock: warps' instructions, bytes from L2 and HBM
# (assumed, as achieved by good kernels), and operations of dense products.
COUNT, CLOCK = 132, 1.7e9
ISSUED = 4
L2 = 30.0
HBM = 3.0e12 / COUNT / CLOCK
# Clocks that a load takes, mostly of what only HBM has (assumed).
LATENCY = 1000
PRODUCTS = {"fp16": 4096, "bf16": 4096, "tf32": 2048, "tf32x3": 2048 / 3}


@dataclass(frozen=True)
class Work:
    """What a launch has to do, and how its code goes about it.

    Attributes:
        elements: outputs of a CTA.
        operations: 2 per multiply-add of matrix products, of the whole launch, padding included.
        moved: bytes that HBM must see: every tensor once.
        read: bytes that a CTA reads from L2 and writes to it.
        trips: of the code's loops, in order.
        copied: blocks of operands that a CTA copies to shared memory one after another; 0: none.
    """

    elements: int
    operations: float
    moved: float
    read: float
    trips: list[int]
    copied: int = 0


def ctas(facts: Json, warps: int, architecture: int) -> int:
    """CTAs that an SM holds at once, by registers, shared memory and warps."""
    sm = SMS[architecture]
    # A warp's registers come in units of 256.
    per_warp = -(-facts["registers"] * 32 // 256) * 256
    by_registers = sm.registers // per_warp // warps
    by_shared = sm.shared // (facts["shared"] + RESERVED)
    return min(by_registers, by_shared, sm.warps // warps, sm.ctas)


def work(launch: Launch) -> Work:
    """Of any of the package's kernels."""
    name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    return WORK[name](Arguments(launch.arguments))


class Arguments:
    """A kernel's arguments as attributes, and the bytes of its tensors."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__ |= values

    def bytes(self, *names: str) -> int:
        """Of those tensors that are there."""
        tensors = [t for t in map(self.__dict__.get, names) if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def there(self, *names: str) -> int:
        """How many of the tensors there are."""
        return sum(torch.is_tensor(self.__dict__[name]) for name in names)


def _snake(a: Any, passes: int) -> Work:
    elements, size = a.BLOCK_C * a.BLOCK_T, a.x.element_size()
    return Work(elements, 0, passes * a.x.numel() * size, passes * elements * size, [])


def _conv1d(a: Any) -> Work:
    size, elements = a.x.element_size(), a.BLOCK_M * a.BLOCK_N
    blocks = a.RUNS * -(-a.RUN // a.BLOCK_K)
    programs = -(-a.rows // a.BLOCK_M) * -(-a.N // a.BLOCK_N)
    # What is masked is not read.
    operands = blocks * (min(a.BLOCK_M, a.rows) + a.BLOCK_N) * a.BLOCK_K * size
    epilogue = a.there("residual", "y", "snaked") * elements * size
    moved = a.bytes("x", "residual", "y", "snaked", "bias", "alpha") + _weight(a)
    products = 2.0 * programs * elements * blocks * a.BLOCK_K
    return Work(elements, products, moved, operands + epilogue, [blocks], blocks)


def _weight(a: Any) -> int:
    """Bytes of a convolution's weight: a transposed one's argument is the second half alone."""
    return a.bytes("weight") * (2 if a.TRANSPOSED else 1)


def _residual_unit(a: Any) -> Work:
    size, columns = a.x.element_size(), a.PARTS * a.BLOCK_N
    elements = a.BLOCK_M * columns
    blocks = a.TAPS * -(-a.C // a.BLOCK_K)
    programs = -(-a.rows // a.BLOCK_M)
    operands = blocks * (a.BLOCK_M + columns) * a.BLOCK_K * size + columns**2 * size
    epilogue = a.there("x", "y", "y_snaked") * elements * size
    moved = a.bytes("x", "snaked", "weight1", "weight2", "y", "y_snaked")
    products = 2.0 * programs * elements * (blocks * a.BLOCK_K + columns)
    # Of one turn the compiler makes no loop.
    trips = [blocks, a.PARTS] if a.PARTS > 1 else [blocks]
    return Work(elements, products, moved, operands + epilogue, trips, blocks)


def _project(a: Any) -> Work:
    elements, blocks = a.BLOCK_R * a.BLOCK_F, a.DEPTH // a.BLOCK_D
    operands = a.DEPTH * (4 * a.BLOCK_R + a.x.element_size() * a.BLOCK_F)
    moved = a.bytes("weight", "x", "y")
    return Work(elements, 0, moved, operands + 4 * elements, [blocks], blocks)


def _sum(a: Any) -> Work:
    read = 4 * a.BLOCK * (a.PIECES + 1)
    return Work(a.BLOCK, 0, a.bytes("parts", "y"), read, [])


def _search(a: Any) -> Work:
    table = a.bytes("codebooks", "units", "half_norms", "cross")
    rows = a.bytes("projections", "latents", "entries", "codes")
    of_cta = rows * a.BLOCK_F // a.frames
    mean_earlier = round((a.N - 1) / 2)
    trips = [a.N, mean_earlier, -(-a.K // a.BLOCK_K)]
    return Work(a.BLOCK_F, 0, table + rows, table + of_cta, trips)


def _decode(a: Any) -> Work:
    elements, blocks = a.BLOCK_D * a.BLOCK_F, -(-a.N * a.DIM // a.BLOCK_R)
    operands = blocks * a.BLOCK_R * 4 * (a.BLOCK_D + a.BLOCK_F)
    moved = a.bytes("codes", "codebooks", "weight", "y")
    read = operands + elements * a.y.element_size()
    return Work(elements, 0, moved, read, [blocks], blocks)


WORK = {
    "forward": lambda a: _snake(a, 2),
    "backward": lambda a: _snake(a, 3),
    "conv1d": _conv1d,
    "residual_unit": _residual_unit,
    "project": _project,
    "sum": _sum,
    "search": _search,
    "decode": _decode,
}


def bound(launch: Launch, program: Program, resources: Json) -> Json:
    """The launch on an H100.

    Returns:
        programs; waves, of CTAs that the GPU holds at once; hbm and l2, bytes; clocks that each of
        the five takes on an SM; limit, the slowest one; ms. Of clocks, `issue` is missing where
        loops are not as expected, and `latency` where nothing is copied ahead.
    """
    todo = work(launch)
    warps = launch.options["num_warps"]
    held = ctas(resources, warps, 90)
    # The busiest SM works through so many CTAs.
    turns = math.ceil(launch.programs / COUNT)
    clocks = {
        "HBM": todo.moved / COUNT / HBM,
        "L2": turns * todo.read / L2,
    }
    if executed := program.executed(todo.trips):
        clocks["issue"] = turns * executed * warps / ISSUED
    if todo.operations and launch.precision in PRODUCTS:
        per_cta = todo.operations / launch.programs
        clocks["products"] = turns * per_cta / PRODUCTS[launch.precision]
    ahead = launch.options.get("num_stages", 1) - 1
    if todo.copied and ahead:
        # CTAs that an SM holds at once wait at the same time.
        clocks["latency"] = turns / min(turns, held) * todo.copied / ahead * LATENCY
    limit = max(clocks, key=lambda name: clocks[name])
    return {
        "programs": launch.programs,
        "waves": launch.programs / (held * COUNT),
        "hbm": todo.moved,
        "l2": todo.read * launch.programs,
        "clocks": clocks,
        "limit": limit,
        "ms": 1e3 * clocks[limit] / CLOCK,
    }
