"""The IDX reader: what it reads, and that nothing damaged passes or asks for much memory."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.data import read_idx


def idx_bytes(array):
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes((0, 0, 8, array.ndim)) + shape + bytes(array)


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
PLAIN = idx_bytes(IMAGES)
PACKED = gzip.compress(PLAIN, mtime=0)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (3, 4, 5), (2, 1, 3, 4)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_reads_plain_and_gz(tmp_path, shape, pack):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    (tmp_path / "x").write_bytes(pack(idx_bytes(array)))
    read = read_idx(tmp_path / "x", ndim=len(shape))
    assert read.dtype == np.uint8
    assert read.flags.writeable
    assert np.array_equal(read, array)


BAD = {
    "nothing": (b"", "starts with nothing, must be 00 00 08 03"),
    "half a magic": (PLAIN[:3], "starts with 00 00 08, must be"),
    "wrong magic": (b"\x01" + PLAIN[1:], "starts with 01 00 08 03, must be"),
    "float elements": (b"\0\0\x0d" + PLAIN[3:], "starts with 00 00 0d 03, must be"),
    "no dimensions": (b"\0\0\x08\0" + PLAIN[4:], "starts with 00 00 08 00, must be"),
    "labels": (idx_bytes(np.zeros(4, np.uint8)), "has 1 dimensions, must have 3"),
    "half a header": (PLAIN[:9], "ends after 9 bytes, inside its header"),
    "no elements": (idx_bytes(np.zeros((0, 4, 5), np.uint8)), "holds no data"),
    "truncated": (gzip.compress(PLAIN[:-1]), "only 59 bytes of data.*wants 60"),
    "trailing": (PLAIN + b"\0", "more bytes of data.*wants 60"),
    "trailing, packed": (gzip.compress(PLAIN + b"\0"), "more bytes of data.*wants 60"),
    "truncated gzip": (PACKED[:-9], "damaged or truncated gzip"),
    "damaged gzip": (PACKED[:30] + b"\xff\xff" + PACKED[32:], "damaged or truncated gzip"),
    "wrong gzip checksum": (PACKED[:-8] + bytes(4) + PACKED[-4:], "damaged or truncated gzip"),
    "after the gzip": (PACKED + b"more", "damaged or truncated gzip"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path, ndim=3)
    assert str(path) in str(error.value)


def test_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "absent")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_declared_size_is_not_believed(tmp_path, pack):
    header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 10_000_000, 32, 32)
    (tmp_path / "x").write_bytes(pack(header + bytes(1000)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="declares 10240000000 bytes"):
            read_idx(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_gz_that_unpacks_a_thousandfold_is_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((4000, 28, 28), np.uint8))))
    with pytest.raises(ValueError, match="declares 3136000 bytes"):
        read_idx(path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("idx") / "mutated"


@settings(max_examples=300, deadline=None)
@given(
    whole=st.sampled_from((PLAIN, PACKED)),
    cut=st.integers(0, 200),
    start=st.integers(0, 120),
    removed=st.integers(0, 8),
    inserted=st.binary(max_size=8),
)
def test_any_mutated_file_loads_or_raises_value_error(scratch, whole, cut, start, removed, inserted):
    mutated = whole[:start] + inserted + whole[start + removed :]
    scratch.write_bytes(mutated[: len(mutated) - cut] if cut < 100 else mutated)
    try:
        read_idx(scratch)
    except ValueError as error:
        assert str(scratch) in str(error)
