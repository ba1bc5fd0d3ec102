"""What both benchmarks share: options, the machine, the check of its load, tables and JSON."""

import argparse
import datetime
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# Of one core, used by other processes or taken by the hypervisor: more spoils a measurement.
MAX_OTHERS = 0.05
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
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    environment.pop("MKL_NUM_THREADS", None)
    if options.isa:
        aten, onednn, mkl = ISA_LIMITS[options.isa]
        environment["SPARSETRAIN_ISA"] = options.isa
        environment["ATEN_CPU_CAPABILITY"] = aten
        environment["ONEDNN_MAX_CPU_ISA"] = onednn
        environment["MKL_ENABLE_INSTRUCTIONS"] = mkl
    return environment


def machine():
    """What the measurements depend on: processor, caches, memory, kernel, commit."""
    with open("/proc/cpuinfo") as file:
        fields = dict(map(str.strip, line.split(":", 1)) for line in file.read().split("\n\n")[0].splitlines())
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / f).read_text().strip() for f in ("level", "type", "size"))
        caches[f"L{level} {kind}"] = size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": fields.get("model name", platform.machine()),
        "family/model/stepping": "/".join(fields.get(name, "?") for name in ("cpu family", "model", "stepping")),
        "cores": len(os.sched_getaffinity(0)),
        "caches": caches,
        "memory_bytes": memory,
        "virtual": "hypervisor" in fields.get("flags", ""),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit():
    """Commit of this checkout, with "+" when files differ from it; None outside git."""

    def git(*words):
        run = subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "-uno") else "")


class Load:
    """CPU time that others take from its making on, as a share of one core.

    others: every process but this one and those of process_ids, which live until taken().
    """

    def __init__(self, process_ids=()):
        self.process_ids = process_ids
        self.start = self._now()

    def taken(self):
        """{"others": other processes, "stolen": the hypervisor, "seconds": so far}."""
        seconds, busy, stolen, ours = (now - then for now, then in zip(self._now(), self.start, strict=True))
        return {
            "others": round(max(0.0, busy - ours) / seconds, 4),
            "stolen": round(stolen / seconds, 4),
            "seconds": round(seconds, 2),
            "load_average": os.getloadavg()[0],
        }

    def _now(self):
        with open("/proc/stat") as file:
            ticks = list(map(int, file.readline().split()[1:9]))
        user, nice, system, _idle, _iowait, irq, softirq, stolen = ticks
        ours = 0
        for process_id in ("self", *self.process_ids):
            # Fields 14 and 15 of man 5 proc; the name, which ends in a bracket, is field 2.
            fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
            ours += int(fields[11]) + int(fields[12])
        hertz = os.sysconf("SC_CLK_TCK")
        busy = user + nice + system + irq + softirq
        return time.monotonic(), busy / hertz, stolen / hertz, ours / hertz


def too_busy(taken):
    """A line that says how busy others were, or None where that is little."""
    if max(taken["others"], taken["stolen"]) <= MAX_OTHERS:
        return None
    return (
        f"others took {taken['others']:.0%} of a core and the hypervisor {taken['stolen']:.0%}"
        f" (at most {MAX_OTHERS:.0%}), load average {taken['load_average']:.2f}"
    )


def check_load(force, seconds=2.0):
    """What others take while we sleep; SystemExit if it is much and force is not set."""
    load = Load()
    time.sleep(seconds)
    taken = load.taken()
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
