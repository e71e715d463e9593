"""Ways to run the whole codec, each a function that starts one and returns what to call.

All take the codec (its weights, not folded, on the device), the direction ("encode", "decode", "both") and its
source, audio or codes. What they return gives a tuple: codes, audio, or both; and has its `precision`.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.case import Unavailable
from bench.peers.compiled import Recipe
from bench.peers.compiled import compiled as compiled_graph
from dac_fast import ops
from dac_fast.codec import DAC
from dac_fast.model.layers import Snake
from dac_fast.ops import reference
from dac_fast.storage import checkpoint

PRECISIONS = {"fp32": "float32", "tf32": "tf32", "fp16": "float16", "bf16": "bfloat16"}


class Run:
    """A call without arguments, and the precision that it computes in ("float32/float16": of encode and decode)."""

    def __init__(self, call: Callable[[], tuple[Tensor, ...]], precision: str):
        self.call, self.precision = call, precision

    def __call__(self) -> tuple[Tensor, ...]:
        """The outputs."""
        with torch.no_grad():
            return self.call()


def in_turn(
    encode: Callable, decode: Callable, direction: str
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What a direction asks for, of the source."""

    def both(audio):
        codes = encode(audio)
        return codes, decode(codes)

    return {
        "encode": lambda audio: (encode(audio),),
        "decode": lambda codes: (decode(codes),),
        "both": both,
    }[direction]


def modules(codec: DAC, direction: str, source: Tensor, backend: str) -> Run:
    """The modules as they are, with the ops of a backend."""
    run = in_turn(lambda audio: codec.encode(audio).codes, codec.decode_codes, direction)

    def call():
        with ops.use_backend(backend):
            return run(source)

    return Run(call, "float32")


@contextlib.contextmanager
def _default_switches():
    """PyTorch's own: convolutions in TF32, matrix products not."""
    # the older names: torch.compile reads them, and does not take a mixture with the newer ones
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32, matmul.allow_tf32 = True, False
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _with_defaults(run: Callable[[], tuple], source: Tensor) -> Run:
    if not source.is_cuda:
        return Run(run, "float32")

    def call():
        with _default_switches():
            return run()

    return Run(call, "tf32")


class _ScriptedSnake(nn.Module):
    """As the published package's, which TorchScript fuses into one kernel."""

    def __init__(self, snake: Snake, function: Callable):
        super().__init__()
        self.alpha, self.function = snake.alpha, function

    def forward(self, x):
        return self.function(x, self.alpha)


def published_equivalent(codec: DAC, direction: str, source: Tensor) -> Run:
    """The published package's computation by our reference ops: nothing folded, Snake by TorchScript."""
    codec, scripted = copy.deepcopy(codec), torch.jit.script(reference.snake)
    for module in list(codec.modules()):
        for name, child in module.named_children():
            if isinstance(child, Snake):
                setattr(module, name, _ScriptedSnake(child, scripted))
    run = in_turn(
        lambda audio: codec.encode(audio).codes,
        # which does not look at the codes' range
        lambda codes: codec.decode(codec.quantizer.from_codes(codes)[0]),
        direction,
    )

    def call():
        with ops.use_backend("reference"):
            return run(source)

    return _with_defaults(call, source)


def transformers(codec: DAC, direction: str, source: Tensor, compiled: bool = False) -> Run:
    """Hugging Face's model, through a checkpoint in its format."""
    try:
        from transformers import DacModel
    except ImportError as error:
        raise Unavailable("transformers is not installed") from error
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(codec, f"{folder}/model")
        model = DacModel.from_pretrained(f"{folder}/model").eval().to(source.device)
    run = in_turn(
        lambda audio: model.encode(audio).audio_codes,
        lambda codes: model.decode(audio_codes=codes).audio_values.unsqueeze(1),
        direction,
    )
    if compiled:
        run = torch.compile(run, dynamic=False)
    return _with_defaults(lambda: run(source), source)


def recipe(codec: DAC, direction: str, source: Tensor) -> Run:
    """bench/recipe.py: folded, channels last, float16, compiled, one graph."""
    made = Recipe(codec.config, codec.state_dict())
    with torch.no_grad():
        return Run(compiled_graph(in_turn(made.encode, made.decode, direction), source), "float16")


def engine(
    codec: DAC,
    direction: str,
    source: Tensor,
    precision: str | None = None,
    shapes: tuple = (),
    memory: int = 0,
) -> Run:
    """`codec.optimize`; with `memory` 0 the layers' choices are made for the shapes, and nothing is captured."""
    stages = {"encode": ("encode",), "decode": ("decode",), "both": ("encode", "decode")}[direction]
    codec = copy.deepcopy(codec).optimize(precision, dict.fromkeys(stages, shapes), memory)
    if memory and codec.engine.graphs.left_eager:
        raise Unavailable(f"its graphs need more than {memory >> 30} GiB")
    run = in_turn(lambda audio: codec.encode(audio).codes, codec.decode_codes, direction)
    # a first request runs without a graph, to look at the range of its values
    run(source)
    precisions = (PRECISIONS[codec.engine.precision[stage]] for stage in stages)
    return Run(lambda: run(source), "/".join(dict.fromkeys(precisions)))
