"""`python -m bench gpu`: its steps, its document, and what it goes through without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from bench_command import ROOT, bench

from bench import gpu, session
from bench.options import Step


def test_gpu_runs_every_step_and_goes_on_with_a_document(tmp_path, monkeypatch):
    """In calls of limited time: what was cut off is run again, what killed its process is not."""
    done = {}

    def run_step(name, command, limit, log, **variables):
        done.setdefault(name, []).append(([str(word) for word in command], limit))
        log.write_text(f"output of {name}\n")
        returncode = 0
        if "--out" in command:
            path = Path(command[command.index("--out") + 1])
            document = json.loads(path.read_text()) if path.exists() else {}
            rows = document.setdefault("rows", [])
            if name == "cases":
                # the first one crashes, the second is cut off, the third ends
                returncode = [-11, None, 0][len(rows)]
                document["running"] = "case"
            row = {"case": str(len(rows)), "provider": "all", "status": "failed", "reason": "test"}
            rows.append(row)
            path.write_text(json.dumps(document))
        return {
            "name": name,
            "command": "",
            "returncode": returncode,
            "seconds": 1.0,
            "result": "done",
        }

    monkeypatch.setattr(session, "run_step", run_step)
    monkeypatch.setattr(gpu, "write_report", lambda path: None)
    monkeypatch.setattr(session, "environment", lambda device, commit, quick: {})
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "compute-sanitizer")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    first = gpu.run_everything(
        session.GpuSettings(tmp_path / "first", 540, patterns=["codec/*"], skip=["train"])
    )
    tools = ["memcheck", "racecheck", "synccheck", "initcheck"]
    # the tests and the tools run side by side, in any order
    assert sorted(done) == sorted(["build", "kernels", "tests", *tools, "cases", "precisions"])
    command, limit = done["cases"][1]
    assert command[command.index("--case") + 1] == "codec/*"
    assert "--quick" not in command
    assert 480 < limit <= 540 - session.RESERVE - session.LIMITS[Step.precisions]
    for tool in tools:
        ((command, _),) = done[tool]
        assert command[:3] == ["compute-sanitizer", "--tool", tool]
    document = json.loads(first.read_text())
    assert "running" not in document
    assert document["precisions"]["rows"][0]["reason"] == "test"
    assert "output of tests" in first.with_suffix(".log").read_text()
    assert {path.suffix for path in first.parent.iterdir()} == {".json", ".log"}

    done.clear()
    skip = ["build", "kernels", "tests", "sanitizers", "precisions"]
    second = gpu.run_everything(
        session.GpuSettings(tmp_path / "second", 540, skip=skip, resume=first)
    )
    assert list(done) == ["cases", "train"]
    document = json.loads(second.read_text())
    assert (second.name, len(document["rows"]), len(document["steps"])) == (first.name, 3, 12)
    assert "precisions" in document
    assert "train" in document

    done.clear()
    gpu.run_everything(session.GpuSettings(tmp_path, 30))
    assert done == {}


def test_gpu_is_rehearsed_on_a_cpu(tmp_path):
    """Every step by the same command, and the page and the pictures of what it wrote."""
    cases = ("--case", "stream/decode/*", "--case", "snake/forward/*/decoder-1x12x*")
    done = bench("gpu", "--rehearse", *cases, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("rehearsal-*.json")
    document = json.loads(path.read_text())
    results = {step["name"]: step["result"] for step in document["steps"]}
    assert sorted(list(results)[:2]) == ["build", "kernels"]
    assert list(results)[2:] == ["sanitizers", "tests", "cases", "precisions", "train"]
    assert results.pop("sanitizers") == "skipped: compute-sanitizer: it needs a GPU"
    assert {result.partition(":")[0] for result in results.values()} == {"done"}, results
    assert "skipped" in results["tests"]
    assert results["kernels"] == "done: 4 kernels"
    log = path.with_suffix(".log").read_text()
    assert all(f"\n===== {step}: " in log for step in results)

    parts = [document, document["precisions"], document["train"]]
    assert {part["environment"]["figures"] for part in parts} == {"tiny sizes, no measurement"}
    written = {each.name.removeprefix(path.stem) for each in tmp_path.iterdir()}
    pictures = {f".{name}.png" for name in ("peers", "roofline", "train")}
    assert written == {".json", ".log", ".md"} | pictures
    page = path.with_suffix(".md").read_text()
    assert page.startswith("# ")
    assert page.partition("\n")[0].endswith(": tiny sizes, no measurement")
    assert "\n## Precisions: " in page
    assert "\n## Training step of `tiny`: " in page
    headline = "| ms, × real time, times baseline | stream, decode: tiny-1x1frame |"
    assert headline in page
    assert headline in done.stdout

    for each in tmp_path.glob("*.png"):
        each.unlink()
    reported = bench("report", path)
    assert reported.returncode == 0, reported.stderr
    assert {each.name.removeprefix(path.stem) for each in tmp_path.iterdir()} == written


def test_launches_find_the_kernels_that_were_compiled_beforehand(tmp_path):
    """With tensors that exist; Triton's cache goes by types, alignments and constants."""
    code = """
import torch, triton
from bench.static import cache
from bench.static.launches import benchmarked_launches
assert cache.fill(90, processes=2, quick=True) == 4
found = []
triton.knobs.compilation.listener = lambda **facts: found.append(facts["cache_hit"])
def real(value):
    if torch.is_tensor(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return value
triton.runtime.driver.set_active(cache.StandIn(90))
for launch in benchmarked_launches(quick=True)[:3]:
    arguments = {name: real(value) for name, value in launch.arguments.items()}
    launch.kernel.warmup(**arguments, grid=(1,), enable_fp_fusion=True, **launch.options)
assert found == [True] * 3, found
"""
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_gpu_says_what_is_missing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pydantic" else find(name)
    )
    assert gpu.missing(skip=[]) == ["tests (pydantic)", "train (pydantic)"]
    assert gpu.missing(skip=["train"]) == ["tests (pydantic)"]
    refused = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['typer'] = None; import bench.__main__"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert refused.stderr == "no typer here, which `python -m bench` needs: install it\n"


def test_gpu_steps_that_fail_or_overrun_are_recorded(tmp_path):
    log = tmp_path / "steps.log"
    slow = session.run_step(
        "slow",
        [sys.executable, "-c", "import time; print('on it', flush=True); time.sleep(60)"],
        2,
        log,
    )
    assert (slow["returncode"], slow["result"]) == (None, "out of time: on it")
    failing = session.run_step(
        "failing", [sys.executable, "-c", "raise SystemExit('no compiler')"], 30, log
    )
    assert (failing["returncode"], failing["result"]) == (1, "failed with status 1: no compiler")
    assert session.run_step("fine", ["env"], 30, log, STEP="7")["returncode"] == 0
    assert "===== failing" in log.read_text()
    assert "STEP=7" in log.read_text()
