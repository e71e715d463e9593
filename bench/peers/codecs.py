"""Ways to run the whole codec, each a function that starts one.

All take the codec (its weights on the device, not folded), the direction ("encode", "decode" or
"both") and its source, audio or codes. Their outputs are codes, audio, or both.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from bench.case import Outputs, Run, Unavailable
from bench.peers.compiled import FoldedCodec, compiled_for
from dac_fast import ops
from dac_fast.codec import DAC
from dac_fast.drop_in import accelerate
from dac_fast.model.layers import Snake
from dac_fast.ops import reference
from dac_fast.storage import checkpoint

# The precisions of `DAC.optimize` as they are called in result files.
PRECISIONS = {
    "fp32": "float32",
    "tf32x3": "tf32x3",
    "tf32": "tf32",
    "fp16": "float16",
    "bf16": "bfloat16",
}

Transform = Callable[[Tensor], Tensor]


def in_turn(encode: Transform, decode: Transform, direction: str) -> Callable[[Tensor], Outputs]:
    """The outputs of a direction as a function of its source."""

    def both(audio: Tensor) -> Outputs:
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
    return Run(_on_backend(backend, lambda: run(source)), "float32")


def published_equivalent(codec: DAC, direction: str, source: Tensor) -> Run:
    """The published package's computation by our reference ops.

    Nothing is folded, and TorchScript runs Snake.
    """
    codec = copy.deepcopy(codec)
    scripted = torch.jit.script(reference.snake)
    for module in list(codec.modules()):
        for name, child in module.named_children():
            if isinstance(child, Snake):
                setattr(module, name, _ScriptedSnake(child, scripted))

    def decode(codes: Tensor) -> Tensor:
        # The published package does not look at the range of the codes, as `decode_codes` does.
        return codec.decode(codec.quantizer.from_codes(codes)[0])

    run = in_turn(lambda audio: codec.encode(audio).codes, decode, direction)
    return _with_defaults(_on_backend("reference", lambda: run(source)), source)


class _ScriptedSnake(nn.Module):
    """Snake as the published package has it; TorchScript fuses it into one kernel."""

    def __init__(self, snake: Snake, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.alpha = snake.alpha
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.alpha)


def transformers(
    codec: DAC, direction: str, source: Tensor, compiled: bool = False, accelerated: bool = False
) -> Run:
    """Hugging Face's model, loaded from a checkpoint in its format."""
    try:
        from transformers import DacModel
    except ImportError as error:
        raise Unavailable("transformers is not installed") from error
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(codec, f"{folder}/model")
        model = DacModel.from_pretrained(f"{folder}/model").eval().to(source.device)
    if accelerated:
        accelerate(model)
    run = in_turn(
        lambda audio: model.encode(audio).audio_codes,
        lambda codes: model.decode(audio_codes=codes).audio_values.unsqueeze(1),
        direction,
    )
    if compiled:
        run = torch.compile(run, dynamic=False)
    return _with_defaults(torch.no_grad()(lambda: run(source)), source)


def frozen(codec: DAC, direction: str, source: Tensor) -> Run:
    """torch.compile of the folded modules with the weights as constants, on the CPU."""
    codec = copy.deepcopy(codec).fold_weight_norm()
    run = in_turn(lambda audio: codec.encode(audio).codes, codec.decode_codes, direction)
    compiled = torch.compile(run, dynamic=False, options={"freezing": True})
    return Run(_on_backend("reference", lambda: compiled(source)), "float32")


def fast_dacvae(codec: DAC, direction: str, source: Tensor, polynomial: bool) -> Run:
    """The recipe of fast-dacvae, see compiled.py."""
    folded = FoldedCodec(codec.config, codec.state_dict(), polynomial)
    with torch.no_grad():
        run = compiled_for(in_turn(folded.encode, folded.decode, direction), source)
    return Run(torch.no_grad()(run), "float16")


def engine(
    codec: DAC,
    direction: str,
    source: Tensor,
    precision: str | None = None,
    shapes: Sequence[tuple[int, int]] = (),
    memory: int = 0,
    invariant: bool = False,
) -> Run:
    """`codec.optimize`: each layer runs in the way that was fastest for the shapes.

    Args:
        codec, direction, source: see the module.
        precision, shapes: of `optimize`; the shapes are those of both directions.
        memory: of `optimize`; 0: nothing is captured.
        invariant: of `optimize`.
    Raises:
        Unavailable: the graphs need more memory.
    """
    directions = ("encode", "decode") if direction == "both" else (direction,)
    wanted = dict.fromkeys(directions, shapes)
    codec = copy.deepcopy(codec).optimize(precision, wanted, memory, invariant)
    if memory and codec.engine.graphs.left_eager:
        raise Unavailable(f"its graphs need more than {memory >> 30} GiB")
    run = in_turn(lambda audio: codec.encode(audio).codes, codec.decode_codes, direction)
    call = torch.no_grad()(lambda: run(source))
    # The first request runs without a graph, since the engine looks at the range of its values.
    call()
    precisions = (PRECISIONS[codec.engine.precision[name]] for name in directions)
    return Run(call, "/".join(dict.fromkeys(precisions)))


def _on_backend(backend: str, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """The call without gradients, with the ops of a backend."""

    @torch.no_grad()
    def call() -> Outputs:
        with ops.use_backend(backend):
            return run()

    return call


def _with_defaults(run: Callable[[], Outputs], source: Tensor) -> Run:
    """The call with PyTorch's default switches: on CUDA, convolutions in TF32."""
    if not source.is_cuda:
        return Run(run, "float32")

    def call() -> Outputs:
        with _default_switches():
            return run()

    return Run(call, "tf32")


@contextlib.contextmanager
def _default_switches() -> Iterator[None]:
    # torch.compile reads these older names, and accepts no mixture with the newer ones.
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32, matmul.allow_tf32 = True, False
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
