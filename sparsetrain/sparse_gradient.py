"""Backward passes that use only some values of the output gradient.

A Selection says which, and as what. They are stored as lists (core.Entries) and multiplied by the kernels of
sparse_gradient.hh, or, where few are left out or few weights are stored, the gradient that is used is written out and
goes through the ordinary kernels. Both give the same result to rounding.
"""

import math
import time
from dataclasses import dataclass, fields

import numpy as np

from sparsetrain import arrays, ops, plans, slabs
from sparsetrain._kernels import core
from sparsetrain.record import tell


@dataclass(frozen=True)
class Selection:
    """Which values of an output gradient are used, and as what. Made by dither(), above(), chosen() and nonzero()."""

    kind: int = core.THRESHOLD
    step: float = 0.0
    limit: int = 0
    seed: int = 0
    base: np.ndarray | None = None
    chosen: np.ndarray | None = None
    thresholds: np.ndarray | None = None

    def arguments(self):
        """Those of core.compress() and core.sparsify()."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def nonzero():
    """All values that are not zero."""
    return Selection()


def dither(step, seed, limit=0):
    """step * floor(value / step + u), u uniform in [0, 1) from a hash of the seed and the value's place.

    A multiple of `step` > 0 whose mean is the value. limit: multiples beyond +-limit are clipped (0: none is).
    """
    if not 0 < step < math.inf:
        raise ValueError(f"step is {step}, must be above 0 and finite")
    # The kernels add image and seed: neighbouring seeds would give one image the numbers of its neighbour.
    return Selection(core.DITHER, step, limit, hash((seed,)) & (1 << 64) - 1)


def above(thresholds, base=None):
    """Values above the threshold of their image in magnitude, (blocks, 16) or one number; all others are zero.

    With base, one image of the gradient (channels, height, width): values whose difference from it is above the
    threshold; all others are the base's.
    """
    if np.ndim(thresholds) == 0 and not thresholds >= 0:
        raise ValueError(f"thresholds is {thresholds}, must be 0 or more")
    return Selection(base=base, thresholds=thresholds)


def chosen(mask):
    """All channels of the pixels of images where mask (blocks, height, width, 16) is not 0."""
    return Selection(chosen=mask)


@dataclass(frozen=True)
class Used:
    """What a backward pass used: nnz of `values`, how many were clipped, and whether they were skipped or multiplied by
    the ordinary kernels ("gradient" or "weight")."""

    nnz: int
    values: int
    clipped: int
    kernel: str

    @property
    def density(self):
        """nnz a value."""
        return self.nnz / self.values


# Of a backward pass on 2 cores: time by the share of values used, and by the share of weights stored (1 / 300 is the
# dense kernels' 300 GFLOP/s), relative to all multiply-adds. With all weights stored they are equal at 47 % zeros,
# measured at 38 to 50 % for 3x3 and linear layers; at 66 % for 1x1 convolutions, which wait for memory: measured at 53
# to 68 %.
def _gradient_time(density, shape, lanes):
    return (density + 0.01) / (100 if shape[2:] == (1, 1) else 155) * max(1, lanes / shape[1])


def _weight_time(density):
    return (density + 0.04) / 300


# Of that time where the dense gradients are those of winograd.hh: equal at 69 % zeros, measured at 70 to 72 % for
# layers of 64 to 512 channels, at 60 % for 512 on maps of 7x7 (AVX2).
TRANSFORMED = 0.6


def skips(weight, geometry, density):
    """Whether skipping zeros of the gradient is faster than the kernels that skip removed weights, for this share of
    values used."""
    if geometry.groups > 1:
        return False
    lanes = core.vector_lanes(weight.data.dtype)
    with_weights = _weight_time(1 - weight.sparsity)
    if plans.is_transformed(weight.shape, geometry):
        with_weights = min(with_weights, TRANSFORMED * _weight_time(1))
    return _gradient_time(density, weight.shape, lanes) < with_weights


def plan(x, weight, geometry, dy, short=False):
    """The SlabPlan for these arrays, made once for the weight's structure. short: as of slabs.plan()."""
    return _plan(weight, geometry, x.dtype, x.array.shape[:4], dy.array.shape[:4], x.n, short)


def _plan(weight, geometry, dtype, x_shape, dy_shape, images, short, lanes=arrays.IMAGES):
    kernel, plans = (*weight.shape, 1, 1)[2:4], weight.structure.plans
    key = ("slabs", geometry, x_shape, dy_shape, images, dtype.char, core.get_isa(), short, lanes)
    if key not in plans:
        plans[key] = slabs.plan(x_shape, dtype, dy_shape, images, kernel, geometry, short=short, lanes=lanes)
    return plans[key]


def plan_for(x, weight, geometry, dy, expected):
    """The plan() for the share of values that will be used, None if that is not known."""
    found = plan(x, weight, geometry, dy)
    short = expected is not None and slabs.is_short(found, expected, x.dtype)
    return plan(x, weight, geometry, dy, short=True) if short else found


def written_out(x, weight, geometry, dy, selection):
    """The gradient that is used as a Blocked, and Used."""
    start = time.perf_counter()
    out = dy.like(geometry.grad_halo((*weight.shape, 1, 1)[2:4]))
    nnz, clipped = core.sparsify(plan(x, weight, geometry, dy), dy.array, out.array, **_arguments(selection, dy))
    tell("sparsify", start, [dy], [out])
    return out, _used(dy, nnz, clipped, "weight")


def _arguments(selection, dy):
    found = selection.arguments()
    if found["thresholds"] is not None:
        shape = (len(dy.array), arrays.IMAGES)
        found["thresholds"] = np.ascontiguousarray(np.broadcast_to(found["thresholds"], shape), dy.dtype)
    return found


def standard_deviation(dy, bias=None):
    """That of all values of a Blocked, as a float. Adds the gradient of a bias, in the same pass."""
    start = time.perf_counter()
    deviation = core.standard_deviation(dy.array, dy.n, *(() if bias is None else bias.gradient()))
    tell("standard deviation", start, [dy], [])
    return deviation


def _used(dy, nnz, clipped, kernel):
    return Used(nnz, math.prod(dy.shape), clipped, kernel)


def _entries(x, weight, geometry, dy, selection, expected):
    """The Entries and Used, or None twice where the ordinary kernels will be or turn out to be faster."""
    if expected is not None and not skips(weight, geometry, expected) or geometry.groups > 1:
        return None, None
    start = time.perf_counter()
    how = plan_for(x, weight, geometry, dy, expected)
    fits = 0 < selection.limit < 128 and dy.dtype == np.float32 and how.positions <= slabs.MOST_POSITION
    if selection.kind == core.DITHER and fits:
        entries = core.int8_compress(how, dy.array, selection.step, selection.limit, selection.seed)
    else:
        entries = core.compress(how, dy.array, **_arguments(selection, dy))
    tell("compress", start, [dy], [])
    used = _used(dy, entries.nnz, entries.clipped, "gradient")
    return (entries, used) if skips(weight, geometry, used.density) else (None, None)


def backward(x, weight, geometry, dy, selection, halo=(0, 0), into=None, expected=None):
    """(dx, Used) of conv2d() for the values of dy that the selection uses; adds the gradient of the weight too.

    expected: the share of values that will be used, if known. No dx if halo is None; it is added
    to the Blocked `into` if given.
    """
    entries, used = _entries(x, weight, geometry, dy, selection, expected)
    if entries is None:
        out, used = written_out(x, weight, geometry, dy, selection)
        return ops.conv2d_backward(x, weight, None, geometry, out, halo, into), used
    full = weight if weight.structure.dense else weight.full()
    base = _base(entries, x, weight, geometry, selection.base)
    _add_weight_gradient(entries, x, weight, full, dy, base)
    if full is not weight:
        weight.collect()
    if halo is None:
        return None, used
    start = time.perf_counter()
    dx = x.like(halo) if into is None else into
    core.slab_input_gradient(entries, full.data.reshape(-1), dx.array, into is not None, base)
    tell("input gradient", start, [into], [dx], weight=weight, output=dy, entries=entries)
    return dx, used


def weight_gradient(x, weight, geometry, dy, selection, expected=None):
    """Adds the gradient of the weight alone, for a selection without base; returns Used."""
    entries, used = _entries(x, weight, geometry, dy, selection, expected)
    if entries is None:
        out, used = written_out(x, weight, geometry, dy, selection)
        ops.weight_gradient(x, weight, geometry, out)
        return used
    full = weight if weight.structure.dense else weight.full()
    _add_weight_gradient(entries, x, weight, full, dy)
    if full is not weight:
        weight.collect()
    return used


def _add_weight_gradient(entries, x, weight, full, dy, base=None):
    start = time.perf_counter()
    grad, accumulate = full.gradient()
    core.slab_weight_gradient(entries, x.array, grad.reshape(-1), accumulate, base)
    tell("weight gradient", start, [x], [], weight=weight, output=dy, entries=entries)


def _base(entries, x, weight, geometry, base):
    """The core.Base of a selection's base, or None.

    What every image has of the base is linear in it, so one image is enough: the base with the sum of x (ReSprop's
    pre-computed parts).
    """
    if base is None:
        return None
    start = time.perf_counter()
    shapes = (1, *x.array.shape[1:4]), (1, *base.shape)
    found = core.base(_plan(weight, geometry, x.dtype, *shapes, 1, entries.plan.short, 1), base, x.array, x.n)
    tell("base", start, [x], [])
    return found
