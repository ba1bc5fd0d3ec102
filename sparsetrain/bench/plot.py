"""A run's results as figures. Needs matplotlib, which is imported only here and only when something is drawn."""

import math

from sparsetrain.bench import report as text
from sparsetrain.bench import results
from sparsetrain.files import replacing

# Okabe and Ito's colours, which people who see few colours can tell apart; markers help where they repeat.
GREY = "0.45"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = "osD^vPX*"
PARTS = {
    "forward": {"color": COLOURS[0], "marker": "o"},
    "backward": {"color": COLOURS[1], "marker": "s"},
    "step": {"color": COLOURS[2], "marker": "D"},
}


def draw(report, folder):
    """Write a PNG for each figure that the report has data for; returns their paths. ImportError without matplotlib."""
    paths = []
    for make in (roofline, sparsity, weights, scaling):
        figure = make(report)
        if figure is not None:
            path = folder / f"{make.__name__}.png"
            with replacing(path, "wb") as file:
                figure.savefig(file, format="png", dpi=120)
            paths.append(path)
    return paths


def _figure(report, name, size):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{name}\n{text.title(report)}", fontsize=11)
    return figure


def _panels(report, name, keys):
    """A figure with a grid of axes, each with one of keys as its title; yields (key, axes) and the figure."""
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = _figure(report, name, (max(7.0, 3.3 * columns), 1.4 + 2.7 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(keys) :]:
        axes.set_axis_off()
    for key, axes in zip(keys, grid, strict=False):
        axes.set_title(key, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    return figure, dict(zip(keys, grid, strict=False))


def _legend(figure, axes):
    """One legend below the figure for what the axes have, each label once."""
    found = {}
    for ax in axes:
        found |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(4, len(found)), fontsize=8)


# ---- figures


def roofline(report):
    """GFLOP/s on stored weights over operations a byte, below the limits of the machine."""
    layers = results.series(report["cases"], "layer")
    if not layers:
        return None
    figure = _figure(report, "Layers and the machine's roofline", (11, 6.2))
    both = figure.subplots(1, 2, sharex=True, sharey=True)
    names = list(dict.fromkeys(name for name, _ in layers))
    points = [
        (p["operations"] / p["bytes"], p["gflops"])
        for (_, part), cases in layers.items()
        for p in (case["passes"][part] for case in cases)
    ]
    peak = text.peak(report)["fma_gflops"]
    left, right = min(x for x, _ in points) / 2, max(max(x for x, _ in points), 50) * 2
    for axes, part in zip(both, ("forward", "backward"), strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(min(y for _, y in points) / 2, peak * 4)  # room for the names of the roofs
        _roofs(axes, text.bandwidths(report), peak, left, right)
        for i, name in enumerate(names):
            found = [case["passes"][part] for case in layers[name, part]]
            x, y = [p["operations"] / p["bytes"] for p in found], [p["gflops"] for p in found]
            style = {"color": COLOURS[i % 8], "marker": MARKERS[(i + i // 8) % 8], "markersize": 5}
            axes.plot(x, y, label=name, linewidth=1, **style)
        axes.set_title(part, fontsize=10)
        axes.set_xlabel("operations a byte of x, y, weights and gradients, each moved once")
        axes.grid(alpha=0.3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    both[0].set_ylabel("GFLOP/s on stored weights")
    lowest, highest = (f(c["sparsity"] for c in next(iter(layers.values()))) for f in (min, max))
    if lowest < highest:
        both[0].annotate(
            f"along a line: sparsity {highest:g} (left) to {lowest:g} (right)",
            (0.03, 0.03),
            xycoords="axes fraction",
            fontsize=8,
        )
    _legend(figure, both[:1])
    return figure


def _roofs(axes, bandwidths, peak, left, right):
    axes.plot([left, right], [peak, peak], color=GREY, linewidth=1.2)
    axes.annotate(f"multiply-add peak {peak:.0f} GFLOP/s", (right / 1.1, peak * 1.08), ha="right", fontsize=8)
    for name, speed in bandwidths.items():
        ridge = peak / speed
        if ridge <= left:  # not a limit anywhere in the figure
            continue
        axes.plot([left, ridge], [left * speed, peak], color=GREY, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"{name} {speed:.0f} GB/s",
            (ridge, peak * 1.08),
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8,
        )


def sparsity(report):
    """Time over sparsity, with the dense time and the break-even point."""
    found = results.series(report["cases"], "layer") | results.series(report["cases"], "net")
    if not found:
        return None
    names = list(dict.fromkeys(name for name, _ in found))
    figure, panels = _panels(report, "Time against sparsity", names)
    points = {(point["name"], point["part"]): point["sparsity"] for point in report["break_even"]}
    for (name, part), cases in found.items():
        axes, style = panels[name], PARTS[part]
        x, y = [_place(case["sparsity"]) for case in cases], [1e3 * results.median(case, part) for case in cases]
        label = {"forward": "layer, forward", "backward": "layer, backward", "step": "net, training step"}[part]
        axes.plot(x, y, label=label, linewidth=1.2, markersize=4, **style)
        dense = next((t for case, t in zip(cases, y, strict=True) if case["sparsity"] == 0), None)
        if dense is not None:
            axes.axhline(dense, color=GREY, linewidth=0.9, linestyle=":", label="the same, dense")
        point = points.get((name, part))
        if isinstance(point, float):
            ring = {"marker": "o", "markersize": 10, "fillstyle": "none", "linestyle": "none"}
            axes.plot([_place(point)], [dense], color="black", label="break-even", **ring)
    shown = sorted({case["sparsity"] for cases in found.values() for case in cases})
    ticks = [s for s in shown if s in (0, 0.5, 0.8, 0.9, 0.95, 0.99)] or shown
    for name, axes in panels.items():
        _log_ms(axes)
        axes.set_xticks([_place(s) for s in ticks], [f"{s:g}" for s in ticks])
        axes.set_xlabel("sparsity (1 - sparsity on a log scale)", fontsize=8)
        found_here = [(part, text.share(points[name, part])) for part in PARTS if points.get((name, part)) is not None]
        _note(axes, "break-even", found_here, "lower left")
    _legend(figure, panels.values())
    return figure


def _log_ms(axes):
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("ms", fontsize=8)


def _note(axes, what, values, corner):
    """`what` and a line for each (pass, text) in a corner of the axes that the curves leave free."""
    from matplotlib.offsetbox import AnchoredText

    if values:
        lines = [what, *(f"{part}: {value}" for part, value in values)]
        box = AnchoredText("\n".join(lines), loc=corner, prop={"fontsize": 7.5}, frameon=False, pad=0.2)
        axes.add_artist(box)


def _place(sparsity):
    """Where a sparsity lies on the axis: the weights that are left, on a log scale."""
    return -math.log10(1 - sparsity)


def weights(report):
    """Time over stored weights with its straight line."""
    found = results.series(report["cases"], "layer") | results.series(report["cases"], "net")
    lines = {(line["name"], line["part"]): line for line in report["lines"] if line["against"] == "stored"}
    names = list(dict.fromkeys(name for name, _ in lines))
    if not names:
        return None
    figure, panels = _panels(report, "Time against stored weights (sparse only), and the straight line", names)
    for key, line in lines.items():
        axes, style = panels[key[0]], PARTS[key[1]]
        cases = [case for case in found[key] if case["sparsity"] > 0]
        x = [case["stored"] / 1e3 for case in cases]
        y = [1e3 * results.median(case, key[1]) for case in cases]
        label = f"{key[1]}, measured" if key[1] != "step" else "training step, measured"
        axes.plot(x, y, linestyle="none", markersize=4.5, label=label, **style)
        _line(axes, line, max(x), 1e3, style, "straight line")
    for name, axes in panels.items():
        axes.set_xlabel("stored weights, thousands", fontsize=8)
        _from_zero(axes)
        off = [(part, f"{lines[name, part]['worst']:.0%}") for part in PARTS if (name, part) in lines]
        _note(axes, "farthest from the line", off, "upper left")
    _legend(figure, panels.values())
    return figure


def scaling(report):
    """How many times as fast with more threads, and time over batch with its straight line."""
    threads = results.series(report["cases"], "threads")
    batches = results.series(report["cases"], "batch")
    keys = [key for key, found in (("threads", threads), ("batch", batches)) if found]
    if not keys:
        return None
    figure = _figure(report, f"Scaling over {' and '.join(keys)}", (5.6 * len(keys), 4.8))
    panels = dict(zip(keys, figure.subplots(1, len(keys), squeeze=False).ravel(), strict=True))
    if threads:
        _threads(panels["threads"], threads)
    if batches:
        _batches(panels["batch"], batches, report["lines"])
    for axes in panels.values():
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left")
    return figure


def _threads(axes, found):
    counts = [case["threads"] for case in next(iter(found.values()))]
    axes.plot(counts, counts, color=GREY, linestyle="--", linewidth=1, label="as many times as threads")
    for size, ((name, part), cases) in zip((11, 8, 5), found.items(), strict=False):
        times = [results.median(case, part) for case in cases]
        label = f"{name} at {cases[0]['sparsity']:g}, {part}"
        # The first is the largest, so that points on top of each other are all seen.
        axes.plot(counts, [times[0] / t for t in times], label=label, markersize=size, **PARTS[part])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_ylim(0.8, max(counts) * 1.9)  # room for the legend
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("threads")
    axes.set_ylabel("times as fast as one thread")


def _batches(axes, found, lines):
    for line in (line for line in lines if line["against"] == "batch"):
        cases = found[line["name"], line["part"]]
        style = PARTS[line["part"]]
        batches = [case["batch"] for case in cases]
        label = f"{line['name']} at {cases[0]['sparsity']:g}, {line['part']}"
        times = [1e3 * results.median(case, line["part"]) for case in cases]
        axes.plot(batches, times, linestyle="none", label=label, **style)
        _line(axes, line, max(batches), 1, style, f"straight line, at most {line['worst']:.0%} off")
    axes.set_xticks(batches)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("batch, images")
    _from_zero(axes)


def _line(axes, line, end, unit, style, label):
    """The fitted line from 0 to `end` units of x, in ms."""
    y = [1e3 * (line["start"] + line["slope"] * x * unit) for x in (0, end)]
    axes.plot([0, end], y, color=style["color"], linewidth=1, label=label)


def _from_zero(axes):
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.set_ylabel("ms", fontsize=8)
