"""Memory for the kernels: aligned, zero, and in huge pages where Linux has them."""

import re
from pathlib import Path

import numpy as np
import pytest

from sparsetrain._kernels import memory

MAPS = Path("/proc/self/smaps")
GIVEN = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mapping_of(address):
    """The entry of /proc/self/smaps that the address lies in."""
    entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", MAPS.read_text(), flags=re.MULTILINE)[1:]
    for entry in entries:
        begin, end = (int(limit, 16) for limit in entry.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return entry
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.parametrize("size", [1, 63, 4096, memory.HUGE - 1, memory.HUGE, 3 * memory.HUGE + 1])
def test_zero_and_aligned(size):
    found = memory.zeros(size)
    assert found.shape == (size,) and found.dtype == np.uint8
    assert found.ctypes.data % (64 if size < memory.HUGE else memory.HUGE) == 0
    assert not found.any()


@pytest.mark.skipif(not MAPS.exists() or not GIVEN.exists(), reason="needs Linux with transparent huge pages")
def test_large_memory_may_have_huge_pages():
    found = memory.zeros(4 * memory.HUGE)
    found[:] = 1
    entry = mapping_of(found.ctypes.data)
    assert entry.split()[1] == "rw-p"  # shared memory would get none
    assert " hg" in re.search(r"^VmFlags:.*$", entry, re.MULTILINE).group()
