"""The corpus benchmark's arithmetic: which phase holds so many GPUs back."""

import pytest

pytest.importorskip("ray.data")

from bench.corpus import markdown, predict, rates


def test_the_slowest_phase_decides():
    found = predict(reading=100, encoding=1000, writing=1e6, gpus=8, readers=4)
    assert (found.speed, found.bottleneck) == (3200, "reading")
    found = predict(reading=100, encoding=1000, writing=1e6, gpus=8, readers=16)
    assert (found.speed, found.bottleneck) == (8000, "encoding")
    found = predict(reading=100, encoding=1000, writing=100, gpus=64, readers=16)
    assert (found.speed, found.bottleneck) == (400, "writing")


def test_the_page_has_medians_and_no_row_of_what_failed():
    def row(way, **values):
        return {"way": way, "workers": 1, "round": 0} | values

    busy = {"reading": 2.0, "waiting": 0.0, "encoding": 10.0, "writing": 0.1}
    ours = {"wall_s": 20.0, "times_real_time": 5.0, "busy_s": busy, "efficiency": 0.5}
    document = {
        "environment": {"cpu": "a CPU", "threads": 1},
        "corpus": {"model": "tiny", "recordings": 4, "seconds": 100.0},
        "rows": [row("ours", **ours), row("theirs", reason="OSError: no such package")],
    }
    assert rates(document) == {"reading": 50.0, "encoding": 10.0, "writing": 1000.0}
    page = markdown(document, gpu_speeds=(100.0,))
    assert "| ours | 20.0 | 5.0 | 50% |" in page
    assert "theirs" not in page
    assert "| 8 | 4 | 800 ×, encoding |" in page
    assert "needs: 2.0." in page
