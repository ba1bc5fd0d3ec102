"""The kernels that measure the machine compute what they say, on every instruction set and number of threads."""

import numpy as np
import pytest

from sparsetrain._kernels import core

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def rows(threads, n, dtype):
    """Small integers, so that every sum is exact."""
    return np.random.default_rng(0).integers(-8, 9, (threads, n)).astype(dtype)


@DTYPES
def test_multiply_add(isa, threads, dtype):
    x = rows(threads, core.CHAINED_VALUES, dtype)
    wanted = ((x * 2 + 3) * 2 + 3) * 2 + 3
    core.multiply_add(x, 2, 3, 3)
    np.testing.assert_array_equal(x, wanted)


@DTYPES
@pytest.mark.parametrize("n", [1, 127, 128, 1000])
def test_read_sum(isa, threads, dtype, n):
    x, totals = rows(threads, n, dtype), np.zeros(threads, dtype)
    core.read_sum(x, totals, 3)
    np.testing.assert_array_equal(totals, 3 * x.sum(axis=1))


@DTYPES
@pytest.mark.parametrize("n", [1, 127, 128, 1000])
def test_axpy(isa, threads, dtype, n):
    x, y = rows(threads, n, dtype), rows(threads, n, dtype)[:, ::-1].copy()
    wanted = y + 6 * x
    core.axpy(2, x, y, 3)
    np.testing.assert_array_equal(y, wanted)
    core.axpy(0.5, y, y, 1)
    np.testing.assert_array_equal(y, 1.5 * wanted)


def test_rows_must_fit():
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match=r"shape \(2, 8\), must be \(2, 768\)"):
        core.multiply_add(x, 1, 1, 1)
    with pytest.raises(ValueError, match=r"must be \(2, 8\)"):
        core.axpy(1, x, np.zeros((1, 8), np.float32), 1)
    with pytest.raises(ValueError, match="contiguous rows"):
        core.read_sum(x[:, ::2], np.zeros(2, np.float32), 1)
    with pytest.raises(ValueError, match="totals has 1 values, must have 2"):
        core.read_sum(x, np.zeros(1, np.float32), 1)
