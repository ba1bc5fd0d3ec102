"""A run's results as tables of text."""

from sparsetrain.bench import analysis, results
from sparsetrain.bench.load import MAX_OTHERS, too_busy
from sparsetrain.nn.summary import table


def tables(report):
    """All tables of a report, with a title above each."""
    cases = report["cases"]
    parts = [
        ("The machine at its best (GB/s: read / update)", _limits(report["limits"])),
        ("Layers: GFLOP/s on stored weights, and what the roofline allows", _layers(cases)),
        ("Nets: training steps with SGD", _nets(cases)),
        (
            "Sparse against dense, and time as a straight line over stored weights",
            _against_dense(report),
        ),
        ("Scaling over threads", _threads(cases)),
        ("Scaling over batch", _batches(report)),
    ]
    return "\n\n".join(f"{title}\n\n{table(head, rows)}" for title, (head, rows) in parts if rows)


def title(report):
    """One line: the machine, threads and instruction set."""
    ran = report["ran_with"]
    threads = f"{ran['threads']} thread{'s' * (ran['threads'] > 1)}"
    return f"{report['machine']['cpu']}, {threads}, {ran['isa']}, float32"


def notes(report):
    """Lines on how many repetitions there were and whether others used the machine."""
    counts, ran = report["repetitions"], report["ran_with"]
    lines = []
    if counts["most"]:
        done = f"{counts['least']}" + f" to {counts['most']}" * (counts["least"] < counts["most"])
        why = f", as the budget of {ran['budget']:g} s was used up" * (counts["least"] < ran["repeats"])
        lines.append(f"repetitions: {done} of {ran['repeats']}{why}; medians; {report['seconds']:.0f} s in all")
    if counts["restless"]:
        lines.append(f"{counts['restless']} repetitions began while the threads did not reach their speed together")
    busy = {when: too_busy(taken) for when, taken in report["load"].items()}
    warnings = [f"WARNING, not to be trusted: {when} the run {line}" for when, line in busy.items() if line]
    if report["load"]["before"] is None:
        lines.append("load of the machine: unknown, this system does not tell")
    elif not warnings:
        lines.append(f"load of the machine: others took at most {MAX_OTHERS:.0%} of a core")
    return lines + warnings


def ms(seconds):
    """Milliseconds with three digits or more."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _limits(limits):
    names = list(dict.fromkeys(level["name"] for at in limits for level in at["levels"]))
    rows = []
    for at in limits:
        levels = {level["name"]: f"{level['read_gbs']:.0f} / {level['update_gbs']:.0f}" for level in at["levels"]}
        rows.append(
            (str(at["threads"]), f"{at['fma_gflops']:.0f}".rjust(11), *(levels.get(name, "-") for name in names))
        )
    return ("threads", "FMA GFLOP/s", *names), rows


def _layers(cases):
    head = ["layer", "sparsity", "stored"]
    for part in ("forward", "backward"):
        head += [f"{part} ms", "GFLOP/s", "roofline", "share"]
    rows = []
    for case in cases:
        if case["what"] == "layer":
            row = [case["name"], f"{case['sparsity']:g}", f"{case['stored']:,}"]
            for judged in case["passes"].values():
                roof = f"{judged['attainable_gflops']:.0f}"
                row += [ms(judged["median"]), f"{judged['gflops']:.0f}", roof, f"{judged['share']:.0%}"]
            rows.append(row)
    return head, rows


def _nets(cases):
    dense = {c["name"]: results.median(c, "step") for c in cases if c["what"] == "net" and c["sparsity"] == 0}
    rows = []
    for case in cases:
        if case["what"] == "net":
            seconds = results.median(case, "step")
            faster = f"{dense[case['name']] / seconds:.2f}" if case["name"] in dense else "-"
            speed = f"{case['batch'] / seconds:,.0f}"
            stored = f"{case['stored']:,}"
            rows.append((case["name"], f"{case['sparsity']:g}", str(case["batch"]), stored, ms(seconds), speed, faster))
    return ("net", "sparsity", "batch", "stored", "ms a step", "images/s", "times dense"), rows


def _against_dense(report):
    lines = {(line["name"], line["part"]): line for line in report["lines"] if line["against"] == "stored"}
    points = {(point["name"], point["part"]): point["sparsity"] for point in report["break_even"]}
    rows = []
    for key in sorted({**points, **lines}, key=lambda key: _order(key, report["cases"])):
        point, line = points.get(key), lines.get(key)
        if point is None and line is None:
            continue
        fit = ("-", "-", "-")
        if line:
            fit = ms(line["start"]), f"{1e9 * line['slope']:.2f}", f"{line['worst']:.0%}"
        rows.append((*key, share(point), *fit))
    return ("", "pass", "break-even sparsity", "ms without weights", "ns a weight", "worst deviation"), rows


def share(point):
    """A break-even point in words."""
    return "-" if point is None else point if isinstance(point, str) else f"{point:.2f}"


def _order(key, cases):
    names = [case["name"] for case in cases]
    return names.index(key[0]), ("forward", "backward", "both", "step").index(key[1])


def _threads(cases):
    rows = []
    for (name, part), members in results.series(cases, "threads").items():
        one = results.median(members[0], part)
        for case in members:
            seconds = results.median(case, part)
            faster = one / seconds
            label = f"{name} at {case['sparsity']:g}"
            rows.append((label, part, str(case["threads"]), ms(seconds), f"{faster:.2f}"))
    return ("", "pass", "threads", "ms", "times one thread"), rows


def _batches(report):
    lines = {(line["name"], line["part"]): line for line in report["lines"] if line["against"] == "batch"}
    rows = []
    for (name, part), members in results.series(report["cases"], "batch").items():
        line = lines.get((name, part))
        worst = f"{line['worst']:.0%}" if line else "-"
        for case in members:
            seconds = results.median(case, part)
            label = f"{name} at {case['sparsity']:g}"
            each = f"{1e6 * seconds / case['batch']:.1f}"
            rows.append((label, part, str(case["batch"]), ms(seconds), each, worst))
    return ("", "pass", "batch", "ms", "us an image", "worst deviation of the line"), rows


def machine_lines(report):
    """What the machine is."""
    machine = report["machine"]
    caches = ", ".join(f"{name} {size >> 10} KB" for name, size in machine["caches"].items()) or "unknown"
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GB" if machine["memory_bytes"] else "unknown"
    virtual = ", virtual" if machine["virtual"] else ""
    return [
        f"sparsetrain {report['sparsetrain']}: {title(report)}",
        f"{machine['cpus']} CPUs, caches {caches}, memory {memory}{virtual}, {machine['system']}",
    ]


def peak(report):
    """The limits at the run's number of threads."""
    return next(at for at in report["limits"] if at["threads"] == report["ran_with"]["threads"])


def bandwidths(report):
    """{level: GB/s} at the run's number of threads."""
    return {level["name"]: analysis.bandwidth(level) for level in peak(report)["levels"]}
