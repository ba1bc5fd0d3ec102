"""Memory as the kernels like it: aligned, and in huge pages where the system gives them."""

import mmap
from contextlib import suppress

import numpy as np

HUGE = 1 << 21  # bytes of a huge page


def zeros(size):
    """`size` zero bytes at a 64-byte boundary; from 2 MB on in huge pages where the system gives them."""
    if size < HUGE:
        raw = np.zeros(size + 64, np.uint8)
        return raw[-raw.ctypes.data % 64 :][:size]
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)
    # Private: what processes share, mmap's default, Linux gives no huge pages.
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(memory, np.uint8)
    begin = -raw.ctypes.data % HUGE
    with suppress(OSError):  # a kernel that knows no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, begin, size // HUGE * HUGE)  # of one not filled the rest would be lost
    return raw[begin:][:size]
