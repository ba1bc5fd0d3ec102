"""Dropout."""

from sparsetrain import checks, ops, rng
from sparsetrain.nn.module import Module


class Dropout(Module):
    """Training: each element is 0 with probability p, else x / (1 - p). Evaluation: y = x.

    Which elements depends on manual_seed() and their place in the batch, not on threads or instruction set.
    Source: Srivastava et al., JMLR 15 (2014).
    """

    replays = True

    def __init__(self, p=0.5):
        self.p = checks.fraction("p", p)

    def forward(self, x, halo):
        if not self.training or self.p == 0:
            return x.with_halo(halo), lambda dy, halo: dy.with_halo(halo or (0, 0))
        seed = int(rng.generator().integers(2**63))
        keep = 1 - self.p

        def backward(dy, halo):
            return ops.dropout(dy, keep, seed, halo or (0, 0))

        return ops.dropout(x, keep, seed, halo), backward

    def _arguments(self):
        return f"p={self.p}"
