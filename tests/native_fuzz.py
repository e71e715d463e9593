"""Random calls of the registered ops of dac_kernels.native on the CPU, half of them spoilt.

A call must give tensors of which every element was written, or be refused with an error. Prints how
many ran and how many were refused. `test_build.py` runs this with csrc under sanitizers.
"""

import random

import torch
from dac_kernels.native import BANDS
from dac_kernels.native.stft_bands import _edges

CALLS = 2000
OPS = torch.ops.dac_native
DTYPES = (torch.float32, torch.float64)
SNAKE = (*DTYPES, torch.bfloat16, torch.float16)


def size(largest):
    """As many small ones as large ones."""
    return random.randint(0, largest >> random.randint(0, 8))


def tensor(shape, dtype):
    """Values of that shape in one of many memory layouts."""
    layout = random.choice(("contiguous", "permuted", "strided", "offset", "expanded"))
    if layout == "permuted":
        axes = random.sample(range(len(shape)), len(shape))
        return torch.randn([shape[axis] for axis in axes], dtype=dtype).permute(
            [axes.index(axis) for axis in range(len(shape))]
        )
    if layout == "strided":
        return torch.randn([*shape[:-1], 2 * shape[-1]], dtype=dtype)[..., ::2]
    if layout == "offset":
        return torch.randn([*shape[:-1], shape[-1] + 5], dtype=dtype)[..., 2:-3]
    if layout == "expanded":
        return torch.randn([1, *shape[1:]], dtype=dtype).expand(shape)
    return torch.randn(shape, dtype=dtype)


def snake_call():
    batch, channels, time, dtype = random.randint(0, 3), size(64), size(3000), random.choice(SNAKE)
    x, grad = (tensor((batch, channels, time), dtype) for _ in range(2))
    alpha = tensor((1, channels, 1), dtype)
    return random.choice(((OPS.snake, [x, alpha]), (OPS.snake_backward, [grad, x, alpha])))


def disc_preprocess_call():
    dtype = random.choice(DTYPES)
    shape = [random.randint(0, 3) for _ in range(random.randint(0, 2))] + [1 + size(100_000)]
    x, grad = (tensor(shape, dtype) for _ in range(2))
    if random.random() < 0.5:
        return OPS.disc_preprocess, [x]
    return OPS.disc_preprocess_backward, [grad, x, OPS.disc_preprocess(x)[1]]


def stft_bands_call():
    windows = [32 << random.randint(0, 7) for _ in range(random.randint(1, 3))]
    bands = random.choice((BANDS, [(0.1, 0.1), (0.2, 0.9)], [(0.0, 1.0)]))
    edges, last = _edges(windows, bands), random.random() < 0.5
    batch, samples = random.randint(0, 3), 2560 + size(5000)
    dtype, out = random.choice(((DTYPES[0],) * 2, (DTYPES[1],) * 2, (DTYPES[0], torch.bfloat16)))
    if random.random() < 0.5:
        return OPS.stft_bands, [tensor((batch, samples), dtype), windows, edges, last, out]
    grads = []
    for i in range(len(edges) // 2):
        frames = -(-samples // (windows[i // len(bands)] // 4))
        grads.append(tensor((batch, 2, frames, edges[2 * i + 1] - edges[2 * i]), out))
    return OPS.stft_bands_backward, [grads, samples, windows, edges, last, dtype]


def spoilt_tensor(x):
    """A tensor that differs from x in shape, dtype, device or kind."""
    axis = random.randrange(max(x.ndim, 1))
    shape = list(x.shape) or [1]
    ways = (
        lambda: x.to(random.choice((torch.float16, torch.int64, torch.bool, torch.complex64))),
        lambda: x.to(torch.float64 if x.dtype == torch.float32 else torch.float32),
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: x[None],
        lambda: x.flatten(),
        lambda: x[..., :0],
        lambda: x.new_zeros(()),
        lambda: x.new_zeros([n + (i == axis) for i, n in enumerate(shape)]),
        lambda: x.new_zeros([n // 2 if i == axis else n for i, n in enumerate(shape)]),
        # Huge, and a single element in memory.
        lambda: x.new_zeros([1] * len(shape)).expand(
            [2**40 + n if i == axis else n for i, n in enumerate(shape)]
        ),
    )
    return random.choice(ways)()


def spoilt(value):
    """Another value for an argument, of the type that the op's schema asks for."""
    if isinstance(value, torch.Tensor):
        return spoilt_tensor(value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice(
            (0, -1, value - 1, value // 100, 2**30 + 1, 2**31 - 2, 2**40, -(2**63))
        )
    if isinstance(value, torch.dtype):
        return random.choice((*DTYPES, torch.bfloat16, torch.float16, torch.int32))
    kind = random.randrange(4)
    if kind == 0 or not value:
        return []
    if kind == 1:
        return value[:-1]
    if kind == 2:
        return [*value, value[0]]
    at = random.randrange(len(value))
    return [*value[:at], spoilt(value[at]), *value[at + 1 :]]


def check(result):
    for output in [result] if isinstance(result, torch.Tensor) else result:
        # New memory holds NaN, so one that nobody wrote shows.
        assert output.is_meta or not output.isnan().any()


random.seed(0)
torch.manual_seed(0)
torch.use_deterministic_algorithms(True, warn_only=True)
ran, refused = 0, 0
for _ in range(CALLS):
    torch.set_num_threads(random.randint(1, 4))
    op, args = random.choice((snake_call, disc_preprocess_call, stft_bands_call))()
    spoil = random.random() < 0.5
    if spoil:
        at = random.randrange(len(args))
        args[at] = spoilt(args[at])
    try:
        check(op(*args))
        ran += 1
    except (RuntimeError, ValueError):
        if not spoil:
            raise
        refused += 1
print(f"{CALLS} random calls: {ran} ran, {refused} were refused")
