"""Pooling layers. All take x (N, C, H, W); sizes are ints or (vertical, horizontal)."""

from sparsetrain import checks, ops
from sparsetrain.nn.module import Module


class _Pool(Module):
    """Windows of kernel_size every `stride` pixels (kernel_size if None), over x with `padding` around it."""

    def __init__(self, kernel_size, stride=None, padding=0):
        self.kernel_size = checks.pair("kernel_size", kernel_size, low=1)
        self.stride = self.kernel_size if stride is None else checks.pair("stride", stride, low=1)
        self.padding = checks.pair("padding", padding)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(f"padding is {self.padding}, must be at most half of kernel_size = {self.kernel_size}")

    def _windows(self, x):
        _check(x)
        if any(n + 2 * p < k for n, p, k in zip(x.shape[2:], self.padding, self.kernel_size, strict=True)):
            raise ValueError(
                f"x has shape {x.shape}: with padding {self.padding} it is smaller than the kernel {self.kernel_size}"
            )
        return [
            ops.windows(*axis) for axis in zip(x.shape[2:], self.kernel_size, self.stride, self.padding, strict=True)
        ]

    def _arguments(self):
        return f"{self.kernel_size}, stride={self.stride}, padding={self.padding}"


class MaxPool2d(_Pool):
    """The maximum of each window; padding never wins. The first maximum gets the gradient."""

    replays = True

    def forward(self, x, halo):
        h, w = self._windows(x)
        y = ops.max_pool2d(x, h, w, halo)

        def backward(dy, halo):
            return ops.max_pool2d_backward(x, y, h, w, dy, halo or (0, 0))

        return y, backward


class AvgPool2d(_Pool):
    """The mean of each window; padding counts as zeros."""

    replays = True

    def forward(self, x, halo):
        return _average(x, *self._windows(x), halo)


class AdaptiveAvgPool2d(Module):
    """The mean of windows that cover x evenly, output_size of them: an int or (vertical, horizontal)."""

    replays = True

    def __init__(self, output_size):
        self.output_size = checks.pair("output_size", output_size, low=1)

    def forward(self, x, halo):
        _check(x)
        windows = [ops.adaptive_windows(n, o) for n, o in zip(x.shape[2:], self.output_size, strict=True)]
        return _average(x, *windows, halo)

    def _arguments(self):
        return f"{self.output_size}"


def _average(x, h, w, halo):
    size = x.shape[2:]

    def backward(dy, halo):
        return ops.avg_pool2d_backward(size, h, w, dy, halo or (0, 0))

    return ops.avg_pool2d(x, h, w, halo), backward


def _check(x):
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}, must be (N, C, H, W)")
