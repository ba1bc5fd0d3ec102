"""The kernels on every instruction set: every tile, edges, poisoned memory, special values.

Operands are small integers where they can be, so that every sum is exact in float32 in whatever
order it is formed: results must be equal to the reference. The layers' tests look at rounding.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

import reference as ref
import sparsetrain as st
from sparsetrain import arrays, ops, plans, winograd
from sparsetrain._kernels import core
from sparsetrain.arrays import IMAGES
from sparsetrain.record import record
from sparsetrain.sparse import Parameter, SparseParameter

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def integers(shape, dtype, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


# ---- poison


class Poison:
    """Every blocked array made in its presence lies in memory of NaN but for its halo, which is zero."""

    def __init__(self):
        self.made = []

    def allocate(self, blocks, channels, height, width, dtype, halo):
        array = self.really_allocate(blocks, channels, height, width, dtype, halo)
        raw = array.base.view(dtype)
        raw[...] = np.nan
        start = address(array) - address(raw) - halo[0] * array.strides[2]
        around = np.ndarray(
            (blocks, channels, height + 2 * halo[0], width + 2 * halo[1], IMAGES),
            dtype,
            array.base,
            start - halo[1] * array.strides[3],
            array.strides,
        )
        around[...] = 0
        array[...] = np.nan
        self.made.append((raw, around, array))
        return array

    def check(self):
        """AssertionError if anything but pixels was written."""
        assert self.made
        for raw, around, array in self.made:
            pixels = array.copy()
            array[...] = 0
            assert not around.any(), "the halo was written"
            around[...] = np.nan
            assert np.isnan(raw).all(), "memory outside of the array was written"
            around[...] = 0
            array[...] = pixels


def address(array):
    return array.__array_interface__["data"][0]


@pytest.fixture
def poison(monkeypatch):
    made = Poison()
    made.really_allocate = arrays._allocate
    arrays.release()
    monkeypatch.setattr(arrays, "_allocate", made.allocate)
    yield made
    made.check()
    arrays.release()


def padding(blocked):
    """The lanes past the last image."""
    return blocked.array[-1, ..., (blocked.n - 1) % IMAGES + 1 :]


def activation(x, halo=(0, 0)):
    """x packed; the padding lanes hold what an earlier layer may have left there."""
    blocked = arrays.pack(x, halo)
    padding(blocked)[...] = 3
    return blocked


def of_gradient(blocked):
    assert not padding(blocked).any(), "padding lanes of a gradient"
    return arrays.unpack(blocked)


# ---- products with stored weights


@dataclass(frozen=True)
class Case:
    """A convolution; size (1, 1) with kernel (1, 1) is a linear layer."""

    n: int
    channels: tuple  # in, out
    size: tuple
    kernel: tuple = (3, 3)
    geometry: plans.Geometry = plans.Geometry(padding=(1, 1))

    def operands(self, dtype):
        """x, dy, weight, mask, bias; one row of the mask is empty, and one is full."""
        (c, o), g = self.channels, self.geometry
        x = integers((self.n, c, *self.size), dtype, 1)
        w = integers((o, c // g.groups, *self.kernel), dtype, 2)
        mask = np.random.default_rng(3).random(w.shape) < 0.4
        mask[0], mask[-1] = True, o == 1
        dy = integers((self.n, o, *g.output(self.kernel, *self.size)), dtype, 4)
        return x, dy, w, mask, integers((o,), dtype, 5)

    def reference(self, x, dy, w, bias):
        """y, dx, dw, db."""
        g = self.geometry._asdict()
        return ref.conv2d(x, w, bias, **g), *ref.conv2d_backward(dy, x, w, **g)


def passes(case, dtype, sparse, which=("forward", "input", "weight")):
    """The results of these passes, each compared with the reference."""
    x, dy, w, mask, bias = case.operands(dtype)
    if sparse:
        w = w * mask
    expected_y, expected_dx, expected_dw, expected_db = case.reference(x, dy, w, bias)
    parameter = SparseParameter.from_dense(w, mask) if sparse else Parameter(w)
    geometry, results = case.geometry, []
    x = activation(x, geometry.padding)
    dy = arrays.pack(dy, geometry.grad_halo(case.kernel))
    if "forward" in which:
        y = ops.conv2d(x, parameter, Parameter(bias), geometry, (1, 2))
        np.testing.assert_array_equal(arrays.unpack(y), expected_y)
        results.append(y.array.copy())
    if "input" in which:
        dx = x.like((2, 1))
        steps = plans.input_gradient(parameter.structure, geometry, dy, dx)
        for times in (1, 2):  # written, then added
            for step in steps:
                values = step.values(parameter.data.reshape(-1))
                core.spmm(step.plan, dy.array, values, None, dx.array, times == 2)
            np.testing.assert_array_equal(of_gradient(dx), times * expected_dx)
        results.append(dx.array.copy())
    if "weight" in which:
        bias = Parameter(bias)
        for times in (1, 2):  # written, then added
            ops.conv2d_backward(x, parameter, bias, geometry, dy, None)
            expected = expected_dw[mask] if sparse else expected_dw
            np.testing.assert_array_equal(parameter.grad, times * expected)
            np.testing.assert_array_equal(bias.grad, times * expected_db)
        results.append(parameter.grad.copy())
    return results


def tiles(limit):
    """(rows, columns) of every tile that choose_tile may return under this limit."""
    for r, w in product(range(1, 5), range(1, 17)):
        if r * w <= limit and (w <= 8 or r <= 2):
            yield r, w


def tiled(order, r, w, stride):
    """A convolution whose output has tiles of r x w positions, and of one less, on the last two
    axes of `order`."""
    extent = dict(zip(order, (2, 2 * r - 1, 2 * w - 1), strict=True))
    size = stride * extent[1], stride * extent[2]
    geometry = plans.Geometry(stride=(stride, stride), padding=(1, 1))
    return Case(IMAGES * extent[0] - 3, (3, 5), size, geometry=geometry)


@pytest.mark.parametrize("kind", ["sparse", "dense", "gradient"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)], ids=str)
@DTYPES
def test_every_tile(dtype, order, kind, isa, monkeypatch):
    limit = dict(zip(("sparse", "gradient", "dense"), core.tile_limits(), strict=True))[kind]
    st.set_num_threads(2)
    for r, w in tiles(limit):
        group = (r + w) % 3 + 1  # of 3 channels, so that sums are left and taken up again
        monkeypatch.setattr(plans, "choose_tile", lambda *_, t=(order, (1, r, w), group): t)
        # Columns 16 elements apart have kernels of their own.
        for stride in (1, 2) if order[2] == 2 else (1,):
            case = tiled(order, r, w, stride)
            which = ("weight",) if kind == "gradient" else ("forward", "input")
            try:
                passes(case, dtype, kind != "dense", which)
            except AssertionError as error:
                raise AssertionError(f"tile {r}x{w}, group {group}, {case}: {error}") from None


@pytest.mark.parametrize("sparse", [False, True])
def test_every_tile_of_a_linear_layer(sparse, isa, monkeypatch):
    """Its only axis longer than 1 is that of the image blocks."""
    tall, wide = [((1, 0, 2), r, 1) for r in range(1, 5)], [((2, 1, 0), 1, w) for w in range(1, 17)]
    for order, r, w in tall + wide:
        if r * w > core.tile_limits()[0 if sparse else 2]:
            continue
        monkeypatch.setattr(plans, "choose_tile", lambda *_, t=(order, (1, r, w), 4): t)
        case = Case(IMAGES * (2 * r * w - 1) - 3, (10, 7), (1, 1), (1, 1), plans.Geometry())
        passes(case, np.float32, sparse, ("forward", "input"))


def test_what_choose_tile_returns_has_been_compiled(isa):
    """For layers of all sizes, so that the tests of tiles above have seen it."""
    kinds = (1, False), (1, True), (plans.ROWS_AT_ONCE, False)
    for limit, (at_once, gradient) in zip(core.tile_limits(), kinds, strict=True):
        known = set(tiles(limit))
        for blocks, size, channels, weights in product((1, 2, 8), (1, 4, 7, 32), (3, 512), (0, 100, 100_000)):
            grid = plans.Grid((blocks, size, size), (3, 3), (-1, -1))
            order, tile, group = plans.choose_tile(grid, 64, channels, weights, limit, at_once, 4, gradient)
            assert sorted(order) == [0, 1, 2] and tile[0] == 1 and tile[1:] in known
            assert 1 <= group <= channels


def test_offsets_and_sorted_values_lie_in_the_order_in_which_they_are_met(monkeypatch):
    """Here in three groups of channels and one chunk of rows; other values stay where the parameter has them."""
    plan_of, made = core.Plan, []

    def keep(**arguments):
        made.append(arguments["segments"])
        return plan_of(**arguments)

    monkeypatch.setattr(core, "Plan", keep)
    monkeypatch.setattr(plans, "choose_tile", lambda *_: ((0, 1, 2), (1, 2, 2), 3))
    passes(Case(IMAGES, (8, 7), (16, 16), (3, 3), plans.Geometry(padding=(1, 1))), np.float32, True)
    assert len(made) == 3
    ascending = []
    for _, entry, value, count, _ in (segments.T for segments in made):
        np.testing.assert_array_equal(entry, np.cumsum(count) - count)
        ascending.append((np.diff(value[count > 0]) > 0).all())
    assert sorted(ascending) == [False, False, True]


EDGES = {
    "one of everything": Case(1, (1, 1), (1, 1), (1, 1), plans.Geometry()),
    "a linear layer": Case(33, (37, 11), (1, 1), (1, 1), plans.Geometry()),
    "kernel as large as the image": Case(15, (2, 3), (4, 3), (4, 3), plans.Geometry()),
    "padding wider than the kernel": Case(17, (2, 3), (2, 3), (2, 1), plans.Geometry(padding=(3, 2))),
    "strides that skip pixels": Case(16, (3, 2), (7, 8), (1, 2), plans.Geometry((3, 4), (0, 1))),
    "dilation over the padding": Case(3, (2, 5), (5, 6), (3, 2), plans.Geometry((1, 2), (3, 4), (3, 5))),
    "groups": Case(18, (6, 9), (5, 4), (3, 3), plans.Geometry((2, 1), (1, 1), (1, 1), 3)),
    "depthwise": Case(16, (5, 10), (6, 7), (3, 3), plans.Geometry((1, 1), (1, 1), (1, 1), 5)),
    "a long row": Case(2, (2, 2), (1, 67), (1, 5), plans.Geometry(padding=(0, 2))),
    "enough for threads": Case(40, (8, 12), (9, 10)),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@DTYPES
def test_edges(name, sparse, dtype, isa, poison):
    """And the same bits from any number of threads."""
    first = None
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        results = passes(EDGES[name], dtype, sparse)
        first = first or results
        for a, b in zip(first, results, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("first", [1, np.inf], ids=["transposed", "as they lie"])
@DTYPES
def test_weights_of_dense_input_gradients(name, first, dtype, isa, threads, poison, monkeypatch):
    monkeypatch.setattr(plans, "TRANSPOSED_FROM", first)
    passes(EDGES[name], dtype, False, ("input",))


WINOGRAD = {
    "one of everything": Case(1, (1, 1), (1, 1)),
    "no padding": Case(17, (3, 5), (5, 8), geometry=plans.Geometry()),
    "odd sizes": Case(35, (5, 6), (7, 9)),
    "more padding than taps": Case(16, (2, 3), (2, 1), geometry=plans.Geometry(padding=(4, 2))),
    "tiles of several blocks": Case(100, (6, 4), (4, 3)),
    "chunks of rows": Case(19, (70, 68), (2, 4)),
    "long rows": Case(3, (2, 4), (3, 37)),
}


@pytest.mark.parametrize("name", WINOGRAD)
@pytest.mark.parametrize("run", range(1, core.MAX_RUN + 1))
@DTYPES
def test_winograd(name, run, dtype, isa, poison, monkeypatch):
    """And the same bits from any number of threads."""
    for choose in ("choose_run", "choose_gradient_run"):
        monkeypatch.setattr(winograd, choose, lambda *_: run)
    first = None
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        results = passes(WINOGRAD[name], dtype, False)
        first = first or results
        for a, b in zip(first, results, strict=True):
            np.testing.assert_array_equal(a, b)
    x, _, w, _, bias = WINOGRAD[name].operands(dtype)
    geometry = WINOGRAD[name].geometry
    plans_run = []
    with record(lambda found: plans_run.extend(plan.run for plan in found.plans)):
        y = ops.conv2d(activation(x, geometry.padding), Parameter(w), Parameter(bias), geometry, relu=True)
    assert 0 < plans_run[0] <= run  # not more tiles than there are
    np.testing.assert_array_equal(arrays.unpack(y), ref.relu(ref.conv2d(x, w, bias, padding=geometry.padding)))


@pytest.mark.parametrize("run", [0, 2])
@DTYPES
def test_dense_weight_gradients_of_any_size(run, dtype, isa, monkeypatch):
    """Of outputs in whole registers or not, one block of them or several, and of as many inputs as meet at once."""
    monkeypatch.setattr(winograd, "choose_gradient_run", lambda *_: run)
    kernel = (3, 3) if run else (1, 1)
    for inputs, outputs in product((*range(1, 10), 70), (1, 3, 6, 9, 17, 24, 33, 50, 72, 130)):
        case = Case(17, (inputs, outputs), (2, 3), kernel, plans.Geometry(padding=(run // 2, run // 2)))
        try:
            passes(case, dtype, False, ("weight",))
        except AssertionError as error:
            raise AssertionError(f"{inputs} inputs, {outputs} outputs: {error}") from None


def test_winograd_where_it_is_faster(isa):
    def run(channels, size, images=64, dtype=np.float32, **geometry):
        weight, geometry = Parameter(np.ones((channels[1], channels[0], 3, 3), dtype)), plans.Geometry(**geometry)
        x = arrays.empty(images, channels[0], size, size, dtype, geometry.padding)
        y = arrays.empty(images, channels[1], *geometry.output((3, 3), size, size), dtype)
        back = plans.input_gradient(weight.structure, geometry, y.with_halo((2, 2)), x)
        ways = plans.forward(weight.structure, geometry, x, y).plan, *(step.plan for step in back)
        return [plan.run for plan in (*ways, plans.weight_gradient(weight.structure, geometry, x, y))]

    one, longest = (1, 1), core.MAX_RUN
    assert run((64, 64), 32, padding=one) == run((512, 512), 4, padding=one) == [longest] * 3
    assert run((64, 128), 16, dtype=np.float64) == [longest] * 3
    assert run((16, 16), 32, padding=one) == [0, 0, longest]
    assert run((512, 512), 2, padding=one) == [0, 0, 4]
    assert run((512, 512), 2, images=16, padding=one) == run((3, 64), 32, padding=one) == [0, 0, 0]
    assert run((64, 64), 32, padding=one, dilation=(2, 2)) == [0, 0, 0]
    assert run((64, 64), 32, padding=one, stride=(1, 2)) == [0, 0, 0, 0]
    assert run((512, 512), 32, images=1, padding=one) == [longest] * 3


@pytest.mark.parametrize("rows", [[], [2]], ids=["empty layer", "empty rows"])
def test_without_weights(rows, isa, poison):
    w, mask = integers((4, 3, 3, 3), np.float32), np.zeros((4, 3, 3, 3), bool)
    mask[rows] = True
    parameter, bias = SparseParameter.from_dense(w, mask), Parameter(integers((4,), np.float32))
    x, dy = integers((5, 3, 6, 6), np.float32, 1), integers((5, 4, 6, 6), np.float32, 2)
    geometry = plans.Geometry(padding=(1, 1))
    y = ops.conv2d(activation(x, (1, 1)), parameter, bias, geometry)
    dx = ops.conv2d_backward(activation(x, (1, 1)), parameter, bias, geometry, arrays.pack(dy, (1, 1)))
    np.testing.assert_array_equal(arrays.unpack(y), ref.conv2d(x, w * mask, bias.data, padding=(1, 1)))
    expected_dx, expected_dw, _ = ref.conv2d_backward(dy, x, w * mask, padding=(1, 1))
    np.testing.assert_array_equal(of_gradient(dx), expected_dx)
    np.testing.assert_array_equal(parameter.grad, expected_dw[mask])


def test_a_plan_is_for_one_layout():
    weight = Parameter(integers((2, 2, 3, 3), np.float32))
    x, y = arrays.empty(3, 2, 5, 5, np.float32, (1, 1)), arrays.empty(3, 2, 5, 5, np.float32)
    step = plans.forward(weight.structure, plans.Geometry(padding=(1, 1)), x, y)
    with pytest.raises(ValueError, match="strides"):
        core.spmm(step.plan, y.array, step.values(weight.data.reshape(-1)), None, y.array)
    with pytest.raises(ValueError, match="values has 1 values, must have"):
        core.spmm(step.plan, x.array, np.zeros(1, np.float32), None, y.array)
    with pytest.raises(ValueError, match="bias has 3 values, must have 2"):
        core.spmm(step.plan, x.array, step.values(weight.data.reshape(-1)), np.zeros(3, np.float32), y.array)


def test_a_large_result_goes_straight_to_memory(isa, threads):
    """y and dx have 10 MB, product.pxi's FAR is 8: what an image has is what it has in a small batch."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 16, 3, 3), np.float32)
    parameter = SparseParameter.from_dense(weight, rng.random(weight.shape) < 0.05)
    geometry = plans.Geometry(padding=(1, 1))
    images = rng.standard_normal((160, 16, 32, 32), np.float32)

    def both(images):
        x = activation(images, (1, 1))
        dx = ops.input_gradient(x, parameter, geometry, arrays.pack(images, (1, 1)))
        return arrays.unpack(ops.conv2d(x, parameter, None, geometry)), arrays.unpack(dx)

    y, dx = both(images)
    for few in (slice(16), slice(144, 160)):
        small_y, small_dx = both(images[few])
        np.testing.assert_array_equal(y[few], small_y)
        np.testing.assert_array_equal(dx[few], small_dx)
    x, right = activation(images, (1, 1)), arrays.empty(160, 16, 32, 32, np.float32)
    step = plans.forward(parameter.structure, geometry, x, right)
    shifted = np.ndarray(right.array.shape, np.float32, bytearray(2 * right.array.nbytes), 8, right.array.strides)
    core.spmm(step.plan, x.array, parameter.data, None, shifted)  # no whole lines of memory
    np.testing.assert_array_equal(arrays.unpack(arrays.Blocked(shifted, 160, (0, 0), 4)), y)


# ---- other layers

SHAPES = [(1, 1, 1, 1), (15, 3, 2, 5), (16, 2, 3, 3), (33, 5, 7, 4), (40, 16, 9, 17)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@shapes
@DTYPES
def test_elementwise(shape, dtype, isa, threads, poison):
    x, dy = integers(shape, dtype, 1), integers(shape, dtype, 2)
    a, g = activation(x), arrays.pack(dy, (1, 0))
    np.testing.assert_array_equal(arrays.unpack(ops.add(a, g, (1, 1))), x + dy)
    y = ops.relu(a, (2, 1))
    np.testing.assert_array_equal(arrays.unpack(y), ref.relu(x))
    for halo in ((0, 1), (0, 0)):  # to another array, and in place
        dx = ops.relu_backward(y, g, halo)
        assert (dx is g) == (halo == (0, 0))
        np.testing.assert_array_equal(of_gradient(dx), ref.relu_backward(dy, x))
    np.testing.assert_array_equal(arrays.unpack(ops.flatten(a)), ref.flatten(x))
    back = ops.flatten_backward(shape[1:], arrays.pack(ref.flatten(dy).astype(dtype)), (1, 1))
    np.testing.assert_array_equal(of_gradient(back), dy)


def test_relu_of_special_values(isa):
    x = np.array([[np.nan, np.inf, -np.inf, -0.0, 0.0]], np.float32)
    y = arrays.unpack(ops.relu(arrays.pack(x)))
    np.testing.assert_array_equal(y, [[np.nan, np.inf, 0, 0, 0]])


@shapes
@DTYPES
def test_pools(shape, dtype, isa, threads, poison):
    x = integers(shape, dtype, 1)  # of 9 values: many equal maxima
    kernel = tuple(min(2, n) for n in shape[2:])
    stride = (1, 2)
    h, w = (ops.windows(n, k, s, 0) for n, k, s in zip(shape[2:], kernel, stride, strict=True))
    a = activation(x)
    y = ops.max_pool2d(a, h, w, (1, 1))
    np.testing.assert_array_equal(arrays.unpack(y), ref.max_pool2d(x, kernel, stride))
    dy = 4 * integers(y.shape, dtype, 2)  # divisible by any window's size here
    g = arrays.pack(dy)
    dx = ops.max_pool2d_backward(a, y, h, w, g, (1, 0))
    np.testing.assert_array_equal(of_gradient(dx), ref.max_pool2d_backward(dy, x, kernel, stride))
    y = ops.avg_pool2d(a, h, w, (0, 2))
    np.testing.assert_array_equal(arrays.unpack(y), ref.avg_pool2d(x, kernel, stride))
    dx = ops.avg_pool2d_backward(shape[2:], h, w, g)
    np.testing.assert_array_equal(of_gradient(dx), ref.avg_pool2d_backward(dy, x, kernel, stride))


def batch_norm(x, dy, add=None, relu=False):
    """y, mean, var, dx, dgamma, dbeta, dadd of one training step with gamma 2, beta 1."""
    c, dtype = x.shape[1], x.dtype
    gamma, beta = np.full(c, 2, dtype), np.ones(c, dtype)
    mean, var, dgamma, dbeta = (np.full(c, np.nan, dtype) for _ in range(4))
    x, dy = activation(x, (1, 0)), arrays.pack(dy)
    y, dx, dadd, more, seen = x.like((1, 1)), x.like((2, 0)), None, None, None
    if add is not None:
        dadd, more, seen = x.like((0, 1)).array, activation(add).array, y.array
    added = () if add is None else ((more, None, None, False),)
    core.batch_norm(x.array, y.array, x.n, gamma, beta, mean, var, 1e-5, True, relu, added)
    of_x = x.array, seen, dy.array, dx.array, x.n, gamma, beta, mean, var
    core.batch_norm_backward(*of_x, dgamma, False, dbeta, False, 1e-5, True, relu, dadd)
    if dadd is not None:
        dadd = of_gradient(arrays.Blocked(dadd, x.n, (0, 1), 4))
    return arrays.unpack(y), mean, var, of_gradient(dx), dgamma, dbeta, dadd


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("fused", ["", "relu", "add, relu"])
@DTYPES
def test_batch_norm(shape, fused, dtype, isa, threads, poison):
    rng = np.random.default_rng(0)
    x, dy, add = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    add = add if "add" in fused else None
    y, mean, var, dx, dgamma, dbeta, dadd = batch_norm(x, dy, add, "relu" in fused)
    c, g = shape[1], dy
    expected, *_ = ref.batch_norm(x, np.full(c, 2), np.ones(c), np.zeros(c), np.ones(c))
    if fused:
        before = expected if add is None else expected + add
        expected, g = ref.relu(before), ref.relu_backward(dy, before)
    if add is not None:
        np.testing.assert_array_equal(dadd, g)
    eps = 200 * np.finfo(dtype).eps
    np.testing.assert_allclose(y, expected, rtol=eps, atol=eps)
    np.testing.assert_allclose(mean, x.mean((0, 2, 3), np.float64), rtol=eps, atol=eps)
    np.testing.assert_allclose(var, x.var((0, 2, 3), np.float64), rtol=eps, atol=eps)
    back = ref.batch_norm_backward(g, x, np.full(c, 2), np.zeros(c), np.ones(c))
    for actual, wanted in zip((dx, dgamma, dbeta), back, strict=True):
        terms = x.size / actual.size  # of each sum
        np.testing.assert_allclose(actual, wanted, rtol=eps, atol=eps * terms**0.5)


@pytest.mark.parametrize("relus", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("terms", [1, 2])
@DTYPES
def test_terms_that_are_added(terms, relus, dtype, isa, threads, poison):
    """x scale + shift + relu(a scale + shift + relu(b scale + shift)), or b as it lies; with numbers that are exact."""
    shape = (19, 5, 4, 3)
    x, *others = (integers(shape, dtype, seed) for seed in range(terms + 1))
    scales, shifts = (integers((terms + 1, shape[1]), dtype, seed) for seed in (7, 8))
    one = np.ones(shape[1], dtype)

    def normed(i, values):
        return values * scales[i][:, None, None] + shifts[i][:, None, None]

    def run(added):
        y = arrays.empty(*shape, dtype, (1, 0))
        numbers = scales[0], shifts[0], 0 * one, one
        core.batch_norm(activation(x).array, y.array, shape[0], *numbers, 0.0, False, True, added)
        return arrays.unpack(y)

    held = [activation(other, (0, i)) for i, other in enumerate(others)]
    added = [(a.array, scales[i], shifts[i], relus[i - 1]) for i, a in enumerate(held, 1)]
    expected = 0
    for i in range(terms, 0, -1):
        expected = normed(i, others[i - 1]) + expected
        expected = np.maximum(expected, 0) if relus[i - 1] else expected
    np.testing.assert_array_equal(run(tuple(added)), np.maximum(normed(0, x) + expected, 0))
    added[-1] = held[-1].array, None, None, False
    expected = others[-1]
    if terms == 2:
        expected = normed(1, others[0]) + expected
        expected = np.maximum(expected, 0) if relus[0] else expected
    np.testing.assert_array_equal(run(tuple(added)), np.maximum(normed(0, x) + expected, 0))
    with pytest.raises(ValueError, match="3 arrays are added, must be at most 2"):
        run(tuple(added[:1] * 3))
    with pytest.raises(ValueError, match="shape"):
        run(((held[0].array[:, 1:], None, None, False),))
    with pytest.raises(ValueError, match="scale"):
        run(((held[0].array, scales[0][1:], shifts[0], False),))


def test_batch_norm_far_from_zero(isa, threads):
    """Means 10,000 times the deviation: the mean of squares less the squared mean would be noise."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((20, 4, 9, 9)) + 1e4 * np.array([1, -1, 3, 0])[:, None, None]).astype(np.float32)
    y, mean, var, *_ = batch_norm(x, x)
    c = x.shape[1]
    np.testing.assert_allclose(mean, x.mean((0, 2, 3), np.float64), rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(var, x.var((0, 2, 3), np.float64), rtol=1e-5)
    expected, *_ = ref.batch_norm(x, np.full(c, 2), np.ones(c), np.zeros(c), np.ones(c))
    # The mean is rounded to float32, by 0.001 at 30,000, and gamma doubles that; so is the shift.
    np.testing.assert_allclose(y, expected, atol=1.2e-2)
    np.testing.assert_allclose(y[:, 3], expected[:, 3], atol=1e-5)


def test_batch_norm_of_equal_values(isa):
    x = np.full((3, 2, 4, 4), 0.1, np.float32)
    y, _, var, dx, *_ = batch_norm(x, x)
    assert (var >= 0).all() and (var < 1e-12).all()
    np.testing.assert_allclose(y, 1, atol=1e-4)
    assert np.isfinite(dx).all()


# ---- dropout


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share(keep, isa):
    x = arrays.pack(np.ones((64, 16, 10, 10), np.float32))
    y = arrays.unpack(ops.dropout(x, keep, 7))
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / keep, rtol=1e-6)
    assert abs(kept.mean() - keep) < 5 * np.sqrt(keep * (1 - keep) / y.size)
    # on each axis, too: no image, channel, row or column stands out
    for axis in range(4):
        share = kept.mean(tuple(i for i in range(4) if i != axis))
        assert abs(share - keep).max() < 5.5 * np.sqrt(keep * (1 - keep) * len(share) / y.size)
    # and neighbours are independent
    both = (kept[..., 1:] & kept[..., :-1]).mean()
    assert abs(both - keep**2) < 0.01


def test_dropout_depends_on_seed_and_place_only(poison):
    x = integers((37, 6, 9, 10), np.float32) + np.float32(10)
    results = {}
    for name, threads, halo in product(st.available_isas(), (1, 2, 5), ((0, 0), (1, 2))):
        st.set_isa(name)
        st.set_num_threads(threads)
        results[name, threads, halo] = ops.dropout(arrays.pack(x, halo), 0.5, 2**40 + 3, halo)
    first, *others = (arrays.unpack(y) for y in results.values())
    for y in others:
        np.testing.assert_array_equal(y, first)
    np.testing.assert_array_equal(first, ref.dropout(x, first != 0, 0.5))
    for seed in (2**40 + 4, 3):  # both halves of the seed count
        other = arrays.unpack(ops.dropout(arrays.pack(x), 0.5, seed))
        assert 0.4 < ((other != 0) == (first != 0)).mean() < 0.6
    # a gradient is dropped where its element was, and the padding lanes stay zero
    of_gradient(ops.dropout(arrays.pack(x), 0.5, 1))


# ---- loss and optimisers


@DTYPES
def test_cross_entropy_of_extreme_logits(dtype, isa, threads):
    big = 1e4 if dtype == np.float32 else 1e8
    rows = [
        [big, -big, 0],
        [0, 0, 0],
        [-big, -big, -big],
        [big, big, -big],
        [1e30, 0, 1],
        [88, 89, -104],
        [0, 1, 2],
    ]
    logits, k = np.repeat(np.array(rows, dtype), 3, axis=0), 3
    labels = np.tile(np.arange(k), len(rows))
    for smoothing in (0, 0.1):
        loss, gradient = np.full(len(logits), np.nan), np.full_like(logits, np.nan)
        core.cross_entropy(logits, labels, smoothing, loss, gradient)
        expected, expected_gradient = ref.cross_entropy(logits, labels, smoothing)
        np.testing.assert_allclose(loss.mean(), expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
        alone = [ref.cross_entropy(logits[i : i + 1], labels[i : i + 1], smoothing)[0] for i in range(len(logits))]
        np.testing.assert_allclose(loss, alone, rtol=1e-6, atol=1e-7)


def test_cross_entropy_of_nan_is_nan(isa):
    logits = np.array([[0, np.nan], [1, 2]], np.float32)
    loss, gradient = np.zeros(2), np.zeros_like(logits)
    core.cross_entropy(logits, np.array([0, 1]), 0, loss, gradient)
    assert np.isnan(loss[0]) and np.isnan(gradient[0]).all() and np.isfinite(loss[1])


@pytest.mark.parametrize("n", [1, 7, 16, 50_001])
@DTYPES
def test_sgd(n, dtype, isa, threads):
    w, g = integers((n,), dtype, 1) / dtype(8), integers((n,), dtype, 2) / dtype(8)
    close = {"rtol": 20 * np.finfo(dtype).eps, "atol": 20 * np.finfo(dtype).eps}
    for momentum, nesterov, decay in [
        (0, False, 0),
        (0, False, 0.1),
        (0.9, False, 0.1),
        (0.9, True, 0.1),
    ]:
        data, buffer = w.copy(), np.zeros(n, dtype)
        other = [np.ones((3, 2), np.float64), np.ones((3, 2)), np.ones((3, 2))]  # the same pass, whatever the dtype
        rows = [tuple(row) if momentum else tuple(row[:2]) for row in ([data, g, buffer], other)]
        expected, expected_buffer = w, None
        for _ in range(3):
            core.sgd_step(rows, 0.1, momentum, nesterov, decay)
            expected, expected_buffer = ref.sgd(expected, g, expected_buffer, 0.1, momentum, nesterov, decay)
        np.testing.assert_allclose(data, expected, **close)
        if momentum:
            np.testing.assert_allclose(buffer, expected_buffer, **close)


@pytest.mark.parametrize("n", [1, 7, 16, 50_001])
@pytest.mark.parametrize("decoupled", [False, True])
@DTYPES
def test_adam(n, decoupled, dtype, isa, threads):
    rng = np.random.default_rng(0)
    w, g = (rng.standard_normal(n).astype(dtype) for _ in range(2))
    data, m, v = w.copy(), np.zeros(n, dtype), np.zeros(n, dtype)
    expected = w, np.zeros(n), np.zeros(n)
    step_of = ref.adamw if decoupled else ref.adam
    for step in (1, 2, 3):
        core.adam_step([(data, g, m, v)], [step], 0.01, 0.9, 0.999, 1e-8, 0.1, decoupled)
        w, *slots = expected
        expected = step_of(w, g, *slots, step, 0.01, weight_decay=0.1)
    for actual, wanted in zip((data, m, v), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=100 * np.finfo(dtype).eps, atol=100 * np.finfo(dtype).eps)


def test_subnormals_are_zero_in_kernels_and_whole_outside(isa, threads):
    """Flush-to-zero is set while a kernel runs, and put back."""
    small = np.float32(1e-38)
    product_before = small * np.float32(0.01)
    x = arrays.pack(np.full((64, 8, 10, 10), 1e-39, np.float32))
    assert not arrays.unpack(ops.add(x, x)).any()
    assert (small * np.float32(0.01)) == product_before != 0
    weight = Parameter(np.full((8, 8, 3, 3), 1e-30, np.float32))
    y = ops.conv2d(x, weight, None, plans.Geometry())
    ops.conv2d_backward(x, weight, None, plans.Geometry(), y)
    data = np.full(100_000, 1e-39, np.float32)
    core.sgd_step([(data, data.copy())], 0.1, 0, False, 0)
    batch_norm(arrays.unpack(x), arrays.unpack(x))
    assert (small * np.float32(0.01)) == product_before != 0
    assert np.float32(1e-39) + np.float32(1e-39) != 0
