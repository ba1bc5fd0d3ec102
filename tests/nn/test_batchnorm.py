"""nn.BatchNorm2d and nn.BatchNorm1d against the reference, a ReLU behind them, their errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

import reference as ref
from sparsetrain import nn
from strategies import quick

SHAPES = [
    (2, 1, 1, 1),
    (1, 3, 1, 2),
    (15, 3, 5, 4),
    (16, 5, 3, 3),
    (17, 1, 7, 9),
    (33, 3, 2, 15),
    (1, 5, 29, 57),
    (2, 1),
    (15, 3),
    (16, 5),
    (17, 20),
    (33, 1),
]


def make(shape, dtype=np.float32, **arguments):
    """A layer with random parameters and statistics; x with its own mean and width a channel."""
    channels = shape[1]
    rng = np.random.default_rng(0)
    layer = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(channels, **arguments)
    layer.to(dtype)
    layer.weight.data[...] = rng.standard_normal(channels)
    layer.bias.data[...] = rng.standard_normal(channels)
    buffers = dict(layer.named_buffers())
    buffers["running_mean"][...] = rng.standard_normal(channels)
    buffers["running_var"][...] = rng.random(channels) + 0.1
    spread = (1, -1) + (1,) * (len(shape) - 2)
    mean, width = rng.standard_normal(channels) * 5, rng.random(channels) + 0.5
    x = rng.standard_normal(shape) * width.reshape(spread) + mean.reshape(spread)
    return layer, x.astype(dtype)


def buffers(layer):
    return {name: np.array(values) for name, values in layer.named_buffers()}


def same(actual, expected):
    assert list(actual) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values)


def check(shape, training, dtype=np.float32, relu=False, **arguments):
    """Output, gradients and running statistics, within a bound on rounding.

    Each mean over count values errs by at most count * eps * (mean of |x|). The bounds replace
    every difference by the sum of absolute values, every operation on a value takes one eps more,
    and in a product the errors of the factors add up.
    """
    layer, x = make(shape, dtype, **arguments)
    layer.train(training)
    running = buffers(layer)
    momentum, eps = arguments.get("momentum", 0.1), arguments.get("eps", 1e-5)
    statistics = running["running_mean"], running["running_var"], training
    w, b = layer.weight.data.copy(), layer.bias.data.copy()
    model = nn.Sequential(layer, nn.ReLU()) if relu else layer
    y = model(x)
    dy = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    dx = model.backward(dy)
    assert y.dtype == dx.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == dtype

    axes, spread = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
    plain, mean, var = ref.batch_norm(x, w, b, *statistics, momentum, eps)
    expected_dy = ref.relu_backward(dy, plain) if relu else dy
    count = x.size // x.shape[1]
    terms = 3 * (count + 8) if training else 8
    scale = np.sqrt((x.var(axes, dtype=float) if training else statistics[1]) + eps)
    scale = 1 / scale.reshape(spread)
    center = abs(x).mean(axes, dtype=float) if training else abs(statistics[0])
    normal = (abs(x) + center.reshape(spread)) * scale
    size = normal * abs(w).reshape(spread) + abs(b).reshape(spread)
    ref.assert_close(y, ref.relu(plain) if relu else plain, terms, size)

    expected = ref.batch_norm_backward(expected_dy, x, w, *statistics, eps)
    dw, db = (abs(expected_dy) * normal).sum(axes), abs(expected_dy).sum(axes)
    size = abs(dy) + training * (db.reshape(spread) + normal * dw.reshape(spread)) / count
    ref.assert_close(dx, expected[0], terms, size * scale * abs(w).reshape(spread))
    ref.assert_close(layer.weight.grad, expected[1], terms + count, dw)
    ref.assert_close(layer.bias.grad, expected[2], terms + count, db)

    after = buffers(layer)
    if training:
        ref.assert_close(after["running_mean"], mean, terms, abs(statistics[0]) + center)
        ref.assert_close(after["running_var"], var, terms, var + (normal / scale).mean(axes) ** 2)
    else:
        same(after, running)
    assert after["num_batches_tracked"] == running["num_batches_tracked"] + training


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edges(shape, training, isa, threads):
    check(shape, training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES[1::3], ids=str)
def test_edges_in_float64(shape, training, isa):
    check(shape, training, np.float64, eps=1e-3, momentum=0.4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_relu_after_it(shape, training, isa):
    check(shape, training, relu=True)


@quick
@given(
    n=hs.integers(2, 35),
    channels=hs.integers(1, 6),
    image=hs.none() | hs.tuples(hs.integers(1, 9), hs.integers(1, 9)),
    training=hs.booleans(),
)
def test_any_shape(n, channels, image, training, isa):
    check((n, channels, *(image or ())), training)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_thread_count_gives_the_same_bits(shape, same_bits):
    def run():
        layer, x = make(shape)
        y = layer(x)
        dx = layer.backward(y * 2 + 1)
        return y, dx, layer.weight.grad, layer.bias.grad, *buffers(layer).values()

    same_bits(run)


def test_a_mean_much_larger_than_the_spread(isa):
    """A sum of squares would lose all: float32 rounds 1000 ** 2 to 1/16, the variance is 0.01."""
    layer = nn.BatchNorm2d(1)
    x = 1000 + 0.1 * np.random.default_rng(0).standard_normal((17, 1, 9, 9))
    x = x.astype(np.float32)
    expected, *_ = ref.batch_norm(x, [1], [0], [0], [1])
    np.testing.assert_allclose(layer(x), expected, atol=5e-3)


def test_a_channel_of_one_value():
    layer = nn.BatchNorm2d(2)
    x = np.full((17, 2, 3, 3), 0.7, np.float32)
    layer.bias.data[...] = 3
    y = layer(x)
    np.testing.assert_allclose(y, 3, atol=1e-3)
    assert np.isfinite(layer.backward(y)).all()


def test_starts_as_pytorch_does():
    layer = nn.BatchNorm2d(3)
    assert layer.weight.data.tolist() == [1, 1, 1] and layer.bias.data.tolist() == [0, 0, 0]
    start = buffers(layer)
    assert list(start) == ["running_mean", "running_var", "num_batches_tracked"]
    assert start["running_mean"].tolist() == [0, 0, 0]
    assert start["running_var"].tolist() == [1, 1, 1]
    assert start["num_batches_tracked"] == 0 and start["num_batches_tracked"].dtype == np.int64
    assert list(layer.state_dict()) == ["weight", "bias", *start]


def test_no_grad_still_moves_the_running_statistics():
    layer, x = make((4, 3, 2, 2))
    twin, _ = make((4, 3, 2, 2))
    y = layer(x)
    with nn.no_grad():
        np.testing.assert_array_equal(twin(x), y)
    same(buffers(twin), buffers(layer))


def test_evaluation_is_the_same_alone_and_in_a_batch():
    layer, x = make((17, 3, 5, 5))
    layer.eval()
    together = layer(x)
    for i in (0, 15, 16):
        np.testing.assert_array_equal(layer(x[i : i + 1])[0], together[i])


def test_nothing_stays_from_a_larger_batch_of_nan():
    layer, x = make((17, 3, 5, 4))
    fresh, _ = make((17, 3, 5, 4))
    start = layer.state_dict()
    layer.backward(layer(np.full((33, 3, 9, 9), np.nan, np.float32)))
    layer.zero_grad()
    layer.load_state_dict(start)
    y = fresh(x)
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(layer.backward(y), fresh.backward(y))
    np.testing.assert_array_equal(layer.weight.grad, fresh.weight.grad)
    np.testing.assert_array_equal(layer.bias.grad, fresh.bias.grad)
    same(buffers(layer), buffers(fresh))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_one_value_a_channel_has_no_variance(shape):
    layer, x = make(shape)
    before = buffers(layer)
    with pytest.raises(ValueError, match="(?i)more than (1|one)|one value|at least 2|single"):
        layer(x)
    same(buffers(layer), before)
    layer.eval()
    assert np.isfinite(layer(x)).all()


@pytest.mark.parametrize(
    ("kind", "x", "error", "match"),
    [
        (nn.BatchNorm2d, np.zeros((4, 3), np.float32), ValueError, r"\(4, 3\)"),
        (nn.BatchNorm1d, np.zeros((4, 3, 2, 2), np.float32), ValueError, "4, 3, 2, 2"),
        (nn.BatchNorm2d, np.zeros((4, 5, 2, 2), np.float32), ValueError, r"(?=.*\b5\b)(?=.*\b3\b)"),
        (nn.BatchNorm1d, np.zeros((4, 5), np.float32), ValueError, r"(?=.*\b5\b)(?=.*\b3\b)"),
        (nn.BatchNorm2d, np.zeros((0, 3, 2, 2), np.float32), ValueError, r"\b0\b|empty"),
        (nn.BatchNorm2d, np.zeros((4, 3, 2, 2)), TypeError, "(?=.*float64)(?=.*float32)"),
        (nn.BatchNorm1d, [[0.0, 0.0, 0.0]], TypeError, "list"),
    ],
)
def test_bad_input(kind, x, error, match):
    layer = kind(3)
    before = buffers(layer)
    with pytest.raises(error, match="(?s)" + match):
        layer(x)
    same(buffers(layer), before)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_features": 0}, "num_features.*0"),
        ({"eps": -1.0}, "eps.*-1"),
        ({"momentum": 1.5}, "momentum.*1.5"),
        ({"momentum": -0.1}, "momentum.*-0.1"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        nn.BatchNorm2d(**({"num_features": 3} | arguments))


def test_bad_output_gradient():
    layer, x = make((4, 3, 2, 2))
    with pytest.raises((RuntimeError, ValueError), match="forward|backward"):
        layer.backward(x)
    layer(x)
    with pytest.raises(ValueError, match="dy"):
        layer.backward(x[:3])
    with pytest.raises(TypeError, match="float64"):
        layer.backward(x.astype(np.float64))


def test_running_statistics_of_the_last_batch_alone():
    """With a momentum of 1 they are that batch's, however small."""
    x = np.random.default_rng(0).normal(size=(16, 1, 4, 4)) * 1e-4
    layer = nn.BatchNorm2d(1, momentum=1.0)
    layer(x.astype(np.float32))
    np.testing.assert_allclose(layer.running_var, x.var(ddof=1), rtol=1e-4)
    np.testing.assert_allclose(layer.running_mean, x.mean(), rtol=1e-4)
