"""What convolutions and linear layers have in common."""

import math

from sparsetrain import ops, rng
from sparsetrain.sparse import Parameter


def uniform(shape, fan_in):
    """A float32 Parameter uniform within +-1 / sqrt(fan_in), PyTorch's default for weights and biases."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0
    return Parameter(rng.generator().uniform(-bound, bound, shape).astype("float32"))


def run(layer, x, geometry, halo, relu):
    """(y, backward) of a layer with weight and bias, as its `backprop` says where a method is attached."""
    weight, bias, method = layer.weight, layer.bias, layer.backprop
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
