"""How a wanted sparsity is shared among layers: each function takes the layers' shapes, the sparsity, and how many
weights each layer has (None: all), and returns how many it keeps."""

import math

import numpy as np


def _to_integers(wanted, total):
    """Integers near the `wanted` shares that add up to `total`: the largest remainders are rounded up."""
    kept = np.floor(wanted).astype(np.int64)
    up = np.argsort(kept - wanted, kind="stable")[: total - kept.sum()]
    kept[up] += 1
    return kept


def uniform(shapes, sparsity, stored=None):
    """The same sparsity in every layer, to one weight; a layer that has fewer keeps those."""
    sizes = np.array([math.prod(s) for s in shapes])
    wanted = np.array([size - round(sparsity * int(size)) for size in sizes])
    return np.minimum(wanted, sizes if stored is None else stored)


def erk(shapes, sparsity, stored=None):
    """Density proportional to sum(shape) / prod(shape), so that small layers keep more.

    Source: Evci et al., Rigging the Lottery, arXiv 1911.11134, section 3 (Erdos-Renyi-Kernel). A layer whose
    density would pass 1, or that has fewer weights than its share, keeps those that it has, and the others share the
    rest: the sum is exact unless there are not as many weights.
    """
    sizes = np.array([math.prod(s) for s in shapes], float)
    raw = np.array([sum(s) for s in shapes], float)  # density times size, up to a common factor
    most = sizes if stored is None else np.array(stored, float)
    total = min(int(sizes.sum()) - round(sparsity * int(sizes.sum())), int(most.sum()))
    full = np.zeros(len(sizes), bool)
    while True:
        factor = (total - most[full].sum()) / raw[~full].sum() if not full.all() else 0
        over = ~full & (raw * factor > most)
        if not over.any():
            break
        full |= over
    return _to_integers(np.where(full, most, raw * factor), total)
