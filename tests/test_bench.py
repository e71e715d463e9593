"""The benchmark: its command line end to end at tiny sizes, and that it times nothing wrong."""

import json
import sys
import wave
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bench_command import ROOT, bench
from served import small_codec
from stand_in_cudnn import cudnn

from bench import codes, precisions, run, soak, timing
from bench.case import Case, Prepared, Run, Settings, Unavailable
from bench.cases import convolutions, end_to_end
from bench.checks import ops as checks
from bench.checks import tensor_cores
from bench.checks.codec import PIECE, Truth, decibels
from bench.checks.random_codec import random_codec
from bench.document import speedups, write
from bench.peers.cudnn_graph import Fused
from bench.report import markdown, write_report
from dac_fast.config import PRESETS

SETTINGS = Settings("cpu", seconds=0.0, rounds=2)
LIMITS = {"copy_gb_s": 10.0, "matmul_tflop_s": {"float32": 0.1}}


def case_of(op="snake", **peers):
    x = torch.linspace(-1, 1, 50)
    check = checks.as_good_as([x.sin()], [x.double().sin()])
    starts = {
        name: f if isinstance(f, str) else lambda f=f: Run(lambda: [f(x)])
        for name, f in peers.items()
    }
    return Case(
        op, "forward", "cpu", "float32", "50", lambda _: Prepared(starts, check, bytes_moved=400)
    )


def run_rows(case):
    return {row["provider"]: row for row in run.run_case(case, SETTINGS, LIMITS)}


def test_command_line_from_list_to_report(tmp_path):
    listed = bench("list", "--device", "cpu", "--quick").stdout.split()
    assert len(listed) == len(set(listed)) > 10

    out = tmp_path / "cpu.json"
    names = ("eager", "reference-folded", "engine", "modules", "accelerated")
    chosen = [word for name in names for word in ("--peer", name)]
    done = bench("run", "--device", "cpu", "--quick", "--threads", 1, *chosen, "--out", out)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["environment"]["threads"] == 1
    assert document["environment"]["torch"] == torch.__version__
    assert document["limits"]["copy_gb_s"] > 0
    assert document["not_run"] == []
    assert "running" not in document
    rows = document["rows"]
    assert {row["case"] for row in rows} == set(listed)
    assert {row["status"] for row in rows} == {"timed"}, [
        row for row in rows if row["status"] != "timed"
    ]
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] <= row["p99_ms"] for row in rows)
    assert {row["provider"] for row in rows if row["op"] == "codec"} == {
        "reference-folded",
        "engine",
    }
    assert all(row["real_time"] > 0 for row in rows if row["op"] in ("codec", "stream"))

    # Nothing is left to do.
    assert bench("run", "--device", "cpu", "--quick", "--out", out, "--resume").returncode == 0
    assert json.loads(out.read_text())["rows"] == rows
    reported = bench("report", out)
    assert reported.returncode == 0, reported.stderr
    text = out.with_suffix(".md").read_text()
    assert "\n| tiny-1x0.2s | engine | float32 |" in text
    assert text.count("\n| 2x2000 float32 | eager |") == 2


def test_a_wrong_peer_is_reported_and_not_timed():
    rows = run_rows(
        case_of(
            eager=torch.sin, close=lambda x: x.sin() + 1e-4, nan=lambda x: x.sin() * float("nan")
        )
    )
    assert rows["eager"]["status"] == "timed"
    for name in ("close", "nan"):
        assert rows[name]["status"] == "failed"
        assert rows[name]["reason"].startswith("parity: ")
        assert "p50_ms" not in rows[name]


def test_one_peer_takes_down_no_other():
    def broken(x):
        raise RuntimeError("no such kernel")

    rows = run_rows(case_of(broken=broken, absent="not built", eager=torch.sin))
    assert rows["broken"]["reason"] == "RuntimeError: no such kernel"
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("skipped", "not built")
    assert rows["eager"]["gb_s"] == pytest.approx(400 / rows["eager"]["p50_ms"] / 1e6)
    assert rows["eager"]["share_of_copy"] == pytest.approx(rows["eager"]["gb_s"] / 10)

    def unprepared(_):
        raise ValueError("bad shape")

    rows = run.run_case(
        Case("snake", "forward", "cpu", "float32", "0", unprepared), SETTINGS, LIMITS
    )
    assert [(row["status"], row["reason"]) for row in rows] == [("failed", "ValueError: bad shape")]


def test_a_case_that_takes_too_long_starts_no_more_peers():
    rows = run.run_case(
        case_of(eager=torch.sin, absent="not built", late=torch.sin),
        replace(SETTINGS, peer_seconds=-1.0),
        LIMITS,
    )
    assert [row["status"] for row in rows] == ["skipped"] * 3
    assert [row["reason"] for row in rows[1:]] == [
        "not built",
        "not started: the ones before took -1 s",
    ]

    def without_library(x):
        raise Unavailable("no such library")

    assert run_rows(case_of(peer=without_library))["peer"]["reason"] == "no such library"


def test_an_interrupted_run_is_continued_behind_the_case_that_ended_it(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "limits", lambda *_: LIMITS)
    path = tmp_path / "results.json"
    first, second, third = (case_of(op=op, eager=torch.sin) for op in ("first", "second", "third"))
    run.run_all([first], SETTINGS, path)
    document = json.loads(path.read_text())
    write(document | {"running": second.name, "steps": []}, path)

    run.run_all([first, second, third], SETTINGS, path)
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
    run.run_all([case_of(eager=torch.sin)], SETTINGS, path, budget=-1.0)
    document = json.loads(path.read_text())
    assert document["rows"] == []
    assert document["not_run"] == ["snake/forward/cpu/float32/50"]
    assert "Not run" in markdown(document)
    assert [p.suffix for p in write_report(path)] == [".md"]


def test_speedups_are_paired_by_round():
    base = {"provider": "eager", "round_ms": [1.0, 10.0, 4.0]}
    assert speedups([base, {"provider": "ours", "round_ms": [0.5, 5.0, 1.0]}]) == {
        "eager": 1.0,
        "ours": 2.0,
    }


def test_options_that_match_nothing_are_named(tmp_path):
    refused = bench("run", "--device", "cpu", "--case", "snail/*")
    assert refused.returncode == 2
    assert "no case matches 'snail/*'" in refused.stderr
    refused = bench("report", tmp_path / "absent.json")
    assert refused.returncode == 2
    assert "absent.json is no file" in refused.stderr


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_every_way_to_run_the_codec_is_right(monkeypatch):
    """Those for CUDA too, as far as they run on a CPU: without graphs, and uncompiled for time."""
    monkeypatch.setattr(end_to_end, "cpu_peers", end_to_end.cuda_peers)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(end_to_end, "FULL", ((2, 0.2),))
    prepared = end_to_end.prepare("tiny", 2, 0.2, "both", SETTINGS)
    found = {}
    for name in (
        "published-equivalent",
        "fast-dacvae",
        "fast-dacvae-sine",
        "engine-fp16-graph",
        "transformers",
        "engine-fp32",
    ):
        run = prepared.peers[name]()
        found[name] = prepared.check(run(), run.precision)
    assert found["engine-fp32"]["snr_db"] > 90 > found["fast-dacvae-sine"]["snr_db"]
    assert found["fast-dacvae-sine"]["snr_db"] > found["fast-dacvae"]["snr_db"] > 40
    codes, audio = run()
    with pytest.raises(AssertionError, match="40.0 dB, at least 90 expected"):
        prepared.check((codes, 0.99 * audio), "float32")
    with pytest.raises(AssertionError, match="of the codes are float64's"):
        prepared.check((codes.roll(1, dims=2), audio), "float16")


@torch.no_grad()
def test_every_way_to_run_a_layer_is_right(monkeypatch):
    """On a CPU, where a stand-in computes what cuDNN's graphs say."""
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    found = set()
    for layer in convolutions.layers(PRESETS["tiny"]):
        prepared = convolutions.prepare(layer, 2, 24, SETTINGS)
        for name in {"library", "conv2d", "cudnn-fused"} & prepared.peers.keys():
            start = prepared.peers[name]()
            prepared.check(start(), "float16")
            prepared.check(start(), "float16")
            found.add((layer.op, name))
    ops = ("conv1d", "residual_unit", "conv_transpose1d")
    wanted = {(op, name) for op in ops for name in ("library", "conv2d", "cudnn-fused")}
    assert found == wanted - {("conv_transpose1d", "cudnn-fused")}

    x, weight = (torch.zeros(1, n, 2).bfloat16().transpose(1, 2) for n in (8, 1))
    arguments = x, weight, torch.zeros(1), 1, 0, 1
    with pytest.raises(Unavailable, match="cuDNN has no kernel for it: no engine"):
        Fused().conv1d(*arguments, alpha=None, keep=True)
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(Unavailable, match="nvidia-cudnn-frontend is not installed"):
        Fused().conv1d(*arguments, alpha=None, keep=True)


@pytest.fixture
def stand_in(tmp_path):
    """A Python in which ours stands in for the published package: frame 60 has a wrong code."""
    (tmp_path / "dac.py").write_text(
        "import dac_fast\n\n\n"
        "class DAC(dac_fast.DAC):\n"
        "    def preprocess(self, audio, rate):\n"
        "        print('this goes to the log')\n"
        "        return audio\n\n"
        "    def encode(self, audio):\n"
        "        codes = super().encode(audio).codes\n"
        "        codes[0, -1, 60:61] ^= 1\n"
        "        return None, codes\n"
    )
    python = tmp_path / "python"
    paths = f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={paths} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_the_published_package_runs_in_a_python_of_its_own(stand_in):
    case = next(case for case in end_to_end.cases("cpu", quick=True) if case.direction == "both")

    def published():
        settings = replace(SETTINGS, peers=["published"], published_python=str(stand_in))
        (row,) = run.run_case(case, settings, LIMITS)
        return row

    row = published()
    assert row["status"] == "timed", row
    assert row["snr_db"] > 90
    assert row["agreement"] > 0.99
    stand_in.with_name("dac.py").write_text("raise ImportError('no torch here')")
    assert published()["reason"].endswith("process ended: ImportError: no torch here")


def test_codes_that_differ_from_the_published_ones_are_judged_by_their_regret(
    tmp_path, stand_in, monkeypatch
):
    monkeypatch.setattr(codes, "SECONDS", 1)
    clip, out = ROOT / "bench/tabla_cc0.wav", tmp_path / "codes.json"
    document = codes.run_codes([clip], 1 / 60, str(stand_in), out, "tiny")
    (row,) = document["rows"]
    assert row["seconds"] == pytest.approx(1, abs=0.01)
    assert row["differ"] == row["frames_that_differ"] == 1
    assert row["regret_ours"] < codes.NEAR_TIE < row["regret_published"]
    assert f"{row['codes'] - 1} of {row['codes']} codes are equal" in codes.markdown(document)


def test_the_ends_of_a_long_input_are_checked():
    codec = random_codec("tiny")
    hop, frames = codec.hop_length, 2 * PIECE + 30
    audio = 0.1 * torch.randn(1, 1, frames * hop, generator=torch.Generator().manual_seed(0))
    truth = Truth(codec, audio)
    with torch.no_grad():
        codes = codec.encode(audio).codes
        restored = codec.decode_codes(codes)
    assert truth.check_codes(codes, "float32")["agreement"] > 0.99
    assert truth.check_audio(codes, restored, "float32")["snr_db"] > 100
    for frame in (0, frames - 1):
        wrong = restored.clone()
        wrong[..., frame * hop] += 0.1
        with pytest.raises(AssertionError, match="at least 90 expected"):
            truth.check_audio(codes, wrong, "float32")


def test_table_of_precisions(tmp_path, monkeypatch):
    monkeypatch.setattr(precisions, "MODELS", dict(list(precisions.MODELS.items())[:1]))
    clip = tmp_path / "clip.wav"
    with wave.open(str(clip), "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        file.writeframes(torch.randint(-9000, 9000, (8000,), dtype=torch.int16).numpy().tobytes())
    document = precisions.run_table(
        "cpu", ("fp32", "tf32x3", "fp16"), clip, 0.1, tmp_path / "table.json"
    )
    assert json.loads((tmp_path / "table.json").read_text()) == document
    reference, fp32, three, fp16 = document["rows"]
    assert reference["agreement"] == fp32["agreement"] == three["agreement"] == 1
    assert min(reference["snr_db"], fp32["snr_db"]) > 90 > fp16["snr_db"] > 40
    page = precisions.markdown(document)
    assert "| golden, even strides | fp16 |" in page
    assert "| golden, even strides | tf32x3, emulated |" in page


def test_a_soak_compares_whatever_ends(tmp_path):
    model, path = tmp_path / "small.safetensors", tmp_path / "soak.json"
    small_codec().save(model)
    # On a busy machine nothing may end in the first seconds.
    for minutes in (0.03, 0.3, 3):
        settings = soak.SoakSettings(minutes=minutes, model=str(model), slots=4)
        last = soak.run_soak(settings, path)["samples"][-1]
        if min(last["streams"], last["requests"]) > 0:
            break
    assert min(last["streams"], last["requests"]) > 0
    assert (last["wrong"], last["tied"]) == (0, 0)
    assert [each.suffix for each in write_report(path)] == [".md", ".png"]
    assert (
        f"| streams that ended, and were compared | {last['streams']} |"
        in path.with_suffix(".md").read_text()
    )

    for part in ("codes", "restored"):
        run = soak.Soak(settings)
        run.signals[:] = [
            replace(signal, **{part: getattr(signal, part).flip(-1)}) for signal in run.signals
        ]
        while run.counts["streams"] < 4:
            run.step()
        assert run.counts["wrong"] > 0


def test_emulated_tensor_cores():
    """Three products of TF32 are as near to float64 as float32 is; one is not."""
    x, weight, bias = torch.randn(1, 40, 70), torch.randn(24, 40, 7), torch.randn(24)
    exact = F.conv1d(x.double(), weight.double(), bias.double(), 2, 9, 3)
    with tensor_cores.emulated_convolutions():
        three = F.conv1d(x, weight, bias, 2, 9, 3)
    one = F.conv1d(tensor_cores.rounded(x), tensor_cores.rounded(weight), bias, 2, 9, 3)
    single = F.conv1d(x, weight, bias, 2, 9, 3)
    assert decibels(three, exact) > decibels(single, exact) - 3 > 120 > decibels(one, exact)
    assert tensor_cores.rounded(torch.tensor([1 + 2**-11, -1 - 2**-11])).tolist() == [
        1 + 2**-10,
        -1 - 2**-10,
    ]
