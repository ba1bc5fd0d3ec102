"""The command `sparsetrain info`, and the versions of what is used."""

import importlib.metadata
import os
import platform

import threadpoolctl

import sparsetrain as st
from sparsetrain import data
from sparsetrain._kernels import threads
from sparsetrain.bench.machine import caches


def add_parser(commands):
    """Add `info` to the subparsers of the command line."""
    commands.add_parser("info", help="versions, instruction sets, threads, caches, data sets")


def run(given):
    """Print it; returns the exit code."""
    limit = threads.container_limit()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"sparsetrain        {st.__version__}")
    print(f"instruction set    {st.get_isa()} (available: {', '.join(st.available_isas())})")
    allowed = "no container limit" if limit is None else f"container limit {limit:g}"
    print(f"threads            {st.get_num_threads()} ({cpus} CPUs for this process, {allowed})")
    for pool in threadpoolctl.threadpool_info():
        name = f"{pool['internal_api']} {pool['version'] or ''}".strip()
        print(f"thread pool        {name}, {pool['num_threads']} threads ({pool['filepath']})")
    sizes = ", ".join(f"{name} {size >> 10}K" for name, size, _ in caches())
    print(f"caches             {sizes or 'unknown'}")
    for name, version in versions().items():
        print(f"{name:<19}{version or 'not installed'}")
    for name in data.NAMES:
        places = data.where(name)
        found = next((p for p in places if p.found), None)
        if found:
            print(f"data {name:<13} in {found.folder} ({found.named_by})")
        else:
            looked = ", ".join(f"{p.folder} ({p.named_by})" for p in places)
            print(f"data {name:<13} not found, looked in {looked}")
    return 0


def versions():
    """Versions of Python and of what sparsetrain uses; None for what is not installed."""
    versions = {"python": platform.python_version()}
    for name in ("numpy", "scipy", "threadpoolctl", "tqdm", "matplotlib", "pooch", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
