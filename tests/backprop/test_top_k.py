"""TopK: which values of each image's gradient are used."""

import numpy as np
import pytest

import sparsetrain as st
from backward_passes import KINDS, Passes
from sparsetrain.backprop import TopK

kinds = pytest.mark.parametrize("kind", KINDS)


def largest(dy, count):
    """dy with all but the `count` largest magnitudes of each image 0."""
    flat = dy.reshape(len(dy), -1)
    order = np.argsort(-abs(flat), axis=1)[:, :count]
    used = np.zeros_like(flat)
    np.put_along_axis(used, order, np.take_along_axis(flat, order, 1), 1)
    return used.reshape(dy.shape)


@kinds
@pytest.mark.parametrize("k", [1e-4, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("n", [1, 16, 18])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exactly_k_of_each_image_are_used(dtype, n, k, kind, kernel):
    passes = Passes(kind, TopK(k), n=n, dtype=dtype)
    dy = passes.gradient() * np.logspace(-3, 3, n).reshape(n, *[1] * (len(passes.shape) - 1)).astype(dtype)
    count = max(1, round(k * dy[0].size))
    passes.check(passes.step(dy), largest(dy, count), dy)
    assert passes.method.report()["0"]["gradient_sparsity"] == pytest.approx(1 - count / dy[0].size)


@kinds
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_is_exact(dtype, kind, kernel):
    passes = Passes(kind, TopK(1.0), dtype=dtype)
    dy = passes.gradient()
    passes.check(passes.step(dy), dy, dy)
    assert passes.method.report()["0"]["gradient_sparsity"] == 0


@kinds
def test_the_bits_of_what_is_used_stay(kind, kernel):
    passes = Passes(kind, TopK(0.25), identity=True)
    dy = passes.gradient()
    np.testing.assert_array_equal(passes.step(dy)[0], largest(dy, round(0.25 * dy[0].size)))


def test_values_as_large_as_the_smallest_are_used_too(kernel):
    passes = Passes("linear", TopK(0.3), identity=True)
    dy = np.tile(np.array([3, -3, 2, -2, 2, 1], np.float32), (18, 1))
    dy[1] = 0
    dy[2] = 5
    dx = passes.step(dy)[0]
    np.testing.assert_array_equal(dx[0], [3, -3, 0, 0, 0, 0])
    assert not dx[1].any()
    np.testing.assert_array_equal(dx[2], 5)
    method = TopK(0.5).attach(passes.model)  # three of six, and a tie
    np.testing.assert_array_equal(passes.step(dy)[0][0], [3, -3, 2, -2, 2, 0])
    assert method.report()["0"]["values"] == dy.size


@pytest.mark.parametrize("value", [np.nan, np.inf])
@kinds
def test_what_is_not_finite_shows_in_dx_and_dw(value, kind, kernel):
    passes = Passes(kind, TopK(0.2))
    dy = passes.gradient()
    dy.reshape(-1)[-1] = value
    dx, dw, db = passes.step(dy)
    assert not np.isfinite(dx[-1]).all() and np.isfinite(dx[:-1]).all()
    assert not np.isfinite(dw[-1]).all() and np.isfinite(dw[:-1]).all()
    assert not np.isfinite(db[-1])


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-40])
@pytest.mark.parametrize("k", [0.1, 1.0])
def test_equal_values_are_all_used(value, k):
    passes, plain = Passes("conv", TopK(k)), Passes("conv")
    dy = np.full(passes.shape, value, np.float32)
    for found, exact in zip(passes.step(dy), plain.step(dy), strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * value)


@kinds
def test_any_thread_count_gives_the_same_bits(kind, kernel):
    results = set()
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        passes = Passes(kind, TopK(0.1), n=700 if kind == "linear" else 60)
        results.add(b"".join(a.tobytes() for a in passes.step(passes.gradient())))
    assert len(results) == 1


@pytest.mark.parametrize(
    ("k", "error"), [(0, ValueError), (1.01, ValueError), (-1, ValueError), (np.nan, ValueError), ("1", TypeError)]
)
def test_bad_arguments(k, error):
    with pytest.raises(error, match="k is"):
        TopK(k)
