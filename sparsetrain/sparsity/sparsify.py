"""Turning layers sparse: which of their weights stay."""

import fnmatch
import math

import numpy as np

from sparsetrain import checks
from sparsetrain.sparsity import distributions, scores

METHODS = {"magnitude": scores.magnitude, "random": scores.random, "snip": scores.snip, "grasp": scores.grasp}
DISTRIBUTIONS = ("uniform", "erk", "global")


def sparsifiable(model, exclude=(), include=("*",)):
    """[(name, layer)] of the convolutions and linear layers of `model` whose names match a glob of `include` and none
    of `exclude`.

    ValueError for a glob that matches none of them.
    """
    layers = [(n, m) for n, m in model.named_modules() if len(getattr(getattr(m, "weight", None), "shape", ())) > 1]
    for argument, globs in (("exclude", exclude), ("include", include)):
        if isinstance(globs, str) or not isinstance(globs, (list, tuple)):
            raise TypeError(f"{argument} is {globs!r}, must be a sequence of layer names or globs")
        checks.globs(argument, globs, [name for name, _ in layers])

    def matches(name, globs):
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    return [(n, m) for n, m in layers if matches(n, include) and not matches(n, exclude)]


def changeable(model, exclude, include):
    """sparsifiable(), of which there must be one, and no two may share a weight: ValueError."""
    named, owners = sparsifiable(model, exclude, include), {}
    if not named:
        raise ValueError("the model has no convolution or linear layer to make sparse")
    for name, layer in named:
        if owners.setdefault(id(layer.weight), name) != name:
            raise ValueError(f"layers {owners[id(layer.weight)]} and {name} share a weight: exclude one of them")
    return named


def masks(named, sparsity, score, distribution):
    """For each of the layers [(name, layer)] a boolean array, true at the stored weights that stay: those with the best
    scores. score: a function of a parameter. As of sparsify(), whose other arguments these are."""
    if distribution == "global":
        total = sum(math.prod(layer.weight.shape) for _, layer in named)
        number = total - round(sparsity * total)
        if number < 1:
            raise ValueError(f"sparsity is {sparsity:g}, which leaves none of {total} weights")
        worth = [score(layer.weight).reshape(-1) for _, layer in named]
        return np.split(best(np.concatenate(worth), number), np.cumsum([len(w) for w in worth])[:-1])
    wanted = numbers(named, sparsity, distribution)
    return (best(score(layer.weight).reshape(-1), number) for (_, layer), number in zip(named, wanted, strict=True))


def numbers(named, sparsity, distribution):
    """How many of its weights each of the layers [(name, layer)] keeps; ValueError if one would keep none."""
    share, shapes = getattr(distributions, distribution), [layer.weight.shape for _, layer in named]
    for (name, _), shape, number in zip(named, shapes, share(shapes, sparsity), strict=True):
        if number < 1:
            raise ValueError(
                f"layer {name} has {math.prod(shape)} weights, of which sparsity {sparsity:g} would leave none: "
                "exclude it"
            )
    return share(shapes, sparsity, [layer.weight.nnz for _, layer in named])


def best(worth, number):
    """Boolean array: true at the `number` largest of a flat array, the first of equal ones; all if it has fewer. NaN is
    the least."""
    if not 0 < number < len(worth):
        return np.full(len(worth), number > 0)
    cost = np.where(np.isnan(worth), np.inf, -worth)
    last = np.partition(cost, number - 1)[number - 1]
    mask = cost < last
    mask[np.flatnonzero(cost == last)[: number - mask.sum()]] = True
    return mask


def sparsify(
    model, sparsity, method="magnitude", distribution="uniform", exclude=(), include=("*",), batches=None, loss=None
):
    """Remove the fraction `sparsity` in [0, 1) of the weights of convolutions and linear layers, in place.

    method: "magnitude" removes the smallest, "random" any, "snip" and "grasp" those that the gradients of a few
    batches say least about (sparsity.scores): batches is a list of (x, y), loss a function (outputs, y) -> (loss,
    gradient), nn.cross_entropy unless given. distribution: "uniform" (the same sparsity in each layer), "erk" (small
    layers keep more) or "global" (the best scores of all layers together). include, exclude: layer names or globs
    ("0", "3.body.*"). The number of weights removed is exact to one weight. A layer that is sparse already only loses
    weights: where it has fewer than its share it stays as it is, and with "erk" the others keep more. Optimiser slots
    follow. Returns the model. ValueError, and the model as it was, if a layer would keep none ("global": if all would).
    """
    sparsity = checks.fraction("sparsity", sparsity)
    score = METHODS[checks.one_of("method", method, METHODS)]
    checks.one_of("distribution", distribution, DISTRIBUTIONS)
    named = changeable(model, exclude, include)
    if method in scores.WITH_GRADIENTS:
        if batches is None:
            raise ValueError(f"method {method!r} needs batches, a list of (x, y)")
        score = score(model, [layer.weight for _, layer in named], list(batches), loss)
    elif batches is not None or loss is not None:
        raise ValueError(f"batches and loss are for {' and '.join(scores.WITH_GRADIENTS)}, method is {method!r}")
    for (_, layer), mask in zip(named, masks(named, sparsity, score, distribution), strict=True):
        layer.weight.keep(mask.reshape(layer.weight.data.shape))
    return model
