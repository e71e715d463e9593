"""A peer in another Python, where packages may be installed that do not go with ours.

`worker.py` runs there; `RemoteRun` starts and asks it.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case import Run
from bench.document import Json
from bench.timing import Sampler


class RemoteRun(Run):
    """A run in another process, which computes and times there, and only while it is asked to.

    Questions and answers are JSON objects, one a line. The process has as many threads as this one.

    Args:
        python: the interpreter of the worker.
        job: see `worker.py`; written with torch.save, since weights and inputs travel with it.
        precision: of the worker's computation.
    Raises:
        RuntimeError: the worker failed; its last line says why.
    """

    def __init__(self, python: str, job: Json, precision: str):
        super().__init__(self._outputs, precision)
        self._device = job["device"]
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._file = folder / "outputs.pt"
        extra = {"threads": torch.get_num_threads(), "outputs": str(self._file)}
        torch.save(job | extra, folder / "job.pt")
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [python, "-W", "ignore", Path(__file__).with_name("worker.py"), folder / "job.pt"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._questions = self._process.stdin
        self._answers = self._process.stdout
        self._answer()

    def sampler(self, device: str, requests: bool) -> Sampler:
        """A function that has the worker time a number of calls, as requests."""
        return lambda n: self._ask(do="sample", n=n)

    def close(self) -> None:
        """Ends the process."""
        self._questions.close()
        self._answers.close()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def _outputs(self) -> list[Tensor]:
        self.facts = self._ask(do="outputs")
        outputs: list[Tensor] = torch.load(self._file, map_location=self._device)
        return outputs

    def _ask(self, **question: str | int) -> Any:
        self._questions.write(json.dumps(question) + "\n")
        self._questions.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            reason = (self._log.read().strip().splitlines() or ["it printed nothing"])[-1]
            self.close()
            raise RuntimeError(f"the published package's process ended: {reason}")
        return json.loads(line)
