"""The convolution layer."""

from sparsetrain import checks, plans
from sparsetrain.nn import weighted
from sparsetrain.nn.module import Module, check_input


class Conv2d(Module):
    """y = W * x + b, a cross-correlation as in PyTorch.

    x (N, in_channels, H, W), y (N, out_channels, OH, OW); weight (out, in / groups, KH, KW), dense or sparse, and
    bias (out,) or None. kernel_size, stride, padding (of zeros) and dilation are ints or (vertical, horizontal).
    """

    replays = True
    fuses_into = True
    backprop = None  # what a method of backprop does in this layer instead of the exact backward pass
    probe = None  # a method of sparsity's look at the gradients of weights that are not stored
    fuses_relu = property(lambda self: type(self) is Conv2d)  # a subclass may have a forward of its own

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True):
        self.in_channels = checks.integer("in_channels", in_channels, low=1)
        self.out_channels = checks.integer("out_channels", out_channels, low=1)
        self.kernel_size = checks.pair("kernel_size", kernel_size, low=1)
        self.stride = checks.pair("stride", stride, low=1)
        self.padding = checks.pair("padding", padding)
        self.dilation = checks.pair("dilation", dilation, low=1)
        self.groups = checks.integer("groups", groups, low=1)
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % groups:
                raise ValueError(f"{name} is {getattr(self, name)}, must be a multiple of groups = {groups}")
        self.geometry = plans.Geometry(self.stride, self.padding, self.dilation, self.groups)
        self.halo, self.grad_halo = self.padding, self.geometry.grad_halo(self.kernel_size)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        fan_in = shape[1] * shape[2] * shape[3]
        self.weight = weighted.uniform(shape, fan_in)
        self.bias = weighted.uniform((out_channels,), fan_in) if bias else None

    def check(self, x):
        """ValueError or TypeError unless x can be convolved."""
        check_input(x, self.weight, 4, self.in_channels)
        if min(self.geometry.output(self.kernel_size, *x.shape[2:])) < 1:
            raise ValueError(
                f"x has shape {x.shape}: with padding {self.padding} it is smaller than the kernel "
                f"{self.kernel_size} with dilation {self.dilation}"
            )

    def forward(self, x, halo, relu=False):
        self.check(x)
        return weighted.run(self, x, halo, relu)

    def _arguments(self):
        parts = [f"{self.in_channels}, {self.out_channels}, {self.kernel_size}"]
        for name, default in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join([*parts, f"bias={self.bias is not None}"])
