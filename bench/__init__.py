"""Benchmarks against peers, run from the repository's root: `python -m bench --help`."""
