"""N:M patterns: N of M neighbouring weights."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from sparsetrain import checks
from sparsetrain.sparsity.method import Timed


@dataclass
class NM(Timed):
    """Of m weights of neighbouring input channels (features, of a linear layer) only the n largest exist.

    Until `stop` (SR-STE) all weights are stored and trained: each step runs with the n largest of m, their gradients go
    to all weights, as if the choice were the identity, and those not chosen decay by `decay` times their value more.
    At stop the others are removed. stop 0: at once, and only those stored are trained. sparsity is 1 - n / m.

    Source: Zhou et al., Learning N:M Fine-Grained Structured Sparse Neural Networks From Scratch, ICLR 2021, arXiv
    2102.04010, equation 7, decay 2e-4. ValueError for a layer whose input channels are no multiple of m.
    """

    sparsity: float = field(init=False, default=0.5)
    distribution: str = field(init=False, default="uniform")
    start: int = field(init=False, default=0)
    every: int = field(init=False, default=1)
    n: int = 2
    m: int = 4
    decay: float = field(default=2e-4, kw_only=True)

    def __post_init__(self):
        self.m, self.n = checks.integer("m", self.m, low=1), checks.integer("n", self.n, low=1)
        if self.n > self.m:
            raise ValueError(f"n is {self.n}, more than m, which is {self.m}")
        self.decay = checks.number("decay", self.decay, low=0.0)
        self.sparsity, self.chosen = 1 - self.n / self.m, []
        super().__post_init__()

    def attach(self, model, begin=True):
        super().attach(model, begin=False)
        for layer in self.layers:
            why = None
            if layer.weight.shape[1] % self.m:
                channels = layer.weight.shape[1]
                why = f"has {channels} input channels a group, must be a multiple of m = {self.m}: exclude it"
            elif begin and not layer.weight.structure.dense:
                why = "is sparse already, NM chooses among all weights"
            if why is not None:
                self.detach()
                raise ValueError(f"layer {layer.name} {why}")
        if begin and self.stop == 0:
            self.update()
        if begin:
            for layer in self.layers:
                layer.note()
        return self

    def mask(self, values):
        """Boolean array, true at the n largest of each m; of equal ones at the first."""
        out, channels = values.shape[:2]
        groups = np.abs(values).reshape(out, channels // self.m, self.m, -1)
        best = np.argsort(-groups, axis=2, kind="stable")[:, :, : self.n]
        mask = np.zeros(groups.shape, bool)
        np.put_along_axis(mask, best, True, axis=2)
        return mask.reshape(values.shape)

    @contextmanager
    def applied(self):
        self._choose()
        try:
            yield
        finally:
            self._restore()

    def begin_step(self):
        self._choose()

    def end_step(self):
        for layer, data, mask in self.chosen:
            if layer.weight.grad is not None:
                layer.weight.grad += data.dtype.type(self.decay) * ~mask * data
        self._restore()
        return super().end_step()

    def cancel_step(self):
        self._restore()
        super().cancel_step()

    def _choose(self):
        self._restore()
        for layer in self.layers:
            if layer.weight.structure.dense:
                mask = self.mask(layer.weight.data)
                self.chosen.append((layer, layer.weight.data, mask))
                layer.weight.data = layer.weight.data * mask

    def _restore(self):
        for layer, data, _ in self.chosen:
            layer.weight.data = data
        self.chosen = []

    def due(self):
        now = self.now()
        return now is not None and now >= self.stop and any(layer.weight.structure.dense for layer in self.layers)

    def update(self):
        for layer in self.layers:
            if layer.weight.structure.dense:
                layer.dropped += layer.size - layer.size * self.n // self.m
                layer.weight.keep(self.mask(layer.weight.data))
