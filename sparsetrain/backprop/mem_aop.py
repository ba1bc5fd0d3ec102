"""Mem-AOP-GD: the weight gradient from the outer products of few rows, the others remembered."""

import math
from dataclasses import dataclass

import numpy as np

from sparsetrain import arrays, checks, ops, plans, slabs, sparse_gradient
from sparsetrain._kernels import core
from sparsetrain.backprop.method import Method

POLICIES = ("topk", "weightedk", "randk")


@dataclass
class MemAOP(Method):
    """The weight gradient is the sum over images (in a convolution, images x pixels of the output: M rows) of dy x^T;
    only K = k M rows are used.

    policy: the rows with the largest |x| |dy| ("topk"), rows drawn without replacement, with probabilities in
    proportion to (|x| |dy|)^2 ("weightedk") or alike ("randk"); no weighting corrects for the rows left out. k in (0,
    1], at least one row. Input and bias gradient are exact.

    memory: x and dy of a row that is not used are added to those that the same row has next time, times sqrt(decay),
    decay in [0, 1]. Each comes in times the square root of the learning rate, and the sum of outer products is
    divided by the present one: with SGD a row counts with the rates of the times it comes from; other optimisers take
    the result for a gradient of now. The memory holds M (inputs + outputs) numbers, inputs being channels x taps:
    nine times the activations for a 3x3 convolution. Its slots belong to rows, so a batch of another size is a
    ValueError, as is attaching it to a convolution with groups.

    Source: Hernandez, Rini & Duman, arXiv 2110.09164, and its code (HernandezEduin/Mem-AOP-GD): one linear layer,
    SGD. Convolutions, deeper nets, other optimisers are ours.
    """

    k: float = 0.1
    policy: str = "topk"
    memory: bool = True
    decay: float = 1.0

    def check(self):
        if not 0 < checks.number("k", self.k) <= 1:
            raise ValueError(f"k is {self.k}, must be in (0, 1]")
        checks.one_of("policy", self.policy, POLICIES)
        checks.flag("memory", self.memory)
        checks.number("decay", self.decay, low=0, high=1)

    def attach(self, model, optimizer=None):
        super().attach(model, optimizer)
        for layer in self.attached:
            groups = layer.module.geometry.groups
            if groups > 1:
                self.detach()
                raise ValueError(f"layer {layer.name} has groups {groups}, MemAOP needs 1: exclude it")
        return self

    def backward(self, layer, x, weight, bias, geometry, dy, halo, into):
        self.bias_gradient(bias, dy)
        used = self._weight_gradient(layer, x, weight, geometry, dy)
        if halo is None:
            return None, used
        if plans.is_nearly_dense(weight.structure, x.shape[1], geometry):
            weight = weight.full()
        return ops.input_gradient(x, weight, geometry, dy, halo, into), used

    def choose(self, layer, worth):
        """The indices of K of the M rows with the squares of |x| |dy| in `worth`, ascending."""
        count = max(1, round(self.k * len(worth)))
        if self.policy == "randk" and np.isfinite(worth).all():
            return np.sort(layer.random().choice(len(worth), count, replace=False))
        if self.policy == "weightedk":
            # The first of exponential variates with these rates come as drawing one by one does (Efraimidis &
            # Spirakis 2006)
            worth = worth / layer.random().standard_exponential(len(worth))
        worth = np.nan_to_num(worth, nan=np.inf, posinf=np.inf)  # what is not finite must show
        least = np.partition(worth, len(worth) - count)[len(worth) - count]
        chosen = np.flatnonzero(worth > least)
        level = np.flatnonzero(worth == least)[: count - len(chosen)]
        return np.sort(np.concatenate([chosen, level]))

    def _weight_gradient(self, layer, x, weight, geometry, dy):
        rows = _Rows(dy)
        if not self.memory:
            worth = rows.pick(_window_norms(x, weight, geometry, dy)) * rows.pick(_norms(dy.array))
            chosen = self.choose(layer, worth)
            linear = len(weight.shape) == 2
            mask = None if linear and not self.angles else rows.mask(chosen)
            if self.angles:
                layer.note_angle(dy.array, dy.array * mask[:, None])
            if linear:
                return _gathered_gradient(weight, x.array, dy.array, dy.n, chosen, 1)
            return sparse_gradient.weight_gradient(x, weight, geometry, dy, sparse_gradient.chosen(mask))
        lr = 1.0 if self.optimizer is None else self.optimizer.lr
        if lr == 0:  # nothing is learned, nor remembered
            return sparse_gradient.weight_gradient(x, weight, geometry, dy, sparse_gradient.above(np.inf))
        worth = rows.pick(self._remember(layer, x, weight, geometry, dy, math.sqrt(lr)))
        chosen = self.choose(layer, worth)
        mask = rows.mask(chosen)
        if self.angles:
            layer.note_angle(dy.array, layer.state["dy"] * mask[:, None])
        layer.state["keep"] = ((1 - mask) * math.sqrt(self.decay)).astype(dy.dtype)
        if len(weight.shape) == 2:
            return _gathered_gradient(weight, layer.state["x"][0], layer.state["dy"], dy.n, chosen, lr)
        return _remembered_gradient(layer.state, weight, dy.n, mask, lr)

    def _remember(self, layer, x, weight, geometry, dy, scale):
        """Adds x and dy, times scale, to the memory; returns the squares of |x| |dy| of its rows."""
        blocks, _, height, width, lanes = dy.array.shape
        windows = _windows(x, weight, geometry, (height, width))
        state = layer.state
        if not state:
            state["images"] = dy.n
            state["x"] = np.zeros((len(windows), *windows[0].shape), dy.dtype)
            state["dy"] = np.zeros(dy.array.shape, dy.dtype)
        if state["images"] != dy.n or state["dy"].shape != dy.array.shape:
            raise ValueError(
                f"layer {layer.name} has a batch of {dy.n}, the memory of MemAOP has slots for {state['images']}: drop "
                "the last batch, or use memory=False"
            )
        x_norms, dy_norms = np.zeros((2, blocks, height, width, lanes), dy.dtype)
        for memory, window in zip(state["x"], windows, strict=True):
            core.remember(memory, window, scale, state.get("keep"), x_norms)
        core.remember(state["dy"], dy.array, scale, state.get("keep"), dy_norms)
        return x_norms * dy_norms


def _norms(array):
    """Sums over the channels of the squares of (blocks, channels, height, width, 16)."""
    blocks, _, height, width, lanes = array.shape
    norms = np.zeros((blocks, height, width, lanes), array.dtype)
    core.square_norms(array, norms)
    return norms


def _taps(weight, geometry):
    """(row, column) of each tap in the padded image."""
    kernel = (*weight.shape, 1, 1)[2:4]
    return [(k * geometry.dilation[0], m * geometry.dilation[1]) for k in range(kernel[0]) for m in range(kernel[1])]


def _windows(x, weight, geometry, size):
    """Views of x, one a tap: what the outputs of `size` (height, width) meet, (blocks, channels, height, width, 16)."""
    array = x.with_halo(geometry.padding).array
    block, channel, row, pixel, lane = array.strides
    first = array.ctypes.data - array.base.ctypes.data - geometry.padding[0] * row - geometry.padding[1] * pixel
    shape = (*array.shape[:2], *size, arrays.IMAGES)
    strides = (block, channel, geometry.stride[0] * row, geometry.stride[1] * pixel, lane)
    return [
        np.ndarray(shape, array.dtype, array.base, first + k * row + m * pixel, strides)
        for k, m in _taps(weight, geometry)
    ]


def _window_norms(x, weight, geometry, dy):
    """The sums of the squares of what each output meets of x, (blocks, height, width, 16)."""
    (ph, pw), (sh, sw) = geometry.padding, geometry.stride
    height, width = dy.array.shape[2:4]
    pixels = np.pad(_norms(x.array), ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    return sum(
        pixels[:, k : k + sh * (height - 1) + 1 : sh, m : m + sw * (width - 1) + 1 : sw]
        for k, m in _taps(weight, geometry)
    )


def _gathered_gradient(weight, x, dy, images, chosen, lr):
    """Adds the outer products of these images of a linear layer's x and dy, (blocks, features, 1, 1, 16) each, divided
    by lr, to weight's gradient: as a batch of their own. Returns Used."""
    block, lane = np.divmod(chosen, arrays.IMAGES)
    few_x, few_dy = (np.ascontiguousarray(a[block, :, 0, 0, lane]) for a in (x, dy))
    few_dy /= few_dy.dtype.type(lr)
    if len(chosen) == 0:
        few_x, few_dy = (np.zeros((1, a.shape[1]), a.dtype) for a in (x, dy))
    ops.weight_gradient(arrays.pack(few_x), weight, plans.Geometry(), arrays.pack(few_dy))
    return sparse_gradient.Used(few_dy.size, images * few_dy.shape[1], 0, "gradient")


def _remembered_gradient(state, weight, images, mask, lr):
    """Adds the outer products of the memory's rows in `mask`, divided by lr, to weight's gradient. Returns Used."""
    full = weight if weight.structure.dense else weight.full()
    grad, accumulate = full.gradient()
    if not accumulate:
        grad[...] = 0
    own = state["dy"]
    plan = slabs.plan(state["x"].shape[1:], own.dtype, own.shape, images, (1, 1), plans.Geometry())
    entries = core.compress(plan, own, core.THRESHOLD, chosen=mask)
    taps = grad.reshape(*weight.shape[:2], -1)
    product = np.empty(math.prod(weight.shape[:2]), own.dtype)
    for tap, memory in enumerate(state["x"]):
        core.slab_weight_gradient(entries, memory, product, False)
        taps[:, :, tap] += product.reshape(weight.shape[:2]) / product.dtype.type(lr)
    if full is not weight:
        weight.collect()
    return sparse_gradient.Used(entries.nnz, images * math.prod(own.shape[1:4]), 0, "gradient")


class _Rows:
    """Rows (image, pixel) of a gradient, in the order of images; arrays of them are (blocks, height, width, 16)."""

    def __init__(self, dy):
        blocks, _, height, width, lanes = dy.array.shape
        self.n, self.shape, self.dtype = dy.n, (blocks, height, width, lanes), dy.dtype

    def pick(self, values):
        """(M,) of an array of rows."""
        return np.moveaxis(values, 3, 1).reshape(-1, self.shape[1] * self.shape[2])[: self.n].reshape(-1)

    def mask(self, chosen):
        """1 at these rows, 0 elsewhere, as an array of rows."""
        blocks, height, width, lanes = self.shape
        flat = np.zeros(blocks * lanes * height * width, self.dtype)
        flat[chosen] = 1
        return np.ascontiguousarray(np.moveaxis(flat.reshape(blocks, lanes, height, width), 1, 3))
