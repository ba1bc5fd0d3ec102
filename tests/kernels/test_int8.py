"""Numbers of 8 bits: rounding of activations and weights, and products of bytes, whose sums are exact.

The reference is float64 NumPy over the whole numbers themselves, which it sums exactly too: what is left to differ is
the rounding of a finished sum to a float.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

import reference as ref
import sparsetrain as st
from sparsetrain import arrays, int8, ops, plans, slabs, sparse_gradient
from sparsetrain._kernels import core
from sparsetrain.arrays import IMAGES
from sparsetrain.sparse import Parameter, SparseParameter
from strategies import Conv, masked_weights, quick, sparsities

SINGLE = np.finfo(np.float32)
JUNK = 1e6  # finite, and far outside of any range here

CASES = {
    "one value": Conv(1, 1, 1, (1, 1), (1, 1)),
    "linear": Conv(33, 40, 11, (1, 1), (1, 1)),
    "linear, 37 inputs, sparse": Conv(5, 37, 20, (1, 1), (1, 1), sparsity=0.9),
    "linear, 30 % removed": Conv(17, 37, 5, (1, 1), (1, 1), sparsity=0.3),
    "3 channels": Conv(5, 3, 7, (9, 8), (3, 3), padding=(1, 1)),
    "stride 2": Conv(33, 16, 20, (7, 7), (3, 3), (2, 2), (1, 1)),
    "dilation, padding 2": Conv(16, 17, 5, (6, 9), (3, 3), padding=(2, 2), dilation=(2, 2)),
    "20 % removed": Conv(17, 6, 9, (7, 8), (3, 3), (1, 2), (1, 0), (2, 1), sparsity=0.2),
    "90 % removed": Conv(18, 40, 24, (8, 8), (3, 3), padding=(1, 1), sparsity=0.9),
    "nothing is stored": Conv(2, 5, 3, (5, 4), (3, 3), padding=(1, 1), sparsity=1.0),
    "1x1": Conv(20, 8, 33, (5, 5), (1, 1)),
    "1x1, 7 channels, stride 2": Conv(3, 7, 6, (5, 6), (1, 1), (2, 2)),
    "5x5": Conv(3, 5, 4, (12, 12), (5, 5), padding=(2, 2)),
    "1x5": Conv(2, 16, 3, (3, 9), (1, 5), padding=(0, 2)),
    "7x7, stride 2": Conv(3, 3, 9, (12, 13), (7, 7), (2, 2), (3, 3)),
    "several bands": Conv(2, 20, 2, (52, 50), (3, 3), padding=(1, 1)),
}
GROUPED = {  # and whether their channels fill quads
    "2 groups of 4": (Conv(17, 8, 6, (6, 7), (3, 3), padding=(1, 1), groups=2), True),
    "3 groups of 8, sparse": (Conv(5, 24, 6, (6, 7), (3, 3), (2, 1), (1, 1), groups=3, sparsity=0.7), True),
    "2 groups of 4, 1x1": (Conv(2, 8, 6, (6, 7), (1, 1), groups=2), True),
    "2 groups of 3": (Conv(2, 6, 4, (7, 7), (3, 3), padding=(1, 1), groups=2), False),
    "depthwise": (Conv(17, 12, 12, (7, 8), (3, 3), padding=(1, 1), groups=12), False),
    "depthwise, sparse": (Conv(17, 5, 10, (7, 8), (3, 3), padding=(1, 1), groups=5, sparsity=0.5), False),
}
cases = pytest.mark.parametrize("name", CASES)
grouped = pytest.mark.parametrize("name", GROUPED)
RANGES = {
    "normal": lambda v: v,
    "positive": lambda v: abs(v) + 0.1,
    "negative": lambda v: -abs(v) - 0.1,
    "mostly positive": lambda v: np.maximum(v, -0.01),
    "large": lambda v: v * 1e37 / abs(v).max(),
    "small": lambda v: v * 1e-34,
    "one outlier": lambda v: np.where(v == v.max(), 1e9, v),
}


@pytest.fixture
def vnni(put_back):
    """AVX-512, with VNNI at first."""
    if not core.get_vnni():
        pytest.skip("this machine does not have AVX-512 VNNI")
    st.set_isa("avx512")
    yield
    core.set_vnni(True)


@hs.composite
def convs(draw):
    """Any Conv with at least one output pixel, groups of channels that fill quads or not."""

    def pair(*values):
        return draw(hs.tuples(hs.sampled_from(values), hs.sampled_from(values)))

    groups = draw(hs.sampled_from([1, 1, 1, 2]))
    conv = Conv(
        n=draw(hs.sampled_from([1, 2, 15, 16, 17])),
        in_channels=groups * draw(hs.sampled_from([1, 3, 4, 8, 17])),
        out_channels=groups * draw(hs.sampled_from([1, 2, 5, 18])),
        size=pair(1, 2, 4, 7, 9),
        kernel=pair(1, 2, 3, 5),
        stride=pair(1, 2, 3),
        padding=pair(0, 1, 2),
        dilation=pair(1, 2),
        groups=groups,
        sparsity=draw(hs.none() | sparsities),
    )
    return conv if min(plans.Geometry(**conv.geometry).output(conv.kernel, *conv.size)) > 0 else draw(convs())


# ---- what arrays of quads hold


def activation(x, halo=(0, 0)):
    """x packed; the padding lanes hold what an earlier layer may have left there."""
    blocked = arrays.pack(x, halo)
    blocked.array[-1, ..., (blocked.n - 1) % IMAGES + 1 :] = JUNK
    return blocked


def with_halo(blocked):
    """The array of a Blocked, halo and all."""
    a, (rows, columns) = blocked.array, blocked.halo
    shape = (*a.shape[:2], a.shape[2] + 2 * rows, a.shape[3] + 2 * columns, IMAGES)
    offset = a.ctypes.data - a.base.ctypes.data - rows * a.strides[2] - columns * a.strides[3]
    return np.ndarray(shape, a.dtype, a.base, offset, a.strides)


def bytes_of(quads):
    """An array of quads as whole numbers (images, channels, height, width)."""
    blocks, planes, height, width, _ = quads.shape
    four = np.ascontiguousarray(quads).view(np.uint8).reshape(*quads.shape, 4)
    return four.transpose(0, 4, 1, 5, 2, 3).reshape(blocks * IMAGES, 4 * planes, height, width).astype(np.int64)


def whole(x):
    """The values of a Quantized in steps, (n, channels, height, width)."""
    return bytes_of(x.quads.array)[: x.n, : x.channels] - x.zero


def spread(weight, values):
    """Values in the parameter's order as an array (out, channels, kernel height, kernel width)."""
    dense = np.zeros(weight.shape)
    dense[weight.mask if isinstance(weight, SparseParameter) else ...] = values.reshape(weight.data.shape)
    return dense.reshape((*weight.shape, 1, 1)[:4])


def levels_in_quads(rounded, channels):
    """The levels that the quads of a Rounded hold, (out, channels, taps), and those past the last channel."""
    structure = rounded.structure
    rows, planes, *kernel = structure.shape
    taps = math.prod(kernel)
    dense = np.zeros((rows, planes * taps, 4), np.int64)
    dense[structure.rows(), structure.csr()[1]] = rounded.quads.reshape(-1).view(np.int8).reshape(-1, 4)
    dense = dense.reshape(rows, planes, taps, 4).swapaxes(2, 3).reshape(rows, 4 * planes, taps)
    return dense[:, :channels], dense[:, channels:]


# ---- quantize()


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (5, 3, 6, 7), (16, 4, 3, 9), (17, 9, 8, 5), (33, 37)], ids=str)
@pytest.mark.parametrize("values", RANGES)
def test_a_value_moves_by_half_a_step_at_most(values, shape, isa):
    x = RANGES[values](np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    found = int8.quantize(activation(x), (1, 2) if x.ndim == 4 else (0, 0))
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    assert found.scale == pytest.approx((high - low) / 255, rel=1e-6)
    assert found.zero == round(-low / found.scale) and 0 <= found.zero <= 255
    assert (found.n, found.channels, found.shape, found.dtype) == (len(x), x.shape[1], x.shape, np.float32)
    steps = whole(found).reshape(x.shape)
    assert abs(steps * found.scale - x.astype(np.float64)).max() <= 0.5001 * found.scale
    back = found.restored((2, 1))
    assert back.halo == (2, 1) and back.shape == x.shape
    np.testing.assert_array_equal(arrays.unpack(back), steps.astype(np.float32) * np.float32(found.scale))
    assert np.isfinite(back.array).all(), "padding lanes"
    outside = with_halo(back).copy()
    outside[:, :, 2:-2, 1:-1] = 0
    assert not outside.any(), "the halo was written"


@pytest.mark.parametrize("n", [1, 5, 17])
def test_padding_lanes_do_not_change_the_range(n, isa, threads):
    x = np.random.default_rng(n).standard_normal((n, 5, 6, 7)).astype(np.float32)
    results = []
    for junk in (0, JUNK, -JUNK):
        blocked = arrays.pack(x)
        blocked.array[-1, ..., (n - 1) % IMAGES + 1 :] = junk
        found = int8.quantize(blocked)
        results.append((found.scale, found.zero, whole(found).tobytes()))
    assert results[0] == results[1] == results[2]


def test_zero_is_a_byte_and_so_are_halo_and_channels_past_the_last(isa):
    for channels in range(1, 10):
        rng = np.random.default_rng(channels)
        x = (rng.standard_normal((17, channels, 4, 5)) + 0.3).astype(np.float32)
        zeros = rng.random(x.shape) < 0.5
        x[zeros] = 0
        for halo in ((0, 0), (1, 1), (3, 0), (0, 2)):
            found = int8.quantize(activation(x), halo)
            assert found.quads.halo == halo and 0 < found.zero < 255
            assert (whole(found)[zeros] == 0).all()
            outside = bytes_of(with_halo(found.quads))
            inside = outside[:, :channels, halo[0] : halo[0] + 4, halo[1] : halo[1] + 5]
            np.testing.assert_array_equal(inside[:17] - found.zero, whole(found))
            inside[...] = found.zero
            assert (outside == found.zero).all()


def test_the_halo_is_written_over_that_of_an_array_with_another_zero(isa):
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)
    for sign in (1, -1):  # the memory of the first is used again by the second
        found = int8.quantize(arrays.pack(sign * abs(x)), (1, 1))
        assert found.zero == (0 if sign > 0 else 255)
        edge = bytes_of(with_halo(found.quads))
        edge[:, :, 1:-1, 1:-1] = found.zero
        assert (edge == found.zero).all()
        del found


@pytest.mark.parametrize("halo", [(0, 2), (1, 0), (1, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (16, 4, 1, 5), (17, 4, 1, 5), (3, 5, 1, 1)], ids=str)
def test_an_image_of_one_row_has_rows_above_and_below(shape, halo, isa):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for sign in (1, -1):  # the second finds the memory of the first, and another zero
        found = int8.quantize(arrays.pack(sign * x), halo)
        edge = bytes_of(with_halo(found.quads))
        inside = edge[: len(x), : x.shape[1], halo[0], halo[1] : halo[1] + x.shape[3]][:, :, None]
        assert abs((inside - found.zero) * found.scale - sign * x).max() <= 0.5001 * found.scale
        inside[...] = found.zero
        edge = edge[: len(x)]
        assert (edge == found.zero).all()
        del found


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-30, -3e38, 1e-40, -1e-45, 1e-37], ids=str)
def test_a_constant(value, isa):
    x = np.full((5, 3, 4, 4), value, np.float32)
    found = int8.quantize(activation(x))
    if abs(value) < 255 * SINGLE.tiny:  # a step would be subnormal
        assert found.scale == 1 and found.zero == 0 and not whole(found).any()
        assert not arrays.unpack(found.restored()).any()
        return
    assert found.zero == (0 if value > 0 else 255)
    assert (whole(found) == (255 if value > 0 else -255)).all()
    np.testing.assert_allclose(arrays.unpack(found.restored()), x, rtol=2e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (4, 2, 3, 1), (18, 4, 5, 6)], ids=str)
def test_there_is_no_range_with_a_value_that_is_not_finite(place, value, isa, threads):
    x = np.random.default_rng(0).standard_normal((19, 5, 6, 7)).astype(np.float32)
    assert int8.quantize(activation(x)) is not None
    x[place] = value
    assert int8.quantize(activation(x)) is None


def test_what_is_not_finite_in_padding_lanes_is_no_matter(isa):
    blocked = arrays.pack(np.ones((3, 2, 2, 2), np.float32))
    blocked.array[..., 3:] = np.nan
    assert (whole(int8.quantize(blocked)) == 255).all()


def test_float64_is_refused():
    with pytest.raises(TypeError, match="products of 8 bits need float32, x is float64"):
        int8.quantize(arrays.pack(np.ones((1, 1))))


# ---- round_weight()


def check_rounding(weight):
    rounded = int8.round_weight(weight)
    w = weight.data.astype(np.float64).reshape(-1)
    most = abs(w).max(initial=0)
    assert rounded.levels.dtype == np.int8 and rounded.levels.shape == w.shape
    assert rounded.scale == (pytest.approx(most / 127, rel=1e-6) if most else 1)
    levels = rounded.levels.astype(np.int64)
    assert (abs(levels * rounded.scale - w) <= 0.5001 * rounded.scale).all()
    assert (levels[abs(w) == most] == np.sign(w[abs(w) == most]) * 127).all()
    assert not levels[w == 0].any()
    dense = spread(weight, levels)
    np.testing.assert_array_equal(rounded.sums, dense.sum((1, 2, 3)))
    inside, outside = levels_in_quads(rounded, dense.shape[1])
    np.testing.assert_array_equal(inside, dense.reshape(inside.shape))
    assert not outside.any()
    return rounded


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (20, 40), (3, 5, 3, 3), (7, 8, 1, 1), (9, 6, 5, 2)], ids=str)
@pytest.mark.parametrize("sparsity", [None, 0.3, 0.9])
def test_levels_of_weights(sparsity, shape, isa, threads):
    rng = np.random.default_rng(1)
    w = (rng.standard_normal(shape) * 0.03).astype(np.float32)
    w[rng.random(shape) < 0.1] = 0
    weight = Parameter(w)
    for _ in range(2 if sparsity is None else 1):  # values change, and the structure stays
        check_rounding(weight)
        weight.data *= np.float32(-1.7)
    if sparsity is not None:
        weight.keep(rng.random(shape) >= sparsity)
        check_rounding(weight)
        weight.keep(rng.random(weight.nnz) >= sparsity)  # and now the structure does
        check_rounding(weight)


@quick
@given(case=masked_weights())
def test_levels_of_weights_of_any_structure(case, isa):
    w, mask = case
    check_rounding(SparseParameter.from_dense(w.astype(np.float32), mask))


def test_rows_without_weights(isa):
    w = np.random.default_rng(0).standard_normal((6, 9, 3, 3)).astype(np.float32)
    mask = np.random.default_rng(1).random(w.shape) < 0.3
    mask[[0, 3, 5]] = False
    rounded = check_rounding(SparseParameter.from_dense(w, mask))
    assert not rounded.sums[[0, 3, 5]].any() and not rounded.structure.dense
    assert np.diff(rounded.structure.indptr)[[0, 3, 5]].tolist() == [0, 0, 0]


def test_few_removed_weights_leave_all_quads_stored():
    w = np.ones((8, 8, 3, 3), np.float32)
    mask = np.random.default_rng(0).random(w.shape) >= 0.3
    assert check_rounding(SparseParameter.from_dense(w, mask)).structure.dense


@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-40])
def test_weights_of_which_the_largest_rounds_to_zero(value, isa):
    rounded = int8.round_weight(Parameter(np.full((3, 5), value, np.float32)))
    assert rounded.scale == 1 and not rounded.levels.any() and not rounded.sums.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_not_rounded(value):
    for kept in (None, np.ones((3, 5), bool)):
        weight = Parameter(np.ones((3, 5), np.float32))
        weight.data[1, 2] = value
        if kept is not None:
            weight.keep(kept)
        assert int8.round_weight(weight) is None


def test_the_parameter_has_its_rounded_values_for_a_while():
    weight = Parameter(np.random.default_rng(0).standard_normal((3, 2, 3, 3)).astype(np.float32))
    before, values = weight.data, weight.data.copy()
    rounded = int8.round_weight(weight)
    with pytest.raises(KeyError), int8.rounded_values(weight, rounded):
        levels = rounded.levels.reshape(weight.shape)
        np.testing.assert_array_equal(weight.data, levels * np.float32(rounded.scale))
        assert (weight.data != values).any()
        raise KeyError
    assert weight.data is before
    np.testing.assert_array_equal(weight.data, values)


# ---- conv2d()


def make(conv, seed=0):
    """x, weight, bias and geometry of a layer: a linear one where it can be."""
    x, w, b, mask = conv.arrays(np.float32, seed)
    if replace(conv, n=1, in_channels=1, out_channels=1, sparsity=None) == CASES["one value"]:
        x, w, mask = (a.reshape(a.shape[:2]) for a in (x, w, mask))
    weight = Parameter(w) if conv.sparsity is None else SparseParameter.from_dense(w, mask)
    return x, weight, Parameter(b), plans.Geometry(**conv.geometry)


def four(a):
    """(N, F) as (N, F, 1, 1)."""
    return a.reshape((*a.shape, 1, 1)[:4])


def check_forward(conv, relu=False, with_bias=True, halo=(0, 0), exact=True):
    """The output, in whose sums nothing is rounded if `exact`."""
    x, weight, bias, geometry = make(conv)
    y, (read, rounded) = int8.conv2d(activation(x), weight, bias if with_bias else None, geometry, halo, relu)
    steps, levels = whole(read), spread(weight, rounded.levels)
    assert abs(steps * read.scale - four(x)).max() <= 0.5001 * read.scale
    scale, b = read.scale * rounded.scale, bias.data * with_bias
    shift = b[:, None, None].astype(np.float64)
    expected = ref.conv2d(steps, levels, None, **conv.geometry) * scale + shift
    terms, size = 3, abs(expected - shift) + abs(shift)
    if not exact:
        terms += ref.conv2d(np.ones(steps.shape), np.ones(levels.shape), None, **conv.geometry)
        size = ref.conv2d(abs(steps), abs(levels), None, **conv.geometry) * scale + abs(shift)
    found = arrays.unpack(y)
    assert y.halo == halo and y.ndim == x.ndim and found.dtype == np.float32
    ref.assert_close(four(found), ref.relu(expected) if relu else expected, terms, size)
    assert np.isfinite(y.array).all(), "padding lanes"
    outside = with_halo(y).copy()
    inside = outside[:, :, halo[0] : outside.shape[2] - halo[0], halo[1] : outside.shape[3] - halo[1]]
    inside[...] = 0
    assert not outside.any(), "the halo was written"
    return found


@cases
def test_output(name, isa):
    check_forward(CASES[name])


@grouped
def test_output_of_groups(name, isa, monkeypatch):
    conv, fills = GROUPED[name]
    runs, run = [], core.int8_spmm
    monkeypatch.setattr(core, "int8_spmm", lambda *arguments: runs.append(run(*arguments)))
    check_forward(conv, exact=fills)
    assert len(runs) == fills


@quick
@given(case=convs())
def test_output_of_any_geometry(case, isa):
    check_forward(case, exact=case.groups == 1 or case.in_channels // case.groups % 4 == 0)


@pytest.mark.parametrize("name", ["linear", "stride 2", "90 % removed", "depthwise"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_relu_bias_and_halo(with_bias, relu, name, isa):
    conv = CASES.get(name) or GROUPED[name][0]
    found = check_forward(conv, relu, with_bias, (0, 0) if name == "linear" else (2, 1), name in CASES)
    assert not relu or (found >= 0).all() and (found == 0).any()


def test_other_arrays_of_the_same_layer(isa):
    """Each shape, halo and set of values finds its own plan, zero and scale."""
    x, weight, bias, geometry = make(CASES["stride 2"])
    for n, scale, halo in ((33, 1, (0, 0)), (33, -3, (0, 0)), (33, 1, (1, 1)), (2, 1, (0, 0)), (33, 2, (0, 0))):
        a = x[:n] * np.float32(scale) + np.float32(0.2 * scale)
        weight.data *= np.float32(scale)
        y, (read, rounded) = int8.conv2d(arrays.pack(a), weight, bias, geometry, halo)
        expected = ref.conv2d(whole(read), spread(weight, rounded.levels), **CASES["stride 2"].geometry)
        shift = bias.data[:, None, None].astype(np.float64)
        expected = expected * (read.scale * rounded.scale) + shift
        ref.assert_close(arrays.unpack(y), expected, 3, abs(expected) + abs(shift))


MOST = int8.MOST_PRODUCTS


@pytest.mark.parametrize("inputs", [MOST, MOST + 1], ids=["the most", "one more"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [1, -1])
def test_the_largest_sums_fit_32_bits(level, sign, inputs, isa, monkeypatch):
    """All bytes at one end of their range; one more channel goes through the ordinary kernels."""
    runs, run = [], core.int8_spmm
    monkeypatch.setattr(core, "int8_spmm", lambda *arguments: runs.append(run(*arguments)))
    weight = Parameter(np.full((1, inputs), level, np.float32))
    x = np.full((1, inputs), sign, np.float32)
    y, (read, _) = int8.conv2d(arrays.pack(x), weight, None, plans.Geometry())
    assert read.zero == (0 if sign > 0 else 255)
    assert arrays.unpack(y)[0, 0] == pytest.approx(sign * level * inputs, rel=1e-6)
    assert len(runs) == (inputs == MOST)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_what_is_not_finite_is_multiplied_in_float32(where, value, isa):
    x, weight, bias, geometry = make(CASES["3 channels"])
    (x if where == "x" else weight.data)[2, 1, 0, 1] = value
    blocked = activation(x, geometry.padding)
    y, kept = int8.conv2d(blocked, weight, bias, geometry, (1, 1), True)
    assert kept is blocked and y.halo == (1, 1)
    expected = arrays.unpack(ops.conv2d(blocked, weight, bias, geometry, (0, 0), True))
    assert not np.isfinite(expected).all()
    np.testing.assert_array_equal(arrays.unpack(y), expected)


# ---- backward()


def gradient(conv, geometry, ndim=4, seed=1):
    """A random output gradient with many values that are small."""
    rng = np.random.default_rng(seed)
    dy = rng.standard_normal((conv.n, conv.out_channels, *geometry.output(conv.kernel, *conv.size))) ** 3
    return arrays.pack(dy.astype(np.float32).reshape(dy.shape[:ndim]), geometry.grad_halo(conv.kernel))


SELECTION = sparse_gradient.dither(0.7, 2**40 + 7, 11)  # some values are clipped


class Kernels:
    """Says which kernels backward() uses: those of the "gradient", which skip its zeros, or those of the "weight"."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def use(self, name):
        self.monkeypatch.setattr(sparse_gradient, "skips", lambda weight, geometry, density: name == "gradient")


@pytest.fixture
def kernels(monkeypatch):
    return Kernels(monkeypatch)


def exact_gradients(conv, operands, weight, dy, selection=SELECTION):
    """(dx, dw) in float64, each with the same of absolute values, dw as a flat array in the parameter's order."""
    geometry = plans.Geometry(**conv.geometry)
    x, w = whole(operands.x), spread(weight, operands.weight.levels)
    used, _ = sparse_gradient.written_out(operands.x.restored(), weight, geometry, dy, selection)
    levels = four(arrays.unpack(used)) / np.float64(np.float32(selection.step))
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-5)
    levels, found = np.rint(levels), []
    for g, a, b in ((levels, x, w), (abs(levels), abs(x), abs(w))):
        dx, dw, _ = ref.conv2d_backward(g, a, b, **conv.geometry)
        dw = dw.reshape(weight.shape)[weight.mask if isinstance(weight, SparseParameter) else ...].reshape(-1)
        found.append((dx * (selection.step * operands.weight.scale), dw * (selection.step * operands.x.scale)))
    return zip(*found, strict=True)


def check_backward(conv, kernels, expected_kernel="gradient"):
    """Both kernels against the reference and each other; what is added to; a second call."""
    x, weight, bias, geometry = make(conv)
    _, operands = int8.conv2d(activation(x), weight, bias, geometry)
    dy = gradient(conv, geometry, x.ndim)
    (dx_expected, dx_size), (dw_expected, dw_size) = exact_gradients(conv, operands, weight, dy)
    seen = []
    for name in ("gradient", "weight"):
        kernels.use(name)
        weight.grad = None
        dx, used = int8.backward(operands, weight, geometry, dy, SELECTION, (1, 2) if x.ndim == 4 else (0, 0))
        assert used.kernel == (expected_kernel if name == "gradient" else "weight")
        seen.append((used.nnz, used.values, used.clipped))
        exact = used.kernel == "gradient"
        terms = 3 if exact else 3 + conv.out_channels * math.prod(conv.kernel)
        ref.assert_close(four(arrays.unpack(dx)), dx_expected, terms, abs(dx_expected) if exact else dx_size)
        terms = 20 if exact else 20 + conv.n * math.prod(four(arrays.unpack(dy)).shape[2:])
        ref.assert_close(weight.grad.reshape(-1), dw_expected, terms, dw_size)
        outside = with_halo(dx).copy()
        outside[:, :, dx.halo[0] : outside.shape[2] - dx.halo[0], dx.halo[1] : outside.shape[3] - dx.halo[1]] = 0
        assert not outside.any(), "the halo was written"
        assert not dx.array[-1, ..., (dx.n - 1) % IMAGES + 1 :].any(), "padding lanes of a gradient"

        # Once more, without dx: dw twice
        once = weight.grad.copy()
        assert int8.backward(operands, weight, geometry, dy, SELECTION, None)[0] is None
        np.testing.assert_allclose(weight.grad, 2 * once, rtol=0, atol=0 if exact else 1e-6 * abs(once).max(initial=0))
        # And added to dx
        into = arrays.pack(x, (1, 1) if x.ndim == 4 else (0, 0))
        assert int8.backward(operands, weight, geometry, dy, SELECTION, (0, 0), into)[0] is into
        sums, added = dx_expected + four(x), four(arrays.unpack(into))
        ref.assert_close(added, sums, 5 + conv.out_channels * math.prod(conv.kernel), dx_size + abs(four(x)))
    assert seen[0] == seen[1] and seen[0][1] == dy.array[..., :1].size * conv.n // len(dy.array)


@cases
def test_gradients(name, isa, kernels):
    check_backward(CASES[name], kernels)


@grouped
def test_gradients_of_groups(name, isa, kernels):
    check_backward(GROUPED[name][0], kernels, "weight")


@quick
@given(case=convs())
def test_gradients_of_any_geometry(case, isa):
    with pytest.MonkeyPatch.context() as patch:
        check_backward(case, Kernels(patch), "gradient" if case.groups == 1 else "weight")


def test_values_are_clipped_and_counted(isa, kernels):
    conv = CASES["3 channels"]
    x, weight, bias, geometry = make(conv)
    _, operands = int8.conv2d(activation(x), weight, bias, geometry)
    dy = gradient(conv, geometry)
    for limit in (1, 11, 127):
        found = []
        for name in ("gradient", "weight"):
            kernels.use(name)
            used = int8.backward(operands, weight, geometry, dy, sparse_gradient.dither(0.02, 3, limit))[1]
            found.append((used.nnz, used.clipped))
        assert found[0] == found[1]
        sure = (abs(dy.array) > (limit + 1) * 0.02).sum()
        assert 0 < sure <= found[0][1] <= (abs(dy.array) > (limit - 1) * 0.02).sum()


def test_what_is_known_of_the_share_of_values_decides(isa, monkeypatch):
    """Where skipping zeros is not expected to be faster, or turns out not to be, the ordinary kernels run."""
    conv = CASES["90 % removed"]
    x, weight, bias, geometry = make(conv)
    _, operands = int8.conv2d(activation(x), weight, bias, geometry)
    dy, asked, compressed, compress = gradient(conv, geometry), [], [], core.int8_compress
    monkeypatch.setattr(core, "int8_compress", lambda *a: compressed.append(1) or compress(*a))
    density = int8.backward(operands, weight, geometry, dy, SELECTION)[1].density
    for expected, limit, runs, kernel in (
        (None, 1, 1, "gradient"),
        (0.01, 1, 1, "gradient"),
        (0.01, density / 2, 1, "weight"),
        (0.9, 0.5, 0, "weight"),
        (None, 0, 1, "weight"),
    ):
        asked.clear(), compressed.clear()
        monkeypatch.setattr(sparse_gradient, "skips", lambda *a, limit=limit: asked.append(a[2]) or a[2] < limit)
        used = int8.backward(operands, weight, geometry, dy, SELECTION, expected=expected)[1]
        assert (used.kernel, len(compressed), used.density) == (kernel, runs, density)
        assert asked == [share for share in (expected, density if runs else None) if share is not None]


def test_an_exact_gradient_meets_the_rounded_operands(isa):
    for name in ("3 channels", "90 % removed", "linear"):
        conv = CASES[name]
        x, weight, bias, geometry = make(conv)
        _, operands = int8.conv2d(activation(x), weight, bias, geometry)
        dy = gradient(conv, geometry, x.ndim)
        dx = int8.exact_backward(operands, weight, geometry, dy)
        g, a, w = four(arrays.unpack(dy)), whole(operands.x), spread(weight, operands.weight.levels)
        a, w = a * operands.x.scale, w * operands.weight.scale
        expected = ref.conv2d_backward(g, a, w, **conv.geometry)
        terms = ref.conv2d_backward(np.ones(g.shape), np.ones(a.shape), np.ones(w.shape), **conv.geometry)
        size = ref.conv2d_backward(abs(g), abs(a), abs(w), **conv.geometry)
        ref.assert_close(four(arrays.unpack(dx)), expected[0], terms[0] + 3, size[0])
        mask = weight.mask if isinstance(weight, SparseParameter) else np.ones(weight.shape, bool)
        dw = [array.reshape(weight.shape)[mask] for array in (expected[1], terms[1] + 3, size[1])]
        ref.assert_close(weight.grad.reshape(-1), *dw)
        assert bias.grad is None


# ---- lists of entries


def slab_plan(conv, images=None):
    geometry, blocks = plans.Geometry(**conv.geometry), -(-conv.n // IMAGES)
    shapes = (
        (blocks, conv.in_channels, *conv.size),
        (
            blocks,
            conv.out_channels,
            *geometry.output(conv.kernel, *conv.size),
        ),
    )
    return slabs.plan(shapes[0], np.dtype(np.float32), shapes[1], conv.n, conv.kernel, geometry)


LISTS = {
    "lists of several blocks": Conv(50, 17, 4, (1, 1), (1, 1)),
    "lists of 16 images": Conv(17, 16, 3, (3, 3), (3, 3), padding=(1, 1)),
    "lists of few images": Conv(19, 17, 3, (9, 8), (3, 3), padding=(1, 1)),
    "several bands": Conv(2, 20, 2, (52, 50), (3, 3), padding=(1, 1)),
    "stride 2": Conv(18, 3, 2, (11, 10), (3, 3), (2, 2), (1, 1)),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("limit", [127, 2])
def test_lists_are_those_of_floats_in_steps(limit, name, isa, threads):
    conv = LISTS[name]
    plan, dy = slab_plan(conv), gradient(conv, plans.Geometry(**conv.geometry))
    how = 0.25, limit, 2**63 + 11
    ours = core.int8_compress(plan, dy.array, *how)
    theirs = core.compress(plan, dy.array, core.DITHER, *how)
    assert ours.dtype == np.int8 and (ours.nnz, ours.clipped) == (theirs.nnz, theirs.clipped)
    assert ours.nnz > 0 and (limit == 127 or ours.clipped > 0)
    for a, b in zip(ours.to_lists(), theirs.to_lists(), strict=True):
        assert a[:3] == b[:3]
        np.testing.assert_array_equal(a[3], b[3])
        np.testing.assert_array_equal(a[4].astype(np.float32), b[4] / np.float32(0.25))


def test_the_lists_are_of_every_kind(isa):
    found = [slab_plan(conv) for conv in LISTS.values()]
    assert {plan.group < IMAGES for plan in found} == {True, False}
    assert max(plan.span for plan in found) > 1 and max(plan.bands for plan in found) > 1


def test_products_of_no_entries_are_zero(isa, kernels):
    conv = CASES["stride 2"]
    x, weight, bias, geometry = make(conv)
    kernels.use("gradient")
    _, operands = int8.conv2d(activation(x), weight, bias, geometry)
    dy = gradient(conv, geometry)
    dy.array[...] = 0
    dx, used = int8.backward(operands, weight, geometry, dy, SELECTION)
    assert (used.nnz, used.kernel) == (0, "gradient")
    assert not dx.array.any() and not weight.grad.any()


# ---- where sums could leave 32 bits

GUARDED = Conv(320, 40, 5, (4, 4), (1, 1))  # 256 values of a block meet a weight


def outcome(kernels):
    """(dx, dw, kernel, SlabPlan) of the integer products, if they can be."""
    kernels.use("gradient")
    x, weight, bias, geometry = make(GUARDED)
    _, operands = int8.conv2d(activation(x), weight, bias, geometry)
    dy = gradient(GUARDED, geometry)
    dx, used = int8.backward(operands, weight, geometry, dy, SELECTION)
    return arrays.unpack(dx), weight.grad.copy(), used.kernel, int8._plan(operands.x, weight, geometry, dy)


def assert_close_to(found, expected):
    for a, b in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * abs(b).max())


def test_a_sum_that_could_be_too_large_is_cut_into_parts(isa, kernels, monkeypatch):
    plain = outcome(kernels)
    assert plain[2] == "gradient"
    spans, of_a_span = plain[3].spans, 256 * plain[3].span
    for most in (of_a_span, 2 * of_a_span - 1, 3 * of_a_span):
        monkeypatch.setattr(int8, "MOST_PRODUCTS", most)
        found = outcome(kernels)
        assert found[2] == "gradient" and found[3].spans == spans
        assert -(-spans // found[3].parts) * of_a_span <= most
        assert isa != "avx512" or most > of_a_span or found[3].parts > plain[3].parts
        assert_close_to(found, plain)


@pytest.mark.parametrize("guard", ["MOST_PRODUCTS", "MOST_POSITION"])
def test_where_no_plan_fits_32_bits_the_ordinary_kernels_run(guard, isa, kernels, monkeypatch):
    plain = outcome(kernels)
    most = {"MOST_PRODUCTS": 256 * plain[3].span, "MOST_POSITION": plain[3].positions}[guard]
    for value, kernel in ((most, "gradient"), (most - 1, "weight")):
        monkeypatch.setattr(int8 if guard == "MOST_PRODUCTS" else slabs, guard, value)
        found = outcome(kernels)
        assert found[2] == kernel and (found[3] is None) == (kernel == "weight")
        assert_close_to(found, plain)


def test_where_sums_of_the_forward_pass_do_not_fit_the_ordinary_kernels_run(isa, kernels, monkeypatch):
    plain = outcome(kernels)
    monkeypatch.setattr(int8, "MOST_PRODUCTS", 39)
    found = outcome(kernels)
    assert found[2:] == ("weight", None)
    assert_close_to(found, plain)
    check_forward(GUARDED, exact=False)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_both_gradients_fit_32_bits(sign, isa, kernels):
    """All values at one end of their range, and as many of them as there may be."""
    kernels.use("gradient")
    conv = Conv(32, 1, 1, (64, 64), (1, 1))  # 65536 of a block
    weight, geometry = Parameter(np.ones((1, 1, 1, 1), np.float32)), plans.Geometry()
    _, operands = int8.conv2d(arrays.pack(np.full((32, 1, 64, 64), sign, np.float32)), weight, None, geometry)
    dy = arrays.pack(np.full((32, 1, 64, 64), 1e3, np.float32))
    selection = sparse_gradient.dither(1.0, 1, 127)
    _, used = int8.backward(operands, weight, geometry, dy, selection)
    assert (used.kernel, used.clipped) == ("gradient", conv.n * 64 * 64)
    assert weight.grad.item() == pytest.approx(sign * 127 * conv.n * 64 * 64, rel=1e-6)

    weight = Parameter(np.full((MOST, 1), sign, np.float32))
    _, operands = int8.conv2d(arrays.pack(np.ones((1, 1), np.float32)), weight, None, geometry)
    dy = arrays.pack(np.full((1, MOST), 1e3, np.float32))
    dx, used = int8.backward(operands, weight, geometry, dy, selection)
    assert (used.kernel, used.clipped) == ("gradient", MOST)
    assert arrays.unpack(dx).item() == pytest.approx(sign * 127 * MOST, rel=1e-6)


# ---- the same bits


def bits(conv):
    """All that comes of a layer, forward and backward."""
    x, weight, bias, geometry = make(conv)
    y, operands = int8.conv2d(activation(x), weight, bias, geometry, (0, 0), True)
    dy = gradient(conv, geometry, x.ndim)
    dx, used = int8.backward(operands, weight, geometry, dy, SELECTION)
    found = [operands.x.scale, operands.x.zero, whole(operands.x).tobytes(), operands.weight.levels.tobytes()]
    outputs = [a.tobytes() for a in (operands.weight.sums, arrays.unpack(y), arrays.unpack(dx), weight.grad)]
    return found + outputs + [used]


@pytest.mark.parametrize("name", [*CASES, *GROUPED])
def test_vnni_changes_no_bit(name, vnni, kernels):
    kernels.use("gradient")
    conv = CASES.get(name) or GROUPED[name][0]
    results = []
    for on in (True, False):
        core.set_vnni(on)
        assert core.get_vnni() == on and core.get_isa() == "avx512"
        results.append(bits(conv))
    assert results[0] == results[1]


@quick
@given(case=convs())
def test_vnni_changes_no_bit_of_any_geometry(case, vnni):
    with pytest.MonkeyPatch.context() as patch:
        Kernels(patch).use("gradient")
        core.set_vnni(True)
        plain = bits(case)
        core.set_vnni(False)
        assert bits(case) == plain


@pytest.mark.parametrize("end", [1, -1])
def test_vnni_does_not_saturate(end, vnni):
    """Pairs of products of the largest bytes leave 16 bits."""
    weight = Parameter(np.full((3, MOST), end, np.float32))
    x = arrays.pack(np.ones((2, MOST), np.float32))
    found = []
    for on in (True, False):
        core.set_vnni(on)
        found.append(arrays.unpack(int8.conv2d(x, weight, None, plans.Geometry())[0]))
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], end * MOST, rtol=1e-6)


def test_vnni_stays_off_on_other_instruction_sets(vnni):
    core.set_vnni(False)
    for name in st.available_isas():
        st.set_isa(name)
        assert not core.get_vnni() and core.get_isa() == name


@pytest.mark.parametrize(
    "conv",
    [
        Conv(130, 40, 24, (9, 8), (3, 3), padding=(1, 1)),
        Conv(130, 40, 24, (9, 8), (3, 3), padding=(1, 1), sparsity=0.9),
        Conv(600, 200, 96, (1, 1), (1, 1)),
    ],
    ids=["convolution", "sparse", "linear"],
)
def test_any_thread_count_gives_the_same_bits(conv, isa, kernels):
    kernels.use("gradient")
    results = []
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        results.append(bits(conv))
    assert results[0] == results[1] == results[2]


# ---- arguments


@pytest.mark.parametrize("limit", [0, 128, -1])
def test_a_limit_that_is_no_number_of_8_bits(limit):
    conv = LISTS["stride 2"]
    dy = gradient(conv, plans.Geometry(**conv.geometry))
    with pytest.raises(ValueError, match=rf"limit is {limit}, must be in \[1, 127\]"):
        core.int8_compress(slab_plan(conv), dy.array, 0.25, limit, 1)


def test_arguments_that_do_not_fit():
    conv = LISTS["lists of few images"]
    x, weight, _, geometry = make(conv)
    plan, dy, a = slab_plan(conv), gradient(conv, geometry), activation(x)
    entries = core.int8_compress(plan, dy.array, 0.25, 127, 1)
    floats = core.compress(plan, dy.array, core.DITHER, 0.25)
    quads, other = int8.quantize(a).quads.array, int8.quantize(arrays.pack(x[:, :4])).quads.array
    levels, one, grad = np.zeros(weight.nnz, np.int8), np.zeros(1, np.int8), np.zeros(weight.nnz, np.float32)
    double, grad64 = arrays.pack(x.astype(float)).array, grad.astype(float)
    indptr, sums = weight.structure.csr()[0], np.zeros(conv.out_channels, np.int32)
    data, place = weight.data.reshape(-1), np.zeros(1, np.int32)
    runs = [
        (lambda: core.int8_compress(plan, a.array, 0.25, 127, 1), ValueError, "another shape of dy"),
        (lambda: core.to_quads(a.array, other, (0, 0), 1.0, 0), ValueError, "a quarter of the channels"),
        (lambda: core.from_quads(other, a.array, 1.0, 0), ValueError, "a quarter of the channels"),
        (lambda: core.int8_weight_gradient(entries, other, 0, 1.0, grad, False), ValueError, "another shape of x"),
        (lambda: core.int8_weight_gradient(entries, quads, 0, 1.0, grad[:1], False), ValueError, "grad has 1"),
        (lambda: core.int8_weight_gradient(floats, quads, 0, 1.0, grad, False), TypeError, "the entries are float32"),
        (lambda: core.int8_input_gradient(entries, one, 1.0, a.array), ValueError, "weights has 1"),
        (lambda: core.int8_input_gradient(entries, levels, 1.0, dy.array), ValueError, "another shape of x"),
        (lambda: core.int8_input_gradient(floats, levels, 1.0, a.array), TypeError, "the entries are float32"),
        (
            lambda: core.slab_weight_gradient(entries, double, grad64, False),
            TypeError,
            "the entries are int8",
        ),
        (lambda: core.slab_input_gradient(entries, grad64, double), TypeError, "the entries are int8"),
        (lambda: core.round_weights(data, indptr[1:], None, 1.0, levels, None, sums), ValueError, "indptr has 3"),
        (lambda: core.round_weights(data, indptr, place, 1.0, levels, levels, sums), ValueError, "place has 1"),
        (lambda: core.round_weights(data, indptr, None, 1.0, one, None, sums), ValueError, "levels has 1"),
    ]
    for run, error, message in runs:
        with pytest.raises(error, match=message):
            run()
