"""A look at the gradients of weights that do not exist."""

import math

import numpy as np

from sparsetrain import arrays, ops, plans
from sparsetrain.sparse import Parameter


class Probe:
    """The largest gradients of weights that are not stored: a block of rows of the gradient at a time, of which only
    the best so far are kept, so that no array of the dense weight's size is ever there."""

    BLOCK = 1 << 18  # weights of a block, 1 MB

    def __init__(self, name, weight, count):
        self.name, self.weight, self.count = name, weight, count
        self.places = self.magnitudes = None

    def __call__(self, x, geometry, dy):
        """Called by the layer in its backward pass."""
        if self.places is not None:
            raise ValueError(
                f"layer {self.name} ran twice between begin_step() and end_step(), where its gradients are probed"
            )
        self.places, self.magnitudes = np.zeros(0, np.int64), np.zeros(0, self.weight.data.dtype)
        rows, columns = self.weight.shape[0], math.prod(self.weight.shape[1:])
        per_group = rows // geometry.groups
        x = x.with_halo(geometry.padding)
        one_group = plans.Geometry(geometry.stride, geometry.padding, geometry.dilation)
        for first in range(0, rows, per_group):
            group = first // per_group
            channels = self.weight.shape[1]
            part = _channels(x, group * channels, (group + 1) * channels)
            step = max(1, self.BLOCK // columns)
            for begin in range(first, first + per_group, step):
                end = min(begin + step, first + per_group)
                block = Parameter(np.zeros((end - begin, *self.weight.shape[1:]), self.weight.data.dtype))
                ops.weight_gradient(part, block, one_group, _channels(dy, begin, end))
                self._take(begin * columns, np.abs(block.grad.reshape(-1)))

    def _take(self, first, magnitudes):
        """Keep what is best of a block of gradients from position `first` on, and of those kept so far."""
        places = self.weight.places()
        stored = places[np.searchsorted(places, first) : np.searchsorted(places, first + len(magnitudes))] - first
        magnitudes[stored] = -1
        here = np.flatnonzero(magnitudes >= 0) if len(magnitudes) <= self.count else _largest(magnitudes, self.count)
        self.places = np.concatenate([self.places, first + here[magnitudes[here] >= 0]])
        self.magnitudes = np.concatenate([self.magnitudes, magnitudes[here[magnitudes[here] >= 0]]])
        if len(self.places) > self.count:
            best = _largest(self.magnitudes, self.count)
            self.places, self.magnitudes = self.places[best], self.magnitudes[best]


def _largest(values, count):
    """Indices of the `count` largest values, ascending; of equal ones the first."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.zeros(0, np.int64)
    least = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > least)
    level = np.flatnonzero(values == least)[: count - len(above)]
    return np.sort(np.concatenate([above, level]))


def _channels(blocked, begin, end):
    """Channels [begin, end) of a Blocked, without a copy."""
    return arrays.Blocked(blocked.array[:, begin:end], blocked.n, blocked.halo, blocked.ndim)
