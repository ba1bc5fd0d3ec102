"""AC/DC: alternating compressed and decompressed training."""

from dataclasses import dataclass

from sparsetrain.sparsity import scores
from sparsetrain.sparsity.method import Timed


@dataclass
class ACDC(Timed):
    """From start on phases of `every` steps (or epochs) alternate: compressed, in which only the largest weights exist,
    and dense, in which the others come back from zero. From stop on the layers stay compressed.

    Source: Peste et al., AC/DC, NeurIPS 2021, arXiv 2106.12379 (on ImageNet, of 100 epochs: start 10, every 5, stop 75,
    global magnitudes). Momentum of weights that come back is zero.
    """

    distributions = ("uniform", "erk", "global")

    def update(self):
        compress = self.now() >= self.stop or (self.now() - self.start) // self.every % 2 == 0
        if compress:
            self.prune(self.sparsity, scores.magnitude)
            return
        for layer in self.layers:
            if not layer.weight.structure.dense:
                layer.grown += layer.size - layer.weight.nnz
                layer.weight.fill()
