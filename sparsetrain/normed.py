"""A batch norm's output that is not written: what reads it forms it, and the gradient that goes back to it."""

import time

import numpy as np

from sparsetrain import arrays
from sparsetrain._kernels import core
from sparsetrain.record import tell


class Norm:
    """The numbers of a batch norm: y = (x - mean) / sqrt(var + eps) * gamma + beta = x * scale + shift.

    All but eps are (channels,); inverse is 1 / sqrt(var + eps), float64. training: whether mean and var are those of x.
    """

    __slots__ = ("beta", "eps", "gamma", "inverse", "mean", "scale", "shift", "training", "var")

    def __init__(self, gamma, beta, mean, var, eps, training):
        self.gamma, self.beta, self.mean, self.var, self.eps, self.training = gamma, beta, mean, var, eps, training
        self.inverse, self.scale, self.shift = np.empty(len(gamma)), np.empty_like(gamma), np.empty_like(gamma)
        core.batch_norm_line(gamma, beta, mean, var, eps, self.inverse, self.scale, self.shift)


class Normed:
    """relu(norm(x) + add), add and relu optional, in the place of a Blocked.

    Who can form it on the way reads `x` and what `add` is formed of; for everybody else it is a Blocked, written when
    `array` or with_halo() is first asked for. `keep`: the halo with which who forms it first also writes it, or None.
    """

    def __init__(self, x, norm, add=None, relu=False):
        self.x, self.norm, self.add, self.relu = x, norm, add, relu
        self.n, self.ndim, self.dtype, self.shape = x.n, x.ndim, x.dtype, x.shape
        self.keep = self.formed = None

    def terms(self):
        """What it is formed of, each with the next one added: (Blocked, scale, shift, relu); scale None: as it is."""
        if self.formed is not None:
            return [(self.formed, None, None, False)]
        added = []
        if isinstance(self.add, Normed):
            added = self.add.terms()
            if len(added) > core.MAX_ADDED:
                added = [(self.add.with_halo((0, 0)), None, None, False)]
        elif self.add is not None:
            added = [(self.add, None, None, False)]
        return [(self.x, self.norm.scale, self.norm.shift, self.relu), *added]

    def keep_for(self, halo):
        """Two will read it: who forms it first shall also write it, with this halo, unless others can add its terms."""
        if len(self.terms()) > core.MAX_ADDED:
            self.keep = halo

    @property
    def forming(self):
        """What forms it of `x`, for core's functions; while it is not written."""
        (_, scale, shift, relu), *added = self.terms()
        return {"scale": scale, "shift": shift, "relu": relu, "added": tuple((x.array, *how) for x, *how in added)}

    def sources(self):
        """The Blockeds that it is formed of."""
        return [x for x, *_ in self.terms()]

    array = property(lambda self: self.with_halo((0, 0)).array)
    halo = property(lambda self: self.with_halo((0, 0)).halo)

    def like(self, halo=(0, 0)):
        """A new array of this geometry, its values not set."""
        return self.x.like(halo)

    def has_halo(self, halo):
        """Whether it is written with a halo of at least `halo`."""
        return self.formed is not None and self.formed.has_halo(halo)

    def with_halo(self, halo):
        """It as a Blocked whose halo is at least `halo`."""
        if self.formed is None:
            start = time.perf_counter()
            norm, added, sources = self.norm, self.forming["added"], self.sources()
            formed = self.like(halo if self.keep is None else tuple(map(max, halo, self.keep)))
            core.batch_norm(
                self.x.array, formed.array, self.n, norm.gamma, norm.beta, norm.mean, norm.var, norm.eps, False,
                self.relu, added,
            )  # fmt: skip
            self.formed = formed
            tell("form", start, sources, [formed], normed=self, forms=True, kept=True)
        return self.formed.with_halo(halo)


class NormedGradient(arrays.Blocked):
    """The gradient of a Normed, zero where its ReLU is closed; its sums, and those times x - mean (2, channels)."""

    __slots__ = ("sums",)

    def __init__(self, gradient, sums):
        super().__init__(gradient.array, gradient.n, gradient.halo, gradient.ndim)
        self.sums = sums
