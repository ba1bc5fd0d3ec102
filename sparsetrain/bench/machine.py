"""What the machine is, and what it can do at best: multiply-adds and bandwidth, for each number of threads."""

import os
import platform
import time
from functools import partial
from pathlib import Path

import numpy as np

from sparsetrain import arrays
from sparsetrain._kernels import core

CPU = "/sys/devices/system/cpu/cpu0/cache"
# Where the system does not tell: small enough for most processors of the last ten years.
ASSUMED = [("L1d", 32 << 10, 1), ("L2", 512 << 10, 1)]
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def describe():
    """What measurements depend on: processor, caches, memory, system. Unknown entries are None."""
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": {name: size for name, size, _ in caches()},
        "memory_bytes": _memory(),
        "virtual": "hypervisor" in _cpuinfo().get("flags", "").split(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def caches(folder=CPU):
    """[(name, bytes, CPUs that share it)] of the first CPU's data caches, the smallest first; [] where not told."""
    found = []
    for index in sorted(Path(folder).glob("index*")):
        try:
            level, kind, size, shared = (
                (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
            number = int(size.rstrip("KMG")) * UNITS.get(size[-1], 1)
        except (OSError, ValueError):  # some systems leave files out
            continue
        if kind != "Instruction":
            found.append((f"L{level}{'d' if kind == 'Data' else ''}", number, _count(shared)))
    return sorted(found, key=lambda cache: cache[1])


def _count(cpus):
    """How many CPUs a list such as "0-3,8" names."""
    ranges = [part.split("-") for part in cpus.split(",")]
    return sum(int(r[-1]) - int(r[0]) + 1 for r in ranges)


def _cpuinfo():
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _cpu():
    info = _cpuinfo()
    if "model name" in info:
        numbers = "/".join(info.get(name, "?") for name in ("cpu family", "model", "stepping"))
        return f"{info['model name']} ({numbers})"
    if "CPU part" in info:  # Arm's cores have numbers
        return f"{platform.machine()} {info.get('CPU implementer', '?')}/{info['CPU part']}"
    return platform.processor() or platform.machine()


def _memory():
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


# ---- limits


def limits(threads, seconds=0.02):
    """What so many threads together reach on the instruction set in use, each on data of its own.

    {"threads", "fma_gflops", "levels": [{"name", "bytes", "read_gbs", "update_gbs"}]}, float32; bytes: how much fits,
    over all threads, None for memory; read: a sum over an array; update: y += a x, which reads two numbers and writes
    one. Each is the best of five runs of so many seconds.
    """
    x = np.ones((threads, core.CHAINED_VALUES), np.float32)
    multiply_add = partial(core.multiply_add, x, 0.5, 0.5)
    rate = _rate(multiply_add, 5 * seconds)  # long: new threads may share a core for their first moments
    known = caches() or ASSUMED
    levels, below = [], 0
    for name, size, shared in known:
        capacity = size * -(-threads // shared)
        # A cache that is hardly larger than the one before it cannot be told from it.
        if capacity >= 2 * below:
            levels.append({"name": name, "bytes": capacity, **_bandwidth(threads, capacity // 2, seconds)})
            below = capacity
    beyond = min(max(64 << 20, 4 * below), (_memory() or 1 << 30) // 8)
    levels.append({"name": "memory", "bytes": None, **_bandwidth(threads, beyond, seconds)})
    arrays.release()
    rate = max(rate, _rate(multiply_add, seconds))
    return {"threads": threads, "fma_gflops": 2 * x.size * rate / 1e9, "levels": levels}


def settle(limits, patience=0.25):
    """Run multiply-adds until the threads of `limits` are about as fast as there, or `patience` seconds end: False.

    Threads that slept may come back on one core, of this system or of the host of a virtual machine, and stay there for
    up to a second, each waiting for the other: then every pass takes as long as on one thread.
    """
    threads, end = limits["threads"], time.perf_counter() + patience
    if threads == 1:
        return True
    x, rounds = np.ones((threads, core.CHAINED_VALUES), np.float32), 50_000
    multiply_add = partial(core.multiply_add, x, 0.5, 0.5)
    enough = 1.5 * 2 * x.size * rounds / (limits["fma_gflops"] * 1e9)
    while _timed(multiply_add, rounds) > enough:
        if time.perf_counter() >= end:
            return False
        multiply_add(10 * rounds)  # long enough that a thread which waits for the core is moved to another
    return True


def _bandwidth(threads, size, seconds):
    """GB/s of reading and updating `size` bytes in all."""
    pixels = max(1, size // (threads * 2 * 64)) | 1  # an odd number leaves no gap between the two halves
    blocked = arrays.empty(16 * threads, 2, 1, pixels, np.float32)
    whole = blocked.array.reshape(threads, -1)
    core.axpy(0.0, whole, whole, 1)  # each thread is the first to touch its own, and so has it near
    whole[...] = 1e-3
    half = whole.shape[1] // 2
    x, y, totals = whole[:, :half], whole[:, half:], np.empty(threads, np.float32)
    read = _rate(partial(core.read_sum, whole, totals), seconds)
    update = _rate(partial(core.axpy, 1e-6, x, y), seconds)
    return {"read_gbs": read * whole.nbytes / 1e9, "update_gbs": update * 3 * x.nbytes / 1e9}


def _rate(run, seconds):
    """Rounds a second of run(rounds), the best of five."""
    rounds, taken = 1, _timed(run, 1)
    while taken < seconds / 4:
        rounds *= 4
        taken = _timed(run, rounds)
    rounds = max(1, round(rounds * seconds / taken))
    return rounds / min(_timed(run, rounds) for _ in range(5))


def _timed(run, rounds):
    start = time.perf_counter()
    run(rounds)
    return max(time.perf_counter() - start, 1e-9)
