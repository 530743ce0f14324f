"""How many cores a process of ours may count on."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

_CGROUP_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> tuple[int, ...]:
    """The cores this process may use: its affinity, and no more of them than its cgroup's quota pays for."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else cores[: max(1, math.ceil(int(quota) / int(period)))]
