"""What a finished run shows: layers and their times, the time of a step, curves."""

import statistics
import time

from sparsetrain import nn
from sparsetrain.files import replacing
from sparsetrain.nn.summary import table


def layer_table(trainer, x, y, steps=10):
    """A table of the layers with the median times of their passes over so many training steps, and, with a method of
    backprop, the mean share of the output gradient that was not used, and its angle to the exact one where that is
    measured.

    The steps are real ones: the trainer goes on by as many.
    """
    layers = {}

    def record(name, module, phase, seconds, y):
        times = layers.setdefault(name, (module, {"forward": [], "backward": []}))[1]
        times[phase].append(1e3 * seconds)

    trainer.model.train()
    trainer.train_step(x, y)
    if trainer.backprop is not None:
        trainer.backprop.report()  # from here on
    with nn.observe(trainer.model, record):
        for _ in range(steps):
            trainer.train_step(x, y)
    gradients = {} if trainer.backprop is None else trainer.backprop.report()
    measured = any(g["angle"] is not None for g in gradients.values())
    rows = []
    for name, (module, times) in layers.items():
        weights = [p for p in module.parameters() if len(p.shape) > 1]
        shape, kept, sparsity = "-", "-", "-"
        if weights:
            size = sum(w.mask.size if hasattr(w, "mask") else w.data.size for w in weights)
            nnz = sum(w.nnz for w in weights)
            shape = ", ".join("x".join(map(str, w.shape)) for w in weights)
            kept, sparsity = f"{nnz:,}", f"{1 - nnz / size:.3f}"
        medians = [f"{statistics.median(t):.3f}" if t else "-" for t in times.values()]
        row = [name, type(module).__name__, shape, kept, sparsity, *medians]
        if gradients:
            here = gradients.get(name)
            row.append(f"{here['gradient_sparsity']:.3f}" if here else "-")
        if measured:
            row.append(f"{here['angle']:.0f}" if here and here["angle"] is not None else "-")
        rows.append(row)
    head = ["layer", "type", "shape", "weights kept", "sparsity", "ms forward", "ms backward"]
    head += ["gradient sparsity"] * bool(gradients) + ["angle"] * measured
    return table(head, rows)


def step_times(trainers, x, y, steps=20):
    """Median seconds of one training step of each trainer on one batch, taking turns."""
    times = [[] for _ in trainers]
    for trainer in trainers:
        trainer.model.train()
        trainer.train_step(x, y)
    for _ in range(steps):
        for trainer, list_of_one in zip(trainers, times, strict=True):
            start = time.perf_counter()
            trainer.train_step(x, y)
            list_of_one.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def plot_curves(path, histories, title):
    """Draw loss and accuracy over the epochs, training dashed and validation solid, as a PNG.

    histories: {label: History}. ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for axes, name, unit in zip(
        figure.subplots(1, 2),
        ("loss", "accuracy"),
        ("cross-entropy, nats", "share correct"),
        strict=True,
    ):
        for i, (label, history) in enumerate(histories.items()):
            epochs = history.column("epoch")
            for column, part, line in ((name, "train", "--"), (f"val_{name}", "validation", "-")):
                values = history.column(column)
                style = {"color": f"C{i}", "linestyle": line, "marker": "."}
                axes.plot(epochs, values, label=f"{label}, {part}", **style)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"{name} ({unit})")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
