"""The benchmark harness: its command line end to end at tiny sizes, and that it refuses to time what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, harness, parity, timing
from bench.harness import Case, Prepared, Settings
from bench.report import markdown, speedups, write_report

ROOT = Path(__file__).parents[1]
SETTINGS = Settings("cpu", seconds=0.0, rounds=2)
LIMITS = {"copy_gb_s": 10.0, "matmul_tflop_s": {"float32": 0.1}}


def bench(*arguments):
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def case_of(op="snake", **providers):
    x = torch.linspace(-1, 1, 50)
    check = parity.as_good_as([x.sin()], [x.double().sin()])
    starts = {name: f if isinstance(f, str) else lambda f=f: lambda: [f(x)] for name, f in providers.items()}
    return Case(op, "forward", "cpu", "float32", "50", lambda _: Prepared(starts, check, bytes_moved=400))


def run_rows(case):
    return {row["provider"]: row for row in harness.run_case(case, SETTINGS, LIMITS)}


def test_command_line_from_list_to_report(tmp_path):
    listed = bench("list", "--device", "cpu", "--quick").stdout.split()
    assert len(listed) == len(set(listed)) > 10

    out = tmp_path / "cpu.json"
    eager = ["--provider", "eager", "--provider", "reference-unfolded", "--provider", "reference-folded"]
    done = bench("run", "--device", "cpu", "--quick", "--threads", 1, *eager, "--out", out)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["environment"]["threads"] == 1
    assert document["environment"]["torch"] == torch.__version__
    assert document["limits"]["copy_gb_s"] > 0
    assert document["not_run"] == []
    assert "running" not in document
    rows = document["rows"]
    assert {row["case"] for row in rows} == set(listed)
    assert {row["status"] for row in rows} == {"timed"}, [row for row in rows if row["status"] != "timed"]
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in rows)

    # Nothing is left to do.
    assert bench("run", "--device", "cpu", "--quick", "--out", out, "--resume").returncode == 0
    assert json.loads(out.read_text())["rows"] == rows
    reported = bench("report", out)
    assert reported.returncode == 0, reported.stderr
    text = out.with_suffix(".md").read_text()
    assert "reference-folded" in text
    assert text.count("\n| 2x2000 float32 | eager |") == 2


def test_a_wrong_provider_is_reported_and_not_timed():
    rows = run_rows(case_of(eager=torch.sin, close=lambda x: x.sin() + 1e-4, nan=lambda x: x.sin() * float("nan")))
    assert rows["eager"]["status"] == "timed"
    for name in ("close", "nan"):
        assert rows[name]["status"] == "failed"
        assert rows[name]["reason"].startswith("parity: ")
        assert "p50_ms" not in rows[name]


def test_one_provider_takes_down_no_other():
    def broken(x):
        raise RuntimeError("no such kernel")

    rows = run_rows(case_of(broken=broken, absent="not built", eager=torch.sin))
    assert rows["broken"]["reason"] == "RuntimeError: no such kernel"
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("skipped", "not built")
    assert rows["eager"]["gb_s"] == pytest.approx(400 / rows["eager"]["p50_ms"] / 1e6)
    assert rows["eager"]["share_of_copy"] == pytest.approx(rows["eager"]["gb_s"] / 10)

    def unprepared(_):
        raise ValueError("bad shape")

    rows = harness.run_case(Case("snake", "forward", "cpu", "float32", "0", unprepared), SETTINGS, LIMITS)
    assert [(row["status"], row["reason"]) for row in rows] == [("failed", "ValueError: bad shape")]


def test_an_interrupted_run_is_continued_behind_the_case_that_ended_it(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "limits", lambda *_: LIMITS)
    path = tmp_path / "results.json"
    first, second, third = (case_of(op=op, eager=torch.sin) for op in ("first", "second", "third"))
    harness.run_all([first], SETTINGS, path)
    document = json.loads(path.read_text())
    harness.write(document | {"running": second.name, "steps": []}, path)

    harness.run_all([first, second, third], SETTINGS, path)
    document = json.loads(path.read_text())
    assert [(row["op"], row["status"]) for row in document["rows"] if "op" in row] == [
        ("first", "timed"), ("third", "timed"),
    ]  # fmt: skip
    assert [row["reason"] for row in document["rows"] if row["case"] == second.name] == [
        "the process ended in this case"
    ]
    assert document["steps"] == []


def test_cases_past_the_budget_are_listed_and_never_estimated(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "limits", lambda *_: LIMITS)
    path = tmp_path / "results.json"
    harness.run_all([case_of(eager=torch.sin)], SETTINGS, path, budget=-1.0)
    document = json.loads(path.read_text())
    assert document["rows"] == []
    assert document["not_run"] == ["snake/forward/cpu/float32/50"]
    assert "Not run" in markdown(document)
    assert [p.suffix for p in write_report(path)] == [".md"]


def test_speedups_are_paired_by_round():
    base = {"provider": "eager", "round_ms": [1.0, 10.0, 4.0]}
    assert speedups([base, {"provider": "ours", "round_ms": [0.5, 5.0, 1.0]}]) == {"eager": 1.0, "ours": 2.0}


def test_options_that_match_nothing_are_named(tmp_path):
    refused = bench("run", "--device", "cpu", "--case", "snail/*")
    assert refused.returncode == 2
    assert "no case matches 'snail/*'" in refused.stderr
    refused = bench("report", tmp_path / "absent.json")
    assert refused.returncode == 2
    assert "absent.json is no file" in refused.stderr


def test_gpu_steps_that_fail_or_overrun_are_recorded(tmp_path):
    log = tmp_path / "steps.log"
    slow = gpu.run_step(
        "slow", [sys.executable, "-c", "import time; print('on it', flush=True); time.sleep(60)"], 2, log
    )
    assert (slow["returncode"], slow["result"]) == (None, "out of time: on it")
    failing = gpu.run_step("failing", [sys.executable, "-c", "raise SystemExit('no compiler')"], 30, log)
    assert (failing["returncode"], failing["result"]) == (1, "failed with status 1: no compiler")
    assert gpu.run_step("fine", ["env"], 30, log, STEP="7")["returncode"] == 0
    assert "===== failing" in log.read_text()
    assert "STEP=7" in log.read_text()
