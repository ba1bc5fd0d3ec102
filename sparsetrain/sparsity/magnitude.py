"""Pruning by magnitude, at once or in rounds."""

from dataclasses import dataclass, field

from sparsetrain import checks
from sparsetrain.sparsity import scores
from sparsetrain.sparsity.method import Timed


@dataclass
class Magnitude(Timed):
    """The smallest weights are removed, in `rounds` of which each keeps the same share of those left.

    One round, at `start`, is one-shot pruning. The rounds come `every` so many steps (or epochs) from start on.

    Source: Han et al., Learning both Weights and Connections, NeurIPS 2015, arXiv 1506.02626; the equal shares are
    those of Frankle & Carbin, ICLR 2019, arXiv 1803.03635, without their return to the first weights.
    """

    rounds: int = 1
    stop: int = field(init=False, default=None)

    distributions = ("uniform", "erk", "global")

    def __post_init__(self):
        self.rounds = checks.integer("rounds", self.rounds, low=1)
        self.start, self.every = checks.integer("start", self.start, low=0), checks.integer("every", self.every, low=1)
        self.stop = self.start + (self.rounds - 1) * self.every
        super().__post_init__()

    def update(self):
        done = (self.now() - self.start) // self.every + 1
        self.prune(
            1 - (1 - self.sparsity) ** (done / self.rounds) if done < self.rounds else self.sparsity, scores.magnitude
        )
