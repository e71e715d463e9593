"""Other implementations, each in a Python of its own: `published.py` runs there, `Peer` talks to it."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch


class Peer:
    """A provider that lives in another process: called it returns its outputs, `sample` times it there.

    The process waits for one JSON object a line on its standard input and answers each with one line. It has the
    same number of threads, and works only while it is asked to.

    Args:
        python: the interpreter to run the worker with.
        job: what the worker is to do; written with torch.save, since weights and inputs travel with it.
        precision: that it computes in.
    Attributes:
        facts: what the worker said of its first call.
    Raises:
        RuntimeError: the worker failed; its last line says why.
    """

    def __init__(self, python: str, job: dict, precision: str):
        self.precision, self.facts, self._device = precision, {}, job["device"]
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._outputs = folder / "outputs.pt"
        torch.save(
            job | {"threads": torch.get_num_threads(), "outputs": str(self._outputs)},
            folder / "job.pt",
        )
        worker = Path(__file__).with_name("published.py")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [python, "-W", "ignore", worker, folder / "job.pt"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip
        self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            reason = (self._log.read().strip().splitlines() or ["it printed nothing"])[-1]
            self.close()
            raise RuntimeError(f"the published package's process ended: {reason}")
        return json.loads(line)

    def _ask(self, **question):
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def __call__(self) -> list[torch.Tensor]:
        self.facts = self._ask(do="outputs")
        return torch.load(self._outputs, map_location=self._device)

    def sample(self, n: int) -> list[float]:
        """Milliseconds of each of n iterations."""
        return self._ask(do="sample", n=n)

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()
