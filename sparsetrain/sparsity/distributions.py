"""How a wanted sparsity is shared among layers: each function takes the layers' shapes and the sparsity, and
returns how many weights each layer keeps."""

import math

import numpy as np


def _to_integers(wanted, total):
    """Integers near the `wanted` shares that add up to `total`: the largest remainders are rounded up."""
    kept = np.floor(wanted).astype(np.int64)
    up = np.argsort(kept - wanted, kind="stable")[: total - kept.sum()]
    kept[up] += 1
    return kept


def uniform(shapes, sparsity):
    """The same sparsity in every layer, to one weight."""
    return np.array([math.prod(s) - round(sparsity * math.prod(s)) for s in shapes])


def erk(shapes, sparsity):
    """Density proportional to sum(shape) / prod(shape), so that small layers keep more.

    Source: Evci et al., Rigging the Lottery, arXiv 1911.11134, section 3 (Erdos-Renyi-Kernel). A layer whose
    density would pass 1 stays dense and the others share the rest.
    """
    sizes = np.array([math.prod(s) for s in shapes], float)
    raw = np.array([sum(s) for s in shapes], float)  # density times size, up to a common factor
    total = int(sizes.sum()) - round(sparsity * int(sizes.sum()))
    full = np.zeros(len(sizes), bool)
    while True:
        factor = (total - sizes[full].sum()) / raw[~full].sum() if not full.all() else 0
        over = ~full & (raw * factor > sizes)
        if not over.any():
            break
        full |= over
    return _to_integers(np.where(full, sizes, raw * factor), total)
