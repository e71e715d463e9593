"""The pages to hear the codec by, each one HTML document that needs nothing beside it."""

from importlib import resources


def listening() -> str:
    """The page that `dac-fast serve` shows."""
    return _read("listen.html")


def reference() -> str:
    """The page that shows a server's endpoints."""
    return _read("reference.html")


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
