"""What both benchmarks share: options, the machine, the check of its load, tables and JSON."""

import argparse
import datetime
import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path

# Importing sparsetrain says in the environment how long idle threads look for work. The peers must not inherit that.
ENVIRONMENT = dict(os.environ)

from sparsetrain.bench.load import idle, too_busy  # noqa: E402
from sparsetrain.bench.machine import describe  # noqa: E402

HERE = Path(__file__).parent
# What keeps PyTorch (ATen, oneDNN, MKL) to an instruction set. SparseProp's kernels are all AVX2.
ISA_LIMITS = {
    "base": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "DEFAULT", "AVX512"),
}


def parser(description, peers, sparsities, repeats, quick):
    """The options that both scripts have. quick: the small case that --quick runs."""
    threads = len(os.sched_getaffinity(0))
    out = HERE / "results" / f"{Path(sys.argv[0]).stem}.json"
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    add = options.add_argument
    add("--threads", type=int, default=threads, help=f"of every peer; default {threads}")
    add("--isa", choices=ISA_LIMITS, help="of every peer that can choose; default the best")
    add("--repeats", type=int, default=repeats, help=f"repetitions a peer; default {repeats}")
    add("--cases", nargs="+", metavar="GLOB", help="names of cases; default all")
    add("--sparsity", nargs="+", type=float, default=sparsities, help=f"default {sparsities}")
    add("--peers", nargs="+", choices=peers, default=peers, help="default all")
    add("--out", type=Path, default=out, help=f"JSON file; default {out}")
    add("--quick", action="store_true", help=f"only 2 repetitions of {quick} at 90 %%")
    add("--force", action="store_true", help="measure although the machine is busy")
    options.set_defaults(quick_case=quick)
    return options


def parse(options):
    """Parsed command line, with what --quick means filled in."""
    chosen = options.parse_args()
    if chosen.quick:
        chosen.repeats, chosen.sparsity = 2, [0.9]
        chosen.cases = chosen.cases or [chosen.quick_case]
    for sparsity in chosen.sparsity:
        if not 0 <= sparsity < 1:
            options.error(f"--sparsity {sparsity}: must be in [0, 1)")
    if min(chosen.threads, chosen.repeats) < 1:
        options.error("--threads and --repeats must be at least 1")
    return chosen


def chosen_cases(cases, options):
    """The cases that --cases chooses; SystemExit if one of its names fits none."""
    names = [case["name"] for case in cases]
    for glob in options.cases or []:
        if not fnmatch.filter(names, glob):
            raise SystemExit(f"--cases {glob} fits none of: {', '.join(names)}")
    globs = options.cases or ["*"]
    return [case for case in cases if any(fnmatch.fnmatch(case["name"], glob) for glob in globs)]


def worker_environment(options):
    """Environment of a worker: threads and instruction set, nothing about how threads wait."""
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(options.threads)}
    environment.pop("MKL_NUM_THREADS", None)
    if options.isa:
        aten, onednn, mkl = ISA_LIMITS[options.isa]
        environment["SPARSETRAIN_ISA"] = options.isa
        environment["ATEN_CPU_CAPABILITY"] = aten
        environment["ONEDNN_MAX_CPU_ISA"] = onednn
        environment["MKL_ENABLE_INSTRUCTIONS"] = mkl
    return environment


def machine():
    """What the measurements depend on: processor, caches, memory, system, commit."""
    return {**describe(), "commit": _commit()}


def _commit():
    """Commit of this checkout, with "+" when files differ from it; None outside git."""

    def git(*words):
        run = subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "-uno") else "")


def check_load(force, seconds=2.0):
    """What others take while we sleep; SystemExit if it is much and force is not set."""
    taken = idle(seconds)
    busy = too_busy(taken)
    if busy and not force:
        raise SystemExit(f"the machine is busy: {busy}. Wait, or give --force")
    if busy:
        print(f"WARNING, results are not to be trusted: {busy}", flush=True)
    return taken


def write_json(path, report):
    """Writes a report whole or not at all."""
    report["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def table(headings, rows):
    """Rows of strings below headings, the first column flush left and the others flush right."""
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def ms(seconds):
    """Milliseconds with three digits, "-" for None."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def times(ratio):
    return "-" if ratio is None else f"{ratio:.2f}x"
