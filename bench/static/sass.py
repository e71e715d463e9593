"""Reading a kernel's machine code (SASS): its loops, and how many instructions of which kind."""

import math
import re
from collections import Counter
from dataclasses import dataclass

from bench.document import Json

# Kinds by how an instruction begins; the first that matches counts, and "integer" is the rest:
# addresses, masks, moves.
KINDS = {
    "mma": ("HGMMA", "HMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA"),
    "async copy": ("LDGSTS", "UTMALDG", "UBLKCP"),
    "sync": ("LDGDEPBAR", "DEPBAR", "BAR", "WARPGROUP", "WARPSYNC", "SYNCS", "FENCE", "MEMBAR",
             "CCTL", "UTCBAR", "ARRIVES", "ERRBAR"),
    "load": ("LDG", "LD."),
    "store": ("STG", "ST."),
    "spill": ("LDL", "STL"),
    "shared load": ("LDS", "LDTM"),
    "shared store": ("STS", "STTM"),
    "special function": ("MUFU",),
    "float": ("FFMA", "FADD", "FMUL", "FMNMX", "FSET", "FSEL", "FCHK", "HADD", "HMUL", "HFMA",
              "HMNMX", "F2F", "F2I", "I2F", "FRND"),
    "exchange": ("SHFL", "REDUX", "CREDUX"),
    "uniform": ("U", "R2UR"),
    "control": ("BRA", "BSSY", "BSYNC", "EXIT", "NOP", "RET", "CALL", "BREAK", "YIELD"),
}  # fmt: skip

# Loops of fewer instructions wait for a barrier, or come after the end.
LEAST_LOOP = 6


@dataclass(frozen=True)
class Instruction:
    """One line of SASS.

    Attributes:
        op: with its modifiers, such as "LDG.E.128".
        text: the whole line, without its predicate.
    """

    op: str
    text: str

    @property
    def kind(self) -> str:
        """A key of `KINDS`, or "integer"."""
        return next((kind for kind, ops in KINDS.items() if self.op.startswith(ops)), "integer")

    @property
    def width(self) -> int:
        """Bytes that each thread moves, of a load or store."""
        bits = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", self.op)
        return int(bits[1]) // 8 if bits else 4


@dataclass(frozen=True, order=True)
class Loop:
    """The instructions first to last, both included, of which the last one jumps to the first."""

    first: int
    last: int

    def __contains__(self, at: int) -> bool:
        return self.first <= at <= self.last

    def encloses(self, other: "Loop") -> bool:
        """Whether the other one is a different loop inside."""
        return self != other and other.first in self and other.last in self


class Program:
    """A kernel's instructions, and its loops in order.

    Args:
        sass: what nvdisasm prints of it.
    """

    def __init__(self, sass: str) -> None:
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(self.instructions)
            elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(.*?);", line):
                text = found[1].strip()
                self.instructions.append(Instruction(text.split()[0], text))
        while self.instructions and self.instructions[-1].op in ("NOP", "BRA"):
            self.instructions.pop()
        jumps = [
            (labels.get(target[1], at + 1), at)
            for at, instruction in enumerate(self.instructions)
            if instruction.op.startswith("BRA")
            and (target := re.search(r"`\((\.L_x_\d+)\)", instruction.text))
        ]
        # What comes after the last way out waits for a barrier, and jumps back to where it is from.
        exits = [at for at, each in enumerate(self.instructions) if each.op == "EXIT"]
        end = exits[-1] if exits else len(self.instructions)
        # Several jumps back to one place are one loop.
        last = {first: at for first, at in jumps if first <= at < end}
        loops = sorted(Loop(first, at) for first, at in last.items() if at - first >= LEAST_LOOP)
        self.loops = loops

    def executed(self, trips: list[int]) -> int | None:
        """Instructions that each warp executes, if the loops run that often; None: other loops.

        Args:
            trips: of each loop, in the order of the code, each time that it is come to.
        """
        if len(trips) != len(self.loops):
            return None
        return sum(self._times(at, trips) for at in range(len(self.instructions)))

    def _times(self, at: int, trips: list[int]) -> int:
        """How often a warp executes an instruction."""
        return math.prod(count for loop, count in zip(self.loops, trips, strict=True) if at in loop)

    def hot(self, trips: list[int]) -> list[Instruction]:
        """The innermost loop that most instructions are executed in; all where there is no loop.

        trips: as for `executed`; loops other than those count by their instructions alone.
        """
        if len(trips) != len(self.loops):
            trips = [1] * len(self.loops)
        inner = [
            loop for loop in self.loops if not any(loop.encloses(other) for other in self.loops)
        ]
        if not inner:
            return self.instructions

        def executed(loop: Loop) -> int:
            return (loop.last - loop.first + 1) * self._times(loop.first, trips)

        hottest = max(inner, key=executed)
        return self.instructions[hottest.first : hottest.last + 1]


def facts(body: list[Instruction]) -> Json:
    """What is counted in some instructions.

    Returns:
        instructions; kinds: how many of each; loads and stores of global memory: how many by bytes
        per thread; mma: how many of each shape; waits.
    """
    kinds = Counter(instruction.kind for instruction in body)
    loads = Counter(i.width for i in body if i.kind in ("load", "async copy"))
    stores = Counter(i.width for i in body if i.kind == "store")
    products = [i.op for i in body if i.kind == "mma"]
    return {
        "instructions": len(body),
        "kinds": dict(kinds.most_common()),
        "loads": {str(width): loads[width] for width in sorted(loads, reverse=True)},
        "stores": {str(width): stores[width] for width in sorted(stores, reverse=True)},
        "mma": dict(Counter(_shape(op) for op in products)),
        "waits": dict(Counter(filter(None, map(_wait, body)))),
    }


def _shape(op: str) -> str:
    """M×N×K of HGMMA.64x128x16.F32, or of HMMA.16816.F32."""
    if wide := re.search(r"\d+x\d+x\d+", op):
        return f"wgmma {wide[0].replace('x', '×')}"
    narrow = re.search(r"\.(1[68])(8)(4|8|16)\b", op)
    return f"mma {'×'.join(narrow.groups())}" if narrow else op.split(".")[0]


def _wait(instruction: Instruction) -> str | None:
    """What stands still: until so many groups are left, or until all warps are there."""
    if found := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", instruction.text):
        return f"wgmma but {found[1]}"
    if found := re.match(r"DEPBAR\.LE SB0, 0x(\d+)", instruction.text):
        return f"copies but {found[1]}"
    return "barrier" if instruction.op.startswith("BAR.SYNC") else None
