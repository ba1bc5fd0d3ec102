"""nn.cross_entropy and nn.mse_loss against the reference, and their errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

import reference as ref
from sparsetrain import nn
from strategies import quick


def normal(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def check_cross_entropy(logits, labels, label_smoothing):
    """Loss and gradient within a bound on rounding.

    A probability errs by eps for each term of its sum, by eps * |z| for rounding the exponent z,
    and by the few eps of exp and log; the loss by as much of the largest |z|, and by eps for each
    image.
    """
    kept = logits.copy()
    loss, gradient = nn.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    assert isinstance(loss, float) and gradient.dtype == logits.dtype
    np.testing.assert_array_equal(logits, kept)

    expected, expected_gradient = ref.cross_entropy(logits, labels, label_smoothing)
    n, k = logits.shape
    depth = abs(logits - logits.max(1, keepdims=True))
    size = (ref.softmax(logits) + np.eye(k)[labels] + label_smoothing / k) / n
    ref.assert_close(gradient, expected_gradient, k + 16 + depth, size)
    size = depth.max() + np.log(k) + abs(logits).max()
    ref.assert_close(np.array(loss, logits.dtype), np.array(expected), n + k + 16, size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("k", [1, 2, 10, 100])
def test_cross_entropy(n, k, label_smoothing, dtype, isa, threads):
    labels = np.random.default_rng(0).integers(0, k, n)
    check_cross_entropy(normal((n, k), dtype) * 3, labels, label_smoothing)


@quick
@given(
    n=hs.integers(1, 20),
    k=hs.integers(1, 20),
    scale=hs.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3]),
    label_smoothing=hs.floats(0, 1),
)
def test_cross_entropy_of_anything(n, k, scale, label_smoothing, isa):
    labels = np.random.default_rng(n).integers(0, k, n)
    check_cross_entropy(normal((n, k)) * np.float32(scale), labels, label_smoothing)


def test_cross_entropy_of_equal_logits():
    loss, gradient = nn.cross_entropy(np.zeros((2, 4), np.float32), np.array([0, 3]))
    assert loss == pytest.approx(np.log(4), rel=1e-6)
    assert gradient.tolist() == [[-0.375, 0.125, 0.125, 0.125], [0.125, 0.125, 0.125, -0.375]]


def test_cross_entropy_of_huge_logits():
    logits = np.array([[1e4, -1e4], [1e30, 0]], np.float32)
    loss, gradient = nn.cross_entropy(logits, np.array([0, 0]))
    assert loss == 0 and (gradient == 0).all()
    loss, gradient = nn.cross_entropy(logits[:1], np.array([1]))
    assert loss == 2e4 and gradient.tolist() == [[1, -1]]


@pytest.mark.parametrize("label_smoothing", [0.0, 1.0])
def test_cross_entropy_of_a_masked_class(label_smoothing):
    """Without a share of the target a logit of -infinity is as if it were not there; with one the loss is infinite."""
    logits = np.array([[1, 2, -np.inf]])
    loss, gradient = nn.cross_entropy(logits, np.array([0]), label_smoothing=label_smoothing)
    assert loss == pytest.approx(np.inf if label_smoothing else np.log(1 + np.e))
    assert np.isfinite(gradient).all()


def test_cross_entropy_of_nan_is_nan():
    logits = normal((17, 3))
    logits[16, 1] = np.nan
    loss, gradient = nn.cross_entropy(logits, np.zeros(17, np.int64))
    assert np.isnan(loss) and np.isnan(gradient[16]).any()


def test_cross_entropy_gives_the_same_bits_on_any_threads(same_bits):
    labels = np.random.default_rng(0).integers(0, 10, 333)
    same_bits(lambda: nn.cross_entropy(normal((333, 10)), labels))


def test_any_memory_order():
    logits, labels = normal((17, 10)), np.arange(17) % 10
    loss, gradient = nn.cross_entropy(logits, labels)
    other, other_gradient = nn.cross_entropy(np.asfortranarray(logits), labels)
    assert other == loss
    np.testing.assert_array_equal(other_gradient, gradient)


LABELS = np.array([0, 1, 2])


@pytest.mark.parametrize(
    ("logits", "labels", "error", "match"),
    [
        (normal((3, 4)), np.array([0, 7, 2]), ValueError, r"labels.*(?=.*\b7\b)(?=.*\b1\b)"),
        (normal((3, 4)), np.array([0, 1, 4]), ValueError, r"labels.*(?=.*\b4\b)(?=.*\b2\b)"),
        (normal((3, 4)), np.array([-1, 1, 2]), ValueError, r"labels.*(?=.*-1\b)(?=.*\b0\b)"),
        (normal((3, 4)), LABELS[:2], ValueError, r"(?=.*labels)(?=.*\b2\b)(?=.*\b3\b)"),
        (normal((3, 4)), LABELS[:, None], ValueError, "labels"),
        (normal((3, 4)), LABELS.astype(np.float32), TypeError, "labels.*float32"),
        (normal((3, 4)), LABELS.astype(np.int32), TypeError, "labels.*int32"),
        (normal((3, 4)), [0, 1, 2], TypeError, "labels.*list"),
        (normal((3, 4, 1, 1)), LABELS, ValueError, "logits.*3, 4, 1, 1"),
        (normal(3), LABELS, ValueError, r"logits.*\(3,\)"),
        (normal((3, 4), np.float16), LABELS, TypeError, "logits.*float16"),
        (np.zeros((3, 4), np.int64), LABELS, TypeError, "logits.*int64"),
        ([[0.0]], LABELS, TypeError, "logits.*list"),
        (normal((0, 4)), LABELS[:0], ValueError, r"\b0\b|empty"),
    ],
)
def test_bad_input(logits, labels, error, match):
    with pytest.raises(error, match="(?s)" + match):
        nn.cross_entropy(logits, labels)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.5, np.nan])
def test_bad_label_smoothing(label_smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing.*{label_smoothing}"):
        nn.cross_entropy(normal((3, 4)), LABELS, label_smoothing=label_smoothing)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (33, 3), (15, 3, 4, 5)], ids=str)
def test_mse_loss(shape, dtype):
    y, target = normal(shape, dtype), normal(shape, dtype, seed=1)
    loss, gradient = nn.mse_loss(y, target)
    assert isinstance(loss, float) and gradient.dtype == dtype
    expected, expected_gradient = ref.mse_loss(y, target)
    size = (abs(y) + abs(target)).astype(np.float64)
    ref.assert_close(np.array(loss, dtype), np.array(expected), y.size + 4, (size**2).mean())
    ref.assert_close(gradient, expected_gradient, 4, 2 * size / y.size)


@pytest.mark.parametrize(
    ("y", "target", "error", "match"),
    [
        (normal((3, 4)), normal((3, 1)), ValueError, r"(?=.*3, 4)(?=.*3, 1)"),
        (normal((3, 4)), normal((3, 4), np.float64), ValueError, "(?=.*float32)(?=.*float64)"),
        (normal((3, 4)), [[0.0]], TypeError, "target.*list"),
        (normal((0, 4)), normal((0, 4)), ValueError, r"\b0\b|empty"),
    ],
)
def test_bad_mse_input(y, target, error, match):
    with pytest.raises(error, match="(?s)" + match):
        nn.mse_loss(y, target)
