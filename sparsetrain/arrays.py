"""Blocked arrays: 16 images side by side in the last axis, so that the batch is the vector."""

import numpy as np

from sparsetrain._kernels import core
from sparsetrain.heap import Heap

IMAGES = 16  # images of a block: one AVX-512 register of float32, two of AVX2, four of NEON
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

_heap = Heap()


class Blocked:
    """A batch in the layout of the kernels: `array` (ceil(n / 16), channels, height, width, 16).

    n is the number of images; lanes past it in the last block are padding: finite in activations, zero in
    gradients. halo (vertical, horizontal) is how many zero pixels lie around each channel in memory.
    ndim is 4, or 2 for a batch of (n, features), which has height and width 1.
    """

    __slots__ = ("array", "halo", "n", "ndim")

    def __init__(self, array, n, halo, ndim):
        self.array, self.n, self.halo, self.ndim = array, n, halo, ndim

    @property
    def dtype(self):
        return self.array.dtype

    @property
    def shape(self):
        """Shape of the batch as users see it: (n, channels, height, width) or (n, features)."""
        return (self.n, *self.array.shape[1 : 4 if self.ndim == 4 else 2])

    def like(self, halo=(0, 0)):
        """A new array of this geometry, its values not set."""
        _, c, h, w, _ = self.array.shape
        return empty(self.n, c, h, w, self.dtype, halo, self.ndim)

    def has_halo(self, halo):
        """Whether the halo is at least `halo`."""
        return self.halo[0] >= halo[0] and self.halo[1] >= halo[1]

    def with_halo(self, halo):
        """This array if its halo is at least `halo`, else a copy that has it."""
        if self.has_halo(halo):
            return self
        wider = self.like((max(halo[0], self.halo[0]), max(halo[1], self.halo[1])))
        core.copy(self.array, wider.array)
        return wider


def empty(n, channels, height, width, dtype, halo=(0, 0), ndim=4):
    """A Blocked whose values are not set and whose halo is zero. Its memory is used again once no array needs it."""
    return Blocked(_allocate(-(-n // IMAGES), channels, height, width, np.dtype(dtype), halo), n, halo, ndim)


def _allocate(blocks, channels, height, width, dtype, halo):
    row = (width + 2 * halo[1]) * IMAGES
    # An odd number of 16-image pixels between channels and between blocks: strides that are a multiple
    # of 4096 bytes share one set of the L1 cache and made a 56x56 convolution 2x slower.
    channel = ((height + 2 * halo[0]) * row // IMAGES | 1) * IMAGES
    block = (channels * channel // IMAGES | 1) * IMAGES
    size = blocks * block * dtype.itemsize
    # What has had this geometry before has zeros around it.
    raw, zero_halo = _heap.take(size, (blocks, channels, height, width, *halo, dtype.char) if any(halo) else None)
    if any(halo) and not zero_halo:
        raw[:] = 0
    return np.ndarray(
        (blocks, channels, height, width, IMAGES),
        dtype,
        raw,
        (halo[0] * row + halo[1] * IMAGES) * dtype.itemsize,
        tuple(dtype.itemsize * s for s in (block, channel, row, IMAGES, 1)),
    )


def release():
    """Give the memory of blocked arrays that are not in use back to the system."""
    _heap.release()


def memory_of(array):
    """The place in the heap that a Blocked's array lies in."""
    return array.base.base.place


class Taken:
    """Memory that no array uses, taken for calls that write to it again and again; given back once this is gone.

    memory: a set of memory_of(). `whole`: whether all of it was there to be taken; if not, none is.
    """

    def __init__(self, memory):
        pieces = _heap.withdraw(memory)
        self.whole, self.pieces = pieces is not None, pieces or []

    def __del__(self):
        _heap.let_go.extend(self.pieces)


class _Address:
    """Memory that somebody else keeps."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__


def unowned(array):
    """The same memory, which the result does not keep: let it go before whoever does."""
    return np.asarray(_Address(array))


def check(name, x):
    """ValueError or TypeError unless x is a batch: an ndarray (N, C, H, W) or (N, F), float32 or float64, not empty."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} is a {type(x).__name__}, must be a numpy array")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}, must be float32 or float64")
    if x.ndim not in (2, 4):
        raise ValueError(f"{name} has shape {x.shape}, must be (N, C, H, W) or (N, F)")
    if x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}, which is empty")


def pack(x, halo=(0, 0), into=None):
    """The Blocked with the values of x, an ndarray (N, C, H, W) or (N, F), float32 or float64.

    `into`, of this geometry, gets them if given.
    """
    check("x", x)
    blocked = into or empty(x.shape[0], *(x.shape[1:] if x.ndim == 4 else (x.shape[1], 1, 1)), x.dtype, halo, x.ndim)
    core.to_blocked(np.ascontiguousarray(x).reshape(x.shape if x.ndim == 4 else (*x.shape, 1, 1)), blocked.array)
    return blocked


def unpack(blocked):
    """The values as an ordinary array (n, channels, height, width) or (n, features)."""
    _, c, h, w, _ = blocked.array.shape
    x = np.empty((blocked.n, c, h, w), blocked.dtype)
    core.from_blocked(blocked.array, x)
    return x.reshape(blocked.shape)
