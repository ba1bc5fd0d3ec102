"""Time to accuracy of every method against dense training, PyTorch's and ours.

All runs of a net train side by side, a process each, and take turns epoch by epoch, so that noise hits all alike. They
have the same data, initial weights, optimiser and schedule, those of common.py; time is that of training steps with
their data, without evaluation. The configurations are those of the other scripts, which take the finished runs from
this one's file with --known (without ReSprop's angles).
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import common
import numpy as np
import sparseprop
import turns
from common import bench

MODELS = ("small-cnn", "resnet20")
# label: script and name there
CONFIGURATIONS = {
    "torch": ("torch", "torch"),
    "exact": ("sparseprop", "exact"),
    "Static-ERK-0.9": ("sparseprop", "Static-ERK-0.9"),
    "GMP-0.9": ("sparseprop", "GMP-0.9"),
    "SET-0.9": ("sparseprop", "SET-0.9"),
    "RigL-0.9": ("sparseprop", "RigL-0.9"),
    "AC/DC-0.9": ("sparseprop", "AC/DC-0.9"),
    "s=2": ("dithered", "s=2"),
    "sparsity=0.92": ("dithered", "sparsity=0.92"),
    "paper-warm-0.9": ("resprop", "paper-warm-0.9"),
}
NAMES = {
    "torch": "PyTorch, dense",
    "exact": "dense",
    "s=2": "Dithered, s = 2",
    "sparsity=0.92": "Dithered, 92 %",
    "paper-warm-0.9": "W-ReSprop, 90 %",
}
BELOW = (5.0, 2.0, 1.0)  # points below the dense run's accuracy
COLORS = ["0.0", "0.5", *(f"C{i}" for i in range(10) if i != 7)]  # of CONFIGURATIONS; C7 is grey, as is dense


class Run:
    """A training run in a process of its own."""

    def __init__(self, request):
        self.record, self.seconds = None, 0.0
        threads = str(request["threads"])
        # How sparsetrain's threads wait was set when this process imported it; a worker sets that for itself.
        environment = {**bench.ENVIRONMENT, "OMP_NUM_THREADS": threads}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("turns.py")], **pipes)
        self._write(json.dumps(request))

    def ready(self):
        """Wait until it may go on; its record is there when it has ended."""
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a worker ended with code {self.process.wait()}")
        self.record = json.loads(answer).get("record")

    def epoch(self):
        """Train for one more."""
        start = time.perf_counter()
        self._write("")
        self.ready()
        self.seconds += time.perf_counter() - start

    def _write(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self):
        self.process.communicate()


def main():
    quick = ["small-cnn/exact/*", "small-cnn/GMP-0.9/*", "small-cnn/s=2/*"]
    options = common.parse(__doc__, seeds=[0], epochs="the net's, as in sparseprop.py", quick_only=quick)
    runs, found = common.Runs(options), {}
    for model in MODELS:
        how = common.recipe(options, model, sparseprop.LONGER)
        for seed in options.seeds:
            records = race(runs, options, model, seed, how)
            for label, record in records.items():
                found.setdefault(model, {}).setdefault(label, []).append(record)
    for model, configurations in found.items():
        print_times(model, configurations)
    if found:
        common.draw(options, "time-to-accuracy", "Time to accuracy", (1, len(found)), lambda axes: plot(axes, found))


def race(runs, options, model, seed, how):
    """{label: record} of a net's finished runs; those that --only names are trained in turns unless all of them are."""
    names = {label: f"{model}/{label}/{seed}" for label in CONFIGURATIONS}
    requests, settings, records, workers = {}, {}, {}, {}
    for label, (script, name) in CONFIGURATIONS.items():
        request = {"script": script, "name": name, "model": model, "seed": seed}
        requests[label] = request | {"threads": options.threads, "recipe": asdict(how)}
        settings[label] = turns.settings(requests[label])
        record = runs.find(names[label], settings[label])
        if record is not None:
            records[label] = record
    chosen = [label for label in names if runs.chosen(names[label])]
    if all(label in records for label in chosen) or runs.late():
        return records
    try:
        for label in chosen:
            workers[label] = Run(requests[label])
        for run in workers.values():
            run.ready()
        for epoch in range(how.epochs):
            start = time.perf_counter()
            for label in chosen[epoch % len(chosen) :] + chosen[: epoch % len(chosen)]:
                run = workers[label]
                if run.record is None:
                    run.epoch()
                    if run.record is not None:
                        records[label] = runs.add(names[label], settings[label], run.record, run.seconds)
            print(f"{model}, epoch {epoch + 1}/{how.epochs}: {time.perf_counter() - start:.0f} s", flush=True)
    finally:
        for run in workers.values():
            run.close()
    return {label: records[label] for label in names if label in records}


def print_times(model, configurations):
    """Seconds until accuracies below the dense run's, and how many times as fast that is as PyTorch."""
    dense = common.accuracies(configurations.get("exact", []))
    if not dense:
        return
    goals = [np.mean(dense) / 100 - points / 100 for points in BELOW]
    theirs = [common.seconds_to(configurations.get("torch", []), goal) for goal in goals]
    theirs_epoch = epoch_seconds(configurations.get("torch", []))
    rows = []
    for label, records in configurations.items():
        correct = common.accuracies(records)
        row = [NAMES.get(label, label), f"{np.mean(correct):.2f}" if correct else "diverged"]
        row += [f"{epoch_seconds(records):.3g}", ratio(theirs_epoch, epoch_seconds(records))]
        for goal, their in zip(goals, theirs, strict=True):
            ours = common.seconds_to(records, goal)
            row += ["never" if ours is None else f"{ours:.0f}", ratio(their, ours)]
        rows.append(row)
    headings = ["", "accuracy %", "s an epoch", "x PyTorch"]
    for goal in goals:
        headings += [f"s to {100 * goal:.1f} %", "x PyTorch"]
    how = configurations["exact"][0]["settings"]
    print(f"\n{model} on {how['data']}, {how['epochs']} epochs")
    print(bench.table(headings, rows))


def epoch_seconds(records):
    """Median over the epochs of all records, nan without any."""
    return statistics.median([t for r in records for t in np.diff([0, *r["time_s"]])] or [np.nan])


def ratio(theirs, ours):
    return "-" if theirs is None or ours is None else f"{theirs / ours:.2f}"


def plot(axes, found):
    """A figure a model: accuracy over training time."""
    for ax, (model, configurations) in zip(axes[0], found.items(), strict=True):
        for label, records in configurations.items():
            whole = [r for r in records if r["accuracy"] is not None]
            if not whole:
                continue
            color = COLORS[list(CONFIGURATIONS).index(label)]
            time_s = np.mean([r["time_s"] for r in whole], axis=0)
            correct = 100 * np.mean([r["val_accuracy"] for r in whole], axis=0)
            ax.plot(time_s, correct, marker=".", color=color, label=NAMES.get(label, label))
        last = [100 * r["accuracy"] for records in configurations.values() for r in records if r["accuracy"]]
        ax.set_ylim(bottom=min(last, default=8) - 8)
        ax.set_title(model, fontsize=10)
        ax.set_xlabel("training time, s")
        ax.set_ylabel("test accuracy, %")
        ax.legend(fontsize=7)


if __name__ == "__main__":
    main()
