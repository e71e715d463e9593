"""Published weights, downloaded before a command needs them."""

from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

from dac_fast.cli.terminal import err, progress_bar
from dac_fast.storage import download


def fetch(name: str, mirror: str | None = None) -> Path:
    """Downloads a preset's weights, and says so, unless they are there; returns their path.

    Raises:
        ValueError: no such preset.
        DownloadError: they cannot be had.
    """
    path = download.cached(name)
    if not path.exists():
        err.print(f"downloading {name} into {path.parent}, once")
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with progress_bar(*columns) as bar:
        task = bar.add_task(name, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return download.download(name, mirror, show)


def fetch_if_published(model: str) -> None:
    """Downloads the weights of a model that is a preset with published weights."""
    if model in download.PUBLISHED:
        fetch(model)
