"""Hypothesis strategies: convolutions of any geometry, and sparse weights of any structure."""

from dataclasses import dataclass

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The same examples at every run, few enough for a suite of a minute; isa may serve all of them.
quick = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

sparsities = st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99, 1.0])


@dataclass(frozen=True)
class Conv:
    """One convolution, and the share of its weights that does not exist (1: none does)."""

    n: int
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    sparsity: float | None = None

    @property
    def geometry(self):
        """The keyword arguments that nn.Conv2d and the reference share."""
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    def arrays(self, dtype, seed=0):
        """Random x, w, b, and the mask of the weights that exist."""
        rng = np.random.default_rng(seed)
        w_shape = (self.out_channels, self.in_channels // self.groups, *self.kernel)
        x = rng.standard_normal((self.n, self.in_channels, *self.size)).astype(dtype)
        w = rng.standard_normal(w_shape).astype(dtype)
        mask = rng.random(w_shape) >= (self.sparsity or 0.0)
        return x, w * mask, rng.standard_normal(self.out_channels).astype(dtype), mask


@st.composite
def convs(draw):
    """Any Conv with at least one output pixel."""

    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = draw(st.integers(1, 3))
    conv = Conv(
        n=draw(st.sampled_from([1, 2, 15, 16, 17])),
        in_channels=groups * draw(st.integers(1, 3)),
        out_channels=groups * draw(st.integers(1, 3)),
        size=pair(1, 10),
        kernel=pair(1, 4),
        stride=pair(1, 3),
        padding=pair(0, 3),
        dilation=pair(1, 3),
        groups=groups,
        sparsity=draw(st.none() | sparsities),
    )
    geometry = conv.size, conv.kernel, conv.stride, conv.padding, conv.dilation
    fits = [n + 2 * p > d * (k - 1) for n, k, _, p, d in zip(*geometry, strict=True)]
    if all(fits):
        return conv
    return draw(convs())


@st.composite
def masked_weights(draw):
    """A weight of a layer, float32 or float64, and any mask: with empty rows, with nothing."""
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 7)))
    if draw(st.booleans()):
        shape += (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    mask = rng.random(shape) >= draw(sparsities)
    mask[rng.random(shape[0]) < draw(st.sampled_from([0.0, 0.5]))] = False
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return rng.standard_normal(shape).astype(dtype), mask
