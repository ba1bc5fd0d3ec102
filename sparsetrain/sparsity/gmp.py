"""GMP: gradual magnitude pruning."""

from dataclasses import dataclass

from sparsetrain import checks
from sparsetrain.sparsity import scores
from sparsetrain.sparsity.method import Timed


@dataclass
class GMP(Timed):
    """The smallest weights are removed little by little: s(t) = s + (s0 - s)(1 - t)^3, t from 0 at start to 1 at stop.

    sparsity is s, initial s0. What is removed stays away; storage and time fall with it.

    Source: Zhu & Gupta, To prune, or not to prune, arXiv 1710.01878, equation 1. SparseProp's schedule from scratch
    (arXiv 2302.04852, section 4) is initial=0.05, start=10, stop=80, every=10, unit="epochs" of 100 epochs.
    """

    initial: float = 0.0

    distributions = ("uniform", "erk", "global")

    def check(self):
        self.initial = checks.fraction("initial", self.initial)
        if self.initial > self.sparsity:
            raise ValueError(f"initial is {self.initial}, above the sparsity {self.sparsity}")

    def update(self):
        self.prune(cubic(self.initial, self.sparsity, self.progress()), scores.magnitude)


def cubic(initial, final, progress):
    """The sparsity at a progress from 0 to 1: it rises fast at first."""
    return final + (initial - final) * (1 - progress) ** 3
