"""Max, average and adaptive average pooling against the reference, and their errors."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as hs

import reference as ref
from sparsetrain import nn
from strategies import quick

# shape, kernel, stride, padding
POOLS = [
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
    ((15, 3, 8, 8), (2, 2), (2, 2), (0, 0)),
    ((16, 3, 7, 9), (2, 2), (2, 2), (0, 0)),  # last row and column in no window
    ((17, 5, 9, 14), (3, 3), (2, 2), (1, 1)),
    ((33, 1, 5, 15), (3, 3), (1, 1), (1, 1)),
    ((2, 3, 29, 57), (3, 3), (2, 2), (1, 1)),
    ((2, 3, 7, 6), (1, 5), (2, 1), (0, 2)),
    ((2, 3, 8, 5), (7, 1), (1, 2), (3, 0)),
    ((2, 3, 9, 9), (2, 3), (3, 4), (1, 1)),
    ((17, 2, 4, 3), (4, 3), (4, 3), (0, 0)),  # the whole image
    ((3, 2, 7, 7), (1, 1), (3, 2), (0, 0)),
]
OUTPUTS = [
    ((1, 1, 1, 1), (1, 1)),
    ((15, 3, 7, 7), (1, 1)),
    ((17, 5, 8, 6), (4, 3)),
    ((16, 3, 7, 9), (3, 5)),
    ((33, 1, 5, 4), (5, 4)),
    ((2, 3, 29, 14), (6, 1)),
    ((2, 2, 3, 2), (5, 3)),  # larger than the image
]


def normal(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def run(layer, x):
    """y, dy, dx, with x and dy left as they were."""
    kept = x.copy()
    y = layer(x)
    dy = normal(y.shape, x.dtype, seed=1)
    dx = layer.backward(dy)
    assert y.dtype == dx.dtype == x.dtype
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(dy, normal(y.shape, x.dtype, seed=1))
    return y, dy, dx


def check_max(x, *geometry):
    y, dy, dx = run(nn.MaxPool2d(*geometry), x)
    np.testing.assert_array_equal(y, ref.max_pool2d(x, *geometry))
    clean = ~np.isnan(x)  # of several NaN in a window PyTorch takes the last: not copied
    expected, terms, size = (ref.max_pool2d_backward(a, x, *geometry)[clean] for a in (dy, np.ones_like(dy), abs(dy)))
    ref.assert_close(dx[clean], expected, terms, size)


def check_avg(x, *geometry):
    y, dy, dx = run(nn.AvgPool2d(*geometry), x)
    area = np.prod(geometry[0])
    ref.assert_close(y, ref.avg_pool2d(x, *geometry), area + 2, ref.avg_pool2d(abs(x), *geometry))
    terms = area * ref.avg_pool2d_backward(np.ones_like(dy), x, *geometry) + 2
    size = ref.avg_pool2d_backward(abs(dy), x, *geometry)
    ref.assert_close(dx, ref.avg_pool2d_backward(dy, x, *geometry), terms, size)


def check_adaptive(x, output):
    y, dy, dx = run(nn.AdaptiveAvgPool2d(output), x)
    area = (x.shape[2] // output[0] + 2) * (x.shape[3] // output[1] + 2)
    ref.assert_close(y, ref.adaptive_avg_pool2d(x, output), area + 2, ref.adaptive_avg_pool2d(abs(x), output))
    terms = 2 + dy[0, 0].size
    size = ref.adaptive_avg_pool2d_backward(abs(dy), x)
    ref.assert_close(dx, ref.adaptive_avg_pool2d_backward(dy, x), terms, size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_edges(pool, dtype, isa, threads):
    shape, *geometry = pool
    check_max(normal(shape, dtype), *geometry)
    check_avg(normal(shape, dtype), *geometry)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "output"), OUTPUTS, ids=str)
def test_adaptive_edges(shape, output, dtype, isa, threads):
    check_adaptive(normal(shape, dtype), output)


@pytest.mark.parametrize("value", [0.0, -3.0, -np.inf, np.nan])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_max_of_equal_infinite_and_nan_values(pool, value, isa):
    shape, *geometry = pool
    x = np.round(normal(shape))
    x[np.random.default_rng(2).random(shape) < 0.4] = value
    check_max(x, *geometry)
    check_max(np.full(shape, value, np.float32), *geometry)


def test_first_maximum_takes_the_gradient():
    layer = nn.MaxPool2d(2)
    x = np.array([[1, 1, 0, 2], [1, 1, 2, 2]], np.float32).reshape(1, 1, 2, 4)
    assert layer(x).tolist() == [[[[1, 2]]]]
    dx = layer.backward(np.array([[[[5, 7]]]], np.float32))
    assert dx.tolist() == [[[[5, 0, 0, 7], [0, 0, 0, 0]]]]


@quick
@given(
    n=hs.sampled_from([1, 2, 16, 17]),
    image=hs.tuples(hs.integers(1, 9), hs.integers(1, 9)),
    kernel=hs.tuples(hs.integers(1, 4), hs.integers(1, 4)),
    stride=hs.tuples(hs.integers(1, 4), hs.integers(1, 4)),
    padded=hs.tuples(hs.booleans(), hs.booleans()),
)
def test_any_geometry(n, image, kernel, stride, padded, isa):
    padding = tuple(p * (k // 2) for p, k in zip(padded, kernel, strict=True))
    assume(all(s + 2 * p >= k for s, p, k in zip(image, padding, kernel, strict=True)))
    x = normal((n, 2, *image))
    check_max(x, kernel, stride, padding)
    check_avg(x, kernel, stride, padding)


@quick
@given(
    image=hs.tuples(hs.integers(1, 9), hs.integers(1, 9)),
    output=hs.tuples(hs.integers(1, 9), hs.integers(1, 9)),
)
def test_any_adaptive_output(image, output):
    check_adaptive(normal((3, 2, *image)), output)


LAYERS = {
    "max": lambda: nn.MaxPool2d(3, 2, 1),
    "avg": lambda: nn.AvgPool2d(3, 2, 1),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((3, 2)),
    "global": lambda: nn.AdaptiveAvgPool2d(1),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def test_any_thread_count_gives_the_same_bits(layer, same_bits):
    x = normal((33, 5, 9, 7))
    same_bits(lambda: (layer(x), layer.backward(layer(x))))


def test_nothing_stays_from_a_larger_batch_of_nan(layer):
    x = normal((17, 3, 6, 5))
    y = layer(x)
    dx = layer.backward(y)
    layer.backward(layer(np.full((33, 3, 9, 9), np.nan, np.float32)))
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(layer.backward(y), dx)


def test_no_input_gradient(layer):
    y = layer(normal((2, 3, 6, 6)))
    assert layer.backward(y, input_gradient=False) is None
    assert list(layer.parameters()) == [] and layer.state_dict() == {}


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
def test_stride_is_the_kernel_unless_given(kind):
    x = normal((2, 3, 9, 8))
    np.testing.assert_array_equal(kind((3, 2))(x), kind((3, 2), (3, 2), 0)(x))
    np.testing.assert_array_equal(kind(2, stride=1)(x), kind((2, 2), (1, 1))(x))


def test_one_output_size_means_both_directions():
    x = normal((2, 3, 9, 8))
    np.testing.assert_array_equal(nn.AdaptiveAvgPool2d(2)(x), nn.AdaptiveAvgPool2d((2, 2))(x))


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kernel_size": 0}, "kernel_size.*0"),
        ({"kernel_size": (2, 3, 4)}, "kernel_size"),
        ({"stride": 0}, "stride.*0"),
        ({"padding": -1}, "padding.*-1"),
        ({"padding": 2}, "padding.*2"),  # more than half the kernel
    ],
)
def test_bad_arguments(kind, arguments, match):
    with pytest.raises(ValueError, match=match):
        kind(**({"kernel_size": 3} | arguments))


@pytest.mark.parametrize("output_size", [0, -1, (2, 0), (1, 2, 3)])
def test_bad_output_size(output_size):
    with pytest.raises(ValueError, match="output_size"):
        nn.AdaptiveAvgPool2d(output_size)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.zeros((2, 3), np.float32), ValueError, r"\(2, 3\)"),
        (np.zeros((3, 8, 8), np.float32), ValueError, "3, 8, 8"),
        (np.zeros((0, 3, 8, 8), np.float32), ValueError, r"\b0\b|empty"),
        (np.zeros((2, 3, 8, 8), np.int32), TypeError, "int32"),
        ([[[[0.0]]]], TypeError, "list"),
    ],
    ids=["2d", "3d", "empty", "int32", "list"],
)
def test_bad_input(layer, x, error, match):
    with pytest.raises(error, match=match):
        layer(x)


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
def test_window_larger_than_the_image(kind):
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b5\b)(?=.*\b4\b)"):
        kind(5)(np.zeros((2, 3, 4, 4), np.float32))


def test_bad_output_gradient(layer):
    x = normal((2, 3, 6, 6))
    with pytest.raises((RuntimeError, ValueError), match="forward|backward"):
        layer.backward(x)
    y = layer(x)
    with pytest.raises(ValueError, match="dy"):
        layer.backward(y[:1])
    with pytest.raises(TypeError, match="float64"):
        layer.backward(y.astype(np.float64))
