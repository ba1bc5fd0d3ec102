"""Batch normalisation, and in the same pass a residual add and a ReLU after it."""

import math
import time

import numpy as np

from sparsetrain import checks
from sparsetrain._kernels import core
from sparsetrain.nn import weighted
from sparsetrain.nn.module import Module, check_input
from sparsetrain.record import tell
from sparsetrain.sparse import Parameter


class BatchNorm2d(Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, per channel of x (N, num_features, H, W).

    Training uses the batch's mean and biased variance and moves the running ones by `momentum` (the variance
    unbiased); evaluation uses the running ones. Source: Ioffe & Szegedy, arXiv 1502.03167.
    """

    replays = True
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    fuses_relu = fuses_add = reuses_dy = True
    _ndim = 4

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        self.num_features = checks.integer("num_features", num_features, low=1)
        self.eps = checks.number("eps", eps, low=0)
        self.momentum = checks.number("momentum", momentum, low=0, high=1)
        self.weight = Parameter(weighted.constant(num_features, 1))
        self.bias = Parameter(weighted.constant(num_features, 0))
        self.running_mean = weighted.constant(num_features, 0)
        self.running_var = weighted.constant(num_features, 1)
        self.num_batches_tracked = np.array(0)

    def check(self, x, add=None):
        """ValueError or TypeError unless x, and `add` to it, can be normed."""
        check_input(x, self.weight, self._ndim, self.num_features)
        if self.training and math.prod(x.shape) == self.num_features:
            raise ValueError(f"x has shape {x.shape}: one value a channel has no variance to train with")
        if add is not None and add.shape != x.shape:
            raise ValueError(f"x has shape {x.shape}, what is added to it {add.shape}")

    def moments(self):
        """Mean and biased variance to norm with: in training new arrays, to be written, else the running ones."""
        if self.training:
            return np.empty_like(self.running_mean), np.empty_like(self.running_var)
        return self.running_mean, self.running_var

    def track(self, mean, var, values):
        """In training, move the running mean and variance towards those of a batch with so many values a channel."""
        if not self.training:
            return
        factor = values / (values - 1)
        batches = self.num_batches_tracked.reshape(1)
        core.track_moments(self.running_mean, mean, self.running_var, var, factor, self.momentum, batches)

    def forward(self, x, halo, add=None, relu=False):
        """relu: of the result. add: a Blocked that is added before; backward(dy, halo, add_halo) -> (dx, dadd) then."""
        self.check(x, add)
        training = self.training
        mean, var = self.moments()
        y = x.like(halo)
        start = time.perf_counter()
        core.batch_norm(
            x.array, y.array, x.n, self.weight.data, self.bias.data, mean, var, self.eps, training, relu,
            () if add is None else ((add.array, None, None, False),),
        )  # fmt: skip
        tell("batch_norm", start, [x, add], [y])
        self.track(mean, var, math.prod(x.shape) // self.num_features)
        fused_add = add is not None
        output = y if relu and fused_add else None

        def backward(dy, halo, add_halo=None):
            halo = halo or (0, 0)
            dx = dy if dy.has_halo(halo) else x.like(halo)
            dadd = x.like(add_halo) if fused_add else None
            start = time.perf_counter()
            core.batch_norm_backward(
                x.array, None if output is None else output.array, dy.array, dx.array, x.n, self.weight.data,
                self.bias.data, mean, var, *self.weight.gradient(), *self.bias.gradient(), self.eps, training, relu,
                None if dadd is None else dadd.array,
            )  # fmt: skip
            tell("batch_norm_backward", start, [x, output, dy], [dx, dadd])
            return (dx, dadd) if fused_add else dx

        return y, backward

    def _arguments(self):
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class BatchNorm1d(BatchNorm2d):
    """BatchNorm2d for x (N, num_features)."""

    replays = True
    _ndim = 2
