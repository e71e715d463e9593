"""The command line `dac-fast`."""

from dac_fast.cli.commands import main

__all__ = ["main"]
