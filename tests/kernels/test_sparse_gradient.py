"""Which values of an output gradient are used, their lists, and the products with them, against the reference.

Operands are small integers where they can be, so that every sum is exact in whatever order it is formed.
"""

import gc
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

import reference as ref
import sparsetrain as st
from sparsetrain import arrays, nn, plans, slabs, sparse_gradient
from sparsetrain._kernels import core, memory
from sparsetrain.arrays import IMAGES
from strategies import Conv, quick

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
L1 = slabs.L1_BYTES
SMALL_L1 = 3 << 10  # several bands and groups of few images, without large operands
SHORT = None  # instead of a size: the plan for lists of few entries

CASES = {
    "one value": (Conv(1, 1, 1, (1, 1), (1, 1)), L1),
    "batch of 1": (Conv(1, 3, 5, (6, 7), (3, 3), padding=(1, 1)), L1),
    "a linear layer": (Conv(33, 37, 11, (1, 1), (1, 1)), L1),
    "a linear layer, several blocks in a slab": (Conv(150, 17, 4, (1, 1), (1, 1)), L1),
    "a linear layer, channels in whole groups": (Conv(40, 256, 3, (1, 1), (1, 1)), L1),
    "a linear layer of one block, channels in whole groups": (Conv(16, 128, 3, (1, 1), (1, 1)), L1),
    "a small map, groups of 16": (Conv(17, 16, 3, (3, 3), (3, 3), padding=(1, 1)), L1),
    "groups below 16": (Conv(19, 17, 3, (9, 8), (3, 3), padding=(1, 1)), L1),
    "large map, several bands": (Conv(2, 40, 2, (40, 38), (3, 3), padding=(1, 1)), L1),
    "several bands": (Conv(18, 3, 2, (9, 8), (3, 3), padding=(1, 1)), SMALL_L1),
    "several bands, stride 2": (Conv(18, 3, 2, (11, 10), (3, 3), (2, 2), (1, 1)), SMALL_L1),
    "bands that share no rows": (Conv(3, 16, 2, (11, 10), (2, 2), (3, 2)), SMALL_L1),
    "a band a row": (Conv(3, 17, 2, (6, 31), (5, 5), padding=(2, 2)), SMALL_L1),
    "1x1, stride 2": (Conv(17, 40, 3, (6, 5), (1, 1), (2, 2)), L1),
    "5x5": (Conv(5, 3, 2, (7, 8), (5, 5), padding=(2, 1)), L1),
    "7x7, stride 2": (Conv(3, 3, 2, (12, 13), (7, 7), (2, 2), (3, 3)), L1),
    "1x5": (Conv(2, 16, 1, (3, 9), (1, 5), padding=(0, 2)), L1),
    "3x1": (Conv(2, 17, 1, (9, 3), (3, 1), padding=(1, 0)), L1),
    "dilation": (Conv(5, 17, 3, (9, 8), (3, 3), (1, 2), (2, 2), (2, 2)), L1),
    "rows that no output reads": (Conv(3, 3, 2, (8, 9), (2, 2), (3, 3)), L1),
    "short lists": (Conv(33, 40, 3, (9, 8), (3, 3), padding=(1, 1)), SHORT),
    "short lists, stride 2": (Conv(19, 35, 2, (11, 10), (3, 3), (2, 2), (1, 1)), SHORT),
    "40 channels, one output": (Conv(16, 40, 1, (5, 5), (3, 3), padding=(1, 1)), L1),
}
KINDS = ["nonzero", "thresholds", "base", "base and thresholds", "chosen", "dither"]
cases = pytest.mark.parametrize("name", CASES)


@hs.composite
def convs(draw):
    """Any (Conv without groups, L1 bytes) with at least one output pixel."""

    def pair(*values):
        return draw(hs.tuples(hs.sampled_from(values), hs.sampled_from(values)))

    conv = Conv(
        n=draw(hs.sampled_from([1, 2, 15, 16, 17, 33])),
        in_channels=draw(hs.sampled_from([1, 3, 16, 17, 40])),
        out_channels=draw(hs.sampled_from([1, 2, 5])),
        size=pair(1, 2, 4, 7, 9),
        kernel=pair(1, 2, 3, 5),
        stride=pair(1, 2, 3),
        padding=pair(0, 1, 2),
        dilation=pair(1, 2),
    )
    return (conv, draw(hs.sampled_from([SMALL_L1, L1, SHORT]))) if min(output(conv)) > 0 else draw(convs())


def geometry(conv):
    return plans.Geometry(**conv.geometry)


def output(conv):
    return geometry(conv).output(conv.kernel, *conv.size)


def integers(shape, dtype, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


def activation(x):
    """x packed; the padding lanes hold what an earlier layer may have left there."""
    blocked = arrays.pack(x)
    blocked.array[-1, ..., (blocked.n - 1) % IMAGES + 1 :] = 3
    return blocked


def operands(conv, dtype):
    """x, dy, w."""
    shapes = (conv.n, conv.in_channels, *conv.size), (conv.n, conv.out_channels, *output(conv))
    w = integers((conv.out_channels, conv.in_channels, *conv.kernel), dtype, 3)
    return integers(shapes[0], dtype, 1), integers(shapes[1], dtype, 2), w


def planned(conv, dtype, l1=L1, lanes=IMAGES):
    """The SlabPlan of a layer, and the arguments that it was made with."""
    arguments, make = {}, core.SlabPlan

    def remember(**given):
        arguments.update(given)
        return make(**given)

    blocks = -(-conv.n // IMAGES)
    shapes = (blocks, conv.in_channels, *conv.size), (blocks, conv.out_channels, *output(conv))
    with mock.patch.object(slabs, "L1_BYTES", l1 or L1), mock.patch.object(core, "SlabPlan", remember):
        options = {"short": l1 is SHORT, "lanes": lanes}
        plan = slabs.plan(shapes[0], np.dtype(dtype), shapes[1], conv.n, conv.kernel, geometry(conv), **options)
    return plan, arguments


def selection(kind, dy):
    """Arguments of compress() and sparsify(), and what they make of dy: (used values, base); None for dither."""
    n, *image = dy.shape
    blocks, rng = -(-n // IMAGES), np.random.default_rng(5)
    arguments, left, base = {"kind": core.THRESHOLD}, dy, np.zeros_like(dy[0])
    if kind == "dither":
        return {"kind": core.DITHER, "step": 3.0, "seed": 2**40 + 7}, None, base
    if "base" in kind:
        arguments["base"] = base = integers(image, dy.dtype, 6)
        left = dy - base
    if "thresholds" in kind:
        limits = rng.integers(0, 6, (blocks, IMAGES)).astype(dy.dtype)
        arguments["thresholds"] = limits
        left = np.where(abs(left) > limits.reshape(-1)[:n, None, None, None], left, 0)
    if kind == "chosen":
        mask = np.where(rng.random((n, *image[1:])) < 0.4, 3, 0).astype(dy.dtype)
        arguments["chosen"] = np.ascontiguousarray(arrays.pack(mask[:, None]).array[:, 0])
        left = np.where(mask[:, None] != 0, dy, 0)
    return arguments, left, base


def decoded(entries, arguments, shape):
    """What the lists hold as an array (blocks * 16, ...), after looking at where each entry stands."""
    span, group, bands = (arguments[name] for name in ("span", "group", "bands"))
    (down, across), out_height = arguments["stride"], arguments["out_height"]
    dense, stored = np.zeros((-(-shape[0] // IMAGES) * IMAGES, *shape[1:]), entries.dtype), 0
    for first, channel, index, positions, values in entries.to_lists():
        assert entries.same_positions or (values != 0).all()
        stored += len(values)
        band, of_band = divmod(index, span * IMAGES // group)
        top, bottom = band * out_height // bands, (band + 1) * out_height // bands
        image, place = np.divmod(positions, arguments["image"])
        row, place = np.divmod(place, arguments["row"] * down)
        column, place = np.divmod(place, arguments["width"] * across)
        assert not place.any()
        assert (image // group == of_band).all()
        assert (row < bottom - top).all() and (column < shape[3]).all()
        at = first * span * IMAGES + image, channel, top + row, column
        assert len(set(zip(*map(np.ravel, np.broadcast_arrays(*at)), strict=True))) == len(values)
        assert not dense[at].any()
        dense[at] = values
    assert entries.nnz == stored
    return dense


# ---- lists


def test_the_cases_have_lists_of_every_kind(isa):
    found = [planned(conv, np.float32, l1)[1] for conv, l1 in CASES.values()]
    assert {a["group"] < IMAGES for a in found} == {True, False}
    assert max(a["span"] for a in found) > 1
    assert max(a["bands"] for a in found) > 2
    assert any(a["bands"] > 1 and a["group"] < IMAGES for a in found)
    assert any(a["bands"] == a["out_height"] > 1 for a in found)


@cases
@pytest.mark.parametrize("kind", KINDS)
@DTYPES
def test_lists_hold_exactly_what_is_used_and_so_does_sparsify(name, kind, dtype, isa):
    conv, l1 = CASES[name]
    plan, arguments = planned(conv, dtype, l1)
    dy = operands(conv, dtype)[1]
    how, expected, base = selection(kind, dy)
    g = arrays.pack(dy, (1, 2))
    entries = core.compress(plan, g.array, **how)
    out = written(g, lambda out: core.sparsify(plan, g.array, out, **how), entries.nnz)
    if expected is None:
        expected = out - base
        assert not (expected % how["step"]).any()
        assert (abs(expected - dy) < how["step"]).all()
        assert not expected[dy == 0].any()
    # All channels store the pixels that are chosen, zero or not
    mask = how["chosen"] if kind == "chosen" else None
    assert entries.same_positions == (mask is not None)
    assert entries.nnz == np.count_nonzero(expected if mask is None else mask) * (1 if mask is None else dy.shape[1])
    found = decoded(entries, arguments, dy.shape)
    np.testing.assert_array_equal(found[: conv.n], expected)
    assert not found[conv.n :].any()
    np.testing.assert_array_equal(out, expected + base)


def written(blocked, run, nnz):
    """What run(array) writes to an array like `blocked`, whose halo and padding lanes must stay zero."""
    out = blocked.like((2, 1))
    out.array[...] = np.nan
    raw = out.array.base.view(out.dtype)
    pixels = np.isnan(raw)
    assert pixels.sum() == out.array.size
    result = run(out.array)
    assert result is None or result == (nnz, 0)
    assert not raw[~pixels].any(), "the halo was written"
    assert not out.array[-1, ..., (out.n - 1) % IMAGES + 1 :].any(), "padding lanes of a gradient"
    return arrays.unpack(out)


def test_sparsify_in_place(isa):
    conv = CASES["groups below 16"][0]
    plan, _ = planned(conv, np.float32)
    how, expected, base = selection("base and thresholds", operands(conv, np.float32)[1])
    g = arrays.pack(operands(conv, np.float32)[1])
    assert core.sparsify(plan, g.array, g.array, **how) == (np.count_nonzero(expected), 0)
    np.testing.assert_array_equal(arrays.unpack(g), expected + base)


@pytest.mark.parametrize("l1", [L1, SMALL_L1], ids=["groups of 16", "small groups"])
@DTYPES
def test_clipped_levels_are_counted(dtype, l1, isa):
    conv = replace(CASES["a small map, groups of 16"][0], n=19)
    plan, _ = planned(conv, dtype, l1)
    dy = operands(conv, dtype)[1] * 100
    how = {"kind": core.DITHER, "step": 1.0, "limit": 127, "seed": 3}
    g = arrays.pack(dy)
    entries = core.compress(plan, g.array, **how)
    assert core.sparsify(plan, g.array, g.array, **how) == (entries.nnz, entries.clipped)
    assert entries.clipped == (abs(dy) > 127).sum() > 0
    np.testing.assert_array_equal(arrays.unpack(g), np.clip(dy, -127, 127))


def test_nothing_is_clipped_without_a_limit(isa):
    conv = CASES["batch of 1"][0]
    dy = operands(conv, np.float32)[1] * np.float32(1e9)
    entries = core.compress(planned(conv, np.float32)[0], arrays.pack(dy).array, core.DITHER, 1.0)
    assert entries.clipped == 0 and entries.nnz == np.count_nonzero(dy)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["nonzero", "thresholds", "base and thresholds", "chosen"])
@pytest.mark.parametrize("name", ["a small map, groups of 16", "groups below 16"])
def test_what_is_not_finite_is_used(value, kind, name, isa):
    conv = CASES[name][0]
    plan, arguments = planned(conv, np.float32)
    dy = operands(conv, np.float32)[1]
    how, expected, base = selection(kind, dy)
    place = tuple(np.argwhere(expected)[-1])
    dy[place] = expected[place] = value
    g = arrays.pack(dy)
    found = decoded(core.compress(plan, g.array, **how), arguments, dy.shape)
    np.testing.assert_array_equal(found[: conv.n], expected)
    core.sparsify(plan, g.array, g.array, **how)
    np.testing.assert_array_equal(arrays.unpack(g), expected + base)


def test_nan_is_never_below_a_threshold(isa):
    conv = CASES["a linear layer"][0]
    dy = np.full((conv.n, conv.out_channels, 1, 1), np.nan, np.float32)
    thresholds = np.full((-(-conv.n // IMAGES), IMAGES), np.inf, np.float32)
    entries = core.compress(planned(conv, np.float32)[0], arrays.pack(dy).array, core.THRESHOLD, thresholds=thresholds)
    assert entries.nnz == dy.size


@pytest.mark.parametrize("kind", KINDS)
def test_any_thread_count_and_instruction_set_gives_the_same_lists(kind):
    conv = Conv(70, 16, 24, (10, 9), (3, 3), padding=(1, 1))
    dy = operands(conv, np.float32)[1]
    how = selection(kind, dy)[0]
    results = []
    for name in st.available_isas():
        st.set_isa(name)
        plan, arguments = planned(conv, np.float32)
        for threads in (1, 2, 5):
            st.set_num_threads(threads)
            g = arrays.pack(dy)
            results.append(decoded(core.compress(plan, g.array, **how), arguments, dy.shape))
            core.sparsify(plan, g.array, g.array, **how)
            np.testing.assert_array_equal(arrays.unpack(g), results[-1][: conv.n] + how.get("base", 0))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


# ---- products


def weight_gradient(entries, x, size, dtype, *base):
    """dw, written over NaN; adding it once more must double it."""
    grad = np.full(size, np.nan, dtype)
    core.slab_weight_gradient(entries, x.array, grad, False, *base)
    twice = grad.copy()
    core.slab_weight_gradient(entries, x.array, twice, True, *base)
    np.testing.assert_array_equal(twice, 2 * grad)
    return grad


def check(conv, l1, dtype):
    """Both products, written and added, with and without base, against the reference."""
    x, dy, w = operands(conv, dtype)
    dy *= abs(dy) > 1
    g, a = arrays.pack(dy), activation(x)
    plan, _ = planned(conv, dtype, l1)
    entries = core.compress(plan, g.array, core.THRESHOLD)
    geometry = {k: v for k, v in conv.geometry.items() if k != "groups"}
    dx, dw, _ = ref.conv2d_backward(dy, x, w, **geometry)
    np.testing.assert_array_equal(weight_gradient(entries, a, w.size, dtype), dw.reshape(-1))
    # with a base: that of one more image, whose dx every image gets
    image = integers((1, *dy.shape[1:]), dtype, 7)
    base_dx, base_dw, _ = ref.conv2d_backward(image, x.sum(0, keepdims=True), w, **geometry)
    one = planned(replace(conv, n=1), dtype, l1, lanes=1)[0]

    def base():
        return core.base(one, image[0], a.array, conv.n)

    assert base().nnz == np.count_nonzero(image)
    np.testing.assert_array_equal(weight_gradient(entries, a, w.size, dtype, base()), (dw + base_dw).reshape(-1))
    for add, extra in ((lambda: None, 0), (base, base_dx)):
        once = written(a, lambda y, add=add: core.slab_input_gradient(entries, w.reshape(-1), y, False, add()), 0)
        np.testing.assert_array_equal(once, dx + extra)
        into = arrays.pack(x, (1, 1))
        core.slab_input_gradient(entries, w.reshape(-1), into.array, True, add())
        np.testing.assert_array_equal(arrays.unpack(into), x + dx + extra)


@cases
@DTYPES
def test_products(name, dtype, isa):
    check(*CASES[name], dtype)


@cases
def test_products_of_entries_of_8_bits(name, isa):
    """Those of the same entries as floats: all sums of whole numbers, times a power of two."""
    conv, l1 = CASES[name]
    x, dy, w = operands(conv, np.float32)
    g, a = arrays.pack(dy), activation(x)
    plan, how = planned(conv, np.float32, l1)[0], (0.25, 10, 3)
    levels = core.int8_compress(plan, g.array, *how)
    found = [weight_gradient(levels, a, w.size, np.float32)]
    found.append(written(a, lambda out: core.slab_input_gradient(levels, w.reshape(-1), out), 0))
    assert levels.dtype == np.int8 and levels.unit == 0.25 and levels.clipped > 0
    floats = core.compress(plan, g.array, core.DITHER, *how)
    np.testing.assert_array_equal(found[0], weight_gradient(floats, a, w.size, np.float32))
    dx = written(a, lambda out: core.slab_input_gradient(floats, w.reshape(-1), out), 0)
    np.testing.assert_array_equal(found[1], dx)


@quick
@given(case=convs())
def test_products_of_any_geometry(case, isa):
    check(*case, np.float32)


@quick
@given(case=convs())
def test_products_of_any_geometry_in_float64(case):
    check(*case, np.float64)


@DTYPES
def test_products_of_real_numbers(dtype, isa):
    conv = Conv(20, 17, 5, (9, 10), (3, 3), (2, 1), (1, 2))
    rng = np.random.default_rng(0)
    x, dy, w = (rng.standard_normal(a.shape).astype(dtype) for a in operands(conv, dtype))
    dy *= rng.random(dy.shape) < 0.1
    entries = core.compress(planned(conv, dtype)[0], arrays.pack(dy).array, core.THRESHOLD)
    arguments = {k: v for k, v in conv.geometry.items() if k != "groups"}
    expected = ref.conv2d_backward(dy, x, w, **arguments)
    terms = ref.conv2d_backward(dy != 0, np.ones_like(x), np.ones_like(w), **arguments)
    size = ref.conv2d_backward(abs(dy), abs(x), abs(w), **arguments)
    dx = activation(x)
    core.slab_input_gradient(entries, w.reshape(-1), dx.array)
    ref.assert_close(arrays.unpack(dx), expected[0], terms[0] + 1, size[0])
    grad = weight_gradient(entries, activation(x), w.size, dtype).reshape(w.shape)
    ref.assert_close(grad, expected[1], terms[1] + 1, size[1])


@pytest.mark.parametrize("name", ["a small map, groups of 16", "several bands, stride 2", "a linear layer"])
def test_products_of_no_entries_are_zero(name, isa):
    conv, l1 = CASES[name]
    x, dy, w = operands(conv, np.float32)
    entries = core.compress(planned(conv, np.float32, l1)[0], arrays.pack(0 * dy).array, core.THRESHOLD)
    assert entries.nnz == 0 and entries.to_lists() == []
    assert not weight_gradient(entries, activation(x), w.size, np.float32).any()
    assert not written(activation(x), lambda out: core.slab_input_gradient(entries, w.reshape(-1), out), 0).any()


@pytest.mark.parametrize(
    "conv",
    [Conv(130, 40, 24, (9, 8), (3, 3), padding=(1, 1)), Conv(600, 200, 96, (1, 1), (1, 1))],
    ids=["convolution", "linear"],
)
@DTYPES
def test_any_thread_count_gives_the_same_products(conv, dtype, isa):
    rng = np.random.default_rng(0)
    x, dy, w = (rng.standard_normal(a.shape).astype(dtype) for a in operands(conv, dtype))
    dy *= rng.random(dy.shape) < 0.1
    results = []
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        entries = core.compress(planned(conv, dtype)[0], arrays.pack(dy).array, core.THRESHOLD)
        dx = activation(x)
        core.slab_input_gradient(entries, w.reshape(-1), dx.array)
        results.append((arrays.unpack(dx).tobytes(), weight_gradient(entries, dx, w.size, dtype).tobytes()))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_both_products(value, isa):
    conv = CASES["groups below 16"][0]
    x, dy, w = operands(conv, np.float32)
    x, w = abs(x) + 1, abs(w) + 1
    dy[18, 2, 4, 4] = value
    entries = core.compress(planned(conv, np.float32)[0], arrays.pack(dy).array, core.THRESHOLD)
    dx = activation(x)
    core.slab_input_gradient(entries, w.reshape(-1), dx.array)
    finite = np.isfinite(arrays.unpack(dx))
    assert not finite[18, :, 3:6, 3:6].any()
    assert finite.sum() == finite.size - 9 * conv.in_channels
    dw = np.empty(w.size, np.float32)
    core.slab_weight_gradient(entries, activation(x).array, dw, False)
    assert np.isfinite(dw.reshape(w.shape)).all((1, 2, 3)).tolist() == [True, True, False]


def test_memory_of_entries_in_a_cycle_can_be_used_again():
    conv = CASES["batch of 1"][0]
    plan, g = planned(conv, np.float32)[0], arrays.pack(operands(conv, np.float32)[1])
    for _ in range(3):
        cycle, other = SimpleNamespace(), SimpleNamespace()
        cycle.entries, cycle.other, other.cycle = core.compress(plan, g.array, core.THRESHOLD), other, cycle
        del cycle, other
        gc.collect()


def test_memory_is_used_again_after_an_error():
    conv = CASES["batch of 1"][0]
    x, dy, _ = operands(conv, np.float32)
    entries = core.compress(planned(conv, np.float32)[0], arrays.pack(dy).array, core.THRESHOLD)

    dx = activation(x)

    def fail():
        with pytest.raises(ValueError, match="weights"):
            core.slab_input_gradient(entries, np.zeros(1, np.float32), dx.array)

    fail()
    with mock.patch.object(memory, "zeros") as zeros:
        fail()
    assert not zeros.called


def test_arguments_that_do_not_fit():
    conv = CASES["batch of 1"][0]
    x, dy, w = operands(conv, np.float32)
    plan, _ = planned(conv, np.float32)
    a, g = arrays.pack(x), arrays.pack(dy)
    entries = core.compress(plan, g.array, core.THRESHOLD)
    double, one = arrays.pack(x.astype(np.float64)), np.zeros(1, np.float32)
    of_one, wide = planned(conv, np.float32, lanes=1)[0], planned(replace(conv, in_channels=40), np.float32, lanes=1)[0]
    wide_x = arrays.pack(np.ones((1, 40, *conv.size), np.float32)).array
    other = core.base(wide, dy[0], wide_x, 1)
    fitting, levels = core.base(of_one, dy[0], a.array, 1), core.int8_compress(plan, g.array, 0.25, 127, 1)
    large = replace(conv, size=tuple(n + 2 for n in conv.size))
    larger_x, larger_dy, _ = operands(large, np.float32)
    larger = core.base(planned(large, np.float32, lanes=1)[0], larger_dy[0], arrays.pack(larger_x).array, 1)
    pixels = g.array[:, 0].copy()
    runs = [
        (lambda: core.compress(plan, a.array, core.THRESHOLD), ValueError, "another shape of dy"),
        (lambda: core.compress(plan, g.array, core.THRESHOLD, base=x[0]), ValueError, "base must"),
        (lambda: core.compress(plan, g.array, core.THRESHOLD, chosen=x[:, 0, :, :, None]), ValueError, "chosen must"),
        (
            lambda: core.compress(plan, g.array, core.THRESHOLD, chosen=pixels, base=dy[0]),
            ValueError,
            "goes",
        ),
        (lambda: core.compress(plan, g.array, core.THRESHOLD, thresholds=one[None]), ValueError, "thresholds has 1"),
        (lambda: core.slab_weight_gradient(entries, g.array, w.reshape(-1), False), ValueError, "another shape of x"),
        (lambda: core.slab_weight_gradient(entries, a.array, one, False), ValueError, "grad has 1"),
        (lambda: core.slab_input_gradient(entries, one, a.array), ValueError, "weights has 1"),
        (
            lambda: core.slab_input_gradient(entries, w.reshape(-1), a.array, False, other),
            ValueError,
            "another layer",
        ),
        (
            lambda: core.slab_weight_gradient(entries, a.array, w.reshape(-1), False, other),
            ValueError,
            "another layer",
        ),
        (lambda: core.slab_input_gradient(entries, w.reshape(-1), a.array, False, larger), ValueError, "another layer"),
        (lambda: core.slab_weight_gradient(levels, a.array, w.reshape(-1), False, fitting), ValueError, "have no base"),
        (lambda: core.compress(plan, g.array, core.DITHER, 1.0, chosen=pixels), ValueError, "chosen goes without"),
        (lambda: core.base(plan, dy[0], a.array, 1), ValueError, "not that of one image"),
        (lambda: core.base(of_one, dy[0, 1:], a.array, 1), ValueError, "another shape of dy"),
        (lambda: core.base(of_one, dy[0], wide_x, 1), ValueError, "another shape of x"),
        (lambda: core.compress(of_one, g.array, core.THRESHOLD), ValueError, "that of one image"),
        (lambda: core.slab_weight_gradient(entries, double.array, np.zeros(w.size), False), TypeError, "float32"),
    ]
    for run, error, message in runs:
        with pytest.raises(error, match=message):
            run()


# ---- sums


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 5, 4), (17, 3, 9, 8), (40, 16, 7, 30)], ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@DTYPES
def test_standard_deviation(shape, scale, dtype, isa, threads):
    x = (np.random.default_rng(0).standard_normal(shape) * scale + 3 * scale).astype(dtype)
    expected = x.std(dtype=np.float64)
    assert core.standard_deviation(activation(x).array, len(x)) == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-20, 3e30])
@DTYPES
def test_standard_deviation_of_a_constant_is_zero(value, dtype, isa, threads):
    x = np.full((19, 5, 6, 7), value, dtype)
    assert core.standard_deviation(activation(x).array, 19) == 0


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (18, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_standard_deviation_is_not_finite_where_a_value_is_not(value, place, isa, threads):
    x = integers((19, 5, 6, 7), np.float32)
    x[place] = value
    assert not np.isfinite(core.standard_deviation(activation(x).array, 19))


def test_standard_deviation_is_the_same_for_any_thread_count():
    x = activation(np.random.default_rng(0).standard_normal((64, 40, 20, 20)).astype(np.float32))
    found = set()
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        found.add(core.standard_deviation(x.array, x.n))
    assert len(found) == 1


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [(19, 5, 6, 7), (35, 70, 1, 1), (1, 1, 1, 1), (16, 9, 1, 3)], ids=str)
@DTYPES
def test_standard_deviation_and_bias_gradient_in_one_pass(shape, accumulate, dtype, isa, threads):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    dy = activation(x)
    found, wanted = np.full((2, shape[1]), 3, dtype)
    deviation = core.standard_deviation(dy.array, len(x), found, accumulate)
    core.bias_grad(dy.array, wanted, accumulate)
    assert found.tobytes() == wanted.tobytes()
    assert deviation == core.standard_deviation(dy.array, len(x)) == pytest.approx(x.std(dtype=float), rel=1e-5)


def of_rows(norms, n):
    """(n, height, width) of an array of rows (blocks, height, width, 16)."""
    return np.moveaxis(norms, 3, 1).reshape(-1, *norms.shape[1:3])[:n]


@pytest.mark.parametrize("kept", [False, True], ids=["", "keep"])
@pytest.mark.parametrize("scale", [3.0, 0.0])
@DTYPES
def test_remember(scale, kept, dtype, isa, threads):
    m, x = integers((35, 5, 6, 7), dtype, 1), integers((35, 5, 12, 21), dtype, 2)
    keep = integers((35, 1, 6, 7), dtype, 3)
    memory, norms = arrays.pack(m), np.full((3, 6, 7, IMAGES), 2, dtype)
    window = activation(x).array[:, :, ::2, ::3]  # steps over pixels
    keeps = np.ascontiguousarray(arrays.pack(keep).array[:, 0]) if kept else None
    core.remember(memory.array, window, scale, keeps, norms)
    expected = m * (keep if kept else 1) + scale * x[:, :, ::2, ::3]
    np.testing.assert_array_equal(arrays.unpack(memory), expected)
    np.testing.assert_array_equal(of_rows(norms, 35), 2 + (expected**2).sum(1))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (35, 5, 6, 7), (16, 9, 3, 4), (40, 3, 20, 30)], ids=str)
@DTYPES
def test_square_norms(shape, dtype, isa, threads):
    x = integers(shape, dtype, 1)
    norms = np.full((-(-len(x) // IMAGES), *shape[2:], IMAGES), 2, dtype)
    core.square_norms(arrays.pack(x).array, norms)
    np.testing.assert_array_equal(of_rows(norms, len(x)), 2 + (x**2).sum(1))


@pytest.mark.parametrize("kernel", [3, 1])
def test_the_plan_is_that_for_short_lists_where_few_values_are_used(kernel):
    layer = nn.Conv2d(64, 4, kernel, stride=2, padding=kernel // 2)
    x, dy = (arrays.pack(np.ones(shape, np.float32)) for shape in ((16, 64, 28, 28), (16, 4, 14, 14)))
    made = [sparse_gradient.plan_for(x, layer.weight, layer.geometry, dy, e) for e in (None, 1.0, 0.001, 1.0, 0.001)]
    assert made[0] is made[1] is made[3] and made[2] is made[4]
    assert made[0] is not made[2]
    assert (made[2].width == core.vector_lanes(np.float32) < made[0].width) == (kernel == 3)
    assert made[2].list_values >= made[0].list_values * (1 if kernel == 3 else 1.5)
