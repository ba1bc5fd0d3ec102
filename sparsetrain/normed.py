"""A batch norm's output that is not written: what reads it forms it, and the gradient that goes back to it."""

import time
from dataclasses import dataclass

import numpy as np

from sparsetrain import arrays
from sparsetrain._kernels import core
from sparsetrain.record import tell


@dataclass(frozen=True)
class Norm:
    """The numbers of a batch norm: y = (x - mean) / sqrt(var + eps) * gamma + beta, each (channels,)."""

    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    eps: float
    training: bool  # mean and var are those of x

    def __post_init__(self):
        inverse, scale, shift = np.empty(len(self.gamma)), np.empty_like(self.gamma), np.empty_like(self.gamma)
        core.batch_norm_line(self.gamma, self.beta, self.mean, self.var, self.eps, inverse, scale, shift)
        object.__setattr__(self, "inverse", inverse)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "shift", shift)


class Normed:
    """relu(norm(x) + add), add and relu optional, in the place of a Blocked.

    Who can form it on the way reads `x`; for everybody else it is a Blocked, written when `array` or with_halo() is
    first asked for. `keep`: the halo with which who forms it first also writes it, or None.
    """

    def __init__(self, x, norm, add=None, relu=False):
        self.x, self.norm, self.add, self.relu = x, norm, add, relu
        self.n, self.ndim, self.dtype, self.shape = x.n, x.ndim, x.dtype, x.shape
        self.keep = self.formed = None

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
            self.formed = self.like(halo if self.keep is None else tuple(map(max, halo, self.keep)))
            norm, add = self.norm, None if self.add is None else self.add.array
            core.batch_norm(
                self.x.array, self.formed.array, self.n, norm.gamma, norm.beta, norm.mean, norm.var, norm.eps, False,
                self.relu, add,
            )  # fmt: skip
            tell("form", start, [self.x, self.add], [self.formed], normed=self, forms=True, kept=True)
        return self.formed.with_halo(halo)


class NormedGradient(arrays.Blocked):
    """The gradient of a Normed, zero where its ReLU is closed; its sums, and those times x - mean (2, channels)."""

    __slots__ = ("sums",)

    def __init__(self, gradient, sums):
        super().__init__(gradient.array, gradient.n, gradient.halo, gradient.ndim)
        self.sums = sums
