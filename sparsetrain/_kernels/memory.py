"""Memory as the kernels like it: aligned, and in huge pages where the system gives them."""

import mmap

import numpy as np

HUGE = 1 << 21  # bytes of a huge page


def zeros(size):
    """`size` zero bytes at a 64-byte boundary; from 2 MB on in huge pages where the system gives them."""
    if size < HUGE:
        raw = np.zeros(size + 64, np.uint8)
        return raw[-raw.ctypes.data % 64 :][:size]
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Private: what processes share, mmap's default, Linux gives no huge pages.
        memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, size + HUGE)
    raw = np.frombuffer(memory, np.uint8)
    return raw[-raw.ctypes.data % HUGE :][:size]
