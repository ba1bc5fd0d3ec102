"""Reader of the binary version of CIFAR-10 and CIFAR-100, from its folder or its .tar.gz."""

import gzip
import posixpath
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

IMAGE = (3, 32, 32)  # red, green, blue planes, rows from the top
IMAGE_BYTES = 3 * 32 * 32
MAX_RECORDS = 50_000  # the publisher's largest file, train.bin of CIFAR-100
MAX_NAMES_BYTES = 1 << 16
MAX_UNPACKED_BYTES = 1 << 28  # the publisher's archives unpack to 185 MB


class Layout(NamedTuple):
    """How the publisher lays out one set (www.cs.toronto.edu/~kriz/cifar.html)."""

    folder: str  # also the folder inside the archive
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str  # a text file, one class a line
    labels: tuple[int, ...]  # how many values each label byte of a record has; the last is used

    @property
    def files(self):
        """Every file that is read."""
        return (*self.train, *self.test, self.names)


CIFAR10 = Layout(
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test=("test_batch.bin",),
    names="batches.meta.txt",
    labels=(10,),
)
CIFAR100 = Layout(
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    train=("train.bin",),
    test=("test.bin",),
    names="fine_label_names.txt",
    labels=(20, 100),  # the coarse label, then the fine one
)


def read_cifar(path, layout):
    """Reads a set from path, the publisher's folder or .tar.gz: (train, test, class names).

    layout is CIFAR10 or CIFAR100; train and test are images uint8 (N, 3, 32, 32) and labels int64
    (N,), the fine ones for CIFAR-100. An archive is read from front to back, nothing is extracted.
    FileNotFoundError if a file of the folder is missing; ValueError, naming the file, if one is
    damaged, is not a whole number of records, or has a label out of range.
    """
    path = Path(path)
    contents = {}
    for name, data in _folder(path, layout) if path.is_dir() else _archive(path, layout):
        decode = _names if name == layout.names else _records
        contents[name] = decode(path / name, data, layout)
    missing = [name for name in layout.files if name not in contents]
    if missing:
        raise ValueError(f"{path} does not contain {', '.join(missing)}")

    def joined(names):
        images, labels = zip(*(contents.pop(name) for name in names), strict=True)
        return np.concatenate(images), np.concatenate(labels)

    return joined(layout.train), joined(layout.test), contents[layout.names]


def _folder(path, layout):
    for name in layout.files:
        with (path / name).open("rb") as stream:
            yield name, _read(path / name, stream, (path / name).stat().st_size, layout)


def _archive(path, layout):
    wanted = {f"{layout.folder}/{name}": name for name in layout.files}
    try:
        with gzip.open(path) as unpacked:
            with tarfile.open(fileobj=_Bounded(unpacked), mode="r|") as tar:
                for member in tar:
                    name = wanted.get(posixpath.normpath(member.name))
                    if name is not None and member.isreg() and not member.issparse():
                        stream = tar.extractfile(member)
                        yield name, _read(path / name, stream, member.size, layout)
            while unpacked.read(1 << 20):  # gzip compares its checksum at the very end
                pass
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged or truncated .tar.gz file: {error}") from error


class _Bounded:
    """A stream that raises at its end, and past MAX_UNPACKED_BYTES.

    tarfile goes on reading nothing, for as long as a damaged size says, or stores all that comes.
    """

    def __init__(self, stream):
        self.stream, self.left = stream, MAX_UNPACKED_BYTES

    def read(self, size):
        data = self.stream.read(size)
        self.left -= len(data)
        if not data or self.left < 0:
            raise EOFError("unexpected end" if not data else f"over {MAX_UNPACKED_BYTES} bytes")
        return data


def _read(path, stream, size, layout):
    """The size bytes of a file, refused before reading if there cannot be so many."""
    if path.name == layout.names:
        unit, most = 1, MAX_NAMES_BYTES
    else:
        unit, most = len(layout.labels) + IMAGE_BYTES, MAX_RECORDS
    if size % unit or not 0 < size <= unit * most:
        what = f"records of {unit} bytes" if unit > 1 else "bytes of class names"
        raise ValueError(f"{path} has {size} bytes, must be 1 to {most} {what}")
    data = stream.read(size)
    if len(data) != size:
        raise ValueError(f"{path} ends after {len(data)} bytes, must have {size}")
    return data


def _records(path, data, layout):
    """Images and labels of a file of records: the label bytes, then the image."""
    skip = len(layout.labels)
    records = np.frombuffer(data, np.uint8).reshape(-1, skip + IMAGE_BYTES)
    for column, classes in enumerate(layout.labels):
        labels = records[:, column].astype(np.int64)
        if labels.max() >= classes:
            first = (labels >= classes).argmax()
            raise ValueError(f"{path} has label {labels[first]} in record {first}, must be 0 to {classes - 1}")
    return records[:, skip:].reshape(-1, *IMAGE), labels


def _names(path, data, layout):
    lines = (line.strip() for line in data.decode("utf-8", "replace").split("\n"))
    names = tuple(line for line in lines if line)  # the publisher's files end with an empty line
    if len(names) != layout.labels[-1]:
        raise ValueError(f"{path} has {len(names)} class names, must have {layout.labels[-1]}")
    return names
