"""Two results files side by side: what differs between the machines, and which cases became faster or slower."""

import statistics
from pathlib import Path

from sparsetrain.bench import report as text
from sparsetrain.bench import results
from sparsetrain.bench.load import too_busy
from sparsetrain.nn.summary import table

ENOUGH = 3  # repetitions on both sides to tell a difference from noise


def compare(path_a, path_b):
    """The text of a comparison. ValueError or OSError for a file that is not a whole result."""
    a, b = results.read(path_a), results.read(path_b)
    cases_a, cases_b = _by_key(a), _by_key(b)
    both = [key for key in cases_a if key in cases_b]
    blocks = [f"A: {_about(path_a, a)}\nB: {_about(path_b, b)}", _differences(a, b)]
    if both:
        rows = [_row(key, cases_a[key], cases_b[key]) for key in both]
        head = ("case", "pass", "A ms", "B ms", "B / A", "repetitions", "more than noise")
        blocks.append(table(head, rows))
        ratios = [statistics.median(cases_b[key]) / statistics.median(cases_a[key]) for key in both]
        blocks.append(f"{len(both)} in both; geometric mean of B / A: {statistics.geometric_mean(ratios):.3f}")
    else:
        blocks.append("no case is in both")
    for name, mine, others in (("A", cases_a, cases_b), ("B", cases_b, cases_a)):
        only = _grouped(label for label, part in mine if (label, part) not in others)
        if only:
            blocks.append("\n".join([f"only in {name}:", *only]))
    return "\n\n".join(blocks)


def differs(a, b):
    """Whether the middle halves of two lists of seconds are apart; None if either has fewer than three."""
    if min(len(a), len(b)) < ENOUGH:
        return None
    (low_a, _, high_a), (low_b, _, high_b) = (statistics.quantiles(s, n=4, method="inclusive") for s in (a, b))
    return high_a < low_b or high_b < low_a


def _by_key(report):
    """{(case, pass): seconds}. What was measured with all threads of its run has no number of threads."""
    found = {}
    for case in report["cases"]:
        # Of nets the name has no batch.
        batch = "" if "kind" in case else f" batch {case['batch']}"
        threads = f" (threads {case['threads']})" if case["what"] == "threads" else ""
        over = " (batch)" if case["what"] == "batch" else ""
        for part, seconds in case["seconds"].items():
            found[f"{case['name']}{batch} at {case['sparsity']:g}{threads}{over}", part] = seconds
    return found


def _grouped(labels):
    """A line for each layer or net: its name, and all of its cases."""
    found = {}
    for label in labels:
        name, _, rest = label.partition(" at ")
        found.setdefault(name, {})[rest] = None
    return [f"  {name} at {', '.join(rests)}" for name, rests in found.items()]


def _row(key, a, b):
    before, after = statistics.median(a), statistics.median(b)
    verdict = {None: "too few", True: "yes", False: "no"}[differs(a, b)]
    return (*key, text.ms(before), text.ms(after), f"{after / before:.3f}", f"{len(a)}, {len(b)}", verdict)


def _about(path, report):
    busy = [line for taken in report["load"].values() for line in [too_busy(taken)] if line]
    warning = f"\n   WARNING, not to be trusted: {'; '.join(busy)}" if busy else ""
    return f"{Path(path)}, {report.get('date', 'no date')}{warning}"


def _differences(a, b):
    """A table of what differs between the machines and settings, and of what they can do at best."""
    rows = []
    for group in ("machine", "ran_with"):
        for name in {**a[group], **b[group]}:
            values = [_shown(report[group].get(name)) for report in (a, b)]
            if values[0] != values[1]:
                rows.append((name, *values, ""))
    if a.get("sparsetrain") != b.get("sparsetrain"):
        rows.append(("sparsetrain", _shown(a.get("sparsetrain")), _shown(b.get("sparsetrain")), ""))
    best_a, best_b = _best(a), _best(b)
    for name in best_a:
        if name in best_b:
            ratio = f"{best_b[name] / best_a[name]:.3f}"
            rows.append((name, f"{best_a[name]:.0f}", f"{best_b[name]:.0f}", ratio))
    return table(("machine", "A", "B", "B / A"), rows) if rows else "the machines and settings are the same"


def _best(report):
    best = {}
    for at in report["limits"]:
        threads = f"{at['threads']} thread{'s' * (at['threads'] > 1)}"
        best[f"{threads}: multiply-adds, GFLOP/s"] = at["fma_gflops"]
        for level in at["levels"]:
            for kind in ("read", "update"):
                best[f"{threads}: {level['name']} {kind}, GB/s"] = level[f"{kind}_gbs"]
    return best


def _shown(value):
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
