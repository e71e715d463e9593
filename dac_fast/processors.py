"""How many processors this process may use."""

import math
import os
from pathlib import Path

# Of a container: its quota in microseconds, and the period that this is for.
CGROUP = Path("/sys/fs/cgroup")
CGROUP_1 = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")


def processors() -> int:
    """Those that the process may run on, or a container's quota of them, rounded up, if it is less.

    More threads than the quota would use it up within a part of each period, then all stand still.
    """
    if hasattr(os, "sched_getaffinity"):
        found = len(os.sched_getaffinity(0))
    else:
        found = os.cpu_count() or 1
    return min(found, _quota() or found)


def _quota() -> int | None:
    """A container's processors; None without a limit. Both versions of Linux's cgroups are read."""
    try:
        if (both := CGROUP / "cpu.max").is_file():
            quota, period = both.read_text().split()
        else:
            quota, period = ((CGROUP / name).read_text() for name in CGROUP_1)
        # Without a limit: "max", or -1.
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None
