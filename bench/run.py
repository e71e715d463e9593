"""A case, and how it is run: start each provider, check its outputs, time those that pass.

The result file is one JSON document, written again after every case, so that nothing is lost:

    environment   see document.py; `limits`: the copy bandwidth and matrix products measured in the same run
    rows          one per case and provider: `status` is "timed", "failed" or "skipped", the last two with a `reason`
    running       the case under way (a document that still has one was cut off in it)
    not_run       cases that the time budget did not reach
    steps         the other steps of `python -m bench gpu`
"""

import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import timing
from bench.case import Case, Prepared, Settings, Unavailable
from bench.document import SCHEMA, environment, write

# Requests are timed that many times as long as ops: their 99th percentile is of interest.
REQUEST_SECONDS = 5


def run_case(case: Case, settings: Settings, limits: dict) -> list[dict]:
    """Check and time every provider of a case; returns one row each."""
    head = {
        "case": case.name,
        "op": case.op,
        "direction": case.direction,
        "device": case.device,
        "dtype": case.dtype,
        "shape": case.shape,
    }
    try:
        prepared = case.prepare(settings)
    except Exception as error:  # reported in its row; the other cases go on
        return [head | {"provider": "all", "status": "failed", "reason": _one_line(error)}]

    rows, samplers, closers, began = [], {}, [], time.monotonic()
    for name, provider in prepared.providers.items():
        if settings.providers and name not in settings.providers:
            continue
        row = head | {"provider": name}
        rows.append(row)
        if not isinstance(provider, str) and time.monotonic() - began > settings.provider_seconds:
            provider = f"not started: the ones before took {settings.provider_seconds:g} s"
        if isinstance(provider, str):
            row |= {"status": "skipped", "reason": provider}
            continue
        try:
            with timing.Start(case.device) as start:
                run = provider()
                closers.append(getattr(run, "close", None))
                outputs = run()
            precision = getattr(run, "precision", case.dtype)
            if case.requests:
                row |= {"precision": precision} | start.facts | getattr(run, "facts", {})
            checked = prepared.check(outputs, precision)
            row |= checked if isinstance(checked, dict) else {"error": checked}
            sampler = timing.request_sampler if case.requests else timing.sampler
            samplers[name] = getattr(run, "sample", None) or sampler(run, case.device)
        except Unavailable as error:
            row |= {"status": "skipped", "reason": str(error)}
        except AssertionError as error:
            row |= {"status": "failed", "reason": f"parity: {_one_line(error)}"}
        except Exception as error:  # likewise
            row |= {"status": "failed", "reason": _one_line(error)}

    timed = [row for row in rows if row["provider"] in samplers]
    try:
        seconds = settings.seconds * (REQUEST_SECONDS if case.requests else 1)
        samples = timing.measure(samplers, seconds, settings.rounds)
    except Exception as error:  # likewise
        for row in timed:
            row |= {"status": "failed", "reason": f"while timing: {_one_line(error)}"}
    else:
        for row in timed:
            row |= {"status": "timed"} | timing.summary(samples[row["provider"]])
            row |= _throughput(row["p50_ms"], prepared, limits, row.get("precision", case.dtype))
    finally:
        for close in filter(None, closers):
            close()
    return rows


def _throughput(milliseconds: float, prepared: Prepared, limits: dict, dtype: str) -> dict:
    """GB/s, its share of the copy bandwidth, and the share of the roof: the floor the device sets, over the time."""
    values, floors = {}, []
    if prepared.bytes_moved:
        gb_s = prepared.bytes_moved / milliseconds / 1e6
        values |= {
            "bytes": prepared.bytes_moved,
            "gb_s": gb_s,
            "share_of_copy": gb_s / limits["copy_gb_s"],
        }
        floors.append(prepared.bytes_moved / limits["copy_gb_s"] / 1e6)
    if prepared.flops:
        values |= {"flops": prepared.flops, "tflop_s": prepared.flops / milliseconds / 1e9}
        # a CPU's products in half precision are not measured
        if dtype in limits["matmul_tflop_s"]:
            floors.append(prepared.flops / limits["matmul_tflop_s"][dtype] / 1e9)
    if prepared.audio_seconds:
        values |= {
            "audio_seconds": prepared.audio_seconds,
            "real_time": prepared.audio_seconds * 1e3 / milliseconds,
        }
    return values | ({"share_of_roof": max(floors) / milliseconds} if floors else {})


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def run_all(
    cases: Sequence[Case],
    settings: Settings,
    path: Path,
    budget: float | None = None,
    commit: str | None = None,
):
    """Run cases in order of priority and write the document to `path`; one that is there already is continued.

    Args:
        budget: seconds; a case is not started after that many.
        commit: see `environment`.
    """
    start = time.monotonic()
    document = json.loads(path.read_text()) if path.exists() else {"schema": SCHEMA}
    if "environment" not in document:
        document["environment"] = environment(settings.device, commit)
    if "limits" not in document:
        document["limits"] = timing.limits(settings.device, settings.quick)
    rows = document.setdefault("rows", [])
    if cut := document.pop("running", None):
        rows.append(
            {
                "case": cut,
                "provider": "all",
                "status": "failed",
                "reason": "the process ended in this case",
            }
        )
    done = {row["case"] for row in rows}
    remaining = [case for case in sorted(cases, key=lambda c: c.priority) if case.name not in done]

    for i, case in enumerate(remaining):
        document["not_run"] = [c.name for c in remaining[i:]]
        if budget is not None and time.monotonic() - start > budget:
            break
        write(document | {"running": case.name}, path)
        new = run_case(case, settings, document["limits"])
        rows += new
        document["not_run"] = document["not_run"][1:]
        write(document, path)
        print_rows(new)
        torch._dynamo.reset()
        gc.collect()
        if case.device == "cuda":
            # After an illegal access this raises: the process is of no more use, and its successor goes on from here.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    write(document, path)


def print_rows(rows: Sequence[dict]):
    """Progress: the case, then a line per provider."""
    print(rows[0]["case"] if rows else "no provider of that name", flush=True)
    for row in rows:
        result = (
            f"{row['p50_ms']:10.4f} ms"
            if row["status"] == "timed"
            else f"{row['status']}: {row['reason']}"
        )
        print(f"  {row['provider']:<22}{result}", flush=True)
