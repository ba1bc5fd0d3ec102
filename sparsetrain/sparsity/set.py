"""SET: sparse evolutionary training."""

from dataclasses import dataclass

import numpy as np

from sparsetrain import rng
from sparsetrain.sparsity.drop_grow import DropGrow


@dataclass
class SET(DropGrow):
    """At each update the weights nearest to zero go, the same share of the positive and of the negative ones, and as
    many grow at random places.

    Source: Mocanu et al., Nature Communications 9, 2383 (2018), arXiv 1707.04780, whose fraction stays the same
    (zeta = 0.3) and whose layers are Erdos-Renyi ("erk" here); it changes them after each epoch (unit="epochs",
    every=1).
    """

    anneal: bool = False

    def drop(self, layer, count):
        data = layer.weight.data
        positive, other = np.flatnonzero(data > 0), np.flatnonzero(data <= 0)
        of_positive = round(count * len(positive) / len(data))
        kept = np.ones(len(data), bool)
        for places, share in ((positive, of_positive), (other, count - of_positive)):
            kept[places[np.argsort(np.abs(data[places]), kind="stable")[:share]]] = False
        return kept

    def grow(self, layer, kept, count):
        return random_places(layer.weight.places()[kept], layer.size, count)


def random_places(taken, size, count):
    """`count` places below `size` that are not among the ascending `taken`, all sets of them equally likely."""
    free = rng.generator().choice(size - len(taken), count, replace=False)
    # The i-th free place has as many taken ones below it as stand before i in taken - (0, 1, 2, ...).
    return free + np.searchsorted(taken - np.arange(len(taken)), free, side="right")
