"""Layers in numbers of 8 bits: activations, weights and output gradients are rounded to 255 or 256 levels, and products
are summed without rounding in 32 bits.

A layer reads a Quantized x and a Rounded weight; sums become floats where they leave it. Where sums could leave 32
bits, where channels of a group do not fill quads, and where another backward kernel is faster, the same rounded
numbers go through the ordinary kernels: the result is the same to rounding.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsetrain import arrays, ops, plans, slabs, sparse_gradient
from sparsetrain._kernels import core
from sparsetrain.record import tell
from sparsetrain.sparse import Structure

QUAD = 4  # channels whose bytes lie side by side
MOST_WEIGHT, MOST_LEVELS = 127, 255
MOST_PRODUCTS = (2**31 - 1) // (MOST_WEIGHT * MOST_LEVELS)  # whose sum fits 32 bits for sure


class Quantized:
    """A batch as bytes: values (byte - zero) * scale. quads: a Blocked of int32 with a quarter of the channels.

    shape and dtype are those of the float32 Blocked that it was made of, as restored() gives it back.
    """

    def __init__(self, quads, channels, scale, zero):
        self.quads, self.channels, self.scale, self.zero = quads, channels, scale, zero

    n = property(lambda self: self.quads.n)
    dtype = np.dtype(np.float32)

    @property
    def shape(self):
        return (self.n, self.channels, *self.quads.shape[2:])

    def restored(self, halo=(0, 0)):
        """The values as a Blocked."""
        _, _, height, width, _ = self.quads.array.shape
        x = arrays.empty(self.n, self.channels, height, width, self.dtype, halo, self.quads.ndim)
        core.from_quads(self.quads.array, x.array, self.scale, self.zero)
        return x


def quantize(x, halo=(0, 0)):
    """The Quantized of a float32 Blocked: the nearest of 256 levels from its least value (at most 0) to its largest.

    None if a value is not finite. TypeError for another dtype.
    """
    if x.dtype != np.float32:
        raise TypeError(f"products of 8 bits need float32, x is {x.dtype}")
    start = time.perf_counter()
    low, high = core.find_range(x.array, x.n)
    scale = (high - low) / MOST_LEVELS
    if not math.isfinite(scale):
        return None
    if scale < np.finfo(np.float32).tiny:
        scale = 1.0
    zero = round(-low / scale)
    _, channels, height, width, _ = x.array.shape
    quads = arrays.empty(x.n, -(-channels // QUAD), height, width, np.int32, halo, x.ndim)
    core.to_quads(x.array, quads.array, quads.halo, scale, zero)
    tell("quantize", start, [x], [quads])
    return Quantized(quads, channels, scale, zero)


@dataclass(frozen=True)
class Rounded:
    """A weight as bytes: values levels * scale, in the order of the parameter's data. quads: int32, four input channels
    each, as `structure` says; sums int32: of each row's levels."""

    levels: np.ndarray
    scale: float
    quads: np.ndarray
    sums: np.ndarray
    structure: Structure


class _QuadPlaces:
    """Which quads of a weight are stored, and where in them its values lie."""

    def __init__(self, weight):
        structure = weight.structure
        rows, channels, height, width = (*structure.shape, 1, 1)[:4]
        taps, quads = height * width, -(-channels // QUAD)
        shape = (rows, quads, height, width)[: len(structure.shape)]
        self.indptr, columns = structure.csr()
        channel, tap = np.divmod(columns, taps)
        quad = structure.rows().astype(np.int64) * (quads * taps) + channel // QUAD * taps + tap
        self.structure = Structure(shape)
        if not structure.dense:
            stored, place = np.unique(quad, return_inverse=True)
            indptr = np.searchsorted(stored, np.arange(rows + 1) * (quads * taps)).astype(np.int32)
            sparse = Structure(shape, indptr, (stored % (quads * taps)).astype(np.int32))
            if not plans.is_nearly_dense(sparse, quads):
                self.structure, quad = sparse, place
        if self.structure.dense and taps == 1 and channels % QUAD == 0 and structure.dense:
            self.place = self.bytes = None  # the values are in the order of the quads as they are
            return
        self.place = (quad * QUAD + channel % QUAD).astype(np.int32)
        self.bytes = np.zeros(self.structure.nnz * QUAD, np.int8)


def round_weight(weight):
    """The Rounded of a float32 parameter, to whole multiples of its largest magnitude / 127; None if that is not
    finite. Its arrays are used again by the next call."""
    start = time.perf_counter()
    data = weight.data.reshape(-1)
    most = _largest(data)
    if not math.isfinite(most):
        return None
    scale = most / MOST_WEIGHT
    if scale < np.finfo(np.float32).tiny:
        scale = 1.0
    kept = weight.structure.plans
    if "quads" not in kept:
        kept["quads"] = _QuadPlaces(weight)
    places = kept["quads"]
    levels, sums = np.empty(data.size, np.int8), np.empty(weight.shape[0], np.int32)
    core.round_weights(data, places.indptr, places.place, scale, levels, places.bytes, sums)
    tell("round weights", start, [], [])
    quads = levels if places.bytes is None else places.bytes
    return Rounded(levels, scale, quads.view(np.int32), sums, places.structure)


def _largest(data):
    """The largest magnitude of a flat array, NaN if a value is not finite."""
    lanes = arrays.IMAGES
    whole = data[: len(data) // lanes * lanes]  # in one pass on all threads
    low, high = core.find_range(whole.reshape(1, -1, 1, 1, lanes), lanes) if len(whole) else (0.0, 0.0)
    rest = np.abs(data[len(whole) :]).max(initial=0.0)
    return float(np.maximum(max(-low, high), rest))


@contextmanager
def rounded_values(weight, rounded):
    """Within it, the parameter has the values of its Rounded."""
    data = weight.data
    weight.data = (rounded.levels * np.float32(rounded.scale)).reshape(data.shape)
    try:
        yield
    finally:
        weight.data = data


def _fits(structure, geometry):
    """Whether the channels of a group fill quads, and all sums of the forward pass and the input gradient 32 bits."""
    taps = math.prod(structure.shape[2:])
    return (geometry.groups == 1 or structure.shape[1] % QUAD == 0) and (
        max(structure.shape[:2]) * taps <= MOST_PRODUCTS
    )


class Operands(NamedTuple):
    """What conv2d() has multiplied, for backward()."""

    x: Quantized
    weight: Rounded


def conv2d(x, weight, bias, geometry, halo=(0, 0), relu=False):
    """(y, Operands) of ops.conv2d() in numbers of 8 bits; (y, x) in float32 where a value or weight is not finite."""
    quantized, rounded = quantize(x, geometry.padding), round_weight(weight)
    if quantized is None or rounded is None:
        return ops.conv2d(x, weight, bias, geometry, halo, relu), x
    return _forward(quantized, weight, rounded, bias, geometry, halo, relu), Operands(quantized, rounded)


def _forward(x, weight, rounded, bias, geometry, halo, relu):
    if not _fits(weight.structure, geometry):
        with rounded_values(weight, rounded):
            return ops.conv2d(x.restored(geometry.padding), weight, bias, geometry, halo, relu)
    height, width = x.quads.array.shape[2:4]
    oh, ow = geometry.output((*weight.shape, 1, 1)[2:4], height, width)
    y = arrays.empty(x.n, weight.shape[0], oh, ow, x.dtype, halo, x.quads.ndim)
    start = time.perf_counter()
    step = ops.planned(rounded, "forward", geometry, plans.forward, x.quads, y)
    # Packing moves 32 bits as they are, and is there for floats.
    values = step.values(rounded.quads.view(np.float32)).view(np.int32)
    shift = np.zeros(weight.shape[0], np.float32) if bias is None else bias.data
    core.int8_spmm(
        step.plan, x.quads.array, values, -x.zero * rounded.sums, x.scale * rounded.scale, shift, y.array, relu
    )
    tell("forward", start, [x.quads], [y], weight=weight, output=y, plans=(step.plan,))
    return y


def backward(operands, weight, geometry, dy, selection, halo=(0, 0), into=None, expected=None):
    """sparse_gradient.backward() of the Operands, for the Selection of a dither with a limit up to 127."""
    x, rounded = operands
    plan = _plan(x, weight, geometry, dy)
    if plan is not None and (expected is None or sparse_gradient.skips(weight, geometry, expected)):
        start = time.perf_counter()
        entries = core.int8_compress(plan, dy.array, selection.step, selection.limit, selection.seed)
        tell("compress", start, [dy], [])
        used = sparse_gradient.Used(entries.nnz, math.prod(dy.shape), entries.clipped, "gradient")
        if sparse_gradient.skips(weight, geometry, used.density):
            return _products(x, weight, rounded, dy, entries, selection.step, halo, into), used
    restored = x.restored(geometry.padding)
    out, used = sparse_gradient.written_out(restored, weight, geometry, dy, selection)
    with rounded_values(weight, rounded):
        return ops.conv2d_backward(restored, weight, None, geometry, out, halo, into), used


def exact_backward(operands, weight, geometry, dy, halo=(0, 0), into=None):
    """ops.conv2d_backward() of the Operands, without bias, for dy as it is."""
    with rounded_values(weight, operands.weight):
        return ops.conv2d_backward(operands.x.restored(geometry.padding), weight, None, geometry, dy, halo, into)


def _plan(x, weight, geometry, dy):
    """The SlabPlan, None where sums could leave 32 bits."""
    if geometry.groups > 1 or not _fits(weight.structure, geometry):
        return None
    shape = (len(dy.array), x.channels, *x.quads.array.shape[2:])
    key = ("int8 slabs", geometry, shape, dy.array.shape, x.n, core.get_isa())
    kept = weight.structure.plans
    if key not in kept:
        plan = slabs.plan(shape, x.dtype, dy.array.shape, x.n, (*weight.shape, 1, 1)[2:4], geometry, MOST_PRODUCTS)
        kept[key] = plan if plan is not None and plan.positions <= slabs.MOST_POSITION else None
    return kept[key]


def _products(x, weight, rounded, dy, entries, step, halo, into):
    """dx; adds the weight's gradient."""
    start = time.perf_counter()
    full = weight if weight.structure.dense else weight.full()
    grad, accumulate = full.gradient()
    core.int8_weight_gradient(entries, x.quads.array, x.zero, step * x.scale, grad.reshape(-1), accumulate)
    if full is not weight:
        weight.collect()
    tell("weight gradient", start, [x.quads], [], weight=weight, output=dy, entries=entries)
    if halo is None:
        return None
    start = time.perf_counter()
    levels = rounded.levels
    if not weight.structure.dense:
        levels = np.zeros(math.prod(weight.shape), np.int8)
        levels[weight.places()] = rounded.levels
    dx = into
    if dx is None:
        _, _, height, width, _ = x.quads.array.shape
        dx = arrays.empty(x.n, x.channels, height, width, x.dtype, halo, x.quads.ndim)
    core.int8_input_gradient(entries, levels, step * rounded.scale, dx.array, into is not None)
    tell("input gradient", start, [into], [dx], weight=weight, output=dy, entries=entries)
    return dx
