"""How layers get their first values, and what convolutions and linear layers have in common."""

import math
from contextlib import contextmanager

import numpy as np

from sparsetrain import ops, rng
from sparsetrain.sparse import Parameter

_blank = None  # the dtype of new layers whose values are zero


@contextmanager
def blank(dtype):
    """Within it, new layers have values of zero, of this dtype, and draw no random numbers: for those that get others
    at once. Memory that nobody writes to costs nothing, so that a large layer whose weights turn out few is no burden.
    """
    global _blank
    before, _blank = _blank, dtype
    try:
        yield
    finally:
        _blank = before


def uniform(shape, fan_in):
    """A float32 Parameter uniform within +-1 / sqrt(fan_in), PyTorch's default for weights and biases."""
    if _blank is not None:
        return Parameter(np.zeros(shape, _blank))
    bound = 1 / math.sqrt(fan_in) if fan_in else 0
    return Parameter(rng.generator().uniform(-bound, bound, shape).astype("float32"))


def constant(count, value):
    """A float32 array of so many times the value."""
    return np.full(count, value, np.float32) if _blank is None else np.zeros(count, _blank)


def run(layer, x, halo, relu):
    """(y, backward) of a layer with weight and bias, as its `backprop` says where a method is attached."""
    weight, bias, geometry, method = layer.weight, layer.bias, layer.geometry, layer.backprop
    if method is None:
        y, kept = ops.conv2d(x, weight, bias, geometry, halo, relu), x
    else:
        y, kept = method.forward(x, weight, bias, geometry, halo, relu)

    def backward(dy, halo, into=None):
        if relu:
            dy = ops.relu_backward(y, dy, layer.grad_halo)
        if layer.probe is not None:
            layer.probe(kept if method is None else method.read(kept, geometry), geometry, dy)
        back = ops.conv2d_backward if method is None else method.backward
        return back(kept, weight, bias, geometry, dy, halo, into)

    return y, backward
