"""The fully connected layer."""

import math

from sparsetrain import checks, ops, plans, rng
from sparsetrain.nn.module import Module, check_input
from sparsetrain.sparse import Parameter


def uniform(shape, fan_in):
    """A float32 Parameter uniform within +-1 / sqrt(fan_in), PyTorch's default for weights and biases."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0
    return Parameter(rng.generator().uniform(-bound, bound, shape).astype("float32"))


class Linear(Module):
    """y = x W^T + b.

    x (N, in_features), y (N, out_features); weight (out, in), dense or sparse, and bias (out,) or None.
    """

    fuses_into = True
    backprop = None  # what a method of backprop does in this layer instead of the exact backward pass
    fuses_relu = property(lambda self: type(self) is Linear)  # a subclass may have a forward of its own

    def __init__(self, in_features, out_features, bias=True):
        self.in_features = checks.integer("in_features", in_features, low=1)
        self.out_features = checks.integer("out_features", out_features, low=1)
        self.weight = uniform((out_features, in_features), in_features)
        self.bias = uniform((out_features,), in_features) if bias else None

    def forward(self, x, halo, relu=False):
        check_input(x, self.weight, 2, self.in_features, f"(N, {self.in_features}); nn.Flatten() makes it so")
        y = ops.conv2d(x, self.weight, self.bias, plans.Geometry(), halo, relu)

        def backward(dy, halo, into=None):
            if relu:
                dy = ops.relu_backward(y, dy, self.grad_halo)
            back = ops.conv2d_backward if self.backprop is None else self.backprop.backward
            return back(x, self.weight, self.bias, plans.Geometry(), dy, halo, into)

        return y, backward

    def _arguments(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
