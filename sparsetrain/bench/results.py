"""The results of a run as one JSON file: what it holds, and reading one that somebody else wrote."""

import json
import math
import statistics

from sparsetrain.bench import analysis, shapes
from sparsetrain.files import read_json, replacing

FORMAT, SCHEMA = "sparsetrain bench", 1
PARTS = {"forward", "backward", "step"}


def judge(case, limits):
    """The result of a measured case with its medians and, of a layer, what the machine allows: "passes".

    passes: {part: {"median", and of layers "operations", "bytes", "gflops", "attainable_gflops", "level", "share"}}.
    limits: `machine.limits()` of the case's number of threads.
    """
    medians = {part: statistics.median(seconds) for part, seconds in case["seconds"].items()}
    passes = {part: {"median": seconds} for part, seconds in medians.items()}
    if "kind" in case:
        for part, (operations, size) in shapes.work(case, case["stored"], case["sparsity"] == 0).items():
            roof, level = analysis.attainable(limits, operations, size)
            gflops = operations / medians[part] / 1e9
            passes[part] |= {"operations": operations, "bytes": size, "gflops": gflops}
            passes[part] |= {"attainable_gflops": roof, "level": level, "share": gflops / roof}
    return {**case, "passes": passes}


def series(cases, what):
    """{(name, part): [cases]} of one kind, in the order measured; over batch the name is without the batch."""
    found = {}
    for case in cases:
        if case["what"] == what:
            name = case["name"].removesuffix(f"-b{case['batch']}") if what == "batch" else case["name"]
            for part in case["passes"]:
                found.setdefault((name, part), []).append(case)
    return found


def median(case, part):
    """Median seconds of a part of a judged case."""
    return case["passes"][part]["median"]


def break_evens(cases):
    """[{"name", "part", "sparsity"}] of each layer and net; "both" is a layer's forward and backward."""
    found = []
    for what in ("layer", "net"):
        times = {}
        for (name, part), members in series(cases, what).items():
            for case in members:
                for key in [(name, part)] + [(name, "both")] * (what == "layer"):
                    at = times.setdefault(key, {})
                    at[case["sparsity"]] = at.get(case["sparsity"], 0.0) + median(case, part)
        found += [
            {"name": name, "part": part, "sparsity": analysis.break_even(at)} for (name, part), at in times.items()
        ]
    return found


def lines(cases):
    """[{"name", "part", "against", "start", "slope", "worst"}]: times against stored weights, and against batch.

    A dense layer runs other kernels and is left out.
    """
    found = []
    for what, against in (("layer", "stored"), ("net", "stored"), ("batch", "batch")):
        for (name, part), members in series(cases, what).items():
            sparse = [case for case in members if case["sparsity"] > 0]
            line = analysis.straight_line([case[against] for case in sparse], [median(case, part) for case in sparse])
            if line:
                found.append({"name": name, "part": part, "against": against, **line})
    return found


def write(path, report):
    """Write a report, whole or not at all."""
    with replacing(path) as file:
        json.dump({"format": FORMAT, "schema": SCHEMA, **report}, file, indent=1)
        file.write("\n")


def read(path):
    """The report in a file; ValueError says why it cannot be one, OSError where there is none."""
    report = read_json(path, FORMAT, SCHEMA)
    for name, kind in (("machine", dict), ("ran_with", dict), ("load", dict), ("limits", list), ("cases", list)):
        if not isinstance(report.get(name), kind):
            raise ValueError(f"{path} has no {name!r}")
    for number, case in enumerate(report["cases"]):
        if not _is_case(case):
            raise ValueError(f"{path}: cases[{number}] is not a measured case")
    return report


def _is_case(case):
    """Whether it has what a comparison needs."""
    if not isinstance(case, dict) or not isinstance(case.get("seconds"), dict) or not case["seconds"]:
        return False
    wanted = (("what", str), ("name", str), ("sparsity", (int, float)), ("batch", int), ("threads", int))
    return all(isinstance(case.get(name), kind) for name, kind in wanted) and all(
        part in PARTS and isinstance(times, list) and times and all(map(_is_time, times))
        for part, times in case["seconds"].items()
    )


def _is_time(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
