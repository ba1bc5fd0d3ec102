"""nn.ReLU, nn.Dropout and nn.Flatten against the reference, and their errors."""

import numpy as np
import pytest

import reference as ref
import sparsetrain as st
from sparsetrain import arrays, nn, ops

SHAPES = [(1, 1), (17, 5), (33, 10), (1, 1, 1, 1), (15, 3, 5, 4), (16, 5, 1, 9), (33, 3, 7, 14)]


def normal(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu(shape, dtype, isa, threads):
    x, dy = normal(shape, dtype), normal(shape, dtype, seed=1)
    for i, special in enumerate([0.0, -0.0, np.inf, -np.inf]):
        x.flat[i::11] = special
    kept = x.copy()
    layer = nn.ReLU()
    y, dx = layer(x), layer.backward(dy)
    assert y.dtype == dx.dtype == dtype
    np.testing.assert_array_equal(y, ref.relu(kept))
    np.testing.assert_array_equal(dx, ref.relu_backward(dy, kept))
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(dy, normal(shape, dtype, seed=1))


def test_relu_passes_nan_and_its_gradient():
    """As PyTorch: a NaN must not be hidden on its way to the loss, nor back."""
    x, dy = np.array([[np.nan, 1, -1]], np.float32), np.array([[5, 6, 7]], np.float32)
    layer = nn.ReLU()
    np.testing.assert_array_equal(layer(x), [[np.nan, 1, 0]])
    np.testing.assert_array_equal(layer.backward(dy), [[5, 6, 0]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flatten(shape, isa):
    x = normal(shape)
    layer = nn.Flatten()
    y = layer(x)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, ref.flatten(x))
    dy = normal(y.shape, seed=1)
    np.testing.assert_array_equal(layer.backward(dy), ref.flatten_backward(dy, x))


@pytest.mark.parametrize(("shape", "flat"), [((33, 1, 5, 6), True), ((33, 3, 5, 7), True), ((33, 2, 4, 4), False)])
def test_flatten_copies_only_what_does_not_lie_flat(shape, flat):
    x = normal(shape)
    images = arrays.pack(x)
    features = ops.flatten(images)
    assert np.shares_memory(images.array, features.array) == flat
    np.testing.assert_array_equal(arrays.unpack(features), ref.flatten(x))
    back = ops.flatten_backward(shape[1:], features)
    assert np.shares_memory(back.array, features.array)
    np.testing.assert_array_equal(arrays.unpack(back), x)


def test_memory_with_two_views_serves_again_when_both_are_gone():
    images = arrays.pack(normal((33, 1, 5, 6)))
    first, features = images.array.ctypes.data, ops.flatten(images)
    del images
    other = arrays.empty(33, 1, 5, 6, np.float32)
    assert other.array.ctypes.data != first
    del features
    assert arrays.empty(33, 1, 5, 6, np.float32).array.ctypes.data == first


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout(shape, p, isa, threads):
    st.manual_seed(5)
    layer = nn.Dropout(p)
    mask = layer(np.ones(shape, np.float32)) != 0
    st.manual_seed(5)
    x, dy = normal(shape), normal(shape, seed=1)
    y, dx = layer(x), layer.backward(dy)
    ref.assert_close(y, ref.dropout(x, mask, p), 4, abs(x) / (1 - p))
    ref.assert_close(dx, ref.dropout(dy, mask, p), 4, abs(dy) / (1 - p))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_drops_its_share_everywhere(p):
    st.manual_seed(0)
    dropped = nn.Dropout(p)(np.ones((64, 8, 16, 16), np.float32)) == 0
    for axis in range(4):  # of each image, channel, row and column, by 6 standard deviations
        share = np.moveaxis(dropped, axis, 0).reshape(dropped.shape[axis], -1)
        assert abs(share.mean(1) - p).max() < 6 * np.sqrt(p * (1 - p) / share.shape[1])


def test_dropout_draws_anew_and_repeats_with_the_seed():
    layer, x = nn.Dropout(0.5), np.ones((17, 40), np.float32)
    st.manual_seed(1)
    first, second = layer(x), layer(x)
    assert (first != second).any()
    st.manual_seed(1)
    np.testing.assert_array_equal(layer(x), first)
    st.manual_seed(2)
    assert (layer(x) != first).any()


def test_dropout_is_gone_in_evaluation():
    layer, x = nn.Dropout(0.5), normal((17, 40))
    layer.eval()
    np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_array_equal(layer.backward(x), x)


def test_dropout_gives_the_same_bits_on_any_threads(same_bits):
    layer, x = nn.Dropout(0.3), normal((33, 5, 9, 7))
    same_bits(lambda: (layer(x), layer.backward(x)))


@pytest.mark.parametrize("p", [-0.1, 1.1, np.nan])
def test_bad_p(p):
    with pytest.raises(ValueError, match=f"p is.*{p}|p.*{p}"):
        nn.Dropout(p)


@pytest.mark.parametrize("make", [nn.ReLU, nn.Flatten, lambda: nn.Dropout(0.5)])
@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.zeros(3, np.float32), ValueError, r"\(3,\)"),
        (np.zeros((2, 3, 4), np.float32), ValueError, "2, 3, 4"),
        (np.zeros((0, 3), np.float32), ValueError, r"\b0\b|empty"),
        (np.zeros((2, 3), np.int64), TypeError, "int64"),
        ([[0.0]], TypeError, "list"),
    ],
    ids=["1d", "3d", "empty", "int64", "list"],
)
def test_bad_input(make, x, error, match):
    with pytest.raises(error, match=match):
        make()(x)


@pytest.mark.parametrize("make", [nn.ReLU, nn.Flatten, lambda: nn.Dropout(0.5)])
def test_bad_output_gradient(make):
    layer = make()
    with pytest.raises((RuntimeError, ValueError), match="forward|backward"):
        layer.backward(normal((2, 3)))
    y = layer(normal((2, 3, 4, 5)))
    with pytest.raises(ValueError, match="dy"):
        layer.backward(y[:1])
    with pytest.raises(TypeError, match="float64"):
        layer.backward(y.astype(np.float64))


@pytest.mark.parametrize("make", [nn.ReLU, nn.Flatten, lambda: nn.Dropout(0.5)])
def test_no_input_gradient(make):
    layer = make()
    assert layer.backward(layer(normal((2, 3, 4, 5))), input_gradient=False) is None
