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


def flags(address):
    return re.search(r"^VmFlags:.*$", mapping_of(address), re.MULTILINE).group().split()


@pytest.mark.parametrize("size", [1, 63, 4096, memory.HUGE - 1, memory.HUGE, 3 * memory.HUGE + 1])
def test_zero_and_aligned(size):
    found = memory.zeros(size)
    assert found.shape == (size,) and found.dtype == np.uint8
    assert found.ctypes.data % 64 == 0
    assert not found.any()


@pytest.mark.skipif(not MAPS.exists() or not GIVEN.exists(), reason="needs Linux with transparent huge pages")
def test_huge_pages_are_asked_for_where_they_are_filled():
    begin = memory.zeros(4 * memory.HUGE + 4096).ctypes
    assert begin.data % memory.HUGE == 0
    assert mapping_of(begin.data).split()[1] == "rw-p"  # shared memory would get none
    assert "hg" in flags(begin.data)
    assert "hg" not in flags(begin.data + 4 * memory.HUGE)


@pytest.mark.skipif(not hasattr(memory.mmap, "MADV_HUGEPAGE"), reason="needs a system that can be asked for huge pages")
def test_a_system_without_huge_pages_gives_others(monkeypatch):
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 12345)  # an advice that no kernel knows: EINVAL, as without them
    assert not memory.zeros(3 * memory.HUGE).any()
