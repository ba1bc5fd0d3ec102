"""Weights of other programs by name: reading files of them, and putting them into a model."""

import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from sparsetrain.files import replacing
from sparsetrain.interchange import torch_file
from sparsetrain.sparse import SparseParameter
from sparsetrain.sparsity import sparsifiable
from sparsetrain.train import checkpoint

MOST_INFLATED, SMALL = 200, 1 << 28  # bytes of a compressed .npz for one in the file, unless they are few


def read_state(path):
    """{name: array} of a file: .safetensors (a checkpoint's too), .npz, or PyTorch's .pt, .pth and .th.

    Of PyTorch's files, the state dict, which may lie under "state_dict" or "model"; a "module." before every name, as
    DataParallel writes, is dropped. ValueError if the file is none of these or is damaged. Nothing in it is run.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        state = _safetensors(path)
    elif suffix == ".npz":
        state = _npz(path)
    elif suffix in (".pt", ".pth", ".th"):
        state = torch_file.read(path)
        for key in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
    else:
        raise ValueError(f"{path} must end in .safetensors, .npz, .pt, .pth or .th")
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, must be a state dict")
    for name, array in state.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise ValueError(f"{path} holds {name!r}, a {type(array).__name__}, must be names and arrays")
    if state and all(name.startswith("module.") for name in state):
        state = type(state)((name.removeprefix("module."), array) for name, array in state.items())
    return state


class _Unordered(dict):
    """Arrays whose order in the file says nothing."""


def _safetensors(path):
    try:
        with safetensors.safe_open(path, framework="np") as file:
            meta = file.metadata() or {}
            if "sparsetrain" not in meta:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                names = json.loads(meta.get("order", "null"))
                return _Unordered(found) if names is None else {name: found[name] for name in names}
    except OSError:
        raise
    except Exception as error:  # of safetensors, JSON and NumPy's types
        raise ValueError(f"{path} is not a safetensors file that can be read, or is damaged ({error})") from error
    return checkpoint.read_state(path)


def _npz(path):
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
            if size > max(SMALL, MOST_INFLATED * os.path.getsize(path)):
                raise ValueError(f"it would take {size} bytes")
            for info in archive.infolist():
                with archive.open(info) as file:
                    _check_npy(info, file)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or forged file can bring zipfile and NumPy to
        raise ValueError(f"{path} is not a .npz file that can be read: {type(error).__name__}: {error}") from error


def _check_npy(info, file):
    """ValueError if an array of a .npz file has fewer bytes than it says, for which NumPy would take memory first."""
    if file.peek(6)[:6] != np.lib.format.MAGIC_PREFIX:
        return
    first = np.lib.format.read_magic(file) == (1, 0)  # (2, 0) and (3, 0) differ in how field names are encoded
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    size = math.prod(shape) * dtype.itemsize
    if size > info.file_size:
        raise ValueError(f"{info.filename} says that it has {size} bytes, and has {info.file_size}")


def write_state(path, model):
    """Write the model's state_dict(), dense and with its names, which are PyTorch's, as a safetensors file."""
    state = {name: np.asarray(array, order="C") for name, array in model.state_dict().items()}
    with replacing(path, "wb") as file:
        file.write(safetensors.numpy.save(state, {"order": json.dumps(list(state))}))


def load_state(model, state, names=None, head="keep"):
    """Put {name: array} of another program into the model; ValueError, and no change, if it does not fit.

    names: None if they are the model's own or in the same order (weights, biases and statistics are told apart by what
    follows the last dot; safetensors files of others keep no order); or {their name: our name}. Arrays become the
    model's dtype. Counts of batches may lack. head="new": the last layer with weights stays as it is, whatever the
    file has for it.
    """
    ours = model.state_dict()
    kept = set()
    if head == "new":
        last = [name for name, p in model.named_parameters() if len(p.shape) > 1][-1].rpartition(".")[0]
        kept = {name for name in ours if name.rpartition(".")[0] == last}
    elif head != "keep":
        raise ValueError(f"head is {head!r}, must be 'keep' or 'new'")
    if names is not None:
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"names has {missing[0]!r}, which the state lacks")
        state = {names[name]: array for name, array in state.items() if name in names}
    elif not _only_counts((set(state) ^ set(ours)) - kept):
        if isinstance(state, _Unordered):
            odd = sorted((set(state) ^ set(ours)) - kept)[0]
            raise ValueError(f"only one of the state and the model has {odd}, and the file keeps no order: give names=")
        state = _in_order(state, ours, kept)
    state = {name: array for name, array in state.items() if name not in kept}
    found = dict(ours)
    for name, array in state.items():
        if name not in ours:
            raise ValueError(f"the state has {name}, which the model lacks")
        if array.shape != ours[name].shape:
            raise ValueError(f"{name} has shape {array.shape}, the model's has {ours[name].shape}")
        found[name] = _converted(name, array, ours[name].dtype)
    lacking = [name for name in ours if name not in state and name not in kept and not _only_counts([name])]
    if lacking:
        raise ValueError(f"the state lacks {lacking[0]}, which the model has")
    model.load_state_dict(found)
    return model


def _converted(name, array, dtype):
    """The array in a dtype, rounded; ValueError if it has no real numbers, or some that are too large."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} has dtype {array.dtype}, must be real numbers")
    try:
        with np.errstate(over="raise", invalid="raise"):
            return np.asarray(array, dtype)
    except FloatingPointError:
        raise ValueError(f"{name} has {array.dtype} numbers that {dtype} cannot hold") from None


def _only_counts(names):
    return all(name.endswith("num_batches_tracked") for name in names)


def _in_order(state, ours, kept):
    """The state with our names, by the order of each kind (what follows the last dot)."""
    renamed = {}
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in ours):
        mine = [name for name in ours if name.rpartition(".")[2] == kind]
        theirs = [name for name in state if name.rpartition(".")[2] == kind]
        if _only_counts([kind]) and not theirs:
            continue
        if len(mine) != len(theirs):
            raise ValueError(f"the state has {len(theirs)} arrays named {kind}, the model {len(mine)}: give names=")
        for here, there in zip(mine, theirs, strict=True):
            shape, wanted = state[there].shape, ours[here].shape
            if here not in kept and shape != wanted:
                raise ValueError(f"{there} has shape {shape}; in order it is {here}, which has {wanted}: give names=")
            renamed[here] = state[there]
    kinds = {name.rpartition(".")[2] for name in ours} | {"num_batches_tracked"}
    others = [name for name in state if name.rpartition(".")[2] not in kinds]
    if others:
        raise ValueError(f"the state has {', '.join(others)}, and the model no arrays of these names: give names=")
    return renamed


def zeros_to_structure(model, exclude=()):
    """Store no weight of convolutions and linear layers that is zero from now on. Returns the model.

    Layers without zeros stay as they are. exclude: layer names or globs.
    """
    for _, layer in sparsifiable(model, exclude):
        nonzero = layer.weight.data != 0
        if not nonzero.all():
            layer.weight.keep(nonzero)
    return model


def to_scipy(model):
    """{layer: scipy CSR matrix (out, in * height * width)} of the layers with sparse weights."""
    return {
        name: layer.weight.to_scipy()
        for name, layer in sparsifiable(model)
        if isinstance(layer.weight, SparseParameter)
    }
