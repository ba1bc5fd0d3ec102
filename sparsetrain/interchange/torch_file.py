"""Reads the tensors of PyTorch's .pt, .pth and .th files without running any code of theirs.

Such a file is a pickle that says how tensors lie in storages, and the storages' bytes: a zip archive since PyTorch
1.6, one after the other before. The unpickler here knows the few names that tensors need and gives an error for any
other. Source of the layout: torch/serialization.py and torch/_utils.py of PyTorch 2.13.
"""

import collections
import math
import os
import pickle
import zipfile

import numpy as np

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files that are no zip archive
STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "LongStorage": np.int64,
    "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip


def read(path):
    """The object in the file at path, its tensors as NumPy arrays; ValueError if it has anything but tensors, numbers,
    strings, dicts and lists, or is damaged."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _archive(archive)
        with open(path, "rb") as file:
            return _sequence(file)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
    ) as error:
        raise ValueError(f"{path} is not a file of PyTorch, or is damaged ({error})") from error
    except (MemoryError, NotImplementedError, RecursionError, TypeError, UnicodeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _archive(archive):
    names = archive.namelist()
    (main,) = [name for name in names if name.split("/")[1:] == ["data.pkl"]] or [None]
    if main is None:
        raise ValueError("it has no data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError("it is compressed, which PyTorch's files are not")
    folder = main.partition("/")[0]

    def storage(dtype, key, size):
        return np.frombuffer(archive.read(f"{folder}/data/{key}"), dtype, size)

    with archive.open(main) as file:
        return _Reader(file, storage).load()


def _sequence(file):
    plain = [_Reader(file, None).load() for _ in range(3)]
    if plain[:2] != [MAGIC, PROTOCOL] or plain[2].get("little_endian") is not True:
        raise ValueError("it does not begin as PyTorch's files do")
    start = file.tell()

    # The storages come after the object that refers to them: once through for their types, then for their values.
    wanted, room = {}, os.fstat(file.fileno()).st_size

    def note(dtype, key, size):
        if size * np.dtype(dtype).itemsize > room:
            raise ValueError(f"storage {key!r} has {size} values, more than the file")
        wanted[key] = np.dtype(dtype), size
        return np.broadcast_to(np.zeros(1, dtype), size)

    _Reader(file, note).load()
    found = {}
    for key in _Reader(file, None).load():
        dtype, size = wanted[key]
        if int.from_bytes(file.read(8), "little") != size:
            raise ValueError(f"storage {key!r} has another size than its tensors say")
        found[key] = np.frombuffer(file.read(size * dtype.itemsize), dtype, size)
    file.seek(start)
    return _Reader(file, lambda dtype, key, size: found[key]).load()


class _Reader(pickle.Unpickler):
    """storage: a function (dtype, key, size) -> array."""

    def __init__(self, file, storage):
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def find_class(self, module, name):
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor"): _tensor,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            **{("torch", storage): _Storage(dtype) for storage, dtype in STORAGES.items()},
        }
        if (module, name) not in known:
            raise ValueError(f"it holds {module}.{name}, which is no tensor: only state dicts can be read")
        return known[module, name]

    def persistent_load(self, saved):
        if self.storage is None or saved[0] != "storage" or not isinstance(saved[1], _Storage):
            raise ValueError(f"it refers to {saved[0]!r}, which is no storage of a known type")
        if len(saved) > 5 and saved[5] is not None:
            raise ValueError("it has views of storages, as only very old files do")
        if not isinstance(saved[4], int) or saved[4] < 0:
            raise ValueError(f"a storage has {saved[4]!r} values")
        return self.storage(saved[1].dtype, saved[2], saved[4])


class _Storage:
    """A type of storage by its name; it does nothing."""

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)


def _tensor(storage, offset, size, stride, *_):
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
        raise ValueError(f"a tensor has size {size}, stride {stride} and offset {offset}")
    values = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if values > len(storage) or (values and last >= len(storage)):
        raise ValueError(f"a tensor of size {size} does not lie in its storage of {len(storage)} values")
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, [s * storage.itemsize for s in stride])
    return np.ascontiguousarray(view).reshape(size)


def _parameter(data, *_):
    return data
