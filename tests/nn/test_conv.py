"""nn.Conv2d, dense and sparse, against the reference at the edges of the tiling; its errors."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

import reference as ref
import sparsetrain as st
from sparsetrain import nn
from sparsetrain.sparse import SparseParameter
from strategies import Conv, convs, quick

# Each edge of batch, channels, width, kernel, stride, padding, dilation and groups at least once.
CONVS = [
    Conv(1, 1, 1, (1, 1), (1, 1)),
    Conv(15, 3, 5, (9, 8), (3, 3), padding=(1, 1)),
    Conv(16, 3, 5, (7, 14), (3, 3), padding=(1, 1)),
    Conv(17, 5, 3, (3, 15), (3, 3), padding=(1, 1)),
    Conv(33, 1, 3, (2, 29), (1, 5), padding=(0, 2)),
    Conv(1, 3, 1, (5, 57), (3, 3), padding=(1, 1)),
    Conv(1, 1, 3, (57, 2), (7, 1), padding=(3, 0)),
    Conv(2, 3, 5, (29, 29), (3, 3), stride=(2, 2), padding=(1, 1)),
    Conv(17, 5, 5, (4, 4), (1, 1)),
    Conv(16, 5, 3, (5, 6), (1, 1), stride=(2, 2)),
    Conv(3, 3, 5, (6, 7), (2, 3), stride=(2, 1)),
    Conv(3, 3, 5, (8, 9), (2, 3), stride=(3, 2), padding=(1, 2)),
    Conv(3, 3, 1, (9, 9), (1, 1), stride=(3, 2)),  # stride larger than kernel
    Conv(2, 3, 3, (9, 14), (2, 2), stride=(5, 4)),
    Conv(2, 3, 3, (4, 3), (3, 3), padding=(4, 0)),  # padding larger than half the kernel
    Conv(2, 1, 3, (3, 4), (1, 1), padding=(2, 3)),
    Conv(2, 3, 3, (1, 1), (3, 3), stride=(2, 2), padding=(5, 4)),
    Conv(2, 3, 5, (9, 8), (3, 3), padding=(2, 1), dilation=(2, 1)),
    Conv(2, 3, 5, (9, 8), (3, 3), padding=(3, 3), dilation=(3, 3)),
    Conv(2, 3, 5, (14, 9), (3, 2), stride=(2, 3), padding=(4, 1), dilation=(3, 3)),
    Conv(2, 6, 4, (7, 7), (3, 3), padding=(1, 1), groups=2),
    Conv(17, 5, 5, (7, 8), (3, 3), padding=(1, 1), groups=5),  # depthwise
    Conv(2, 3, 9, (7, 8), (3, 3), stride=(2, 2), padding=(1, 1), groups=3),  # multiplier 3
    Conv(2, 6, 6, (6, 6), (2, 3), stride=(2, 1), padding=(0, 2), dilation=(2, 1), groups=3),
    Conv(1, 40, 37, (5, 5), (3, 3), padding=(1, 1)),  # more channels than a group of the tiling
    Conv(17, 33, 70, (2, 2), (1, 1)),
]
SAMPLE = Conv(17, 3, 5, (7, 9), (3, 3), (2, 1), (1, 2))


def make(conv, dtype=np.float32, seed=0):
    """A layer with random weights, its x, and its weights as dense arrays."""
    x, w, b, mask = conv.arrays(dtype, seed)
    layer = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel, **conv.geometry)
    layer.to(dtype)
    layer.weight.data[...] = w
    layer.bias.data[...] = b
    if conv.sparsity is not None:
        layer.weight = SparseParameter.from_dense(w, mask)
    return layer, x, w, b, mask


def stored(parameter, dense):
    """The values of a dense array that the parameter holds, in its order."""
    return dense[parameter.mask] if isinstance(parameter, SparseParameter) else dense


def check(conv, dtype=np.float32):
    """Output and all gradients, within the bound that their own reductions set."""
    layer, x, w, b, mask = make(conv, dtype)
    y = layer(x)
    dy = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
    dx = layer.backward(dy)
    assert y.dtype == dx.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == dtype

    one = np.ones_like
    terms = 1 + ref.conv2d(one(x), mask, None, **conv.geometry)
    size = ref.conv2d(abs(x), abs(w), abs(b), **conv.geometry)
    ref.assert_close(y, ref.conv2d(x, w, b, **conv.geometry), terms, size)
    expected = ref.conv2d_backward(dy, x, w, **conv.geometry)
    terms = ref.conv2d_backward(one(dy), one(x), mask, **conv.geometry)
    size = ref.conv2d_backward(abs(dy), abs(x), abs(w), **conv.geometry)
    ref.assert_close(dx, expected[0], terms[0], size[0])
    dw = [stored(layer.weight, a) for a in (expected[1], terms[1], size[1])]
    ref.assert_close(layer.weight.grad, *dw)
    ref.assert_close(layer.bias.grad, expected[2], terms[2], size[2])


@pytest.mark.parametrize("sparsity", [None, 0.0, 0.7], ids=["dense", "sparsity0", "sparse"])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_edges(conv, sparsity, isa):
    check(replace(conv, sparsity=sparsity))


@pytest.mark.parametrize("sparsity", [None, 0.7], ids=["dense", "sparse"])
@pytest.mark.parametrize("conv", CONVS[1::5], ids=str)
def test_edges_in_float64(conv, sparsity, isa, threads):
    check(replace(conv, sparsity=sparsity), np.float64)


@quick
@given(conv=convs())
def test_any_geometry(conv, isa):
    check(conv)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_any_thread_count_gives_the_same_bits(conv, same_bits):
    def run():
        layer, x, *_ = make(replace(conv, sparsity=0.5))
        y = layer(x)
        return y, layer.backward(y), layer.weight.grad, layer.bias.grad

    same_bits(run)


def test_empty_rows(isa):
    layer, x, w, b, mask = make(replace(SAMPLE, sparsity=0.5))
    mask[[0, 2]] = False
    layer.weight = SparseParameter.from_dense(w, mask)
    y = layer(x)
    assert (y[:, 0] == b[0]).all() and (y[:, 2] == b[2]).all()
    layer.backward(y)
    assert layer.weight.grad.shape == (mask.sum(),)


def test_empty_layer(isa):
    layer, x, _, b, _ = make(replace(SAMPLE, sparsity=1.0))
    y = layer(x)
    assert (y == b[:, None, None]).all()
    assert (layer.backward(np.ones_like(y)) == 0).all()
    assert layer.weight.grad.shape == (0,)
    assert (layer.bias.grad == y[:, 0].size).all()


def test_ints_mean_both_directions():
    layer, x, w, b, _ = make(Conv(2, 4, 6, (9, 8), (3, 3), (2, 2), (1, 1), (2, 2), 2))
    by_ints = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
    by_ints.load_state_dict(layer.state_dict())
    assert (by_ints(x) == layer(x)).all()


def test_without_bias():
    layer = nn.Conv2d(3, 4, 3, bias=False)
    assert layer.bias is None and [name for name, _ in layer.named_parameters()] == ["weight"]
    x, w = np.ones((1, 3, 3, 3), np.float32), layer.weight.data
    ref.assert_close(layer(x), w.sum((1, 2, 3)).reshape(1, 4, 1, 1), 28, 27)
    layer.backward(np.ones((1, 4, 1, 1), np.float32))
    assert layer.weight.grad.shape == w.shape


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_without_input_gradient(sparsity):
    conv = replace(SAMPLE, sparsity=sparsity)
    layer, x, *_ = make(conv)
    y = layer(x)
    assert layer.backward(y, input_gradient=False) is None
    other, *_ = make(conv)
    other(x)
    other.backward(y)
    assert (layer.weight.grad == other.weight.grad).all()


def test_gradients_accumulate():
    layer, x, *_ = make(SAMPLE)
    x = np.round(x)  # integers, so that no sum is rounded
    dy = np.round(layer(x))
    layer.backward(dy)
    dw, db = layer.weight.grad.copy(), layer.bias.grad.copy()
    layer(x)
    layer.backward(dy)
    np.testing.assert_array_equal(layer.weight.grad, 2 * dw)
    np.testing.assert_array_equal(layer.bias.grad, 2 * db)
    layer.zero_grad()
    assert layer.weight.grad is None and layer.bias.grad is None


def test_arrays_are_not_changed_and_not_shared():
    layer, x, *_ = make(SAMPLE)
    kept = x.copy()
    y = layer(x)
    first = y.copy()
    dx = layer.backward(y)
    first_dx = dx.copy()
    layer(x * 2)
    layer.backward(y)
    for array, before in ((x, kept), (y, first), (dx, first_dx)):
        np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_nothing_stays_from_a_larger_batch_of_nan(sparsity, isa):
    conv = replace(SAMPLE, sparsity=sparsity)
    layer, x, *_ = make(conv)
    fresh, *_ = make(conv)
    broken = layer(np.full((33, 3, 9, 9), np.nan, np.float32))
    layer.backward(broken)
    layer.zero_grad()
    y = fresh(x)
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(layer.backward(y), fresh.backward(y))
    np.testing.assert_array_equal(layer.weight.grad, fresh.weight.grad)
    np.testing.assert_array_equal(layer.bias.grad, fresh.bias.grad)


def test_any_memory_order():
    layer, x, *_ = make(SAMPLE)
    y = layer(x)
    dx = layer.backward(y)
    np.testing.assert_array_equal(layer(np.asfortranarray(x)), y)
    np.testing.assert_array_equal(layer.backward(np.asfortranarray(y)), dx)


def test_nan_and_inf_reach_only_what_they_touch():
    layer, x, *_ = make(SAMPLE)
    clean = layer(x)
    x[3, 1, 0, 0], x[5, 1, 6, 8] = np.nan, np.inf
    y = layer(x)
    assert np.isnan(y[3, :, 0, :3]).all() and not np.isfinite(y[5, :, -1, -1]).any()
    others = [i for i in range(17) if i not in (3, 5)]
    np.testing.assert_array_equal(y[others], clean[others])
    np.testing.assert_array_equal(y[3, :, 2:], clean[3, :, 2:])


def test_initialisation_is_pytorch_default():
    st.manual_seed(3)
    layer = nn.Conv2d(16, 32, (3, 5), groups=2)
    bound = 1 / np.sqrt(16 / 2 * 3 * 5)
    for values in (layer.weight.data, layer.bias.data):
        assert values.dtype == np.float32
        assert 0.9 * bound < abs(values).max() <= bound
    assert layer.weight.shape == (32, 8, 3, 5) and layer.bias.shape == (32,)
    assert abs(layer.weight.data.std() / (bound / np.sqrt(3)) - 1) < 0.05
    st.manual_seed(3)
    assert (nn.Conv2d(16, 32, (3, 5), groups=2).weight.data == layer.weight.data).all()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"stride": 0}, ValueError, "stride.*0"),
        ({"stride": (1, 0)}, ValueError, "stride.*0"),
        ({"stride": (1, 2, 3)}, ValueError, "stride"),
        ({"stride": 1.5}, (TypeError, ValueError), "stride.*1.5"),
        ({"padding": -1}, ValueError, "padding.*-1"),
        ({"dilation": 0}, ValueError, "dilation.*0"),
        ({"kernel_size": 0}, ValueError, "kernel_size.*0"),
        ({"kernel_size": "3"}, (TypeError, ValueError), "kernel_size.*3"),
        ({"in_channels": 0}, ValueError, "in_channels.*0"),
        ({"out_channels": -2}, ValueError, "out_channels.*-2"),
        ({"groups": 0}, ValueError, "groups.*0"),
        ({"groups": 3}, ValueError, "groups.*3|3.*groups"),  # does not divide 4
        ({"in_channels": 6, "groups": 3}, ValueError, "groups.*3|3.*groups"),  # nor 4 here
    ],
)
def test_bad_arguments(arguments, error, match):
    good = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
    with pytest.raises(error, match=match):
        nn.Conv2d(**(good | arguments))


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.zeros((3, 8, 8), np.float32), ValueError, "3, 8, 8"),
        (np.zeros((2, 4, 8, 8), np.float32), ValueError, r"(?s)(?=.*\b4\b)(?=.*\b3\b)"),
        (np.zeros((2, 3, 2, 8), np.float32), ValueError, r"\b5\b"),
        (np.zeros((0, 3, 8, 8), np.float32), ValueError, r"\b0\b|empty"),
        (np.zeros((2, 3, 8, 8)), TypeError, "(?s)(?=.*float64)(?=.*float32)"),
        (np.zeros((2, 3, 8, 8), np.uint8), TypeError, "uint8"),
        (np.zeros((2, 3, 8, 8), np.float16), TypeError, "float16"),
        ([[[[0.0]]]], TypeError, "list"),
        (None, TypeError, "None"),
    ],
    ids=["ndim", "channels", "small", "empty", "float64", "uint8", "float16", "list", "None"],
)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_bad_input(x, error, match, sparsity):
    layer, *_ = make(Conv(1, 3, 4, (8, 8), (5, 3), padding=(1, 0), sparsity=sparsity))
    with pytest.raises(error, match=match):
        layer(x)


def test_bad_output_gradient():
    layer, x, *_ = make(SAMPLE)
    with pytest.raises((RuntimeError, ValueError), match="forward|backward"):
        layer.backward(x)
    y = layer(x)
    with pytest.raises(ValueError, match="dy"):
        layer.backward(y[:, :, :-1])
    with pytest.raises(ValueError, match="dy"):
        layer.backward(y[:-1])
    with pytest.raises(TypeError, match="float64"):
        layer.backward(y.astype(np.float64))
    assert layer.weight.grad is None


def test_backward_after_no_grad():
    layer, x, *_ = make(SAMPLE)
    with nn.no_grad():
        y = layer(x)
    with pytest.raises((RuntimeError, ValueError), match="no_grad|forward|backward"):
        layer.backward(y)
