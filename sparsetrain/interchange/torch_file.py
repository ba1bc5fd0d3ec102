"""Reads the tensors of PyTorch's .pt, .pth and .th files without running any code of theirs.

Such a file is a pickle that says how tensors lie in storages, and the storages' bytes: a zip archive since PyTorch
1.6, one after the other before. The unpickler here knows the few names that tensors need and gives an error for any
other. Source of the layout: torch/serialization.py and torch/_utils.py of PyTorch 2.13.
"""

import collections
import math
import os
import pickle
import reprlib
import types
import zipfile

import numpy as np

COPIES = 8  # of the file, that tensors and dicts may take as memory beside it
PAIR = 100  # bytes of memory that a pair in a dict takes
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files that are no zip archive
STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "LongStorage": np.int64,
    "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip


def read(path):
    """The object in the file at path, its tensors as NumPy arrays; ValueError if it has anything but tensors, numbers,
    strings, dicts and lists, or is damaged."""
    size = os.path.getsize(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _archive(archive, size)
        with open(path, "rb") as file:
            return _sequence(file, size)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or forged file can bring pickle, zipfile and NumPy to
        raise ValueError(f"{path} is not a file of PyTorch, or is damaged: {type(error).__name__}: {error}") from error


def _archive(archive, size):
    names = archive.namelist()
    (main,) = [name for name in names if name.split("/")[1:] == ["data.pkl"]] or [None]
    if main is None:
        raise ValueError("it has no data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError("it is compressed, which PyTorch's files are not")
    if sum(info.file_size for info in archive.infolist()) > size:
        raise ValueError("its parts overlap")
    folder = main.partition("/")[0]
    order = archive.read(f"{folder}/byteorder") if f"{folder}/byteorder" in names else b"little"
    if order != b"little":
        raise ValueError(f"its byteorder is {order[:20]!r}, must be b'little'")

    found = {}

    def storage(dtype, key, count):
        if key not in found:
            found[key] = archive.read(f"{folder}/data/{key}")
        return np.frombuffer(found[key], dtype, count)

    with archive.open(main) as file:
        return _Reader(file, size, storage).load()


def _sequence(file, size):
    plain = [_Reader(file, size).load() for _ in range(3)]
    if plain[:2] != [MAGIC, PROTOCOL] or plain[2].get("little_endian") is not True:
        raise ValueError("it does not begin as PyTorch's files do")
    start = file.tell()

    # The storages come after the object that refers to them: once through for their types, then for their values.
    wanted = {}

    def note(dtype, key, count):
        wanted[key] = dtype, count

    _Reader(file, size, note).load()
    found = {}
    for key in _Reader(file, size).load():
        dtype, count = wanted[key]
        if int.from_bytes(file.read(8), "little") != count:
            raise ValueError(f"storage {key!r} has another size than its tensors say")
        found[key] = np.frombuffer(file.read(min(count * dtype.itemsize, size)), dtype, count)
    file.seek(start)
    return _Reader(file, size, lambda dtype, key, count: found[key]).load()


class _Reader(pickle._Unpickler):
    """size: bytes of the whole file. storage: a function (dtype, key, count) -> array, or None, of which no tensors
    are made.

    The unpickler in Python, since the memo of the one in C grows to any index that a file names.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, size, storage=None):
        def read(count):
            return file.read(min(count, size))  # a buffered file would take memory for what it has not

        super().__init__(types.SimpleNamespace(read=read, readline=file.readline), encoding="utf-8")
        self.storage, self.room = storage, COPIES * size

    def load_build(self):
        self.stack.pop()  # attributes, such as the versions that PyTorch writes beside a state dict, are not set

    dispatch[pickle.BUILD[0]] = load_build

    def load_refused(self):
        raise ValueError("it holds a bytearray or a set: only state dicts can be read")

    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.EMPTY_SET[0]] = dispatch[pickle.FROZENSET[0]] = load_refused

    def find_class(self, module, name):
        known = {
            ("collections", "OrderedDict"): self.ordered,
            ("torch._utils", "_rebuild_tensor"): self.tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            **{("torch", storage): _Storage(dtype) for storage, dtype in STORAGES.items()},
        }
        if (module, name) not in known:
            raise ValueError(f"it holds {module}.{name}, which is no tensor: only state dicts can be read")
        return known[module, name]

    def persistent_load(self, saved):
        if self.storage is None or saved[0] != "storage" or not isinstance(saved[1], _Storage):
            raise ValueError(f"it refers to {reprlib.repr(saved[0])}, which is no storage of a known type")
        if not isinstance(saved[2], str):
            raise ValueError(f"the name of a storage is a {type(saved[2]).__name__}, must be a str")
        if len(saved) > 5 and saved[5] is not None:
            raise ValueError("it has views of storages, as only very old files do")
        if not isinstance(saved[4], int) or saved[4] < 0:
            raise ValueError(f"a storage has {reprlib.repr(saved[4])} values")
        return self.storage(saved[1].dtype, saved[2], saved[4])

    def ordered(self, pairs=()):
        """An OrderedDict, which Python 3 writes empty and Python 2 wrote as the list of its pairs."""
        made = collections.OrderedDict(pairs)
        self.take(PAIR * len(made))
        return made

    def take(self, count):
        """ValueError if there are not so many bytes left that what is read may take."""
        self.room -= count
        if self.room < 0:
            raise ValueError("its tensors and dicts would take many times as much memory as the file")

    def tensor(self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
        if metadata:
            raise ValueError(f"a tensor is marked {reprlib.repr(metadata)}: only plain ones can be read")
        size, stride = tuple(map(int, size)), tuple(map(int, stride))
        if len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
            raise ValueError(f"a tensor has size {size}, stride {stride} and offset {offset}")
        if storage is None:
            return None
        values = math.prod(size)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if values > len(storage) or (values and last >= len(storage)):
            raise ValueError(f"a tensor of size {size} does not lie in its storage of {len(storage)} values")
        view = np.lib.stride_tricks.as_strided(storage[offset:], size, [s * storage.itemsize for s in stride])
        if not view.flags.c_contiguous:
            self.take(view.nbytes)
        return np.ascontiguousarray(view).reshape(size)


class _Storage:
    """A type of storage by its name; it does nothing."""

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)


def _parameter(data, *_):
    return data
