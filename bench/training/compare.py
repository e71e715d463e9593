"""`python -m bench train --compare STEPS`: whether our step learns what the published one learns.

Small networks train on made-up audio: with the published step in float32 from several seeds, and
from weights that differ in the last bits (these differences are noise); with ours in float32 and in
bfloat16, from the same weights and batches as the published run of that seed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bench.document import SCHEMA, Json, environment, facts, table_head, table_row, title, write
from bench.training.parts import AnyStep
from bench.training.step import made_up_audio, make_step
from dac_fast.training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Overrides of the recipe `tiny` for a CPU: half as wide, at a lower rate, with one discriminator,
# on short excerpts.
SMALL = (
    "model.encoder_dim=8",
    "model.decoder_dim=96",
    "model.n_codebooks=6",
    "model.codebook_size=256",
    "model.sample_rate=16000",
    "discriminator.periods=[]",
    "discriminator.fft_sizes=[256]",
    "data.seconds=0.128",
)
# Items of a step and of the held-out batch.
BATCH, HELD_OUT = 2, 16
# Steps from one evaluation of the held-out batch to the next.
EVERY = 20
# Steps at the beginning that must agree closely, and at the end whose mean is the final loss.
EARLY, LAST = 20, 40
LOSSES = ("mel", "discriminator", "adversarial", "feature", "commitment", "codebook", "loss")


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        peer, precision, seed: of the step.
        change: of the first weights, relative to them.
        against: the run that it is compared with. Where that one has another seed, or other first
            weights, the difference is noise.
    """

    peer: str
    precision: str
    seed: int
    change: float = 0.0
    against: str = "published, fp32, seed 0"


RUNS = {
    "published, fp32, seed 0": Plan("published", "fp32", 0),
    "published, fp32, seed 1": Plan("published", "fp32", 1),
    "published, fp32, seed 2": Plan("published", "fp32", 2),
    "published, fp32, seed 0, weights off by 1e-6": Plan("published", "fp32", 0, change=1e-6),
    "published, fp32, seed 0, weights off by 2e-6": Plan("published", "fp32", 0, change=2e-6),
    "ours, fp32, seed 0": Plan("ours", "fp32", 0),
    "ours, fp32, seed 1": Plan("ours", "fp32", 1, against="published, fp32, seed 1"),
    "ours, fp32, seed 2": Plan("ours", "fp32", 2, against="published, fp32, seed 2"),
    "ours, bf16, seed 0": Plan("ours", "bf16", 0),
}


def run_compare(
    device: str, steps: int, path: Path, quick: tuple[str, ...] = (), commit: str | None = None
) -> Json:
    """Makes the runs and writes the document, again after each; returns it.

    Args:
        device: "cpu" or "cuda".
        steps: of every run.
        path: of the document.
        quick: overrides of a still smaller model, for the test of the benchmark itself.
        commit: see `environment`.
    """
    document: Json = {
        "schema": SCHEMA,
        "environment": environment(device, commit, bool(quick)),
        "steps": steps,
        "runs": {},
    }
    for name, plan in RUNS.items():
        recipe = load_recipe("tiny", [*SMALL, *quick, f"trainer.seed={plan.seed}"])
        run = one_run(plan, recipe, steps, torch.device(device))
        document["runs"][name] = run
        write(document, path)
        print(f"{name}: mel {run['held_out'][-1]:.4f} on held-out audio", flush=True)
    document["verdict"] = verdict(document)
    write(document, path)
    return document


def one_run(plan: Plan, recipe: Recipe, steps: int, device: torch.device) -> Json:
    """Trains once.

    Returns:
        losses: of every step; after the first ones of the mel loss alone.
        held_out: the mel loss on held-out audio before every `EVERY` steps, and after the last one.
    """
    step = make_step(plan.peer, recipe, device, plan.precision)
    with torch.no_grad():
        for parameter in step.codec.parameters():
            parameter.mul_(1 + plan.change * torch.randn_like(parameter))
    # Our codec in float32 judges every run: published weights fit it.
    judge = make_step("ours", recipe, device, "fp32")
    held_out = made_up_audio(recipe, HELD_OUT, seed=10_000).to(device)

    @torch.no_grad()
    def held_out_loss(step: AnyStep) -> float:
        judge.codec.load_state_dict(step.codec.state_dict())
        return judge.mel_loss(judge.codec.eval()(held_out)["audio"], held_out).item()

    losses, judged = [], []
    for number in range(steps):
        if number % EVERY == 0:
            judged.append(held_out_loss(step))
        seed = 1_000_000 * plan.seed + number
        torch.manual_seed(seed)
        values = step(made_up_audio(recipe, BATCH, seed).to(device), number)
        kept = values if number < EARLY else {"mel": values["mel"]}
        losses.append({name: float(value) for name, value in kept.items()})
    return {"losses": losses, "held_out": [*judged, held_out_loss(step)]}


def verdict(document: Json) -> Json:
    """How far the runs are apart.

    Returns:
        early: per loss, the largest relative difference between ours and the published one in the
            first steps, in float32.
        training, held_out: per run, the difference of its final mel loss to that of the run that it
            is compared with.
    """
    runs = document["runs"]
    found: Json = {"early": dict.fromkeys(LOSSES, 0.0), "training": {}, "held_out": {}}
    for name, plan in RUNS.items():
        ours, theirs = runs[name], runs[plan.against]
        found["training"][name] = final_training(ours) - final_training(theirs)
        found["held_out"][name] = ours["held_out"][-1] - theirs["held_out"][-1]
        if (plan.peer, plan.precision) != ("ours", "fp32"):
            continue
        for a, b in zip(ours["losses"][:EARLY], theirs["losses"][:EARLY], strict=True):
            for loss in LOSSES:
                difference = abs(a[loss] - b[loss]) / abs(b[loss])
                found["early"][loss] = max(found["early"][loss], difference)
    return found


def final_training(run: Json) -> float:
    """The mean of the mel loss over the last steps."""
    return float(np.mean([losses["mel"] for losses in run["losses"][-LAST:]]))


def main_line(document: Json) -> str:
    """The verdict in a line."""
    found = document["verdict"]
    final = ", ".join(f"{name} {value:+.4f}" for name, value in found["training"].items())
    apart = f"first {EARLY} steps: at most {max(found['early'].values()):.1e} apart"
    return f"{apart}; final mel loss: {final}"


def markdown(document: Json) -> str:
    """The page with the tables of the verdict."""
    found, steps = document["verdict"], document["steps"]
    machine = document["environment"]
    networks = "a small codec and small discriminators (`bench/training/compare.py`)"
    training_title, held_out_title = f"training, last {LAST} steps", f"{HELD_OUT} held-out items"
    lines = [
        f"# {steps} training steps, ours and the published ones: {title(machine)}",
        "",
        *facts(machine),
        f"- {networks}, {BATCH} items a step, made-up audio",
        "",
        f"## The first {EARLY} steps in float32",
        "",
        *table_head(("loss", "largest relative difference")),
        *(table_row((name, f"{value:.1e}")) for name, value in found["early"].items()),
        "",
        f"## Mel loss after {steps} steps",
        "",
        *table_head(("run", training_title, "difference", held_out_title, "difference")),
    ]
    for name in RUNS:
        run = document["runs"][name]
        training = (f"{final_training(run):.4f}", f"{found['training'][name]:+.4f}")
        held_out = (f"{run['held_out'][-1]:.4f}", f"{found['held_out'][name]:+.4f}")
        lines.append(table_row((name, *training, *held_out)))
    first = document["runs"]["published, fp32, seed 0"]["held_out"][0]
    lines += [
        "",
        "Differences of ours are to the published run of the same seed; those of the published "
        "runs, to their first, are noise. Before its first step that one's held-out mel loss was "
        f"{first:.4f}.",
        "",
    ]
    return "\n".join(lines)


def figures(document: Json) -> "dict[str, Figure]":
    """One picture: training and held-out mel loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    training, held_out = figure.subplots(1, 2)
    numbers = [*range(0, document["steps"], EVERY), document["steps"]]
    for name, run in document["runs"].items():
        mel = np.array([losses["mel"] for losses in run["losses"]])
        smooth = np.convolve(mel, np.ones(10) / 10, "valid")
        training.plot(np.arange(len(smooth)) + 10, smooth, label=name, linewidth=1)
        held_out.plot(numbers, run["held_out"], label=name, linewidth=1)
    training.set(title="mel loss, mean of 10 steps", xlabel="step")
    held_out.set(title="mel loss on held-out audio", xlabel="step")
    training.legend(fontsize=8)
    return {".png": figure}
