"""nn.Linear, dense and sparse, against the reference, and its errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

import reference as ref
import sparsetrain as st
from sparsetrain import nn
from sparsetrain.sparse import SparseParameter
from strategies import quick, sparsities

SHAPES = [
    (1, 1, 1),
    (1, 5, 3),
    (2, 300, 10),
    (15, 3, 5),
    (16, 17, 33),
    (17, 33, 17),
    (33, 64, 65),
    (49, 7, 9),
    (128, 31, 57),
]


def make(features_in, features_out, sparsity=None, dtype=np.float32):
    """A layer with random weights, these as dense arrays, and the mask of those that exist."""
    rng = np.random.default_rng(0)
    mask = rng.random((features_out, features_in)) >= (sparsity or 0.0)
    w = (rng.standard_normal(mask.shape) * mask).astype(dtype)
    b = rng.standard_normal(features_out).astype(dtype)
    layer = nn.Linear(features_in, features_out)
    layer.to(dtype)
    layer.weight.data[...], layer.bias.data[...] = w, b
    if sparsity is not None:
        layer.weight = SparseParameter.from_dense(w, mask)
    return layer, w, b, mask


def check(n, features_in, features_out, sparsity, dtype=np.float32):
    """Output and all gradients, within the bound that their own reductions set."""
    layer, w, b, mask = make(features_in, features_out, sparsity, dtype)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, features_in)).astype(dtype)
    dy = rng.standard_normal((n, features_out)).astype(dtype)
    y, dx = layer(x), layer.backward(dy)
    assert y.dtype == dx.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == dtype

    ref.assert_close(y, ref.linear(x, w, b), mask.sum(1) + 1, ref.linear(abs(x), abs(w), abs(b)))
    expected = ref.linear_backward(dy, x, w)
    size = ref.linear_backward(abs(dy), abs(x), abs(w))
    ref.assert_close(dx, expected[0], mask.sum(0), size[0])
    stored = ... if sparsity is None else mask
    ref.assert_close(layer.weight.grad, expected[1][stored], n, size[1][stored])
    ref.assert_close(layer.bias.grad, expected[2], n, size[2])


@pytest.mark.parametrize("sparsity", [None, 0.0, 0.8], ids=["dense", "sparsity0", "sparse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edges(shape, sparsity, isa, threads):
    check(*shape, sparsity)


@pytest.mark.parametrize("sparsity", [None, 0.8], ids=["dense", "sparse"])
@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_edges_in_float64(shape, sparsity, isa):
    check(*shape, sparsity, np.float64)


@quick
@given(
    n=hs.integers(1, 40),
    features_in=hs.integers(1, 40),
    features_out=hs.integers(1, 40),
    sparsity=hs.none() | sparsities,
)
def test_any_shape(n, features_in, features_out, sparsity, isa):
    check(n, features_in, features_out, sparsity)


@pytest.mark.parametrize("sparsity", [None, 0.8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_thread_count_gives_the_same_bits(shape, sparsity, same_bits):
    n, features_in, features_out = shape
    x = np.random.default_rng(2).standard_normal((n, features_in)).astype(np.float32)

    def run():
        layer, *_ = make(features_in, features_out, sparsity)
        y = layer(x)
        return y, layer.backward(y), layer.weight.grad, layer.bias.grad

    same_bits(run)


def test_empty_rows_and_columns(isa):
    layer, w, b, mask = make(6, 5, 0.2)
    mask[[0, 3]], mask[:, [1, 5]] = False, False
    layer.weight = SparseParameter.from_dense(w, mask)
    x = np.random.default_rng(1).standard_normal((17, 6)).astype(np.float32)
    y = layer(x)
    assert (y[:, [0, 3]] == b[[0, 3]]).all()
    dx = layer.backward(y)
    assert (dx[:, [1, 5]] == 0).all()
    assert layer.weight.grad.shape == (mask.sum(),)


def test_empty_layer(isa):
    layer, _, b, _ = make(6, 5, 1.0)
    x = np.ones((17, 6), np.float32)
    y = layer(x)
    assert (y == b).all() and (layer.backward(np.ones_like(y)) == 0).all()
    assert layer.weight.grad.shape == (0,) and (layer.bias.grad == 17).all()


def test_without_bias():
    layer = nn.Linear(4, 3, bias=False)
    assert layer.bias is None and [name for name, _ in layer.named_parameters()] == ["weight"]
    y = layer(np.ones((2, 4), np.float32))
    ref.assert_close(y, np.tile(layer.weight.data.sum(1), (2, 1)), 5, 4)
    assert layer.backward(y).shape == (2, 4)


def test_nothing_stays_from_a_larger_batch_of_nan():
    for sparsity in (None, 0.5):
        layer, *_ = make(9, 7, sparsity)
        fresh, *_ = make(9, 7, sparsity)
        layer.backward(layer(np.full((64, 9), np.nan, np.float32)))
        layer.zero_grad()
        x = np.random.default_rng(1).standard_normal((17, 9)).astype(np.float32)
        y = fresh(x)
        np.testing.assert_array_equal(layer(x), y)
        np.testing.assert_array_equal(layer.backward(y), fresh.backward(y))
        np.testing.assert_array_equal(layer.weight.grad, fresh.weight.grad)
        np.testing.assert_array_equal(layer.bias.grad, fresh.bias.grad)


def test_initialisation_is_pytorch_default():
    st.manual_seed(3)
    layer = nn.Linear(64, 50)
    for values in (layer.weight.data, layer.bias.data):
        assert values.dtype == np.float32 and 0.9 / 8 < abs(values).max() <= 1 / 8
    assert layer.weight.shape == (50, 64) and layer.bias.shape == (50,)
    st.manual_seed(3)
    assert (nn.Linear(64, 50).weight.data == layer.weight.data).all()


@pytest.mark.parametrize("name", ["in_features", "out_features"])
@pytest.mark.parametrize("value", [0, -1])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        nn.Linear(**({"in_features": 3, "out_features": 3} | {name: value}))


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.zeros((2, 3, 1, 1), np.float32), ValueError, "2, 3, 1, 1"),
        (np.zeros(3, np.float32), ValueError, r"\(3,\)"),
        (np.zeros((2, 4), np.float32), ValueError, r"(?s)(?=.*\b4\b)(?=.*\b3\b)"),
        (np.zeros((0, 3), np.float32), ValueError, r"\b0\b|empty"),
        (np.zeros((2, 3)), TypeError, "(?s)(?=.*float64)(?=.*float32)"),
        (np.zeros((2, 3), np.int64), TypeError, "int64"),
        ([[0.0, 0.0, 0.0]], TypeError, "list"),
    ],
    ids=["4d", "1d", "features", "empty", "float64", "int64", "list"],
)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_bad_input(x, error, match, sparsity):
    layer, *_ = make(3, 5, sparsity)
    with pytest.raises(error, match=match):
        layer(x)


def test_bad_output_gradient():
    layer, *_ = make(3, 5)
    y = layer(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="dy"):
        layer.backward(y[:, :4])
    with pytest.raises(TypeError, match="float64"):
        layer.backward(y.astype(np.float64))
