"""Dithered backprop: stochastic rounding of output gradients to few, mostly zero, levels."""

import math
from dataclasses import dataclass

import numpy as np

from sparsetrain import checks, int8, sparse_gradient
from sparsetrain.backprop.method import Method

LEAST, MOST = 1e-3, 1e6  # of s while a sparsity is to be held, so that it can come back from either end
EXACT = 1e-6  # an s up to here would round beyond the precision of float32
FASTEST = 2.0  # by which s changes from one pass to the next, at most, while a sparsity is to be held


@dataclass
class Dithered(Method):
    """Each layer's output gradient is rounded to multiples of s standard deviations, up or down at random so that its
    mean stays.

    The same sample serves input and weight gradient; the bias's is exact. s > 0: larger is sparser;
    about 2 gives 61 % zeros for normal gradients, 74 % behind a ReLU, more for heavier tails. sparsity in (0, 1):
    instead of s held fixed, it is changed in each layer, from s on, until so many values are zero. bits=8: multiples
    beyond +-127 are clipped, and counted, and those of a float32 layer stored in 8 bits. precision=8: training in 8
    bits, which includes that: the layers read inputs rounded to 256 levels and weights rounded to 255, forward and
    backward (also in evaluation, as long as the method is attached), and products of bytes are summed without
    rounding. The weights that are trained stay float32.

    Source: Wiedemann et al., Dithered backprop, arXiv 2004.04729 (non-subtractive dither, step s * sigma over the
    layer's whole gradient). A gradient whose deviation is 0 or not finite is used as it is. The target sparsity is
    ours; levels are even steps between a tensor's extremes, which the paper leaves open.
    """

    s: float = 2.0
    sparsity: float | None = None
    bits: int | None = None
    precision: int | None = None

    def check(self):
        if checks.number("s", self.s) <= 0:
            raise ValueError(f"s is {self.s}, must be above 0")
        if self.sparsity is not None and not 0 < checks.number("sparsity", self.sparsity) < 1:
            raise ValueError(f"sparsity is {self.sparsity}, must be in (0, 1)")
        if self.bits not in (None, 8):
            raise ValueError(f"bits is {self.bits!r}, must be 8 or None")
        if self.precision not in (None, 8):
            raise ValueError(f"precision is {self.precision!r}, must be 8 or None")
        self.deviation = None  # of the gradient of this pass, once it is known

    def forward(self, x, weight, bias, geometry, halo, relu):
        if self.precision is None:
            return super().forward(x, weight, bias, geometry, halo, relu)
        return int8.conv2d(x, weight, bias, geometry, halo, relu)

    def read(self, kept, geometry):
        return kept.x.restored(geometry.padding) if isinstance(kept, int8.Operands) else kept

    def backward(self, layer, x, weight, bias, geometry, dy, halo, into):
        if not isinstance(x, int8.Operands):
            return super().backward(layer, x, weight, bias, geometry, dy, halo, into)
        self.bias_gradient(bias, dy)
        selection = self.select(layer, x, geometry, dy)
        if selection is None:
            return int8.exact_backward(x, weight, geometry, dy, halo, into), None
        if self.angles:
            used, _ = sparse_gradient.written_out(x.x.restored(), weight, geometry, dy, selection)
            layer.note_angle(dy.array, used.array)
        return int8.backward(x, weight, geometry, dy, selection, halo, into, layer.density)

    def bias_gradient(self, bias, dy):
        if bias is not None:
            self.deviation = sparse_gradient.standard_deviation(dy, bias)  # one pass for both

    def select(self, layer, x, geometry, dy):
        s = layer.state.get("s", self.s)
        step = s * (sparse_gradient.standard_deviation(dy) if self.deviation is None else self.deviation)
        self.deviation = None
        if s <= EXACT or not np.finfo(dy.dtype).tiny <= step < np.finfo(dy.dtype).max:
            return None
        return sparse_gradient.dither(step, layer.seed(), 0 if self.bits is None and self.precision is None else 127)

    def after(self, layer, dy, used):
        if self.sparsity is not None and used is not None:
            # Far out, the share of values that stay is in proportion to 1 / s; nearer it changes more slowly.
            change = used.density / (1 - self.sparsity)
            s = layer.state.get("s", self.s) * min(FASTEST, max(1 / FASTEST, math.sqrt(change)))
            layer.state["s"] = min(MOST, max(LEAST, s))
