"""GraNet: gradual pruning with growth at zero cost."""

from dataclasses import dataclass, field

from sparsetrain import checks
from sparsetrain.sparsity import scores
from sparsetrain.sparsity.gmp import cubic
from sparsetrain.sparsity.rigl import RigL


@dataclass
class GraNet(RigL):
    """RigL whose layers lose weights by the cubic schedule of GMP, from `initial` sparsity on to `sparsity`, before
    each drop and growth.

    Source: Liu et al., Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, NeurIPS 2021, arXiv
    2106.10404, the sparse-to-sparse form (initial 0.5; fraction 0.5 there). The schedule's targets follow
    `distribution` at each update; there the least of all layers go.
    """

    initial: float = 0.5
    fraction: float = field(default=0.5, kw_only=True)

    def check(self):
        self.initial = checks.fraction("initial", self.initial)
        if self.initial > self.sparsity:
            raise ValueError(f"initial is {self.initial}, above the sparsity {self.sparsity}")

    def begin(self):
        self.prune(self.initial, scores.random)

    def update(self):
        wanted = self.targets(cubic(self.initial, self.sparsity, self.progress()))
        for layer, number in zip(self.layers, wanted, strict=True):
            surplus = max(0, layer.weight.nnz - int(number))
            count = max(0, min(self.count(layer), int(number) - 1))
            if surplus + count:
                kept = self.drop(layer, surplus + count)
                layer.rewire(kept, self.grow(layer, kept, count) if count else ())
