"""docs/trust.md names tests that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_is_kept_by_a_test():
    text = (ROOT / "docs/trust.md").read_text()
    promises = [line for line in text.splitlines() if re.match(r"\| (?!promise )", line)]
    assert len(promises) > 20
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise.split("|")[2])
        assert named, promise
        for path, name in named:
            assert f"\ndef {name}(" in (ROOT / path).read_text(), (path, name)
