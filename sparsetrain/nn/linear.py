"""The fully connected layer."""

from sparsetrain import checks, plans
from sparsetrain.nn import weighted
from sparsetrain.nn.module import Module, check_input


class Linear(Module):
    """y = x W^T + b.

    x (N, in_features), y (N, out_features); weight (out, in), dense or sparse, and bias (out,) or None.
    """

    replays = True
    geometry = plans.Geometry()  # of a convolution of one pixel
    fuses_into = True
    backprop = None  # what a method of backprop does in this layer instead of the exact backward pass
    probe = None  # a method of sparsity's look at the gradients of weights that are not stored
    fuses_relu = property(lambda self: type(self) is Linear)  # a subclass may have a forward of its own

    def __init__(self, in_features, out_features, bias=True):
        self.in_features = checks.integer("in_features", in_features, low=1)
        self.out_features = checks.integer("out_features", out_features, low=1)
        self.weight = weighted.uniform((out_features, in_features), in_features)
        self.bias = weighted.uniform((out_features,), in_features) if bias else None

    def forward(self, x, halo, relu=False):
        check_input(x, self.weight, 2, self.in_features, "; nn.Flatten() makes it so")
        return weighted.run(self, x, halo, relu)

    def _arguments(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
