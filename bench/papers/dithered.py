"""Dithered backprop: accuracy, zeros and time over the step s, the variance of averaged gradients, and the noise in
each layer.

Source of the claims: Wiedemann et al., arXiv 2004.04729: 92 % zeros on average "at no or negligible accuracy drop";
gradients of N nodes may be averaged, which divides their variance by N. Nets and training are those of common.py.
"""

import itertools
import math
from dataclasses import asdict

import common
import numpy as np
from common import bench

from sparsetrain import backprop, nn

STEPS = (0.5, 1.0, 2.0, 4.0, 8.0)
TARGET = 0.92
NEGLIGIBLE = 0.5  # points of accuracy; the paper gives no number
NODES, DRAWS = (1, 2, 4, 8, 16), 256
NOISE = ("lenet5", "small-cnn", "resnet20")
# Steps of training before it is measured, passes until s holds the target, and passes that are measured
NOISE_STEPS, SETTLING, NOISE_DRAWS = 150, 12, 16
METHODS = {
    "exact": lambda seed, model: None,
    **{f"s={s:g}": lambda seed, model, s=s: backprop.Dithered(s=s, seed=seed) for s in STEPS},
    f"sparsity={TARGET:g}": lambda seed, model: backprop.Dithered(sparsity=TARGET, seed=seed),
}


def main():
    options = common.parse(
        __doc__,
        seeds=[0, 1, 2],
        epochs="the net's, see common.py",
        quick_only=["*/exact/*", "*/s=[28]/*", "lenet5/*"],
    )
    runs = common.Runs(options)
    found = common.run_all(runs, options, common.RECIPES, METHODS)
    common.print_models(found)
    for model, configurations in found.items():
        print_target(model, configurations)
    variances = [variance(runs, options, seed) for seed in options.seeds]
    variances = [record for record in variances if record is not None]
    if variances:
        print_variance(variances)
    for model in NOISE:
        records = [noise(runs, options, model, seed) for seed in options.seeds]
        if records := [record for record in records if record is not None]:
            print_noise(model, records)
    draw(options, found, variances)


def print_target(model, configurations):
    """Which s gives the target share of zeros, between the measured ones, and what it costs."""
    exact = configurations.get("exact", [])
    if not common.accuracies(exact):
        return
    points = []
    for s in STEPS:
        records = configurations.get(f"s={s:g}", [])
        lost, error = common.drop(records, exact) if records else (math.nan, math.nan)
        if not math.isnan(lost):
            points.append((common.sparsity(records), math.log(s), lost, error))
    print(f"\n{model}: exact gradients have {common.sparsity(exact):.1%} zeros of their own")
    zeros = [point[0] for point in points]
    if not points or not min(zeros) <= TARGET <= max(zeros):
        between = f", they give {min(zeros):.1%} to {max(zeros):.1%}" if points else ""
        print(f"{model}: {TARGET:.0%} zeros are outside of what the finished runs cover{between}")
    else:
        points.sort()
        columns = list(zip(*points, strict=True))
        log_s, lost, error = (float(np.interp(TARGET, columns[0], column)) for column in columns[1:])
        print(f"{model}: s = {math.exp(log_s):.2f} gives {TARGET:.0%} zeros and loses {cost(lost, error)}")
    held = configurations.get(f"sparsity={TARGET:g}", [])
    if held:
        lost, error = common.drop(held, exact)
        share = common.sparsity(held)
        print(f"{model}: held at {TARGET:.0%} by changing s ({share:.1%} achieved), it loses {cost(lost, error)}")


def cost(lost, error):
    words = common.verdict(lost, error, NEGLIGIBLE)
    return f"{lost:+.2f} points (s.e. {error:.2f}); at most {NEGLIGIBLE:g} points: {words}"


# ---- averaged gradients


def variance(runs, options, seed):
    """Record of the squared errors of N averaged weight gradients of LeNet-5, relative to the exact one's square."""
    how, s = common.recipe(options, "lenet5"), 4.0
    draws = 32 if options.quick else DRAWS
    settings = {"model": "lenet5", **asdict(how), "epochs": 1, "seed": seed, "s": s, "draws": draws}
    return runs.get(f"lenet5/variance/{seed}", settings, lambda: measure_variance(how, seed, s, draws))


def measure_variance(how, seed, s, draws):
    trainer, train, _ = common.trainer("lenet5", how, seed)
    trainer.fit(train, 1)
    x, y = next(iter(train))
    exact = gradient(trainer, x, y)
    method = backprop.Dithered(s=s, seed=seed).attach(trainer.model)
    drawn = [gradient(trainer, x, y) for _ in range(draws)]
    errors = {name: {} for name in exact}
    for n in NODES:
        for name, right in exact.items():
            means = np.reshape([d[name] for d in drawn], (draws // n, n, -1)).mean(axis=1)
            squares = ((means - right) ** 2).sum(axis=1) / (right**2).sum()
            errors[name][str(n)] = common.mean_and_error(squares)
    return {"zeros": {name: layer["gradient_sparsity"] for name, layer in method.report().items()}, "errors": errors}


def gradient(trainer, x, y):
    """{weight: its gradient for one batch}, float64 and flat."""
    trainer.model.train()
    trainer.optimizer.zero_grad()
    _, dy = nn.cross_entropy(trainer.model(x), y)
    trainer.model.backward(dy, input_gradient=False)
    weights = [(name, p) for name, p in trainer.model.named_parameters() if len(p.shape) > 1]
    return {name: p.grad.astype(np.float64).ravel() for name, p in weights}


def print_variance(records):
    """Squared errors times N, which 1/N makes equal."""
    rows = []
    for name in records[0]["errors"]:
        row, off = [name], 0.0
        means = {n: np.mean([r["errors"][name][str(n)][0] for r in records]) for n in NODES}
        error = np.linalg.norm([r["errors"][name]["1"][1] for r in records]) / len(records) / means[1]
        for n in NODES:  # the fewer means of N there are, the larger is their error
            ratio, expected = n * means[n] / means[1], math.sqrt(n) * error
            row.append(f"{ratio:.3f} +- {expected:.3f}")
            off = max(off, abs(ratio - 1) / expected)
        rows.append([*row, "reproduced" if off <= 4 else "NOT REPRODUCED"])
    print("\nLeNet-5: squared error of N averaged weight gradients, times N, relative to N = 1")
    print(bench.table(["weight", *(f"N = {n}" for n in NODES), "variance 1/N"], rows))


# ---- noise by layer


def noise(runs, options, model, seed):
    """Record of each layer's squared error of the weight gradient, relative to the exact one's square, with 92 % zeros
    in all layers."""
    how = common.recipe(options, model)
    steps = 2 if options.quick else NOISE_STEPS
    settings = {"model": model, **asdict(how), "epochs": 1, "seed": seed, "steps": steps, "draws": NOISE_DRAWS}
    return runs.get(f"{model}/noise/{seed}", settings, lambda: measure_noise(model, how, seed, steps))


def measure_noise(model, how, seed, steps):
    trainer, train, _ = common.trainer(model, how, seed)
    for x, y in itertools.islice(train, steps):
        trainer.train_step(x, y)
    exact = gradient(trainer, x, y)
    method = backprop.Dithered(sparsity=TARGET, seed=seed).attach(trainer.model)
    for _ in range(SETTLING):
        gradient(trainer, x, y)
    method.report()
    errors = {name: 0.0 for name in exact}
    for _ in range(NOISE_DRAWS):
        for name, used in gradient(trainer, x, y).items():
            errors[name] += ((used - exact[name]) ** 2).sum() / (exact[name] ** 2).sum() / NOISE_DRAWS
    return {"zeros": {name: layer["gradient_sparsity"] for name, layer in method.report().items()}, "errors": errors}


def print_noise(model, records):
    """From the last layer, where the gradient comes from, to the first."""
    rows = []
    for name in reversed(records[0]["errors"]):
        values = [record["errors"][name] for record in records]
        zeros = np.mean([record["zeros"][name.removesuffix(".weight")] for record in records])
        rows.append([name, f"{100 * zeros:.1f}", f"{np.mean(values):.3g}"])
    print(f"\n{model}, {TARGET:.0%} zeros held: squared error of the weight gradient over its square")
    print(bench.table(["weight", "zeros %", "error"], rows))


def draw(options, found, variances):
    series = {"s held": {s: f"s={s:g}" for s in STEPS}}
    curves = ["s=2", "s=8", f"sparsity={TARGET:g}"]
    common.draw_models(options, "dithered", "Dithered backprop", found, "s", series, curves)

    def plot(axes):
        for i, name in enumerate(variances[0]["errors"]):
            values = [np.mean([r["errors"][name][str(n)][0] for r in variances]) for n in NODES]
            axes[0, 0].loglog(NODES, values, "o", color=f"C{i}", label=name)
            axes[0, 0].loglog(NODES, [values[0] / n for n in NODES], "--", color=f"C{i}")
        axes[0, 0].set_xlabel("N averaged gradients (dashed: 1/N)")
        axes[0, 0].set_ylabel("squared error / squared gradient")
        axes[0, 0].legend(fontsize=7)

    if variances:
        common.draw(options, "dithered-variance", "Averaged dithered gradients, LeNet-5", (1, 1), plot)


if __name__ == "__main__":
    main()
