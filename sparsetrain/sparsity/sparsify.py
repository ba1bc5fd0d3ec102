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
        for glob in globs:
            names = [n for n, _ in layers]
            if glob != "*" and not fnmatch.filter(names, glob):
                raise ValueError(f"{argument} has {glob!r}, which matches none of the layers {', '.join(names)}")

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
        worth = [score(layer.weight).reshape(-1) for _, layer in named]
        total = sum(math.prod(layer.weight.shape) for _, layer in named)
        kept = best(np.concatenate(worth), total - round(sparsity * total))
        return np.split(kept, np.cumsum([len(w) for w in worth])[:-1])
    weights = [layer.weight for _, layer in named]
    wanted = getattr(distributions, distribution)([w.shape for w in weights], sparsity, [w.nnz for w in weights])
    return (best(score(m.weight).reshape(-1), k) for (_, m), k in zip(named, wanted, strict=True))


def best(worth, number):
    """Boolean array: true at the `number` largest of a flat array, the first of equal ones; all if it has fewer."""
    mask = np.zeros(len(worth), bool)
    mask[np.argsort(-worth, kind="stable")[:number]] = True
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
    follow. Returns the model.
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
