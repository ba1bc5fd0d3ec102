"""A run as one safetensors file: numbers and JSON, never a pickle.

Tensors: "parameter/<name>/data", for a sparse one also "/indptr" and "/indices", of nnz values, so removed weights are
not there; "slot/<name>/<slot>"; "buffer/<name>"; "backprop/<layer>/<name>" and "sparsity/<layer>/<name>", the methods';
"callback/<class>-<number>/<name>", of callbacks that have a state.
The rest is JSON in the metadata's "sparsetrain": the names of all tensors, how to build model, optimiser and methods
again, counters, history, generator state, version.
"""

import dataclasses
import inspect
import json
import math
import sys
from contextlib import contextmanager

import numpy as np
import safetensors.numpy

from sparsetrain import backprop, checks, nn, optim, rng, sparsity
from sparsetrain.files import replacing
from sparsetrain.nn.weighted import blank
from sparsetrain.sparse import Parameter, SparseParameter
from sparsetrain.train.history import COLUMNS, History
from sparsetrain.version import VERSION

FORMAT = 3
MOST_DENSE, SMALL = 800, 1 << 29  # bytes that read_state() makes dense for one in the file, unless they are few
METHODS = {"backprop": backprop, "sparsity": sparsity}  # what a Trainer takes, and where its classes are


def save(trainer, path):
    """Write the trainer's run to path, replacing it as a whole. See Trainer.save."""
    written = contents(trainer)
    with replacing(path, "wb") as file:
        file.write(written)


def contents(trainer):
    """The bytes of the file that save() writes; a trainer that was resumed from a file has that file's again."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    optimizer = trainer.optimizer
    for name, parameter in zip(optimizer.names, optimizer.params, strict=True):
        if id(parameter) not in names:
            raise ValueError(f"optimizer holds {name}, which is not a parameter of the model")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "model": describe(trainer.model),
        "shapes": {name: list(p.shape) for name, p in trainer.model.named_parameters()},
        "optimizer": {
            "class": _own_name(optim, type(optimizer)),
            "settings": optimizer.state_dict()["settings"],
            "steps": optimizer.steps,
            "parameters": [names[id(p)] for p in optimizer.params],
        },
        "loss": _own_name(nn, trainer.loss),
        "label_smoothing": trainer.label_smoothing,
        "schedule": trainer.schedule is not None,
        **{kind: _describe_method(module, getattr(trainer, kind)) for kind, module in METHODS.items()},
        "step": trainer.step,
        "epoch": trainer.epoch,
        "batch": trainer.batch,
        "paused": trainer.paused,
        "history": list(trainer.history),
        "rng": rng.generator().bit_generator.state,
    }
    arrays = {}
    for name, parameter in trainer.model.named_parameters():
        arrays |= parameter_arrays(name, parameter)
        for slot, array in parameter.slots.items():
            arrays[f"slot/{name}/{slot}"] = array
    for name, buffer in trainer.model.named_buffers():
        arrays[f"buffer/{name}"] = buffer
    for kind in METHODS:
        method = getattr(trainer, kind)
        if method is not None:
            arrays |= {f"{kind}/{key}": np.asarray(value) for key, value in method.state_dict().items()}
    for name, callback in _named(trainer.callbacks):
        arrays |= {f"callback/{name}/{key}": value for key, value in callback.state_dict().items()}
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(arrays, {"sparsetrain": json.dumps(meta | {"tensors": sorted(arrays)})})


def resume(trainer_class, path, model, optimizer, settings):
    """The trainer saved at path. See Trainer.resume."""
    meta, arrays = read(path)
    if optimizer is not None and model is None:
        raise ValueError("optimizer is given without model, it must hold that model's parameters")
    with _sound(path):
        if meta["schedule"] and "schedule" not in settings:
            raise ValueError(
                "it ran with a schedule, a function that no file can hold: give schedule=, "
                f"or schedule=None to go on with lr {meta['optimizer']['settings']['lr']}"
            )
        if meta["loss"] is None and "loss" not in settings:
            raise ValueError("it ran with a loss that is not one of nn's: give loss=")
        for kind, module in METHODS.items():
            method = meta[kind]
            if method is not None and method["class"] is None and kind not in settings:
                raise ValueError(f"it ran with a method of {kind} of your own: give {kind}=")
            if method is not None and kind not in settings:
                settings[kind] = _known(module, method["class"], module.Method)(**method["settings"])
        if "loss" not in settings:
            settings["loss"] = _known(nn, meta["loss"], None)
        smoothing = checks.number("label_smoothing", meta["label_smoothing"], low=0.0, high=1.0)
        settings.setdefault("label_smoothing", smoothing)
        if model is None:
            with blank(np.result_type(*{arrays[f"parameter/{name}/data"].dtype for name in meta["shapes"]})):
                model = build(meta["model"])
        parameters = _parameters(meta, arrays, model)
        buffers = _buffers(arrays, model)
        names = meta["optimizer"]["parameters"]
        if optimizer is None:
            optimizer = _build_optimizer(meta["optimizer"], parameters)
        else:
            _check_optimizer(meta["optimizer"], optimizer, model)
        counters = [_count(name, meta[name]) for name in ("step", "epoch", "batch")]
        steps = [_count("a parameter's steps", n) for n in meta["optimizer"]["steps"]]
        if len(steps) != len(names):
            raise ValueError(f"it has the steps of {len(steps)} parameters, its optimiser holds {len(names)}")
        history, paused = History([dict(row) for row in meta["history"]]), meta["paused"]
        lacking = [column for row in history for column in COLUMNS if column not in row]
        if lacking:
            raise ValueError(f"a row of its history lacks {lacking[0]}")
        if meta["batch"]:
            _check_paused(paused)
    weights, generator = settings.pop("sparsity", None), rng.generator().bit_generator
    trainer = trainer_class(model, optimizer, **settings)
    before, random = dict(model.named_parameters()), generator.state
    try:
        with _sound(path):
            for name, parameter in parameters.items():
                model.set_parameter(name, parameter)
            generator.state = meta["rng"]
            trainer.sparsity = weights if weights is None else weights.attach(model, begin=False)
            for kind in METHODS:
                method = getattr(trainer, kind)
                if method is not None and meta[kind] is not None:
                    state = below(f"{kind}/", arrays)
                    method.load_state_dict({key: a if a.ndim else a[()] for key, a in state.items()})
            for name, callback in _named(trainer.callbacks):
                if state := below(f"callback/{name}/", arrays):
                    callback.load_state_dict(state, trainer)
        if weights is not None and meta["sparsity"] is None:
            weights.attach(model)  # it begins now
    except BaseException:
        for method in (weights, trainer.backprop):
            if method is not None:
                method.detach()
        for name, parameter in before.items():
            model.set_parameter(name, parameter)
        generator.state = random
        raise

    # Everything fits: from here on nothing can fail.
    for name, buffer in model.named_buffers():
        buffer[...] = buffers[name]
    optimizer.params = [parameters[name] for name in names]
    optimizer.steps = steps
    trainer.step, trainer.epoch, trainer.batch = counters
    trainer.history, trainer.paused = history, paused
    return trainer


@contextmanager
def _sound(path):
    """Within it, any error is a ValueError that names the file, and what only a damaged or forged one can cause says
    so."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is not a sound checkpoint: {type(error).__name__}: {error}") from error


def _count(name, value):
    return checks.integer(name, value, low=0, high=sys.maxsize)


def _check_paused(state):
    """ValueError or TypeError unless `state` is that of an epoch's Means after at least a batch."""
    if not isinstance(state, dict) or state.keys() != {"images", "loss", "correct", "time_s"}:
        raise ValueError(f"paused is {state!r:.80}, must have images, loss, correct and time_s of the batches done")
    _count("paused images", state["images"])
    checks.number("paused loss", state["loss"])
    checks.number("paused time_s", state["time_s"], low=0.0)
    if state["correct"] is not None:
        _count("paused correct", state["correct"])


def _known(module, name, base):
    """What a module exports by this name; ValueError if that is no function or, with base, no subclass of it."""
    found = getattr(module, name) if isinstance(name, str) and name in module.__all__ else None
    if not callable(found) or (base is not None and not (isinstance(found, type) and issubclass(found, base))):
        raise ValueError(f"it names {name!r}, which {module.__name__} does not have")
    return found


def _describe_method(module, method):
    if method is None:
        return None
    settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(method) if field.init}
    return {"class": _own_name(module, type(method)), "settings": settings}


def read(path):
    """The metadata and the arrays of the checkpoint at path; ValueError if it is not one."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            meta = json.loads((file.metadata() or {})["sparsetrain"])
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        version = meta["format"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a checkpoint of sparsetrain, or is damaged ({error})") from error
    if version != FORMAT:
        raise ValueError(f"{path} has checkpoint format {version}, this version reads {FORMAT}")
    with _sound(path):
        _same_names("tensor", arrays, dict.fromkeys(meta["tensors"]), "its list of tensors")
    return meta, arrays


def read_state(path):
    """{name: dense array} of the parameters and buffers in the checkpoint at path, as of Module.state_dict()."""
    meta, arrays = read(path)
    with _sound(path):
        parameters = {name: read_parameter(arrays, name, tuple(s)) for name, s in meta["shapes"].items()}
        dense = {name: math.prod(p.shape) * p.data.itemsize for name, p in parameters.items()}
        if sum(dense.values()) > max(SMALL, MOST_DENSE * sum(array.nbytes for array in arrays.values())):
            name = max(dense, key=dense.get)
            raise ValueError(
                f"as dense arrays its parameters take {sum(dense.values())} bytes, too many for so few stored weights; "
                f"the largest is {name} with shape {parameters[name].shape}"
            )
        return {name: p.to_dense() for name, p in parameters.items()} | below("buffer/", arrays)


def below(prefix, arrays):
    """The arrays whose names begin so, by the rest of their names."""
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def _named(callbacks):
    """(class and number among those of its class, callback) of each."""
    kinds = [type(callback).__name__ for callback in callbacks]
    for i, callback in enumerate(callbacks):
        yield f"{kinds[i]}-{kinds[:i].count(kinds[i])}", callback


def describe(module):
    """How to build this module again: its class and constructor arguments, down the tree.

    An argument is taken from the attribute of the same name; a layer of a class that is not
    sparsetrain's own is only named.
    """
    kind = type(module)
    if _own_name(nn, kind) is None:
        return {"foreign": kind.__qualname__}
    children = dict(module.children())
    arguments = {}
    for name, argument in inspect.signature(kind).parameters.items():
        if argument.kind is inspect.Parameter.VAR_POSITIONAL:
            return {"class": kind.__name__, "layers": [describe(m) for m in children.values()]}
        if name in children:
            arguments[name] = describe(children[name])
        else:
            value = getattr(module, name)
            # bias=True makes the attribute `bias` a Parameter, bias=False makes it None.
            arguments[name] = value is not None if isinstance(argument.default, bool) else value
    return {"class": kind.__name__, "arguments": arguments}


def build(description):
    """The module that `describe` described, newly initialised."""
    if "foreign" in description:
        raise ValueError(
            f"the saved model has a layer of class {description['foreign']}, which is not "
            "sparsetrain's own: give resume() a model= to fill"
        )
    kind = _known(nn, description["class"], nn.Module)
    if "layers" in description:
        return kind(*(build(layer) for layer in description["layers"]))
    return kind(**{name: _argument(v) for name, v in description["arguments"].items()})


def _argument(value):
    if isinstance(value, dict):
        return build(value)
    return tuple(value) if isinstance(value, list) else value


def _own_name(module, thing):
    """The name of a class or function if it is the one that module has by it, else None."""
    name = getattr(thing, "__name__", "")
    return name if getattr(module, name, None) is thing else None


def _parameters(meta, arrays, model):
    """The saved parameters with their slots, by name, after checking that the model has them."""
    present = dict(model.named_parameters())
    _same_names("parameter", meta["shapes"], present)
    parameters = {}
    for name, shape in meta["shapes"].items():
        if tuple(shape) != tuple(present[name].shape):
            raise ValueError(f"{name} has shape {tuple(shape)}, the model's has {present[name].shape}")
        parameters[name] = read_parameter(arrays, name, tuple(shape))
        data = parameters[name].data
        if data.dtype != present[name].data.dtype:
            raise ValueError(f"{name} is {data.dtype}, the model's is {present[name].data.dtype}")
        for key, slot in below(f"slot/{name}/", arrays).items():
            if (slot.shape, slot.dtype) != (data.shape, data.dtype):
                raise ValueError(
                    f"slot/{name}/{key} is {slot.dtype} {slot.shape}, must be {data.dtype} {data.shape} as its weights"
                )
            parameters[name].slots[key] = slot
    return parameters


def parameter_arrays(name, parameter):
    """{name of the tensor: array} of a parameter, without its slots."""
    arrays = {f"parameter/{name}/data": parameter.data}
    if isinstance(parameter, SparseParameter):
        arrays |= {f"parameter/{name}/indptr": parameter.indptr, f"parameter/{name}/indices": parameter.indices}
    return arrays


def read_parameter(arrays, name, shape, prefix=""):
    """The parameter of the arrays that parameter_arrays() gave, with a prefix to their names; ValueError if it has
    another shape or is none, KeyError if one is missing."""
    tensor = f"{prefix}parameter/{name}"
    data = arrays[f"{tensor}/data"]
    try:
        if f"{tensor}/indptr" in arrays:
            return SparseParameter(shape, arrays[f"{tensor}/indptr"], arrays[f"{tensor}/indices"], data)
        if data.shape != shape:
            raise ValueError(f"data has shape {data.shape}, must be {shape}")
        return Parameter(data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{tensor}: {error}") from error


def _buffers(arrays, model):
    saved = below("buffer/", arrays)
    present = dict(model.named_buffers())
    _same_names("buffer", saved, present)
    for name, array in saved.items():
        wanted = present[name]
        if (array.dtype, array.shape) != (wanted.dtype, wanted.shape):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, the model's is {wanted.dtype} {wanted.shape}")
    return saved


def _same_names(what, saved, present, holder="the model"):
    missing = [name for name in present if name not in saved]
    unexpected = [name for name in saved if name not in present]
    if missing:
        raise ValueError(f"it lacks {what} {missing[0]}, which {holder} has")
    if unexpected:
        raise ValueError(f"it has {what} {unexpected[0]}, which {holder} lacks")


def _build_optimizer(saved, parameters):
    if saved["class"] is None:
        raise ValueError("it ran with an optimiser of your own: give model= and optimizer=")
    kind = _known(optim, saved["class"], optim.Optimizer)
    return kind([(name, parameters[name]) for name in saved["parameters"]], **saved["settings"])


def _check_optimizer(saved, optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names.get(id(p)) for p in optimizer.params]
    if held != saved["parameters"]:
        raise ValueError(f"the optimiser held the parameters {saved['parameters']}, this one has {held}")
    if saved["class"] not in (None, type(optimizer).__name__):
        raise ValueError(f"it ran with {saved['class']}, this is {type(optimizer).__name__}")
