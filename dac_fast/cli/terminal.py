"""What the command line prints, and where."""

from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.text import Text


class Terminal(Console):
    """A console that shows control characters and their like as escapes, as `\\x1b`.

    Names and messages come from files too, whose authors are not to move the cursor, rewrite lines
    or set a title. Only line breaks pass.
    """

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: D102
        return super().render_str(visible(text), **options)


def visible(text: str) -> str:
    """The text, with an escape for every character but line breaks that is not printable."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


out = Terminal(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Terminal(soft_wrap=True, highlight=False, markup=False, emoji=False, stderr=True)


def fail(error: Exception, subject: object = None) -> None:
    """Prints one line about what went wrong, naming the subject unless the message does."""
    message = one_line(str(error)) or type(error).__name__
    prefix = f"{subject}: " if subject is not None and str(subject) not in message else ""
    err.print(f"error: {prefix}{message}")


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A progress bar that is gone when it ends, and shown on a terminal only."""
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
