"""Blocked arrays: the way there and back, what the memory looks like, and when it is used again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

from sparsetrain import arrays
from sparsetrain.arrays import IMAGES
from sparsetrain.heap import Heap
from strategies import quick

BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture(autouse=True)
def empty_heap(monkeypatch):
    monkeypatch.setattr(arrays, "_heap", Heap())


def address(blocked):
    return blocked.array.__array_interface__["data"][0]


def wide(blocked):
    """The pixels and their halo as one array (blocks, channels, height, width, 16)."""
    array, (vertical, horizontal) = blocked.array, blocked.halo
    b, c, h, w, _ = array.shape
    start = address(blocked) - vertical * array.strides[2] - horizontal * array.strides[3]
    raw = array.base
    return np.ndarray(
        (b, c, h + 2 * vertical, w + 2 * horizontal, IMAGES),
        array.dtype,
        raw,
        start - raw.__array_interface__["data"][0],
        array.strides,
    )


@quick
@given(
    hs.sampled_from([1, 2, 15, 16, 17, 33]),
    hs.lists(hs.integers(1, 5), min_size=1, max_size=1)
    | hs.lists(hs.integers(1, 5), min_size=3, max_size=3)
    | hs.just([2, 3, 35]),
    hs.tuples(hs.integers(0, 2), hs.integers(0, 2)),
    hs.sampled_from([np.float32, np.float64]),
)
def test_round_trip(n, sizes, halo, dtype):
    x = np.random.default_rng(0).standard_normal((n, *sizes)).astype(dtype)
    blocked = arrays.pack(x, halo)
    assert blocked.shape == x.shape and blocked.dtype == dtype and blocked.halo == halo
    back = arrays.unpack(blocked)
    assert back.flags.c_contiguous and back.dtype == dtype
    np.testing.assert_array_equal(back, x)
    height, width = (*sizes[1:], 1, 1)[:2]
    assert blocked.array.shape == (-(-n // IMAGES), sizes[0], height, width, IMAGES)
    for i in range(n):
        np.testing.assert_array_equal(blocked.array[i // IMAGES, ..., i % IMAGES].reshape(sizes), x[i])
    if n % IMAGES:
        assert not blocked.array[-1, ..., n % IMAGES :].any()  # padding lanes
    around = wide(blocked)
    assert np.count_nonzero(around) == np.count_nonzero(blocked.array)


def test_round_trip_in_every_build(isa, threads):
    x = np.random.default_rng(0).standard_normal((37, 9, 7, 35)).astype(np.float32)
    np.testing.assert_array_equal(arrays.unpack(arrays.pack(x, (1, 2))), x)


def test_strided_input():
    x = np.random.default_rng(0).standard_normal((4, 3, 6, 5)).astype(np.float32)
    for view in (x[::2], x.transpose(0, 1, 3, 2), x[:, ::-1], np.asfortranarray(x)):
        np.testing.assert_array_equal(arrays.unpack(arrays.pack(view)), view)


@BOTH
@pytest.mark.parametrize("halo", [(0, 0), (1, 1), (2, 3)])
@pytest.mark.parametrize("size", [(17, 3, 5, 7), (1, 1, 1, 1), (33, 4, 8, 8), (64, 32, 56, 56)])
def test_memory(size, halo, dtype):
    """64-byte alignment, and strides that keep channels and blocks out of each other's cache sets."""
    blocked = arrays.empty(*size, dtype, halo)
    pixel = IMAGES * blocked.array.itemsize
    block, channel, row, column, lane = blocked.array.strides
    assert address(blocked) % 64 == 0
    assert (column, lane) == (pixel, blocked.array.itemsize)
    assert row == (size[3] + 2 * halo[1]) * pixel
    assert block // pixel % 2 == channel // pixel % 2 == 1
    assert block % pixel == channel % pixel == 0
    assert not wide(blocked).any()


def test_wrong_batches():
    good = np.zeros((2, 3), np.float32)
    for x, error, match in [
        (good.tolist(), TypeError, "x is a list"),
        (good.astype(np.int64), TypeError, "x has dtype int64.*float32 or float64"),
        (good.astype(np.float16), TypeError, "float16"),
        (good[0], ValueError, r"x has shape \(3,\)"),
        (good[:, :, None], ValueError, r"\(2, 3, 1\)"),
        (good[:0], ValueError, r"\(0, 3\).*empty"),
        (np.zeros((2, 3, 0, 4), np.float32), ValueError, "empty"),
    ]:
        with pytest.raises(error, match=match):
            arrays.pack(x)


def test_with_halo():
    x = np.random.default_rng(0).standard_normal((3, 2, 4, 5)).astype(np.float32)
    blocked = arrays.pack(x, (1, 0))
    assert blocked.with_halo((1, 0)) is blocked and blocked.with_halo((0, 0)) is blocked
    wider = blocked.with_halo((0, 2))
    assert wider.halo == (1, 2) and wider.n == 3 and wider.shape == x.shape
    np.testing.assert_array_equal(arrays.unpack(wider), x)
    assert np.count_nonzero(wide(wider)) == x.size


@pytest.mark.parametrize("size", [(3, 2, 4, 5), (32, 16, 40, 41)])  # below and above a huge page
class TestMemoryIsUsedAgain:
    def test_with_a_halo_that_is_still_zero(self, size):
        first = arrays.empty(*size, np.float32, (1, 2))
        first.array[...] = np.nan
        where = address(first)
        del first
        again = arrays.empty(*size, np.float32, (1, 2))
        assert address(again) == where
        again.array[...] = 1
        assert wide(again).sum() == again.array.size

    def test_with_a_halo_for_the_same_geometry_only(self, size):
        first = arrays.empty(*size, np.float32, (1, 2))
        where = wide(first).__array_interface__["data"][0]
        del first
        n, c, h, w = size
        kept = [
            arrays.empty(*size, np.float64, (1, 2)),
            arrays.empty(*size, np.float32, (2, 1)),
            arrays.empty(*size, np.float32),
            arrays.empty(n, c, w, h, np.float32, (1, 2)),
            arrays.empty(n + IMAGES, c, h, w, np.float32, (1, 2)),
        ]
        assert where not in [wide(other).__array_interface__["data"][0] for other in kept]
        # another batch with as many blocks may have it
        again = arrays.empty(n + 1 if n % IMAGES else n - 1, c, h, w, np.float32, (1, 2))
        assert wide(again).__array_interface__["data"][0] == where

    def test_without_halo_for_any_geometry(self, size):
        first = arrays.empty(*size, np.float32)
        where = address(first)
        first.array[...] = np.nan
        del first
        n, c, h, w = size
        assert address(arrays.empty(n, c, w, h, np.float32)) == where
        assert address(arrays.empty(n, 1, 1, w, np.float64)) == where

    def test_a_halo_is_zero_whatever_lay_there(self, size):
        first = arrays.empty(*size, np.float32)
        first.array[...] = np.nan
        del first
        with_halo = arrays.empty(*size, np.float32, (1, 1))
        with_halo.array[...] = 1
        assert wide(with_halo).sum() == with_halo.array.size

    def test_not_while_a_view_holds_it(self, size):
        first = arrays.empty(*size, np.float32)
        first.array[...] = 7
        where, view = address(first), first.array[..., 0]
        del first
        other = arrays.empty(*size, np.float32)
        assert address(other) != where
        other.array[...] = 8
        assert (view == 7).all()

    def test_not_while_the_array_is_held(self, size):
        first = arrays.empty(*size, np.float32)
        where, array = address(first), first.array
        del first
        assert address(arrays.empty(*size, np.float32)) != where
        assert array.shape[1] == size[1]

    def test_not_while_another_blocked_holds_it(self, size):
        first = arrays.empty(*size, np.float32)
        where, other = address(first), arrays.Blocked(first.array, first.n, first.halo, 4)
        del first
        assert address(arrays.empty(*size, np.float32)) != where
        arrays.release()
        assert other.array.shape[1] == size[1]
        del other
        assert address(arrays.empty(*size, np.float32)) == where

    def test_not_after_release(self, size):
        first = arrays.empty(*size, np.float32)
        del first
        assert arrays._heap.idle() > 0
        arrays.release()
        assert arrays._heap.idle() == 0
