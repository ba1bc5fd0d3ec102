"""What the scripts that reproduce papers share: options, finished runs in a JSON file, training, tables and figures."""

import argparse
import datetime
import fnmatch
import functools
import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # for bench, and for sparsetrain where it is not installed

import sparsetrain as st  # noqa: E402
from bench import common as bench  # noqa: E402
from sparsetrain import backprop, data, named, optim  # noqa: E402
from sparsetrain.files import replacing  # noqa: E402
from sparsetrain.train import Callback, Progress, TrainingDiverged  # noqa: E402

QUICK_IMAGES, QUICK_BATCH = 128, 32
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


@dataclass(frozen=True)
class Recipe:
    """How a net is trained: SGD, momentum 0.9, weight decay 5e-4, cosine, one epoch of warm-up, as `sparsetrain train`.

    images: how many of the training set, None for all.
    """

    data: str
    lr: float
    batch: int
    epochs: int
    crop: int = 0
    flip: bool = False
    images: int | None = None


# lr of the LeNets: Caffe's examples/mnist/lenet_solver.prototxt; crop, flip, batch, lr of ResNet-20: He et al., CVPR
# 2016, section 4.2
RECIPES = {
    "lenet300": Recipe("mnist", 0.01, 64, 15),
    "lenet5": Recipe("mnist", 0.01, 64, 15),
    "small-cnn": Recipe("fashion-mnist", 0.1, 64, 12),
    "resnet20": Recipe("cifar10", 0.1, 128, 12, crop=4, flip=True),
}


IMAGE = {"lenet300": (1, 28, 28), "lenet5": (1, 28, 28), "small-cnn": (1, 28, 28), "resnet20": (3, 32, 32)}


# ---- options


def parse(description, seeds, epochs, quick_only, more=None):
    """The parsed command line. epochs: what its default is, in words; quick_only: globs of the runs of --quick; more:
    {option: argparse's settings} of the script's own."""
    name = Path(sys.argv[0]).stem.replace("_", "-")
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help=f"JSON file of the runs; default {ROOT / 'bench' / 'results'}/papers-{name}.json")
    add("--figures", type=Path, help=f"folder of papers-*.png; default {ROOT / 'docs' / 'figures'}")
    add("--seeds", nargs="+", type=int, default=seeds, help=f"a run each; default {' '.join(map(str, seeds))}")
    add("--epochs", type=int, help=f"of each run; default {epochs}")
    add("--only", nargs="+", metavar="GLOB", help="start only these runs (names such as resnet20/exact/0); default all")
    add("--known", nargs="+", type=Path, default=[], metavar="FILE", help="take finished runs from these files too")
    add("--minutes", type=float, default=math.inf, help="start no run after so many minutes; default no limit")
    add("--threads", type=int, default=st.get_num_threads(), help="default all")
    add("--force", action="store_true", help="run again what is finished")
    add("--quick", action="store_true", help="a few runs on few images, files in runs/")
    for option, settings in (more or {}).items():
        add(option, **settings)
    options = parser.parse_args()
    st.set_num_threads(options.threads)
    out, figures = ROOT / "bench" / "results" / f"papers-{name}.json", ROOT / "docs" / "figures"
    if options.quick:
        out, figures = Path("runs") / f"papers-{name}.json", Path("runs")
        options.seeds, options.epochs = options.seeds[:1], options.epochs or 2
        options.only = options.only or quick_only
        print("--quick: few images and epochs, whose numbers say nothing about the paper")
    options.out, options.figures = options.out or out, options.figures or figures
    return options


def recipe(options, model, longer=None):
    """The model's Recipe, as the options change it. longer: {model: epochs} where not those of RECIPES."""
    found = RECIPES[model]
    epochs = options.epochs or (longer or {}).get(model, found.epochs)
    if options.quick:  # this set is part of the package
        found = replace(found, data="fashion-mini", images=QUICK_IMAGES, batch=QUICK_BATCH)
    return replace(found, epochs=epochs)


# ---- finished runs


class Runs:
    """Finished runs in the file --out, which is written as a whole after each; one with the same settings is not run
    again."""

    def __init__(self, options):
        self.options, self.start = options, time.perf_counter()
        self.known = [_read(path)["runs"] for path in options.known]
        found = _read(options.out) if options.out.exists() else {"about": {"commands": []}, "runs": {}}
        self.runs = found["runs"]
        commands = found["about"]["commands"]
        command = shlex.join(["python", *sys.argv])
        self.about = {
            "machine": bench.machine(),
            "threads": st.get_num_threads(),
            "isa": st.get_isa(),
            "sparsetrain": st.__version__,
            "commands": commands if command in commands else [*commands, command],
        }

    def get(self, name, settings, work):
        """The record of a run, from work() -> dict unless it is finished; None if it is not and may not be started."""
        found = self.find(name, settings)
        if found is not None or not self.chosen(name) or self.late():
            return found
        start = time.perf_counter()
        return self.add(name, settings, work(), time.perf_counter() - start)

    def find(self, name, settings):
        """The record of a finished run with these settings, None if there is none or it is to be run again."""
        if self.chosen(name) and self.options.force:
            return None
        settings = json.loads(json.dumps(settings))
        for runs in (self.runs, *self.known):
            if runs.get(name, {}).get("settings") == settings:
                if runs is not self.runs:
                    self._keep(name, runs[name])
                return runs[name]
        return None

    def late(self):
        """Whether --minutes are over."""
        return time.perf_counter() - self.start > 60 * self.options.minutes

    def chosen(self, name):
        """Whether --only names this run."""
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.options.only or ["*"])

    def add(self, name, settings, result, seconds):
        """The record of a run that has just ended, which is kept."""
        result, seconds = rounded(result), round(seconds, 4)
        about = {"commit": self.about["machine"]["commit"], "date": _now(), "threads": self.about["threads"]}
        self._keep(name, {"settings": settings, **about, "seconds": seconds, **result})
        numbers = ", ".join(f"{key} {value}" for key, value in result.items() if np.isscalar(value))
        print(f"{name}: {numbers} ({seconds:.0f} s)", flush=True)
        return self.runs[name]

    def _keep(self, name, record):
        self.runs[name] = record
        lines = [f"  {json.dumps(key)}: {json.dumps(run)}" for key, run in self.runs.items()]
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.options.out) as file:
            about = json.dumps(self.about | {"date": _now()}, indent=1)
            file.write(f'{{"about": {about},\n "runs": {{\n' + ",\n".join(lines) + "\n}}\n")


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def rounded(value):
    """The same with numbers of six digits, so that the files stay small."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}")
    return value


# ---- training


@functools.cache
def load(name, images=None):
    """The data set, or its first so many images and half as many test images."""
    full = data.load(name)
    if images is None:
        return full
    test = tuple(part[: images // 2] for part in full.test)
    return data.Dataset(name, tuple(part[:images] for part in full.train), test, full.classes)


def trainer(model, recipe, seed, method=None, callbacks=(), sparsity=None):
    """A Trainer of the model of that name, its training and its test batches. sparsity: None, or a function (model,
    steps an epoch, epochs) -> a method of sparsity."""
    images = load(recipe.data, recipe.images)
    scale = {"mean": images.mean, "std": images.std}
    augment = {"crop": recipe.crop, "flip": recipe.flip}
    batches = data.Batches(*images.train, recipe.batch, shuffle=True, seed=seed, **augment, **scale)
    st.manual_seed(seed)
    net = named.model(model, images.train[0].shape[1:], len(images.classes))
    optimizer = optim.SGD(net.named_parameters(), lr=recipe.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = optim.warmup(optim.cosine(recipe.lr, recipe.epochs * len(batches)), len(batches))
    weights = None if sparsity is None else sparsity(model, len(batches), recipe.epochs)
    options = {"schedule": schedule, "backprop": method, "sparsity": weights, "callbacks": callbacks}
    made = st.Trainer(net, optimizer, **options)
    return made, batches, data.Batches(*images.test, 256, **scale)


def fit(trainer, train, epochs, test):
    """Train, and what a record says of it: curves by epoch, and what went wrong if the run diverged."""
    zeros = NaturalZeros()
    if trainer.backprop is None and trainer.sparsity is None:
        trainer.callbacks.append(zeros)
    diverged = None
    try:
        trainer.fit(train, epochs, test)
    except TrainingDiverged as error:
        diverged = str(error)
    if trainer.history.interrupted:
        raise KeyboardInterrupt
    rows = trainer.history
    reports = zeros.reports if trainer.backprop is None else [row["layers"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("loss", "val_loss", "val_accuracy")}
    return {
        "accuracy": None if diverged else columns["val_accuracy"][-1],
        "diverged": diverged,
        "gradient_sparsity": float(np.mean([_share(report) for report in reports])) if reports else None,
        **columns,
        "time_s": np.cumsum([row["time_s"] for row in rows]).tolist(),
        "sparsity": [_share(report) for report in reports],
        "weight_sparsity": [row["sparsity"] for row in rows],
        "explored": _explored(rows[-1]) if rows else None,
        "layers_sparsity": _by_layer(reports, "gradient_sparsity"),
        "layers_angle": _by_layer(reports, "angle"),
    }


def _share(report):
    values = sum(layer["values"] for layer in report.values())
    return sum(layer["values"] * layer["gradient_sparsity"] for layer in report.values()) / max(1, values)


def _explored(row):
    """Share of the weights that existed at some time, None without a method of sparsity."""
    weights = sum(layer["weights"] for layer in row["weights"].values())
    return sum(layer["weights"] * layer["explored"] for layer in row["weights"].values()) / weights if weights else None


def _by_layer(reports, what):
    """{layer: [value by epoch]} of the layers where it was measured."""
    names = [
        name for name in (reports[0] if reports else ()) if any(report[name][what] is not None for report in reports)
    ]
    return {name: [report[name][what] for report in reports] for name in names}


class _Nonzero(backprop.Method):
    """The exact gradient, its zeros counted."""

    def select(self, layer, x, geometry, dy):
        return backprop.nonzero()


class NaturalZeros(Callback):
    """Counts the zeros that exact gradients have, in the first step of each epoch."""

    def __init__(self):
        self.reports, self.method = [], _Nonzero()

    def on_epoch_begin(self, trainer, batches):
        self.method.attach(trainer.model)

    def on_batch_end(self, trainer, mean):
        if self.method.attached:
            self.reports.append(self.method.report())
            self.method.detach()


def settings(model, recipe, seed, method, sparsity=None):
    """What a run's result depends on; the arguments are those of trainer()."""
    found = {"model": model, **asdict(recipe), "seed": seed, "backprop": repr(method)}
    if sparsity is not None:
        found["sparsity"] = repr(sparsity(model, 1, recipe.epochs))  # as if an epoch had one step
    return found


def run_all(runs, options, models, methods, callbacks=lambda: (), sparsities=None, longer=None):
    """{model: {configuration: [records]}} of models x methods x seeds.

    methods: {configuration: f(seed, model) -> Method or None}; callbacks: a function that makes those of a run;
    sparsities: {configuration: trainer()'s argument sparsity}; longer: recipe()'s.
    """
    found = {}
    for model in models:
        how = recipe(options, model, longer)
        for name, make in methods.items():
            for seed in options.seeds:
                method, label = make(seed, model), f"{model}/{name}/{seed}"
                weights = (sparsities or {}).get(name)

                def work(model=model, how=how, seed=seed, method=method, label=label, weights=weights):
                    shown = [Progress(label=label), *callbacks()]
                    made, train, test = trainer(model, how, seed, method, shown, weights)
                    return fit(made, train, how.epochs, test)

                record = runs.get(label, settings(model, how, seed, method, weights), work)
                if record is not None:
                    found.setdefault(model, {}).setdefault(name, []).append(record)
    return found


# ---- tables


def mean_and_error(values):
    """Mean and its standard error, nan for a single value."""
    values = np.asarray(values, float)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def accuracies(records):
    """Final accuracies in per cent of the runs that did not diverge."""
    return [100 * r["accuracy"] for r in records if r["accuracy"] is not None]


def drop(records, exact):
    """(points lost against exact, standard error); nan where a run diverged or there is no exact one."""
    ours, theirs = accuracies(records), accuracies(exact)
    if len(ours) < len(records) or not ours or not theirs:
        return math.nan, math.nan
    (a, da), (b, db) = mean_and_error(ours), mean_and_error(theirs)
    return b - a, math.hypot(da, db)


def verdict(lost, error, limit):
    """Whether at most so many points of accuracy are lost, in words."""
    if math.isnan(lost):
        return "NOT REPRODUCED, a run diverged"
    if lost <= limit:
        return "reproduced"
    return "not decided, within 2 s.e." if lost - 2 * error <= limit else "NOT REPRODUCED"


def sparsity(records):
    return float(np.mean([r["gradient_sparsity"] or 0 for r in records]))


def seconds_to(records, accuracy):
    """Mean training time until the test accuracy (a share) was reached, None if a run never did."""
    times = [
        next((t for t, a in zip(r["time_s"], r["val_accuracy"], strict=True) if a >= accuracy), None) for r in records
    ]
    return None if None in times or not times else float(np.mean(times))


def print_models(found):
    """A table of each model: accuracy, loss against exact, achieved sparsity, time."""
    for model, configurations in found.items():
        exact = configurations.get("exact", [])
        goal = np.mean(accuracies(exact)) / 100 - 0.01 if accuracies(exact) else math.inf
        rows = []
        for name, records in configurations.items():
            correct = accuracies(records)
            mean, error = mean_and_error(correct) if correct else (math.nan, math.nan)
            lost, off = drop(records, exact)
            epochs = [r["time_s"][-1] / len(r["time_s"]) for r in records if r["time_s"]]
            until = seconds_to(records, goal)
            rows.append(
                [
                    name,
                    str(len(records)),
                    str(len(records) - len(correct)),
                    f"{mean:.2f}",
                    f"{error:.2f}",
                    f"{lost:+.2f}",
                    f"{off:.2f}",
                    f"{100 * sparsity(records):.1f}",
                    f"{np.mean(epochs):.3g}" if epochs else "-",
                    "never" if until is None else f"{until:.3g}",
                ]
            )
        headings = ["runs", "diverged", "accuracy %", "s.e.", "points lost", "s.e.", "zeros %", "s an epoch"]
        how = next(iter(configurations.values()))[0]["settings"]
        print(f"\n{model} on {how['data']}, {how['epochs']} epochs")
        print(bench.table(["", *headings, f"s to {100 * goal:.1f} %"], rows))


# ---- figures


def draw(options, name, title, shape, plot):
    """Write papers-<name>.png: plot(axes) fills shape = (rows, columns) of them."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figures: they need matplotlib (pip install 'sparsetrain[plot]')")
        return
    figure = Figure(figsize=(4.6 * shape[1], 3.6 * shape[0] + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(*shape, squeeze=False)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    plot(axes)
    options.figures.mkdir(parents=True, exist_ok=True)
    path = options.figures / f"papers-{name}.png"
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)
    print(f"wrote {path}")


def draw_models(options, name, title, found, x_label, series, curves):
    """A row of figures a model: accuracy against x, against achieved sparsity, and over the epochs (over time:
    time_to_accuracy.py).

    series: {label: {x: configuration}}; curves: the configurations whose accuracy by epoch is shown, after exact.
    """

    def plot(axes):
        for (model, configurations), (by_x, by_sparsity, by_epoch) in zip(found.items(), axes, strict=True):
            exact = accuracies(configurations.get("exact", []))
            for ax in (by_x, by_sparsity):
                if exact:
                    ax.axhline(np.mean(exact), color="0.4", linestyle="--", label="exact")
                ax.set_ylabel("test accuracy, %")
            for i, (label, points) in enumerate(series.items()):
                there = [(x, configurations[c]) for x, c in points.items() if accuracies(configurations.get(c, []))]
                if not there:
                    continue
                y = [np.mean(accuracies(records)) for _, records in there]
                bars = [np.std(accuracies(records)) for _, records in there]
                style = {"yerr": bars, "color": f"C{i}", "marker": "o", "markersize": 4, "capsize": 2, "label": label}
                by_x.errorbar([x for x, _ in there], y, **style)
                by_sparsity.errorbar([100 * sparsity(records) for _, records in there], y, **style)
            for i, c in enumerate(["exact", *curves]):
                records = [r for r in configurations.get(c, []) if r["accuracy"] is not None]
                if records:
                    correct = 100 * np.mean([r["val_accuracy"] for r in records], axis=0)
                    color = "0.4" if c == "exact" else f"C{i - 1}"
                    by_epoch.plot(range(1, len(correct) + 1), correct, color=color, marker=".", label=c)
            by_x.set_xticks(sorted({x for points in series.values() for x in points}))
            by_x.set_xlabel(x_label)
            by_sparsity.set_xlabel("gradient sparsity, %")
            by_epoch.set_xlabel("epoch")
            by_epoch.set_ylabel("test accuracy, %")
            for ax in (by_x, by_sparsity, by_epoch):
                ax.set_title(model, fontsize=10)
                if ax.get_legend_handles_labels()[0]:
                    ax.legend(fontsize=7)

    found = {model: configurations for model, configurations in found.items() if set(configurations) > {"exact"}}
    if found:
        draw(options, name, title, (len(found), 3), plot)
