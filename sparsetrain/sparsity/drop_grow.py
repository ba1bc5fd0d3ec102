"""What methods have in common that drop weights and grow as many others."""

import math
from dataclasses import dataclass, field

import numpy as np

from sparsetrain import checks
from sparsetrain.sparsity import scores
from sparsetrain.sparsity.method import Timed
from sparsetrain.sparsity.sparsify import best


@dataclass
class DropGrow(Timed):
    """Keeps the number of weights of each layer, but at each update drops a fraction of them and grows as many others,
    zero at first.

    fraction in (0, 1): of a layer's weights, at start; anneal: falls to 0 at stop as half a cosine. A method defines
    which weights to drop and which to grow. Those dropped may grow again at once; their values are lost then. The
    layers that change leave out the optimiser's next step.
    """

    fraction: float = field(default=0.3, kw_only=True)
    anneal: bool = field(default=True, kw_only=True)
    distribution: str = field(default="erk", kw_only=True)

    changes_at_start = False

    def __post_init__(self):
        if not 0 < checks.number("fraction", self.fraction) < 1:
            raise ValueError(f"fraction is {self.fraction}, must be in (0, 1)")
        self.fraction = float(self.fraction)
        checks.flag("anneal", self.anneal)
        super().__post_init__()

    def check(self):
        if self.anneal and self.start + self.every >= self.stop:
            raise ValueError(
                f"every is {self.every}: the one update would be at stop, {self.stop}, where the fraction has come to 0"
            )

    # ---- what a method defines

    def drop(self, layer, count):
        """Boolean array (nnz), false at the `count` weights that go."""
        raise NotImplementedError(f"{type(self).__name__} does not define drop(layer, count)")

    def grow(self, layer, kept, count):
        """The positions of `count` weights to grow, none of them stored after kept = drop(...)."""
        raise NotImplementedError(f"{type(self).__name__} does not define grow(layer, kept, count)")

    # ---- what they share

    def begin(self):
        self.prune(self.sparsity, scores.random)

    def count(self, layer):
        """How many weights of a layer go and come at this update: no more than there is room for."""
        fraction = self.fraction * (0.5 * (1 + math.cos(math.pi * self.progress())) if self.anneal else 1.0)
        nnz = layer.weight.nnz
        return max(0, min(round(fraction * nnz), nnz - 1, layer.size - nnz))

    def update(self):
        for layer in self.layers:
            count = self.count(layer)
            if count:
                kept = self.drop(layer, count)
                grown = self.grow(layer, kept, count)
                if len(grown) != count:
                    raise ValueError(f"grow() gave {len(grown)} positions for layer {layer.name}, must give {count}")
                layer.rewire(kept, grown)


def smallest(weight, count):
    """Boolean array, false at the `count` stored weights of the least magnitude, the last of equal ones."""
    return best(np.abs(weight.data.reshape(-1)), weight.nnz - count)


def largest_gradients(layer, kept, count):
    """The positions of the `count` largest gradients among weights that are not stored after `kept`: what the layer's
    probe found, and those just dropped."""
    places, magnitudes = layer.probed()
    gone = ~kept
    places = np.concatenate([layer.weight.places()[gone], places])
    magnitudes = np.concatenate([np.abs(layer.weight.grad[gone]), magnitudes])
    return places[np.lexsort((places, -magnitudes))[:count]]
