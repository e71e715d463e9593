"""Pickles read without running them.

A pickle is a program for a stack machine, and Python's `pickle` would run whatever it says. Here
that machine is written out with the few operations that arrays and plain values need. It calls
nothing: the names that a format knows stand for data, every other name is refused.
"""

import pickletools
from collections.abc import Mapping
from dataclasses import dataclass

LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}

PROTOCOLS = range(6)
MOST_DIMENSIONS = 8


class RefusedError(ValueError):
    """The pickle holds `what`, as no file of its format does."""

    def __init__(self, what: str) -> None:
        super().__init__(f"its pickle holds {what}; accepted: arrays and plain values")


@dataclass(frozen=True)
class Name:
    """A name that the pickle mentions, not what it stands for in Python."""

    name: str


def dimensions(values: object) -> list[int]:
    """An array's sizes or strides, which `values` has to be.

    Raises:
        RefusedError: it is something else, or so many that their product takes time.
    """
    if not isinstance(values, tuple) or len(values) > MOST_DIMENSIONS:
        raise RefusedError("an array of no shape")
    numbers = [n for n in values if type(n) is int and n >= 0]
    if len(numbers) != len(values):
        raise RefusedError("an array of no shape")
    return numbers


class Machine:
    """The stack machine that pickles are programs for, as far as arrays and plain values need it.

    A format gives its names, and says by `made`, `filled` and `persistent` what stands for the
    objects that they would make.

    Args:
        names: full names ("module name") that may be mentioned, and what they are called here.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        # The values since the last mark, and the lists of those before it.
        self.stack: list[object] = []
        self.below: list[list[object]] = []
        self.memo: dict[object, object] = {}

    def made(self, name: object, arguments: object) -> object:
        """What stands for the call of `name` with `arguments`; nothing is called."""
        raise RefusedError("a call")

    def filled(self, target: object, state: object) -> None:
        """Gives `target`, which `made` returned, the state that its class would be given."""
        raise RefusedError("an object with a state")

    def persistent(self, identifier: object) -> object:
        """What lies outside the pickle under that identifier."""
        raise RefusedError("a reference to what is outside")

    def run(self, data: bytes) -> object:
        """What the pickle `data` builds, of dicts, lists, tuples, plain values and `made` ones.

        Raises:
            ValueError: the pickle is damaged, or uses anything else.
        """
        end = 0
        try:
            for operation, argument, position in pickletools.genops(data):
                end = (position or 0) + 1
                if operation.name != "STOP":
                    self.step(operation.name, argument)
            if end != len(data) or len(self.stack) != 1 or self.below:
                raise RefusedError("more than one value")
            return self.stack[0]
        except RefusedError:
            raise
        # A program that ends early, or takes what it has not put there, comes to these.
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise ValueError("damaged or cut short: its pickle cannot be read") from error

    def step(self, operation: str, argument: object) -> None:
        """Carries out one operation, under its name in `pickletools`."""
        match operation:
            case "PROTO" if argument in PROTOCOLS:
                pass
            # Frames say how much to read ahead.
            case "FRAME":
                pass
            case _ if operation in LITERALS:
                # The product of longer numbers would take time.
                if isinstance(argument, int) and argument.bit_length() > 64:
                    raise RefusedError("a number of more than 64 bits")
                self.stack.append(argument)
            case "NONE":
                self.stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                self.stack.append(operation == "NEWTRUE")
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                values = tuple(self.since_mark())
                self.stack.append(values)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self.pop(int(operation[-1]))))
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS":
                self.extend(self.since_mark())
            case "SETITEM":
                self.update(self.pop(2))
            case "SETITEMS":
                self.update(self.since_mark())
            case "GLOBAL":
                self.stack.append(self.named(str(argument)))
            case "STACK_GLOBAL":
                module, name = self.pop(2)
                self.stack.append(self.named(f"{module} {name}"))
            case "REDUCE":
                self.stack.append(self.made(*self.pop(2)))
            case "BUILD":
                (state,) = self.pop(1)
                self.filled(self.stack[-1], state)
            case "BINPERSID":
                self.stack.append(self.persistent(*self.pop(1)))
            case _:
                raise RefusedError(f"the operation {operation}")

    def pop(self, count: int) -> list[object]:
        """The last `count` values, taken off the stack."""
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def since_mark(self) -> list[object]:
        """The values since the last mark, taken off the stack."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def extend(self, values: list[object]) -> None:
        """Appends to the list on the stack."""
        target = self.stack[-1]
        if not isinstance(target, list):
            raise RefusedError("something appended to no list")
        target.extend(values)

    def update(self, values: list[object]) -> None:
        """Enters keys and values, in turns, into the dict on the stack."""
        target, keys = self.stack[-1], values[::2]
        # Text only: the hash of a tuple within tuples can take forever.
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
            raise RefusedError("a key that is no text")
        target.update(zip(keys, values[1::2], strict=True))

    def named(self, name: str) -> Name:
        """A module's name and a name in it, if it is one of `names`."""
        if name not in self.names:
            raise RefusedError(f"the name {name[:80]!r}")
        return Name(self.names[name])
