"""dac_kernels.rvq against the reference, float64 and the published codec.

On a GPU, or in Triton's interpreter.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dac_kernels import per_version, rvq, rvq_kernels
from dac_kernels.rvq_kernels import decode, project, search
from device import DEVICE
from tolerances import assert_as_good_as

import dac_fast
from dac_fast.ops import reference

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_weights(depth=24, stages=3, size=100, dim=5, dtype=torch.float32, seed=0):
    """in_weights, in_biases, codebooks, out_weights, out_biases, on DEVICE."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((dim, depth), (dim,), (size, dim), (depth, dim), (depth,))
    scales = (depth**-0.5, 0.1, 1.0, dim**-0.5, 0.1)
    return [
        [(torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype) for _ in range(stages)]
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def random_input(items=2, depth=24, frames=17, dtype=torch.float32, seed=1):
    return torch.randn(items, depth, frames, generator=torch.Generator().manual_seed(seed)).to(
        DEVICE, dtype
    )


def column(values):
    """The values as a column of a table: with others between them in memory."""
    return torch.tensor([[value, 1] for value in values], device=DEVICE)[:, 0]


def golden_weights(golden, name, stages):
    state = torch.load(golden / f"weights_{name}.pth", weights_only=False)["state_dict"]

    def folded(key):
        direction, size = state[f"{key}.weight_v"], state[f"{key}.weight_g"]
        return (direction * size / direction.norm(dim=1, keepdim=True))[:, :, 0].to(DEVICE)

    keys = [f"quantizer.quantizers.{i}" for i in range(stages)]
    return [
        [folded(f"{key}.in_proj") for key in keys],
        [state[f"{key}.in_proj.bias"].to(DEVICE) for key in keys],
        [state[f"{key}.codebook.weight"].to(DEVICE) for key in keys],
        [folded(f"{key}.out_proj") for key in keys],
        [state[f"{key}.out_proj.bias"].to(DEVICE) for key in keys],
    ]


def regret(z, weights, codes):
    """Per frame and stage, in float64: how much farther the chosen entry is than the nearest."""
    in_weights, in_biases, codebooks, out_weights, out_biases = (
        [w.double() for w in group] for group in weights
    )
    residual, regrets = z.double(), []
    for i, codebook in enumerate(codebooks):
        latent = F.conv1d(residual, in_weights[i][:, :, None], in_biases[i])
        distance = torch.cdist(
            F.normalize(latent.transpose(1, 2), dim=2), F.normalize(codebook)[None]
        ).square()
        chosen = distance.gather(2, codes[:, i, :, None])[..., 0]
        regrets.append(chosen - distance.amin(2))
        entry = codebook[codes[:, i]].transpose(1, 2)
        residual = residual - F.conv1d(entry, out_weights[i][:, :, None], out_biases[i])
    return torch.stack(regrets, 1)


def with_gradients(module, z, weights, counts=None, lengths=None):
    """Outputs of rvq_encode, and gradients of z and of every weight, for fixed upstream ones."""
    z, weights = (
        z.clone().requires_grad_(),
        [[w.clone().requires_grad_() for w in group] for group in weights],
    )
    outputs = module.rvq_encode(z, *weights, counts, lengths)
    quantised, _, latents, commitment, codebook = outputs
    generator = torch.Generator().manual_seed(2)
    total = 3 * commitment + 5 * codebook
    for output in (quantised, latents):
        total = total + (output * torch.randn(output.shape, generator=generator).to(output)).sum()
    total.backward()
    return outputs, [z.grad, *(w.grad for group in weights for w in group)]


def test_codes_of_the_published_codec(golden):
    model = {
        name: torch.from_numpy(value).to(DEVICE)
        for name, value in np.load(golden / "model_even.npz").items()
    }
    weights = golden_weights(golden, "even", 5)
    quantised, codes, latents, commitment, codebook = rvq.rvq_encode(model["enc"], *weights)
    assert torch.equal(codes, model["codes"])
    for actual, expected in ((quantised, "z"), (latents, "latents")):
        torch.testing.assert_close(actual, model[expected], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(commitment, model["commitment_loss"])
    torch.testing.assert_close(codebook, model["codebook_loss"])
    torch.testing.assert_close(
        rvq.rvq_decode(codes, *weights[2:]), model["z_from_codes"], rtol=1e-5, atol=1e-5
    )

    two = [group[:2] for group in weights]
    quantised, codes, *_ = rvq.rvq_encode(model["enc"], *two)
    assert torch.equal(codes, model["codes_nq2"])
    torch.testing.assert_close(quantised, model["z_nq2"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rvq.rvq_decode(codes, *weights[2:]), quantised, rtol=1e-5, atol=1e-5)


def test_whole_model_with_this_backend(golden):
    model = np.load(golden / "model_even.npz")
    codec = dac_fast.DAC.load(golden / "weights_even.pth").to(DEVICE).eval()
    with torch.no_grad(), dac_fast.use_backend("triton"):
        encoded = codec.encode(torch.from_numpy(model["audio_in"]).to(DEVICE))
        audio = codec.decode_codes(encoded.codes)
    assert torch.equal(encoded.codes.cpu(), torch.from_numpy(model["codes"]))
    torch.testing.assert_close(audio.cpu(), torch.from_numpy(model["decoded"]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("items", "frames", "size", "dim"), [(2, 17, 100, 5), (1, 1, 3, 1), (2, 9, 130, 32)]
)
def test_random_codes_are_the_nearest(items, frames, size, dim, dtype):
    weights = random_weights(stages=2, size=size, dim=dim, dtype=dtype)
    z = random_input(items, frames=frames, dtype=dtype)
    quantised, codes, latents, commitment, codebook = rvq.rvq_encode(
        z.transpose(1, 2).contiguous().mT, *weights
    )
    assert codes.dtype == torch.int64
    assert regret(z, weights, codes).max() < 1e-5
    exact = [[w.double() for w in group] for group in weights]
    expected = reference.rvq_decode(codes, *exact[2:])
    # The dtype's own rounding of an exact result is the least that any implementation has.
    assert_as_good_as(quantised, expected.to(dtype), expected)
    assert_as_good_as(rvq.rvq_decode(codes, *weights[2:]), expected.to(dtype), expected)
    assert {quantised.dtype, latents.dtype, commitment.dtype, codebook.dtype} == {dtype}
    entries = torch.cat([exact[2][i][codes[:, i]].transpose(1, 2) for i in range(2)], 1)
    loss = (latents.double() - entries).square().mean() * 2
    torch.testing.assert_close(
        commitment.double(), loss, rtol=3e-2 if dtype == torch.bfloat16 else 4e-3, atol=0
    )


@pytest.mark.parametrize(
    ("counts", "lengths"),
    [(None, None), ([1, 3], None), (None, [17, 4]), ([2, 1], [9, 17])],
    ids=str,
)
def test_losses_and_gradients(counts, lengths):
    counts = counts and torch.tensor(counts, device=DEVICE)
    lengths = lengths and column(lengths)
    z, weights = random_input(), random_weights()
    outputs, gradients = with_gradients(rvq, z, weights, counts, lengths)
    same, same_gradients = with_gradients(reference, z, weights, counts, lengths)
    exact_weights = [[w.double() for w in group] for group in weights]
    exact, exact_gradients = with_gradients(reference, z.double(), exact_weights, counts, lengths)
    assert torch.equal(outputs[1], exact[1])
    for i in (0, 2, 3, 4):
        assert_as_good_as(outputs[i], same[i], exact[i])
    for gradient, s, e in zip(gradients, same_gradients, exact_gradients, strict=True):
        assert_as_good_as(gradient, s, e)


def test_first_of_equal_entries_wins():
    weights = random_weights(size=200)
    for codebook in weights[2]:
        codebook[150:] = codebook[:50]
        codebook[7] = 0
    z = random_input()
    codes = rvq.rvq_encode(z, *weights)[1]
    assert torch.equal(codes, reference.rvq_encode(z, *weights)[1])
    assert codes.max() < 150
    # Neither direction nor length: every distance is that of the entry alone.
    weights[1] = [torch.zeros_like(bias) for bias in weights[1]]
    codes = rvq.rvq_encode(torch.zeros_like(z), *weights)[1]
    assert torch.equal(codes, reference.rvq_encode(torch.zeros_like(z), *weights)[1])


@pytest.mark.parametrize("lengths", [None, [9, 4]], ids=str)
def test_decode_gradients_and_codes_that_do_not_exist(lengths):
    lengths = lengths and column(lengths)
    weights = random_weights()[2:]
    codes = torch.randint(0, 100, (2, 2, 9), device=DEVICE)
    results = []
    for module in (rvq, reference):
        inputs = [[w.clone().requires_grad_() for w in group] for group in weights]
        z = module.rvq_decode(codes, *inputs, lengths)
        (z * torch.arange(9, device=DEVICE)).sum().backward()
        results.append([z, *(group[i].grad for group in inputs for i in range(2))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert lengths is None or not results[0][0][1, :, 4:].any()
    codes[0, 0, 3], codes[1, 1, 5] = 100, -1
    bad = rvq.rvq_decode(codes, *weights).isnan()
    assert bad[0, :, 3].all()
    assert bad[1, :, 5].all()
    assert bad.sum() == 2 * 24


def views(weights):
    """What a model hands over: views made anew for every call."""
    return [[w.squeeze(2) for w in weights[0]], *weights[1:]]


def test_tables_follow_the_weights(monkeypatch):
    z, weights = random_input(frames=5), random_weights()
    # As a 1x1 convolution keeps them.
    weights[0] = [w[:, :, None].clone() for w in weights[0]]
    before, builds = len(rvq._encode_tables.entries), []
    build = rvq._encode_tables.build
    monkeypatch.setattr(
        rvq._encode_tables, "build", lambda *groups: builds.append(1) or build(*groups)
    )

    first = rvq.rvq_encode(z, *views(weights))
    with torch.inference_mode():
        assert torch.equal(rvq.rvq_encode(z, *views(weights))[0], first[0])
    assert len(builds) == 1
    parameters = [w.requires_grad_() for group in weights for w in group]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    rvq.rvq_encode(z, *views(weights))[0].square().mean().backward()
    optimizer.step()
    for factor in (1, 2):
        weights[3][0].data = weights[3][0].data * factor
        with torch.no_grad():
            changed, expected = (
                rvq.rvq_encode(z, *views(weights)),
                reference.rvq_encode(z, *views(weights)),
            )
        assert torch.equal(changed[1], expected[1])
        torch.testing.assert_close(changed[0], expected[0])
    assert not torch.equal(changed[0], first[0])

    assert len(rvq._encode_tables.entries) == before + 1
    del weights, parameters, optimizer
    gc.collect()
    assert len(rvq._encode_tables.entries) == before


def test_a_captured_graph_keeps_its_tables(monkeypatch):
    capturing, builds = [], []
    monkeypatch.setattr(per_version, "_capturing", lambda tensor: bool(capturing))
    tables = per_version.PerVersion(lambda group: builds.append(1) or [2 * group[0]])
    weight = torch.ones(3)
    capturing.append(1)
    assert tables([weight]) is not tables([weight])  # built in the graph, each time
    capturing.clear()
    kept = tables([weight])
    capturing.append(1)
    assert tables([weight]) is tables([weight]) is kept
    assert len(builds) == 3
    reference = weakref.ref(kept[0])
    del weight, kept
    gc.collect()
    assert not tables.entries
    assert reference() is not None


def test_another_stream_waits_for_tables(monkeypatch):
    class Stream:
        def __init__(self):
            self.waits = []

        def record_event(self):
            return self

        def wait_event(self, event):
            self.waits.append(event)

    first, second = Stream(), Stream()
    tables = per_version.PerVersion(lambda group: [2 * group[0]])
    weight = torch.ones(3)
    for stream in (first, first, second):
        monkeypatch.setattr(per_version, "_stream", lambda tensor, stream=stream: stream)
        tables([weight])
    assert first.waits == []
    assert second.waits == [first]


def test_same_bits_with_every_tile(monkeypatch):
    """So which one is fastest decides no code."""
    z, weights, made = random_input(frames=40), random_weights(size=200, dim=8), []
    for tile in range(len(rvq_kernels.search_configs(8))):
        choice = lambda op, x, shape, configs, run, tile=tile: configs[tile]  # noqa: E731
        monkeypatch.setattr(rvq_kernels, "tuned", choice)
        made.append(rvq.rvq_encode(z, *weights))
    for outputs in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, made[0], strict=True))


def test_same_bits_every_time():
    runs = [with_gradients(rvq, random_input(), random_weights()) for _ in range(2)]
    for first, second in zip(*([*outputs, *gradients] for outputs, gradients in runs), strict=True):
        assert torch.equal(first, second)


def test_registered():
    z, weights = random_input(frames=4), random_weights(stages=2, size=9)
    encoding = rvq._encode_tables(*weights)
    decoding = encoding.decode
    projections = project(encoding.in_weight, z, encoding.bias)
    lengths = torch.tensor([4, 2], device=DEVICE)
    codes = torch.randint(0, 9, (2, 2, 4), device=DEVICE)
    leaf = lambda t: t.detach().clone().requires_grad_()  # noqa: E731
    torch.library.opcheck(project, (leaf(encoding.in_weight), leaf(z), leaf(encoding.bias)))
    tables = decoding.codebooks, encoding.units, encoding.half_norms
    torch.library.opcheck(search, (leaf(projections), leaf(encoding.cross), *tables, lengths))
    bias = leaf(decoding.out_bias.sum(0))
    tables = leaf(decoding.codebooks), leaf(decoding.out_weight), bias
    torch.library.opcheck(decode, (codes, *tables, lengths, torch.float32))


def test_compiles_into_one_graph():
    z, weights = random_input(frames=4), random_weights(stages=2, size=9)

    class Compiled:
        rvq_encode = staticmethod(
            torch.compile(rvq.rvq_encode, fullgraph=True, backend="aot_eager")
        )

    (outputs, gradients), (expected, expected_gradients) = (
        with_gradients(m, z, weights) for m in (Compiled, rvq)
    )
    for actual, eager in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(actual, eager)


def test_refusals_name_the_value(golden):
    z, weights = random_input(), random_weights()
    assert rvq.rvq_encode_unsupported(z, *weights) is None
    assert "float64" in rvq.rvq_encode_unsupported(z.double(), *weights)
    mixed = [[*a[:2], *b[2:]] for a, b in zip(weights, random_weights(dim=6), strict=True)]
    assert "one for all stages" in rvq.rvq_encode_unsupported(z, *mixed)
    assert "100 x 33" in rvq.rvq_encode_unsupported(z, *random_weights(dim=33))
    with pytest.raises(ValueError, match="1 to 3"):
        rvq.rvq_decode(torch.zeros(1, 4, 2, dtype=torch.int64, device=DEVICE), *weights[2:])


def test_warmup():
    rvq.warmup([(1, 8, 3)], stages=2, size=10, dim=4, device=DEVICE)


@pytest.mark.gpu
def test_full_size_whatever_the_tf32_switch(monkeypatch):
    weights, z = random_weights(1024, 9, 1024, 8), random_input(16, 1024, 215)
    codes = rvq.rvq_encode(z, *weights)[1]
    assert regret(z, weights, codes).max() < 1e-5
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert torch.equal(rvq.rvq_encode(z, *(list(group) for group in weights))[1], codes)


@pytest.mark.gpu
def test_graph_capture():
    weights, z = random_weights(1024, 9, 1024, 8), random_input(2, 1024, 100)
    with torch.no_grad():
        rvq.rvq_encode(z, *weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = rvq.rvq_encode(z, *weights)
        z.mul_(0.5).add_(0.1)
        graph.replay()
        for captured, eager in zip(outputs, rvq.rvq_encode(z, *weights), strict=True):
            assert torch.equal(captured, eager)
