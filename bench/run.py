"""Running cases: each peer is started, its outputs are checked, and those that pass are timed.

The result file is one JSON document, written again after every case, so that nothing is lost:

    environment   see document.py
    limits        the copy bandwidth and matrix products that the same run measured
    rows          one per case and peer: `status` is "timed", "failed" or "skipped", the last two
                  with a `reason`
    running       the case under way: a document that still has one was cut off in it
    not_run       cases that the time budget did not reach
    steps         the other steps of `python -m bench gpu`
    precisions, train
                  what those of its steps found, see their modules
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import timing
from bench.case import Case, Prepared, Run, Settings, Unavailable
from bench.document import SCHEMA, Json, environment, one_line, write

# How many times as long as an op a request is timed, for the sake of its 99th percentile.
REQUEST_SECONDS = 5


def run_all(
    cases: Sequence[Case],
    settings: Settings,
    path: Path,
    budget: float | None = None,
    commit: str | None = None,
) -> None:
    """Runs cases in order of priority and writes the document; one that exists is continued.

    Args:
        path: of the document.
        budget: seconds after which no case is started.
        commit: see `environment`.
    """
    start = time.monotonic()
    document: Json = json.loads(path.read_text()) if path.exists() else {"schema": SCHEMA}
    if "environment" not in document:
        document["environment"] = environment(settings.device, commit, settings.quick)
    if "limits" not in document:
        document["limits"] = timing.limits(settings.device, settings.quick)
    rows = document.setdefault("rows", [])
    if cut := document.pop("running", None):
        reason = "the process ended in this case"
        rows.append({"case": cut, "provider": "all", "status": "failed", "reason": reason})
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
            # An illegal access shows here: the process is of no more use, and the next one goes on.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    write(document, path)


def run_case(case: Case, settings: Settings, limits: Json) -> list[Json]:
    """Checks and times every peer of a case; returns a row for each."""
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
    except Exception as error:  # A row reports it, and the other cases go on.
        return [head | {"provider": "all", "status": "failed", "reason": one_line(error)}]

    rows = []
    started: list[tuple[Json, Run]] = []
    began = time.monotonic()
    for name, peer in prepared.peers.items():
        if settings.peers and name not in settings.peers:
            continue
        row = head | {"provider": name}
        rows.append(row)
        if not isinstance(peer, str) and time.monotonic() - began > settings.peer_seconds:
            peer = f"not started: the ones before took {settings.peer_seconds:g} s"
        if isinstance(peer, str):
            row |= {"status": "skipped", "reason": peer}
        elif run := start_and_check(peer, case, prepared, row):
            started.append((row, run))
    time_runs(started, case, prepared, settings, limits)
    return rows


def start_and_check(
    start: Callable[[], Run], case: Case, prepared: Prepared, row: Json
) -> Run | None:
    """The peer ready to be timed; None where it cannot run or is wrong, which its row then says."""
    run = None
    try:
        with timing.Start(case.device) as measured:
            run = start()
            outputs = run()
        precision = run.precision or case.dtype
        if case.requests:
            row |= {"precision": precision} | measured.facts | run.facts
        found = prepared.check(outputs, precision)
        row |= found if isinstance(found, dict) else {"error": found}
        return run
    except Unavailable as error:
        row |= {"status": "skipped", "reason": str(error)}
    except AssertionError as error:
        row |= {"status": "failed", "reason": f"parity: {one_line(error)}"}
    except Exception as error:  # The row reports it, and the other peers go on.
        row |= {"status": "failed", "reason": one_line(error)}
    if run:
        run.close()
    return None


def time_runs(
    started: list[tuple[Json, Run]],
    case: Case,
    prepared: Prepared,
    settings: Settings,
    limits: Json,
) -> None:
    """Times the peers that were started in turns, completes their rows and ends them."""
    seconds = settings.seconds * (REQUEST_SECONDS if case.requests else 1)
    try:
        samplers = {
            row["provider"]: run.sampler(case.device, case.requests) for row, run in started
        }
        samples = timing.measure(samplers, seconds, settings.rounds)
    except Exception as error:  # The rows report it, and the other cases go on.
        for row, _ in started:
            row |= {"status": "failed", "reason": f"while timing: {one_line(error)}"}
    else:
        for row, _ in started:
            row |= {"status": "timed"} | timing.summary(samples[row["provider"]])
            row |= throughput(row["p50_ms"], prepared, limits, row.get("precision", case.dtype))
    finally:
        for _, run in started:
            run.close()


def throughput(milliseconds: float, prepared: Prepared, limits: Json, dtype: str) -> Json:
    """Bytes, flops and audio per second, and the share of the roof.

    The roof is the time that the measured limits allow at best; its share is that over the time
    taken.
    """
    values: Json = {}
    floors = []
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
        # A CPU's products in float16 are not measured.
        if dtype in limits["matmul_tflop_s"]:
            floors.append(prepared.flops / limits["matmul_tflop_s"][dtype] / 1e9)
    if prepared.audio_seconds:
        values["audio_seconds"] = prepared.audio_seconds
        values["real_time"] = prepared.audio_seconds * 1e3 / milliseconds
    if floors:
        values["share_of_roof"] = max(floors) / milliseconds
    return values


def print_rows(rows: Sequence[Json]) -> None:
    """Prints the case, and a line per peer."""
    print(rows[0]["case"] if rows else "no peer of that name", flush=True)
    for row in rows:
        result = (
            f"{row['p50_ms']:10.4f} ms"
            if row["status"] == "timed"
            else f"{row['status']}: {row['reason']}"
        )
        print(f"  {row['provider']:<22}{result}", flush=True)
