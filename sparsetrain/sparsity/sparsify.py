"""Turning the layers of a model sparse, once."""

import fnmatch
import math

import numpy as np

from sparsetrain import checks
from sparsetrain.sparsity import distributions, scores

METHODS = {"magnitude": scores.magnitude, "random": scores.random}
DISTRIBUTIONS = ("uniform", "erk", "global")


def sparsifiable(model, exclude=()):
    """[(name, layer)] of the convolutions and linear layers of `model` whose names match no glob of `exclude`.

    ValueError for a glob that matches none of them.
    """
    layers = [(n, m) for n, m in model.named_modules() if len(getattr(getattr(m, "weight", None), "shape", ())) > 1]
    if isinstance(exclude, str):
        raise TypeError(f"exclude is {exclude!r}, must be a sequence of layer names or globs")
    for glob in exclude:
        names = [n for n, _ in layers]
        if not fnmatch.filter(names, glob):
            raise ValueError(f"exclude has {glob!r}, which matches none of the layers {', '.join(names)}")
    return [(n, m) for n, m in layers if not any(fnmatch.fnmatchcase(n, glob) for glob in exclude)]


def sparsify(model, sparsity, method="magnitude", distribution="uniform", exclude=()):
    """Remove the fraction `sparsity` in [0, 1) of the weights of convolutions and linear layers, in place.

    method: "magnitude" removes the smallest, "random" any. distribution: "uniform" (the same sparsity in each layer),
    "erk" (small layers keep more) or "global" (the best scores of all layers together). exclude: layer names or globs
    ("0", "3.body.*"). The number of weights removed is exact to one weight. A layer that is sparse already only
    loses weights: where it has fewer than its share it stays as it is. Optimiser slots follow. Returns the model.
    """
    sparsity = checks.fraction("sparsity", sparsity)
    score = METHODS[checks.one_of("method", method, METHODS)]
    checks.one_of("distribution", distribution, DISTRIBUTIONS)
    weights = [layer.weight for _, layer in sparsifiable(model, exclude)]
    if not weights:
        raise ValueError("the model has no convolution or linear layer to make sparse")
    worth = [score(w).reshape(-1) for w in weights]
    if distribution == "global":
        total = sum(math.prod(w.shape) for w in weights)
        best = np.argsort(-np.concatenate(worth), kind="stable")[: total - round(sparsity * total)]
        kept = np.zeros(sum(map(len, worth)), bool)
        kept[best] = True
        masks = np.split(kept, np.cumsum([len(w) for w in worth])[:-1])
    else:
        numbers = getattr(distributions, distribution)([w.shape for w in weights], sparsity)
        masks = []
        for w, number in zip(worth, numbers, strict=True):
            mask = np.zeros(len(w), bool)
            mask[np.argsort(-w, kind="stable")[:number]] = True
            masks.append(mask)
    for weight, mask in zip(weights, masks, strict=True):
        weight.keep(mask.reshape(weight.data.shape))
    return model
