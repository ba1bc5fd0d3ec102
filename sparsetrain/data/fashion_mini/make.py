"""Makes the embedded set: python make.py FOLDER, where FOLDER has Fashion-MNIST's four .gz files.

Takes the first 1,000 training and the first 200 test images of each class, in file order, and
writes them beside this script in the same format. The same input gives the same bytes: the gzip
header has no time or file name in it (another zlib, such as zlib-ng, packs differently).
"""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from sparsetrain.data.idx import read_idx

PER_CLASS = {"train": 1000, "t10k": 200}


def first_of_each_class(labels, count):
    """Indices of the first count entries of every value in labels, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in np.unique(labels)]))


def write_idx_gz(path, array):
    """Writes a uint8 array as a gzipped IDX file. zlib's own gzip header has time 0 and no name."""
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31, 9)
    path.write_bytes(compressor.compress(header + array.tobytes()) + compressor.flush())


def make(source, target):
    """Writes the four files of the subset of source's set into target."""
    for part, count in PER_CLASS.items():
        images, labels = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
        y = read_idx(source / labels, ndim=1)
        chosen = first_of_each_class(y, count)
        write_idx_gz(target / images, read_idx(source / images, ndim=3)[chosen])
        write_idx_gz(target / labels, y[chosen])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]), Path(__file__).parent)
