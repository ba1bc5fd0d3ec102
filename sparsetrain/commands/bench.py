"""The command `sparsetrain bench`: its options, a run, and what it prints and writes."""

import argparse
import datetime
import math
import time
from pathlib import Path

from tqdm import tqdm

from sparsetrain import checks, options
from sparsetrain._kernels import core
from sparsetrain.bench import compare, load, machine, measure, plot, report, results, shapes
from sparsetrain.version import VERSION

LAYER_SPARSITIES = (0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
NET_SPARSITIES = (0, 0.8, 0.9, 0.95, 0.99)
USUAL_NETS = ("lenet5", "mlp", "resnet20")
SCALING_SPARSITY = 0.9

# Default, argparse's settings, help. Where the default is None the help explains it.
OPTIONS = {
    "layers": (
        None,
        {"nargs": "+", "metavar": "GLOB"},
        "layers by name, such as 'conv3x3*', or none (default: all of --shapes)",
    ),
    "shapes": (None, {"metavar": "FILE"}, "text file of layer shapes (default: eight usual layers)"),
    "nets": (USUAL_NETS, {"nargs": "+", "metavar": "NAME"}, f"nets: {', '.join(measure.NETS)}; or none"),
    "sparsity": (
        None,
        {"nargs": "+", "type": float, "metavar": "S"},
        "sparsities of layers and nets, in [0, 1) "
        f"(default: {' '.join(f'{s:g}' for s in LAYER_SPARSITIES)}, fewer for nets)",
    ),
    "threads": (None, {"type": int}, "threads (default: as many as this process may use)"),
    "isa": (None, {}, "instruction set: base, avx2 or avx512 (default: the best there is)"),
    "repeats": (7, {"type": int}, "repetitions of each case"),
    "budget": (90.0, {"type": float, "metavar": "SECONDS"}, "stop repeating after so long; all runs once"),
    "out": (None, {"metavar": "FOLDER"}, "new folder for bench.json and figures (default: runs/bench-TIME)"),
    "quick": (False, {"action": "store_true"}, "little of everything in 15 seconds (default: no)"),
    "compare": (
        None,
        {"nargs": 2, "metavar": ("A.json", "B.json")},
        "measure nothing, compare two results (default: none)",
    ),
}
# The defaults with --quick, where they are others.
QUICK = {"nets": ["lenet5"], "sparsity": NET_SPARSITIES, "repeats": 3, "budget": 12.0}


def add_parser(commands):
    """Add `bench` to the subparsers of the command line."""
    options.add_parser(
        commands,
        "bench",
        OPTIONS,
        help="measure the machine, layers and nets",
        description="Measure the machine's peak and bandwidths, then layers and training steps over sparsity, threads "
        "and batch. Prints tables; writes a folder with bench.json and, where matplotlib is installed, roofline.png, "
        "sparsity.png, weights.png and scaling.png.",
    )


def run(given):
    """Run the command with the options that were given; returns the exit code."""
    if "compare" in given:
        for name in given:
            if name != "compare":
                raise ValueError(f"--{name} cannot be given with --compare, which measures nothing")
        print(compare.compare(*given["compare"]))
        return 0
    o, layers, folder = _options(given)
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sparsetrain": VERSION,
        "machine": machine.describe(),
        "ran_with": {
            "threads": core.get_num_threads(),
            "isa": core.get_isa(),
            "repeats": o.repeats,
            "budget": o.budget,
        },
    }
    print("\n".join(report.machine_lines(found)), flush=True)
    found |= _measure(o, layers)
    print(f"\n{report.tables(found)}\n")
    print("\n".join(report.notes(found)))
    folder.mkdir(parents=True, exist_ok=True)
    results.write(folder / "bench.json", found)
    print(f"wrote {folder / 'bench.json'}", flush=True)
    try:
        for path in plot.draw(found, folder):
            print(f"wrote {path}")
    except ImportError:
        print("no figures: they need matplotlib (pip install 'sparsetrain[plot]')")
    return 0


def _options(given):
    """Every option, resolved and checked, the chosen layers, and the folder."""
    o = argparse.Namespace(**options.defaults(OPTIONS) | (QUICK if given.get("quick") else {}) | given)
    layers = [] if o.layers == ["none"] else shapes.read(o.shapes or shapes.DEFAULT)
    if o.layers not in (None, ["none"]):
        try:
            layers = shapes.chosen(layers, o.layers)
        except ValueError as error:
            raise ValueError(f"--layers: {error}") from None
    elif o.layers == ["none"] and o.shapes:
        raise ValueError("--shapes cannot be given with --layers none")
    elif o.quick and len(layers) > 2:
        layers = [layers[len(layers) // 4], layers[-1]]
    o.nets = [] if list(o.nets) == ["none"] else list(dict.fromkeys(o.nets))
    for name in o.nets:
        checks.one_of("--nets", name, (*measure.NETS, "none"))
        if name == "none":
            raise ValueError("--nets none cannot be given with other nets")
    for sparsity in o.sparsity or ():
        if not 0 <= sparsity < 1:
            raise ValueError(f"--sparsity is {sparsity:g}, must be in [0, 1)")
    checks.integer("--repeats", o.repeats, low=1)
    if not (math.isfinite(o.budget) and o.budget > 0):
        raise ValueError(f"--budget is {o.budget:g}, must be more than 0 seconds")
    if o.isa is not None:
        checks.one_of("--isa", o.isa, core.available_isas())
    folder = Path(o.out or f"runs/bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out is {folder}, which is there already, must be a new folder")
    if o.threads is not None:
        core.set_num_threads(checks.integer("--threads", o.threads, low=1))
    if o.isa is not None:
        core.set_isa(o.isa)
    return o, layers, folder


def _measure(o, layers):
    """The measured part of the report."""
    start = time.perf_counter()
    threads = core.get_num_threads()
    before = load.idle(0.5 if o.quick else 1.0)
    during = load.Load()
    limits = [machine.limits(n) for n in measure.thread_counts(threads)]
    at_layers, at_nets = (sorted({*(o.sparsity or usual)}) for usual in (LAYER_SPARSITIES, NET_SPARSITIES))
    scaling_at = min((*at_layers, *at_nets), key=lambda s: abs(s - SCALING_SPARSITY))
    cases = [
        *measure.layer_cases(layers, at_layers, threads),
        *measure.net_cases(o.nets, at_nets, threads),
        *measure.scaling_cases(layers, o.nets, scaling_at, threads),
    ]
    by_threads = {at["threads"]: at for at in limits}

    restless = []

    def settle(n):
        if not machine.settle(by_threads[n]):
            restless.append(n)

    left = o.budget - (time.perf_counter() - start)
    try:
        with tqdm(total=len(cases) * o.repeats, desc="measuring", disable=None, leave=False) as bar:
            measure.run(cases, o.repeats, left, settle, done=bar.update)
    finally:
        core.set_num_threads(threads)
    judged = [results.judge(case.result(), by_threads[case.threads]) for case in cases]
    counts = [len(case.repetitions) for case in cases]
    return {
        "limits": limits,
        "load": {"before": before, "during": during.taken()},
        "repetitions": {"least": min(counts, default=0), "most": max(counts, default=0), "restless": len(restless)},
        "seconds": time.perf_counter() - start,
        "cases": judged,
        "break_even": results.break_evens(judged),
        "lines": results.lines(judged),
    }
