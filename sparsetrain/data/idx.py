"""Reader of IDX files, the format of MNIST and Fashion-MNIST."""

import contextlib
import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

UBYTE = 0x08  # the element type of every image and label file; the format's other types are refused

# How far a .gz file may unpack: images shrink 2 to 10 times, labels 10 to 1000 times but are few.
# So a file of 10 MB can ask for 1 GB at most, whatever its header declares.
UNPACK_RATIO, UNPACK_FLOOR = 100, 1 << 20


def read_idx(path, ndim=None):
    """Reads an IDX file of unsigned bytes, plain or gzipped, into a uint8 array.

    ndim, where it is given, is the number of dimensions that the file must have: 3 for images
    (N, H, W), 1 for labels (N,). Gzip is recognised by its first two bytes, not by the name.
    ValueError, naming the file, if it is damaged, truncated, too long, empty or of another type.
    Memory grows with the bytes that are really there, not with what the header declares.
    Format: two zero bytes, the element type, the number of dimensions, then each as a big-endian
    uint32, then the elements, the last dimension fastest (yann.lecun.com/exdb/mnist).
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.open(raw) if packed else contextlib.nullcontext(raw) as file:
            limit = max(UNPACK_RATIO * size, UNPACK_FLOOR) if packed else size
            try:
                return _read(path, file, limit, ndim)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is a damaged or truncated gzip file: {error}") from error


def _read(path, file, limit, ndim):
    magic = file.read(4)
    wanted = f"00 00 {UBYTE:02x} {'01 to 04' if ndim is None else f'{ndim:02x}'}"
    if len(magic) < 4 or magic[:3] != bytes((0, 0, UBYTE)) or not 1 <= magic[3] <= 4:
        raise ValueError(f"{path} starts with {magic.hex(' ') or 'nothing'}, must be {wanted}")
    if ndim not in (None, magic[3]):
        raise ValueError(f"{path} has {magic[3]} dimensions, must have {ndim}")

    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError(f"{path} ends after {4 + len(header)} bytes, inside its header")
    shape = struct.unpack(f">{magic[3]}I", header)
    count = math.prod(shape)
    if count == 0:
        raise ValueError(f"{path} declares shape {shape}: it holds no data")
    if count > limit:
        raise ValueError(f"{path} declares {count} bytes of data, shape {shape}, its size allows {limit} at most")
    data = file.read(count + 1)  # one more, to notice what should not be there
    if len(data) != count:
        came = f"only {len(data)}" if len(data) < count else "more"
        raise ValueError(f"{path} holds {came} bytes of data, its shape {shape} wants {count}")
    return np.frombuffer(data, np.uint8).reshape(shape).copy()  # bytes are read-only
