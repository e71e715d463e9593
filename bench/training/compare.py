"""`python -m bench train --compare STEPS`: whether ours learns what the published composition learns.

Runs on made-up audio with small networks: the published composition in float32 from several seeds, and from weights
that differ in the last bits (what differs then is noise); ours in float32 and in bfloat16, from the same weights and
batches as the published run of that seed.
"""

from pathlib import Path

import numpy as np
import torch

from bench.document import SCHEMA, environment, table_row, title, write
from bench.training.step import made_up_audio, make_step
from dac_fast.training.recipe import Recipe, load_recipe

# Half of `tiny`, at a lower rate, with one discriminator, on short excerpts: for a CPU.
SMALL = (
    "model.encoder_dim=8", "model.decoder_dim=96", "model.n_codebooks=6", "model.codebook_size=256",
    "model.sample_rate=16000", "discriminator.periods=[]", "discriminator.fft_sizes=[256]",
    "data.seconds=0.128",
)  # fmt: skip
# Items of a step, and of the held-out batch; steps between its evaluations.
BATCH, HELD_OUT, EVERY = 2, 16, 20
# Steps that must agree closely, and those at the end whose mean is the final training loss.
EARLY, LAST = 20, 40
# Implementation, precision, seed, by how much the first weights are changed relative to them, and the run it is
# compared with: where that is one of another seed, or of other weights, the difference is noise.
RUNS = {
    "published, fp32, seed 0": ("published", "fp32", 0, 0.0, "published, fp32, seed 0"),
    "published, fp32, seed 1": ("published", "fp32", 1, 0.0, "published, fp32, seed 0"),
    "published, fp32, seed 2": ("published", "fp32", 2, 0.0, "published, fp32, seed 0"),
    "published, fp32, seed 0, weights off by 1e-6": (
        "published",
        "fp32",
        0,
        1e-6,
        "published, fp32, seed 0",
    ),
    "published, fp32, seed 0, weights off by 2e-6": (
        "published",
        "fp32",
        0,
        2e-6,
        "published, fp32, seed 0",
    ),
    "ours, fp32, seed 0": ("ours", "fp32", 0, 0.0, "published, fp32, seed 0"),
    "ours, fp32, seed 1": ("ours", "fp32", 1, 0.0, "published, fp32, seed 1"),
    "ours, fp32, seed 2": ("ours", "fp32", 2, 0.0, "published, fp32, seed 2"),
    "ours, bf16, seed 0": ("ours", "bf16", 0, 0.0, "published, fp32, seed 0"),
}


def run_compare(
    device: str, steps: int, path: Path, quick: tuple[str, ...] = (), commit: str | None = None
) -> dict:
    """Make the runs, write the document to `path` and its table and plot beside it; returns the document.

    Args:
        quick: overrides of a still smaller model, for the test of this.
    """
    document = {
        "schema": SCHEMA,
        "environment": environment(device, commit),
        "steps": steps,
        "runs": {},
    }
    for name, (implementation, precision, seed, change, _) in RUNS.items():
        recipe = load_recipe("tiny", [*SMALL, *quick, f"trainer.seed={seed}"])
        document["runs"][name] = one_run(
            recipe, implementation, precision, change, steps, torch.device(device)
        )
        write(document, path)
        print(
            f"{name}: mel {document['runs'][name]['held_out'][-1]:.4f} on held-out audio",
            flush=True,
        )
    document["verdict"] = verdict(document)
    write(document, path)
    path.with_suffix(".md").write_text(markdown(document))
    try:
        plot(document, path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")
    return document


def one_run(
    recipe: Recipe,
    implementation: str,
    precision: str,
    change: float,
    steps: int,
    device: torch.device,
) -> dict:
    """Every step's losses; the mel loss on held-out audio before every few steps, and after the last one."""
    step, seed = make_step(implementation, recipe, device, precision), recipe.trainer.seed
    with torch.no_grad():
        for parameter in step.codec.parameters():
            parameter.mul_(1 + change * torch.randn_like(parameter))
    judging = make_step("ours", recipe, device, "fp32")
    held_out = made_up_audio(recipe, HELD_OUT, seed=10_000).to(device)

    @torch.no_grad()
    def judge(step) -> float:
        judging.codec.load_state_dict(step.codec.state_dict())
        return judging.mel_loss(judging.codec.eval()(held_out)["audio"], held_out).item()

    losses, judged = [], []
    for number in range(steps):
        if number % EVERY == 0:
            judged.append(judge(step))
        torch.manual_seed(1_000_000 * seed + number)
        values = step(
            made_up_audio(recipe, BATCH, seed=1_000_000 * seed + number).to(device), number
        )
        # of later steps only what is looked at
        losses.append(
            {
                name: float(value)
                for name, value in values.items()
                if number < EARLY or name == "mel"
            }
        )
    return {"losses": losses, "held_out": [*judged, judge(step)]}


def verdict(document: dict) -> dict:
    """How far the runs are apart.

    early: per loss, the largest relative difference between ours and the published composition in the first steps.
    training, held_out: mel loss at the end; per run, its difference to the one that it is compared with.
    """
    runs, early = document["runs"], {}
    for name in (
        "mel",
        "discriminator",
        "adversarial",
        "feature",
        "commitment",
        "codebook",
        "loss",
    ):
        pairs = [
            (a[name], b[name])
            for key, (implementation, precision, *_, against) in RUNS.items()
            if (implementation, precision) == ("ours", "fp32")
            for a, b in zip(
                runs[key]["losses"][:EARLY], runs[against]["losses"][:EARLY], strict=True
            )
        ]
        early[name] = max(abs(a - b) / abs(b) for a, b in pairs)
    found = {"early": early, "training": {}, "held_out": {}}
    for name, (*_, against) in RUNS.items():
        found["training"][name] = final_training(runs[name]) - final_training(runs[against])
        found["held_out"][name] = runs[name]["held_out"][-1] - runs[against]["held_out"][-1]
    return found


def final_training(run: dict) -> float:
    """Mean of the mel loss over the last steps."""
    return float(np.mean([losses["mel"] for losses in run["losses"][-LAST:]]))


def markdown(document: dict) -> str:
    """The tables."""
    found, steps = document["verdict"], document["steps"]
    lines = [
        f"# {steps} training steps, ours and the published composition: {title(document['environment'])}",
        "",
        *(
            f"- {key}: {value}"
            for key, value in document["environment"].items()
            if value is not None
        ),
        f"- a small codec and small discriminators (`bench/train_compare.py`), {BATCH} items a step, made-up audio",
        "",
        f"## The first {EARLY} steps in float32",
        "",
        table_row(("loss", "largest relative difference")),
        table_row(("---", "---")),
        *(table_row((name, f"{value:.1e}")) for name, value in found["early"].items()),
        "",
        f"## Mel loss after {steps} steps",
        "",
        table_row(
            (
                "run",
                f"training, last {LAST} steps",
                "difference",
                f"{HELD_OUT} held-out items",
                "difference",
            )
        ),
        table_row(["---"] * 5),
    ]
    for name in RUNS:
        run, training, held_out = (
            document["runs"][name],
            found["training"][name],
            found["held_out"][name],
        )
        cells = [
            name,
            f"{final_training(run):.4f}",
            f"{training:+.4f}",
            f"{run['held_out'][-1]:.4f}",
        ]
        lines.append(table_row([*cells, f"{held_out:+.4f}"]))
    first = document["runs"]["published, fp32, seed 0"]["held_out"][0]
    lines += [
        "",
        "Differences of ours are to the published run of the same seed; those of the published runs, to their first, "
        f"are noise. Before its first step that one's held-out mel loss was {first:.4f}.",
        "",
    ]
    return "\n".join(lines)


def plot(document: dict, path: Path):
    """Training and held-out mel loss over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    training, held_out = figure.subplots(1, 2)
    for name, run in document["runs"].items():
        mel = np.array([losses["mel"] for losses in run["losses"]])
        smooth = np.convolve(mel, np.ones(10) / 10, "valid")
        training.plot(np.arange(len(smooth)) + 10, smooth, label=name, linewidth=1)
        numbers = [*range(0, document["steps"], EVERY), document["steps"]]
        held_out.plot(numbers, run["held_out"], label=name, linewidth=1)
    training.set(title="mel loss, mean of 10 steps", xlabel="step")
    held_out.set(title="mel loss on held-out audio", xlabel="step")
    training.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main_line(document: dict) -> str:
    """The verdict in a line."""
    found = document["verdict"]
    final = ", ".join(f"{name} {value:+.4f}" for name, value in found["training"].items())
    return f"first {EARLY} steps: at most {max(found['early'].values()):.1e} apart; final mel loss: {final}"
