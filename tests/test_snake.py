"""dac_kernels.snake against float64, on a GPU or in Triton's interpreter."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from dac_kernels import launch
from dac_kernels.snake import (
    _snake,
    _snake_backward,
    activated,
    snake,
    snake_beta,
    snake_unsupported,
    warmup,
)
from device import DEVICE
from tolerances import assert_as_good_as

from dac_fast.ops import reference

pytestmark = pytest.mark.triton
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Older interpreters round the product of a fused multiply-add.
VERSION = tuple(map(int, launch.triton.__version__.split(".")[:2]))
FUSED = not launch.INTERPRETED or VERSION >= (3, 9)


@pytest.fixture(autouse=True)
def poisoned():
    """New memory holds NaN, so that an element which no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(shape, layout, dtype, seed=0):
    """x [B, C, T] with gradient, and alpha with entries of both signs."""
    generator = torch.Generator().manual_seed(seed)
    b, c, t = shape
    if layout == "channels_last":
        x = torch.randn(b, t, c, generator=generator).transpose(1, 2)
    elif layout == "sliced":
        x = torch.randn(b, c + 1, 2 * t + 1, generator=generator)[:, 1:, 1::2]
    else:
        x = torch.randn(shape, generator=generator)
    alpha = torch.rand(1, c, 1, generator=generator) * 4 - 1
    return (3 * x).to(DEVICE, dtype).detach().requires_grad_(), alpha.to(
        DEVICE, dtype
    ).requires_grad_()


def with_gradients(op, inputs, seed=1, dtype=None):
    """Output and gradients of the inputs, for one fixed gradient of the output."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = op(*inputs)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(
        DEVICE, inputs[0].detach().dtype
    )
    return y, *torch.autograd.grad(y, inputs, g.to(y.dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 5, 63), (2, 96, 40), (1, 2, 1000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_pytorch(shape, layout, dtype):
    inputs = make(shape, layout, dtype)
    same = with_gradients(reference.snake, inputs)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = reference.snake(*exact)
    exact = (y, *torch.autograd.grad(y, exact, g.double()))
    for a, s, e in zip(with_gradients(snake, inputs), same, exact, strict=True):
        assert a.dtype == dtype
        assert_as_good_as(a, s, e)


@pytest.mark.parametrize("log_scale", [False, True])
def test_snake_beta(log_scale):
    x, alpha = make((2, 5, 63), "contiguous", torch.float32)
    beta = (alpha.detach().flip(1) + 2).requires_grad_()
    for run in (snake_beta, reference.snake_beta):
        assert run(x, alpha, beta, log_scale).shape == x.shape
    actual = with_gradients(lambda *a: snake_beta(*a, log_scale), (x, alpha, beta))
    same = with_gradients(lambda *a: reference.snake_beta(*a, log_scale), (x, alpha, beta))
    exact = with_gradients(
        lambda *a: reference.snake_beta(*a, log_scale), (x, alpha, beta), dtype=torch.float64
    )
    for a, s, e in zip(actual, same, exact, strict=True):
        assert_as_good_as(a, s, e)


def test_sine_is_accurate_to_its_stated_bound():
    """sin^2 alone: a gain of 2^20 lifts it out of x's rounding."""
    x = torch.linspace(-1e4, 1e4, 20_001, device=DEVICE)[None, None]
    x = torch.cat([x, torch.linspace(-4, 4, 2001, device=DEVICE)[None, None]], dim=2)
    alpha, beta = torch.ones(1, 1, 1, device=DEVICE), torch.full((1, 1, 1), 2.0**-20, device=DEVICE)
    gain = 1 / (beta.double() + 1e-9)
    error = ((snake_beta(x, alpha, beta).double() - x) / gain - x.double().sin().square()).abs()
    # Rounding of the result itself, which is at most 2^20 + 1e4.
    rounding = 6e-8 * 1.01
    assert (error <= 4e-7 + rounding + (0 if FUSED else 1.2e-7) * x.abs()).all(), error.max()


@launch.jit
def _in_float16(x, alpha, y):
    """What a float16 kernel computes, before it is rounded."""
    at = launch.tl.arange(0, 4096)
    frequency = launch.tl.load(alpha + at)
    gain = 1.0 / (frequency + 1e-9)
    value = activated(launch.tl.load(x + at), frequency, gain, False)
    launch.tl.store(y + at, value)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.1, 1.0, 30.0])
def test_half_precision_is_accurate_to_its_stated_bound(alpha):
    """Of the instruction for sine the interpreter makes the most of the error that it may have."""
    scale = 10.0 ** torch.linspace(-4, 4, 2048, device=DEVICE)
    x = torch.cat([scale, -scale]) / alpha
    frequency, y = torch.full_like(x, alpha), torch.empty_like(x)
    launch.launch(_in_float16, 1, x, frequency, y)
    exact = x.double() + (x.double() * frequency).sin().square() / (frequency.double() + 1e-9)
    stated = 1.5e-6 * x.abs() + 4.6e-13 / alpha
    # Rounding of the gain and of the result in float32.
    rounding = 1.2e-7 * (2 * x.abs() + exact.abs())
    assert ((y - exact).abs() <= stated + rounding + (0 if FUSED else 1.2e-7) * x.abs()).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_extreme_inputs():
    huge = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e5, -1e8, 1e38]
    x = torch.tensor(huge, device=DEVICE).expand(1, 4, -1)
    alpha = torch.tensor([0.0, -2.0, -1e-9, 3.0], device=DEVICE).view(1, 4, 1)
    actual, expected = snake(x, alpha), reference.snake(x, alpha)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite()
    # Where sin^2 has lost its argument it is still between 0 and 1.
    assert ((actual - expected).abs()[finite] <= (1 + 1e-6 * expected.abs())[finite]).all()
    # Half precision computes in float32, so it keeps alpha = 0 the identity.
    half = torch.randn(1, 2, 9, device=DEVICE).half()
    assert torch.equal(snake(half, torch.zeros(1, 2, 1, device=DEVICE).half()), half)


def test_same_bits_every_time_and_strides_kept():
    x, alpha = make((2, 7, 300), "channels_last", torch.float32)
    first, second = with_gradients(snake, (x, alpha)), with_gradients(snake, (x, alpha))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert snake(x, alpha).stride() == x.stride()
    assert snake(x[:0], alpha).shape == (0, 7, 300)


def test_offsets_beyond_32_bits():
    """Two items 2^31 elements apart; the memory between them is never touched."""
    torch.use_deterministic_algorithms(False)
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided(
        (2, 2, 32), (2**31, 32, 1)
    )
    values = torch.randn(2, 2, 32, device=DEVICE).half()
    x.copy_(values)
    alpha = torch.ones(1, 2, 1, device=DEVICE)
    assert torch.equal(snake(x, alpha), snake(values, alpha))


def test_registered():
    x, alpha = make((2, 3, 10), "channels_last", torch.float32)
    beta = (alpha.detach() + 3).requires_grad_()
    torch.library.opcheck(_snake, (x, alpha, None))
    torch.library.opcheck(_snake, (x, alpha, beta))
    torch.library.opcheck(_snake_backward, (x.detach(), x.detach(), alpha.detach(), None))
    compiled = torch.compile(snake, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        with_gradients(compiled, (x, alpha)), with_gradients(snake, (x, alpha)), strict=True
    ):
        assert torch.equal(a, b)


def test_refusals_name_the_value():
    x, alpha = make((1, 3, 4), "contiguous", torch.float32)
    assert snake_unsupported(x, alpha) is None
    assert "float64" in snake_unsupported(x.double(), alpha)
    assert "(1, 4, 1)" in snake_unsupported(x, torch.ones(1, 4, 1, device=DEVICE))
    assert "meta" in snake_unsupported(x.to("meta"), alpha)
    with pytest.raises(ValueError, match="alpha has shape"):
        snake(x, alpha[0])


def test_without_gpu_and_interpreter(monkeypatch):
    x, alpha = torch.zeros(1, 3, 4), torch.ones(1, 3, 1)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in snake_unsupported(x, alpha)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    on_turing = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    assert launch.device_unsupported(on_turing) == (
        "the GPU has compute capability 7.5; accepted: 8.0 or later"
    )
    monkeypatch.setattr(launch, "triton", None)
    assert snake_unsupported(x, alpha) == "Triton is not installed"


def test_imports_without_triton():
    script = "import sys; sys.modules['triton'] = None; from dac_kernels import launch, rvq, snake"
    script += "; print(launch.device_unsupported(None))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == "Triton is not installed", result.stderr


def test_configuration_is_chosen_once_and_never_during_capture(monkeypatch):
    """And one that does not fit into the GPU is passed over."""
    timed, capturing = [], True

    def run(config):
        if config["time"] == 0:
            raise launch.triton.OutOfResources(2, 1, "shared memory")
        return config["time"]

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_choices", {})
    monkeypatch.setattr(launch, "milliseconds", lambda run: timed.append(run()) or timed[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    configs = [{"time": 3}, {"time": 0}, {"time": 1}, {"time": 2}]
    pick = lambda: launch.tuned("op", torch.zeros(1), (), configs, run)  # noqa: E731
    assert pick() is configs[0]
    assert not timed
    capturing = False
    assert pick() is pick() is configs[2]
    assert timed == [3, 1, 2]


def test_a_short_kernel_is_timed_without_the_host_that_launches_it(monkeypatch):
    """On a pretended GPU, where a launch takes the host 1 ms and the device 0.25 ms."""
    now, captured, modes = 0.0, None, []

    class Event:
        def __init__(self, enable_timing):
            self.time = None

        def record(self):
            self.time = now

        def synchronize(self):
            assert self.time == now

        def elapsed_time(self, end):
            return end.time - self.time

    class Stream:
        def wait_stream(self, other):
            assert other == "current"

    class Graph:
        def replay(self):
            nonlocal now
            now += 0.25 * self.launches

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        nonlocal captured
        captured = 0
        yield modes.append(capture_error_mode)
        graph.launches, captured = captured, None

    def run():
        nonlocal now, captured
        if captured is None:
            now += 1.0
        else:
            captured += 1

    pretended = {"Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": capture}
    pretended |= {"current_stream": lambda: "current", "stream": contextlib.nullcontext}
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert launch.milliseconds(run) == 0.25
    assert modes == ["thread_local"]


@pytest.mark.gpu
def test_times_of_launches_grow_with_their_work():
    small, large = (torch.zeros(2**power, device="cuda") for power in (10, 28))
    assert 0 < launch.milliseconds(small.zero_) < launch.milliseconds(large.zero_)


def test_warmup():
    warmup([(1, 4, 20)], torch.float32, DEVICE, channels_last=True, backward=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(70_000, 1, 5), (1, 70_000, 5), (1, 2, 70_000 * 16), (2, 1, 2**30 + 8)]
)
def test_large(shape):
    torch.use_deterministic_algorithms(False)
    x = torch.randn(shape, device="cuda", dtype=torch.float16)
    alpha = torch.rand(1, shape[1], 1, device="cuda") + 0.5
    y = snake(x, alpha)
    for part in (slice(0, 4096), slice(-4096, None)):
        head = x[..., part] if shape[2] > 4096 else x
        got = y[..., part] if shape[2] > 4096 else y
        assert_as_good_as(
            got, reference.snake(head, alpha.half()), reference.snake(head.double(), alpha.double())
        )


@pytest.mark.gpu
def test_graph_capture():
    x, alpha = make((2, 96, 4096), "contiguous", torch.float16)
    warmup([x.shape], x.dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = snake(x, alpha)
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    assert torch.equal(y, snake(x, alpha))
