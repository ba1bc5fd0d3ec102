"""meProp: only the largest values of each image's output gradient."""

from dataclasses import dataclass

import numpy as np

from sparsetrain import arrays, checks, sparse_gradient
from sparsetrain.backprop.method import Method


@dataclass
class TopK(Method):
    """Of each image's output gradient the share k, in (0, 1], of largest magnitude is used, at least one value.

    Values as large as the smallest of them are used too. The bias's gradient is exact. Source: Sun et al., meProp, ICML
    2017 (top-k of each example, linear layers); convolutions take an image's whole map, which is ours.
    """

    k: float = 0.1

    def check(self):
        if not 0 < checks.number("k", self.k) <= 1:
            raise ValueError(f"k is {self.k}, must be in (0, 1]")

    def select(self, layer, x, geometry, dy):
        magnitudes = np.abs(arrays.unpack(dy)).reshape(dy.n, -1)
        size = magnitudes.shape[1]
        place = size - max(1, round(self.k * size))
        smallest = np.partition(magnitudes, place, axis=1)[:, place]
        thresholds = np.zeros((len(dy.array), arrays.IMAGES), dy.dtype)
        thresholds.reshape(-1)[: dy.n] = np.nextafter(smallest, np.zeros_like(smallest))
        return sparse_gradient.above(thresholds)
