"""Benchmarks of the ops and of the codec against their peers: `python -m bench --help`, from the repository's root."""
