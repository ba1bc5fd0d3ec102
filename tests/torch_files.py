"""Files as torch.save writes them, put together by hand: from sound ones to those that nobody would write."""

import zipfile

import numpy as np

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Raw(bytes):
    """Opcodes of a pickle that leave one object on its stack."""


def dump(value):
    """The opcodes of a value: plain objects and Raw."""
    if isinstance(value, Raw):
        return value
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"I%d\n" % value
    if isinstance(value, float):
        return b"F%r\n" % value
    if isinstance(value, str):
        text = value.encode()
        return b"X" + len(text).to_bytes(4, "little") + text
    if isinstance(value, dict):
        return b"(" + b"".join(dump(k) + dump(v) for k, v in value.items()) + b"d"
    return b"(" + b"".join(map(dump, value)) + {tuple: b"t", list: b"l"}[type(value)]


def named(module, name):
    """What a module has by this name."""
    return Raw(f"c{module}\n{name}\n".encode())


def call(function, *arguments):
    """What a function of named() returns."""
    return Raw(function + dump(arguments) + b"R")


def built(thing, state):
    """The object after __setstate__, or with these attributes."""
    return Raw(dump(thing) + dump(state) + b"b")


def storage(kind, key, size, *more):
    """A storage that lies elsewhere in the file."""
    return Raw(dump(("storage", named("torch", kind), key, "cpu", size, *more)) + b"Q")


def tensor(storage, offset, size, stride):
    hooks = call(named("collections", "OrderedDict"))
    return call(named("torch._utils", "_rebuild_tensor_v2"), storage, offset, size, stride, False, hooks)


def tensors(arrays, views=False):
    """{name: tensor} of {name: array}, and {key: array} of their storages. views: None after each, as old files do."""
    found, storages = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        # a transposed array stays one: its storage has the order of memory
        flat = np.asarray(array).ravel("K")
        storages[str(i)] = flat
        kept = storage(STORAGES[array.dtype.name], str(i), flat.size, *([None] if views else []))
        stride = tuple(s // array.itemsize for s in array.strides)
        found[name] = tensor(kept, 0, array.shape, stride)
    return found, storages


def pickled(value):
    return b"\x80\x02" + dump(value) + b"."


def write_archive(path, value, storages, folder="archive", compression=zipfile.ZIP_STORED):
    """A zip archive, as since PyTorch 1.6. storages: {key: array or bytes}."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", pickled(value))
        for key, values in storages.items():
            archive.writestr(f"{folder}/data/{key}", bytes(values))
        archive.writestr(f"{folder}/version", "3\n")


def write_sequence(path, value, storages, magic=MAGIC, protocol=PROTOCOL, system=None, keys=None):
    """One pickle after the other, as before PyTorch 1.6."""
    about = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with open(path, "wb") as file:
        system, keys = about if system is None else system, list(storages) if keys is None else keys
        for part in (magic, protocol, system, value, keys):
            file.write(pickled(part))
        for values in storages.values():
            file.write(len(values).to_bytes(8, "little") + bytes(values))


def write_state(path, arrays, wrap=lambda state: state, old=False):
    """A state dict, in what `wrap` puts around it."""
    found, storages = tensors(arrays, views=old)
    (write_sequence if old else write_archive)(path, wrap(found), storages)
