"""Mistakes in a recipe, each in one line: the key, its value, and what is accepted."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import ErrorDetails

# The accepted values, by the type of pydantic's error; in braces its context.
ACCEPTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
    # Lists of a fixed length are pairs.
    "missing": "a list of a number (2)",
    "too_long": "a list of a number (2)",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "multiple_of": "multiples of {multiple_of}",
    "literal_error": "{expected}",
}


def described(
    errors: Sequence[ErrorDetails], values: dict[str, Any], defaults: dict[str, Any]
) -> str:
    """The first of pydantic's errors about `values`; `defaults` has all keys that there are."""
    first = errors[0]
    key, value = _place(first, values)
    if first["type"] in ("unexpected_keyword_argument", "invalid_key"):
        return f"unknown key {key!r:.80}; did you mean {_nearest(key, defaults)!r}?"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}".removeprefix(": ")
    if first["type"] == "dataclass_type":
        return f"{key} is {value!r:.80}; accepted: {key}.<key> for {', '.join(defaults[key])}"
    if first["loc"] == ("model",) and first["type"] == "missing":
        return "model is missing"
    # A value that may be of several types has an error for each of them, first about the likeliest.
    alternatives = errors[:1] if "ctx" in first else errors
    accepted = [_accepted(error) for error in alternatives if _place(error, values)[0] == key]
    return f"{key} is {value!r:.80}; accepted: {' or '.join(dict.fromkeys(accepted))}"


def _accepted(error: ErrorDetails) -> str:
    return ACCEPTED.get(error["type"], error["msg"]).format(**error.get("ctx", {}))


def _place(error: ErrorDetails, values: Any) -> tuple[str, Any]:
    """The key that an error is about, and its value."""
    key = ""
    for part in error["loc"]:
        if isinstance(values, dict) and part in values:
            key += f".{part}"
        elif isinstance(values, list) and part in range(len(values)):
            key += f"[{part}]"
        else:
            # An item that is missing, or pydantic's name for one of several types.
            continue
        values = values[part]
    return key.removeprefix("."), values


def _nearest(key: str, defaults: dict[str, Any]) -> str:
    """The valid key that is most like this one, in whole and in its last part."""

    def likeness(other: str) -> float:
        last, other_last = key.rpartition(".")[2], other.rpartition(".")[2]
        return (
            difflib.SequenceMatcher(None, last, other_last).ratio()
            + difflib.SequenceMatcher(None, key, other).ratio()
        )

    return max(_keys(defaults), key=likeness)


def _keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
