"""What the command line prints, and where."""

from rich.console import Console
from rich.progress import Progress, ProgressColumn

out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, stderr=True)


def fail(error: Exception, subject: object = None) -> None:
    """Prints one line about what went wrong, naming the subject unless the message does."""
    message = " ".join(str(error).split()) or type(error).__name__
    prefix = f"{subject}: " if subject is not None and str(subject) not in message else ""
    err.print(f"error: {prefix}{message}")


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A progress bar that is gone when it ends, and shown on a terminal only."""
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
