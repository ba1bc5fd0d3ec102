"""A convolution and the batch norm after it as one step of a Sequential."""

import time

from sparsetrain import arrays, ops
from sparsetrain.nn import module
from sparsetrain.nn.replay import keeps
from sparsetrain.normed import Norm, Normed, NormedGradient


class ConvNorm:
    """A Conv2d without bias and its BatchNorm2d, with the residual add and the ReLU after them.

    The norm's output is not written but formed, band by band, by the convolution that reads it, which also takes the
    sums that the norm before and the norm after need while its bands are in cache. Where bands do not pay the two
    layers run one by one.
    """

    fuses_into = fuses_relu = True
    reuses_dy = False
    grad_halo = (0, 0)

    def __init__(self, conv, norm):
        self.conv, self.norm = conv, norm

    halo = property(lambda self: self.conv.halo)

    def run(self, x, halo, add=None, relu=False):
        """(Normed, backward(dy, halo, add_halo=None, into=None)), as of BatchNorm2d and of Conv2d."""
        conv, norm = self.conv, self.norm
        with module.blamed(conv):
            conv.check(x)
        if conv.backprop is not None or conv.probe is not None or not ops.can_band(x, conv.weight, conv.geometry):
            return self._one_by_one(x, halo, add, relu)
        start = time.perf_counter()
        mean, var = norm.moments()
        training = norm.training
        y = ops.conv2d_bands(x, conv.weight, conv.geometry, (mean, var) if training else None)
        module.report(conv, "forward", start, y)
        start = time.perf_counter()
        with module.blamed(norm):
            norm.check(y, add)
        values = y.n * y.shape[2] * y.shape[3]
        norm.track(mean, var, values)
        if not training:
            mean, var = mean.copy(), var.copy()  # the running ones may move before the backward pass
        numbers = Norm(norm.weight.data, norm.bias.data, mean, var, norm.eps, training)
        out = Normed(y, numbers, add, relu)
        module.report(norm, "forward", start, out)

        def backward(dy, halo, add_halo=None, into=None):
            start = time.perf_counter()
            if not isinstance(dy, NormedGradient):
                dy = ops.normed_gradient(out, dy)
            ops.norm_parameter_gradients(norm.weight, norm.bias, numbers, dy)
            module.report(norm, "backward", start, dy)
            start = time.perf_counter()
            dx = ops.conv2d_bands_backward(x, conv.weight, conv.geometry, y, numbers, dy, halo, into)
            module.report(conv, "backward", start, dx)
            if add is None:
                return dx
            # Without its sums, which do not hold any more once something is added to it.
            dadd = arrays.Blocked(dy.array, dy.n, dy.halo, dy.ndim)
            return dx, dadd.with_halo(add_halo or (0, 0))

        return out, backward if keeps() else None

    def _one_by_one(self, x, halo, add, relu):
        y, conv_backward = self.conv.run(x, self.norm.halo)
        y, norm_backward = self.norm.run(y, halo, add=add, relu=relu)

        def backward(dy, halo, add_halo=None, into=None):
            options = {} if into is None else {"into": into}
            if add is None:
                return conv_backward(norm_backward(dy, self.conv.grad_halo), halo, **options)
            dy, dadd = norm_backward(dy, self.conv.grad_halo, add_halo or (0, 0))
            return conv_backward(dy, halo, **options), dadd

        return y, backward if keeps() else None
