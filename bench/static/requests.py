"""How many kernels a request of the engine launches on a GPU, counted on a CPU."""

from dataclasses import asdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.static.launches import SIZES, Recorder
from dac_fast import DAC, PRESETS
from dac_fast.inference.engine import Engine, Options
from dac_fast.model.halves import DIRECTIONS

# The size that a request is counted at; it is the same for all.
SIZE = "1 × 1 s"


def launches_of_requests() -> dict[str, int]:
    """By direction, in its default precision on a GPU: kernels in the graph of a request."""
    with torch.device("meta"):
        codec = DAC(**asdict(PRESETS["44khz"]))
    codec = codec.to_empty(device="cpu").eval().fold_weight_norm()
    return {direction: _launches(codec, direction) for direction in DIRECTIONS}


def _launches(codec: DAC, direction: str) -> int:
    engine = Engine(codec, Options.checked(codec, {"decode": "fp16"}))
    # As it runs after its first request.
    engine._proven.update(engine.plans)
    run, inputs = engine._example(direction, *SIZES[SIZE])
    recorder = Recorder()
    with recorder.recording(SIZE, engine.precision[direction]):
        # Tables that are made once.
        run(*inputs)
        before = recorder.count
        with _Computing() as by_torch:
            run(*inputs)
    return recorder.count - before + by_torch.count


class _Computing(TorchDispatchMode):
    """Counts PyTorch's ops that compute: all but views and fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [result.alias_info for result in op._schema.returns]
        view = any(alias and not alias.is_write for alias in returned)
        ours = op.namespace != "aten"
        self.count += not (view or ours or "empty" in op.name())
        return op(*args, **(kwargs or {}))
