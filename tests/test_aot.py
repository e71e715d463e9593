"""What the compiler makes of the Triton kernels for sm_90, on any machine, held to budgets.

`python -m bench static` reads the machine code; this runs it on what a second of audio, a training
step and shapes of no preset launch. A budget is what the kernel took when it was written down, the
greater of Triton 3.6 and 3.9, so a
change that adds instructions to a hot loop or narrows its loads fails here. One that is worth its
price raises the budget.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from dac_kernels.residual_unit import SHARED_TF32

from bench.static.sass import Loop, Program, facts

ROOT = Path(__file__).parents[1]


class Budget(NamedTuple):
    """What a kernel may take at most, and what it must have.

    Attributes:
        registers: of a thread, at most.
        instructions: of the hot loop, or of an element where there is no loop; at most.
        width: bytes of the loads that bring most.
        product: the instruction of the matrix product.
    """

    registers: int
    instructions: float
    width: int
    product: str | None = None


BUDGETS = {
    "fp16/conv 7 dilated, 768 to 768: snake/128×128×64, 8 warps, 3 stages": Budget(
        169, 127, 16, "wgmma 64×128×16"
    ),
    "fp16/conv 7 dilated, 768 to 768: snake/256×128×64, 16 warps, 3 stages": Budget(
        128, 118, 16, "wgmma 64×128×16"
    ),
    "fp16/conv 1, 768 to 768 + residual: y and snake/128×128×64, 8 warps, 3 stages": Budget(
        166, 120, 16, "wgmma 64×128×16"
    ),
    "fp16/transposed 16 stride 8, 1536 to 768: y and snake/128×128×64, 8 warps, 3 stages": Budget(
        196, 127, 16, "wgmma 64×128×16"
    ),
    "fp16/unit, 192: y and snake/128×64×32, 8 warps, 3 stages": Budget(
        192, 109, 16, "wgmma 64×64×16"
    ),
    "fp16/unit, 96: y and snake/128×32×32, 8 warps, 3 stages": Budget(
        143, 113, 16, "wgmma 64×32×16"
    ),
    "tf32/conv 7 dilated, 768 to 768: snake/128×128×32, 8 warps, 3 stages": Budget(
        177, 127, 16, "wgmma 64×128×8"
    ),
    "tf32x3/conv 7 dilated, 768 to 768: snake/128×128×32, 8 warps, 3 stages": Budget(
        214, 507, 16, "wgmma 64×128×8"
    ),
    "fp32/conv 7 dilated, 768 to 768: snake/64×64×16, 4 warps, 3 stages": Budget(128, 627, 16),
    # Of a single frame.
    "fp16/conv 7 dilated, 768 to 768: snake/64×16×256, 4 warps, 4 stages": Budget(
        162, 301, 16, "wgmma 64×16×16"
    ),
    "fp32/conv 7 dilated, 768 to 768: snake/16×16×128, 4 warps, 4 stages": Budget(62, 453, 16),
    "fp16/snake forward, channels last/32×128, 4 warps": Budget(53, 19.91, 16),
    "fp16/snake backward, channels last/32×128, 4 warps": Budget(122, 33.8, 16),
    "fp32/snake forward, channels last/32×128, 4 warps": Budget(72, 24.1, 16),
    # 8 divides its rows, 16 does not.
    "other/fp16/snake forward, channels first/4×1024, 4 warps": Budget(44, 18.3, 16),
    "fp32/rvq search/16×128, 4 warps": Budget(146, 322, 4),
    "fp32/rvq search/2×512, 4 warps": Budget(90, 196, 16),
}


def static(path, patterns):
    """`python -m bench static` of launches that match, for sm_90."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = [sys.executable, "-m", "bench", "static", "--arch", "90", "--out", path]
    for pattern in patterns:
        command += ["--only", pattern]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("static") / "static.json"
    others = ("other/*", "*/rvq sum*", "csrc/disc_preprocess", "csrc/hopper/*")
    result = static(path, (*BUDGETS, *others))
    assert result.returncode == 0, result.stderr
    page = path.with_suffix(".md").read_text()
    assert "Nothing here was measured" in page
    return json.loads(path.read_text()) | {"page": page}


def test_a_pattern_that_matches_nothing(tmp_path):
    result = static(tmp_path / "static.json", ["csrc/*", "fp61/*"])
    assert result.returncode == 2
    assert "--only is 'fp61/*', which matches none of" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def table(document):
    return document["static"]


def test_nothing_spills(table, document):
    kernels = {row["kernel"].strip("_").removesuffix("_kernel") for row in table}
    assert kernels == {
        *("forward", "backward", "conv1d", "residual_unit", "project", "sum", "search", "decode")
    }
    assert not [row["name"] for row in table if "spill" in row["hot"]["kinds"]]
    # With Triton 3.6 registers that the tallest tile's epilogue needs wait while its loop runs.
    tall = 80 if document["environment"]["triton"].startswith("3.6") else 0
    for row in table:
        allowed = tall if row["tile"].startswith("256×") else 0
        assert row["stack"] + row["spilled"] <= allowed, row["name"]


@pytest.mark.parametrize("name", BUDGETS)
def test_budget(table, name):
    budget = BUDGETS[name]
    rows = [row for row in table if row["name"] == name]
    assert rows
    for row in rows:
        hot = row["hot"]
        found = Budget(
            row["registers"],
            row.get("per_element", hot["instructions"]),
            int(max(hot["loads"], key=lambda width: int(width) * hot["loads"][width])),
            *sorted(hot["mma"]),
        )
        assert found.registers <= budget.registers, found
        assert found.instructions <= budget.instructions, found
        assert found[2:] == budget[2:], found


def test_launches_of_a_request(document):
    assert document["launches"]["decode"] < 30
    assert document["launches"]["encode"] <= 64
    assert "29 to decode" in document["page"]


def test_kernels_of_csrc(document):
    rows = document["csrc"]
    if "nvcc" not in document["environment"]:
        assert not rows
        assert "nvcc was not found" in document["page"]
        return
    of_source = {"disc_preprocess": [], "hopper": []}
    for row in rows:
        of_source[row["name"].split("/")[1]].append(row)
        assert f"| {row['name']} | {row['registers']} |" in document["page"]
        assert row["stack"] + row["spilled"] == 0
    assert {row["kernel"] for row in of_source["disc_preprocess"]} == {
        *("measure", "scale", "measure_gradient", "scale_gradient")
    }
    # A tree over 256 threads has 8 levels of 2 barriers.
    assert all(row["all"]["waits"]["barrier"] >= 16 for row in of_source["disc_preprocess"])
    assert len(of_source["hopper"]) == 4
    for row in of_source["hopper"]:
        channels = 96 if "96" in row["kernel"] else 64
        # Products of 8 taps, and two waits: none stands between them.
        assert row["all"]["mma"] == {f"wgmma 64×{channels}×16": 8 * channels // 16}
        assert row["all"]["waits"]["wgmma but 0"] == 2
        # Of three warpgroups, one CTA.
        assert row["registers"] <= 168


# What sm_100 does with a barrier that is not there yet: it waits behind the kernel's end.
WAITING = """
.L_x_0:
 /*0000*/ IADD3 R0, R0, 0x1, RZ ;
 /*0010*/ LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
 /*0020*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
 /*0030*/ @!P0 BRA `(.L_x_2) ;
.L_x_1:
 /*0040*/ UTCHMMA gdesc[UR4], gdesc[UR10], tmem[UR8], tmem[UR18], idesc[UR19], UPT ;
 /*0050*/ ISETP.GE.AND P1, PT, R0, R3, PT ;
 /*0060*/ @!P1 BRA `(.L_x_0) ;
 /*0070*/ STG.E.128 desc[UR6][R6.64], R8 ;
 /*0080*/ EXIT ;
.L_x_2:
 /*0090*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
 /*00a0*/ @!P0 BRA `(.L_x_2) ;
 /*00b0*/ BRA `(.L_x_1) ;
"""


def test_waiting_behind_the_end_is_no_loop():
    program = Program(WAITING)
    assert program.loops == [Loop(0, 6)]
    assert facts(program.hot([8]))["mma"] == {"UTCHMMA": 1}
    assert program.executed([8]) == 8 * 7 + 3


def test_defaults_fit_in_shared_memory(table):
    """The first configuration of each op, on every GPU from sm_80 on; TF32's units on sm_90."""
    defaults = {}
    for row in table:
        defaults.setdefault((row["precision"], row["op"]), row)
    for row in defaults.values():
        tf32 = row["kernel"] == "_residual_unit_kernel" and row["precision"] == "tf32"
        assert row["shared"] <= (SHARED_TF32 if tf32 else 99 << 10), row["name"]
