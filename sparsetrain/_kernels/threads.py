"""How many threads to start with: what the machine, the container and OMP_NUM_THREADS allow."""

import math
import os
from pathlib import Path


def _read(path):
    try:
        return Path(path).read_text().split()
    except OSError:
        return []


def container_limit(root="/sys/fs/cgroup"):
    """CPUs that the control group of this process may use (a float), or None without a limit.

    Reads cpu.max (cgroup v2) or cpu.cfs_quota_us and cpu.cfs_period_us (v1) under `root`.
    """
    quota = _read(f"{root}/cpu.max") or _read(f"{root}/cpu/cpu.cfs_quota_us") + _read(f"{root}/cpu/cpu.cfs_period_us")
    if len(quota) != 2 or quota[0] in ("max", "-1"):
        return None
    return int(quota[0]) / int(quota[1])


def default():
    """Threads to start with: OMP_NUM_THREADS if set, else the CPUs that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isdigit() and int(wanted) >= 1:
        return int(wanted)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, math.ceil(container_limit() or cpus)))
