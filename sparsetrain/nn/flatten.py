"""From images to features."""

from sparsetrain import ops
from sparsetrain.nn.module import Module


class Flatten(Module):
    """(N, C, H, W) to (N, C * H * W), in this order; (N, F) stays."""

    replays = True

    def forward(self, x, halo):
        if x.ndim == 2:
            return x.with_halo(halo), lambda dy, halo: dy.with_halo(halo or (0, 0))
        shape = x.shape[1:]

        def backward(dy, halo):
            return ops.flatten_backward(shape, dy, halo or (0, 0))

        return ops.flatten(x, halo), backward
