"""The shortcut without weights of residual nets whose blocks change shape."""

from sparsetrain import arrays, checks
from sparsetrain.nn.module import Module


class PadChannels(Module):
    """y[:, before : before + C] = x[:, :, ::stride, ::stride], zero in the other channels.

    x (N, C, H, W), y (N, before + C + after, ceil(H / stride), ceil(W / stride)).
    Source: He et al., CVPR 2016, section 3.3, shortcut option A.
    """

    def __init__(self, before, after, stride=2):
        self.before, self.after = checks.integer("before", before, low=0), checks.integer("after", after, low=0)
        self.stride = checks.integer("stride", stride, low=1)

    def forward(self, x, halo):
        if x.ndim != 4:
            raise ValueError(f"x has shape {x.shape}, must be (N, C, H, W)")
        n, channels, height, width = x.shape
        inside, every = slice(self.before, self.before + channels), slice(None, None, self.stride)
        size = -(-height // self.stride), -(-width // self.stride)
        y = arrays.empty(n, self.before + channels + self.after, *size, x.dtype, halo)
        y.array[:, : self.before] = y.array[:, self.before + channels :] = 0
        y.array[:, inside] = x.array[:, :, every, every]

        def backward(dy, halo):
            if halo is None:
                return None
            dx = arrays.empty(n, channels, height, width, dy.dtype, halo)
            dx.array[...] = 0
            dx.array[:, :, every, every] = dy.array[:, inside]
            return dx

        return y, backward

    def _arguments(self):
        return f"{self.before}, {self.after}, stride={self.stride}"
