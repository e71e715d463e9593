"""The fast training step against the published one, in float64: the same numbers, by whatever way
they are computed.
"""

import json
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from small_codec import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from bench.__main__ import app
from bench.peers.published_step import PublishedStep
from dac_fast.model.channels_last import set_channels_last
from dac_fast.model.layers import Block, ResidualUnit, WeightNorm, weights_kept
from dac_fast.ops import use_backend
from dac_fast.training import RecipeError, load_recipe
from dac_fast.training.data import moved
from dac_fast.training.step import TrainingStep

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def some_audio(seed, items=4):
    generator = torch.Generator().manual_seed(seed)
    frequencies = 100 + 2000 * torch.rand(items, 1, 3, 1, generator=generator)
    noise = 0.01 * torch.randn(items, 1, 1024, generator=generator)
    return 0.2 * torch.sin(2 * torch.pi * frequencies * torch.arange(1024) / 8000).sum(2) + noise


def fast_step(*overrides, device=CPU, precision="fp32"):
    return TrainingStep(load_recipe("tiny", [*SMALL, *overrides]), device, precision)


def in_float64(step):
    for network in (step.codec, step.discriminator):
        network.double()
    return step


def published_step(source, *overrides):
    step = in_float64(PublishedStep(load_recipe("tiny", [*SMALL, *overrides]), CPU))
    step.load_state_dict(source.state_dict())
    return step


def run(step, numbers, device=CPU, dtype=torch.float64):
    """The losses of those steps; what is random depends on the number alone."""
    losses = []
    for number in numbers:
        torch.manual_seed(number)
        values = step(some_audio(number).to(device, dtype), number)
        losses.append({name: float(value) for name, value in values.items()})
    return losses


def assert_same(actual, expected, relative):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=relative)


def gradients_of(step):
    """A dictionary that gets each network's gradients, by its name, when its update begins."""
    gradients, networks = {}, {"discriminator": step.discriminator, "generator": step.codec}

    def keep(part):
        if part == "optimizers":
            name = next(name for name in networks if name not in gradients)
            gradients[name] = [p.grad.clone() for p in networks[name].parameters()]

    step.mark = keep
    return gradients


@pytest.fixture(autouse=True)
def _reference_backend(request):
    with use_backend("auto" if request.node.get_closest_marker("gpu") else "reference"):
        yield


@pytest.mark.parametrize("form", ["as on the CPU", "channels last", "checkpointed"])
def test_losses_gradients_and_weights_are_the_published_ones(form):
    # An MPD takes most of the time, so one of the forms has it.
    periods = "discriminator.periods=[2]" if form == "channels last" else "discriminator.periods=[]"
    ours = in_float64(
        fast_step(periods, f"trainer.gradient_checkpointing={form == 'checkpointed'}")
    )
    theirs = published_step(ours, periods)
    if form == "channels last":
        set_channels_last(ours.codec)
        set_channels_last(ours.discriminator)
    actual, expected = gradients_of(ours), gradients_of(theirs)
    # The windows of the mel loss are kept in float32.
    assert_same(run(ours, range(1)), run(theirs, range(1)), 1e-7)
    for name, network in theirs.networks.items():
        for a, b in zip(actual[name], expected[name], strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()
        torch.testing.assert_close(
            ours.state_dict()["networks"][name], network.state_dict(), rtol=1e-6, atol=1e-8
        )


def test_gradients_keep_channels_innermost():
    """Another layout would be copied in every unit."""
    unit = ResidualUnit(8, 3, "snake")
    set_channels_last(unit)
    x = torch.randn(2, 50, 8).transpose(1, 2).requires_grad_()
    unit(x).backward(torch.randn(2, 50, 8).transpose(1, 2))
    assert x.grad.stride() == x.stride()


def test_a_checkpoint_goes_from_the_fast_step_to_the_published_one_and_back():
    expected = run(in_float64(fast_step()), range(3))
    first, last = in_float64(fast_step()), in_float64(fast_step())
    losses = run(first, range(1))
    middle = published_step(first)
    losses += run(middle, range(1, 2))
    last.load_state_dict(first.state_dict() | middle.state_dict())
    losses += run(last, range(2, 3))
    assert_same(losses, expected, 1e-6)


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return operator(*args, **(kwargs or {}))


def test_nothing_is_fetched_from_the_device_and_nothing_computed_twice():
    step = fast_step()
    with Calls() as calls:
        step(some_audio(0), 0)
    assert not calls.counts.keys() & {
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "masked_select",
        "is_nonzero",
    }
    codec, discriminator = (
        sum(isinstance(module, WeightNorm) for module in network.modules())
        for network in (step.codec, step.discriminator)
    )
    # The discriminator's once for its own update, and once after it.
    assert calls.counts["_weight_norm_interface"] == codec + 2 * discriminator
    # Of both signals, two windows for the discriminator and two for the mel loss.
    assert calls.counts["_fft_r2c"] == 2 * 4


def test_weights_are_kept_inside_only():
    discriminator = fast_step().discriminator
    layer = next(module for module in discriminator.modules() if isinstance(module, WeightNorm))
    with weights_kept(discriminator):
        assert layer.normed_weight() is layer.normed_weight()
    before = layer.normed_weight()
    with torch.no_grad():
        layer.weight_g.mul_(2)
    torch.testing.assert_close(layer.normed_weight(), 2 * before)


def test_checkpointing_keeps_less():
    def kept(*overrides):
        step, sizes = fast_step(*overrides), []

        def count(tensor):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = step.codec(some_audio(0))
        assert sum(type(m) is Block and m.checkpointed for m in step.codec.modules()) == (
            4 if overrides else 0
        )
        return sum(sizes), out["audio"]

    (everything, plain), (less, checkpointed) = kept(), kept("trainer.gradient_checkpointing=true")
    assert torch.equal(plain, checkpointed)
    assert less < 0.3 * everything


def test_a_graph_needs_a_gpu():
    with pytest.raises(
        RecipeError, match="trainer.cuda_graph is true on cpu; accepted: on one CUDA device"
    ):
        fast_step("trainer.cuda_graph=true")


def one_of_four(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4
    )
    step = fast_step("model.quantizer_dropout=0", "discriminator.fft_sizes=[128]")
    for number in range(2):
        step(some_audio(number)[rank : rank + 1], number)
    torch.save(step.state_dict()["networks"], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_four_processes_equal_one_with_the_same_batch(tmp_path):
    # One import of PyTorch, not four; a fork of this process could be born with a lock that one of
    # its threads held.
    multiprocessing.set_forkserver_preload(["torch.distributed", "dac_fast"])
    torch.multiprocessing.start_processes(
        one_of_four, (str(tmp_path),), nprocs=4, start_method="forkserver"
    )
    alone = fast_step("model.quantizer_dropout=0", "discriminator.fft_sizes=[128]")
    for number in range(2):
        alone(some_audio(number), number)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    for name, weights in alone.state_dict()["networks"].items():
        for key, weight in weights.items():
            assert all(torch.equal(rank[name][key], ranks[0][name][key]) for rank in ranks)
            # Sums over the batch are rounded in another order; a step changes a weight by up to
            # 1e-4.
            assert (ranks[0][name][key] - weight).abs().max() <= 1e-5, key


def bench(*arguments):
    app([*map(str, arguments)], standalone_mode=False)


def test_bench_counts_and_times_a_step(tmp_path):
    path = tmp_path / "train.json"
    train = ("train", "--device", "cpu", "--quick", "--out", path)
    bench(*train, "--count-only", "--batch", 2)
    theirs, ours = json.loads(path.read_text())["rows"]
    # The reference's Snake keeps more than those of the other backends.
    assert ours["saved_peak_bytes"] < 0.75 * theirs["saved_peak_bytes"]
    # Its own weights get no gradients in the generator's backward pass.
    assert (
        ours["work"]["generator backward"]["flops"] < theirs["work"]["generator backward"]["flops"]
    )

    bench(*train, "--peer", "ours", "--precision", "fp32")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["status"] == "timed"
    assert row["parts"].keys() == row["work"].keys()
    assert "| generator forward |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").exists()


def test_bench_compares_runs(tmp_path):
    path = tmp_path / "compare.json"
    bench("train", "--device", "cpu", "--quick", "--compare", 1, "--out", path)
    verdict = json.loads(path.read_text())["verdict"]
    assert max(verdict["early"].values()) < 1e-4
    for seed in range(3):
        assert abs(verdict["held_out"][f"ours, fp32, seed {seed}"]) < 1e-3
    assert abs(verdict["held_out"]["published, fp32, seed 1"]) > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_as_on_the_cpu(precision):
    ours, theirs = fast_step(device=GPU, precision=precision), fast_step()
    theirs.load_state_dict(ours.state_dict())
    with use_backend("reference"):
        expected = run(theirs, range(1), dtype=torch.float32)
    # Quantizer dropout draws from each device's own generator: its losses are not compared.
    actual = run(ours, range(1), GPU, torch.float32)[0]
    for name in ("discriminator", "mel", "adversarial", "feature"):
        assert actual[name] == pytest.approx(
            expected[0][name], rel=0.1 if precision == "bf16" else 0.05
        ), name


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits_for_it():
    step = fast_step(device=GPU, precision="bf16")
    run(step, range(2), GPU, torch.float32)
    batches = [{"audio": some_audio(number).pin_memory(), "unreadable": {}} for number in (2, 3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, batch in enumerate(moved(iter(batches), GPU), start=2):
            values = step(batch["audio"], number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for value in values.values())


@pytest.mark.gpu
def test_a_graph_does_what_the_step_does():
    # TF32 and atomics leave differences that grow from step to step.
    overrides = ("model.quantizer_dropout=0.5", "trainer.ema=0.9", "optimizer.learning_rate=1e-5")
    plain, graphed = (
        fast_step(*overrides, *more, device=GPU) for more in ((), ("trainer.cuda_graph=true",))
    )
    graphed.load_state_dict(plain.state_dict())
    expected, actual = (run(step, range(8), GPU, torch.float32) for step in (plain, graphed))
    assert_same(actual, expected, 0.02)
    assert {name: int(count) for name, count in graphed.skipped.items()} == {
        "total": 0,
        "row": 0,
        "longest": 0,
    }
    assert int(graphed.code_counts.sum()) == int(plain.code_counts.sum()) > 0
    # The learning rate of a replayed step is its own.
    assert float(graphed.optimizers["generator"].param_groups[0]["lr"]) == pytest.approx(
        1e-5 * 0.999996**7, rel=1e-6
    )
    assert_same(
        run(graphed, range(8, 10), GPU, torch.float32),
        run(plain, range(8, 10), GPU, torch.float32),
        0.02,
    )
