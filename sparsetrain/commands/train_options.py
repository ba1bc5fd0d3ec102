"""The options of `sparsetrain train` and `finetune`, their checks, and the methods that they ask for."""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from sparsetrain import checks, data, optim, options, sparsity
from sparsetrain.named import AT_ONCE, BACKPROP, DISTRIBUTIONS, METHODS, MODELS, WHILE_TRAINING

OPTIMIZERS = {"sgd": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW}
SCHEDULES = ("cosine", "step", "constant")

# Default, argparse's settings, help. Where the default is None the help explains it.
OPTIONS = {
    "data": ("fashion-mini", {}, f"data set: {', '.join(data.NAMES)}"),
    "model": ("small-cnn", {}, f"model: {', '.join(MODELS)}"),
    "sparsity": (0.9, {"type": float}, "fraction of the weights to remove, in [0, 1)"),
    "method": (
        "magnitude",
        {},
        f"which weights exist: chosen before training by {', '.join(AT_ONCE)}; changed while training by "
        f"{', '.join(WHILE_TRAINING)}",
    ),
    "distribution": (
        None,
        {},
        f"how the sparsity is spread over the layers: {', '.join(DISTRIBUTIONS)} (default: erk for set, rigl and "
        "granet, else uniform)",
    ),
    "change-every": (
        None,
        {"type": int},
        "steps between changes of the weights while training (default: 100, in shorter runs a tenth of those in which "
        "weights change)",
    ),
    "change-until": (None, {"type": float}, "share of the run after which they stay, in [0, 1) (default: 0.75)"),
    "drop-fraction": (
        None,
        {"type": float},
        "set, rigl, granet: share of the weights that a change replaces, in (0, 1) (default: 0.3, granet 0.5)",
    ),
    "initial-sparsity": (None, {"type": float}, "gmp, granet: sparsity at first (default: 0, granet 0.5)"),
    "pattern": (
        None,
        {"metavar": "N:M"},
        "n:m: N of M neighbouring weights exist, instead of --sparsity (default: 2:4)",
    ),
    # Keeping the first layer dense is the "uniform" of Evci et al., RigL, ICML 2020: it has few
    # weights, and small-cnn on fashion-mini gains 1.5 to 2 points of accuracy.
    "exclude": (
        ["first"],
        {"nargs": "*", "metavar": "LAYER"},
        "layers to keep dense: names as in the table, patterns such as '3.*', first, the layer next to the images, or "
        "last; none if no name follows",
    ),
    "backprop": ("exact", {}, f"which values of the output gradients are used: {', '.join(BACKPROP)}"),
    "s": (None, {"type": float}, "dithered: step of the rounding in standard deviations (default: 2)"),
    "gradient-sparsity": (
        None,
        {"type": float},
        "dithered: hold this share of zeros, in (0, 1), changing s in each layer (default: s stays)",
    ),
    "bits": (None, {"type": int}, "dithered: 8 clips the levels to 8 bits (default: no limit)"),
    "precision": (None, {"type": int}, "dithered: 8 for 8-bit inputs, weights and levels (default: float32)"),
    "reuse": (
        None,
        {"type": float},
        "resprop: share of the gradient to take from the last step, in [0, 1) (default: 0.9)",
    ),
    "reuse-warmup": (
        None,
        {"action": argparse.BooleanOptionalAction},
        "resprop: reuse from epoch 2 on, 10 %% more in each (default: no)",
    ),
    "control": (None, {}, "resprop: threshold by the paper's rule or by quantile (default: paper)"),
    "k": (None, {"type": float}, "mem-aop: share of the rows; top-k: of the values; in (0, 1] (default: 0.1)"),
    "policy": (None, {}, "mem-aop: rows are chosen by topk, weightedk or randk (default: topk)"),
    "memory": (
        None,
        {"action": argparse.BooleanOptionalAction},
        "mem-aop: rows that are not used are kept and added later (default: yes)",
    ),
    "decay": (None, {"type": float}, "mem-aop: decay of the memory, in [0, 1] (default: 1, none)"),
    "angles": (None, {"action": "store_true"}, "measure the angle between used and exact gradient (default: no)"),
    "exact-layers": (
        None,
        {"nargs": "*", "metavar": "LAYER"},
        "layers that use their whole gradient, named as for --exclude (default: none)",
    ),
    "epochs": (8, {"type": int}, "passes over the training images"),
    "batch-size": (64, {"type": int}, "images a step; multiples of 16 are fastest"),
    "optimizer": ("sgd", {}, f"optimiser: {', '.join(OPTIMIZERS)}"),
    "lr": (None, {"type": float}, "highest learning rate (default: 0.1 for sgd, else 0.002)"),
    "momentum": (0.9, {"type": float}, "momentum of sgd, in [0, 1)"),
    "weight-decay": (
        None,
        {"type": float},
        "weight decay (default: 0.01 for adamw, else 0.0005)",
    ),
    "schedule": (
        "cosine",
        {},
        f"learning rate over the run: {', '.join(SCHEDULES)}; step: a tenth after each third",
    ),
    "warmup": (1, {"type": int}, "epochs in which the learning rate rises from zero"),
    "label-smoothing": (0.0, {"type": float}, "label smoothing of the loss, in [0, 1]"),
    "augment": (
        None,
        {"action": argparse.BooleanOptionalAction},
        "random crop and, but for mnist, flip (default: on cifar10 and cifar100)",
    ),
    "mean": (
        None,
        {"type": float, "nargs": "+"},
        "a value a channel that is taken from images in [0, 1], given with --std (default: the training images' mean)",
    ),
    "std": (None, {"type": float, "nargs": "+"}, "by which they are then divided (default: the training images')"),
    "seed": (0, {"type": int}, "seed of the weights, the order of images and augmentation"),
    "threads": (None, {"type": int}, "threads (default: as many as this process may use)"),
    "isa": (None, {}, "instruction set: base, avx2 or avx512 (default: the best there is)"),
    "plans": (
        None,
        {"metavar": "FILE"},
        "take the planner's choices from this file of sparsetrain profile --save-plans (default: none)",
    ),
    "data-dir": (
        None,
        {"metavar": "FOLDER"},
        "where data sets lie (default: see sparsetrain info)",
    ),
    "out": (None, {"metavar": "FOLDER"}, "new run folder (default: runs/DATA-MODEL-TIME)"),
    "checkpoint-every": (
        None,
        {"type": int},
        "write the checkpoint after every so many steps, too (default: epochs only)",
    ),
    "keep": (1, {"type": int}, "checkpoints to keep: the last, and those before it"),
    "compare": (
        True,
        {"action": argparse.BooleanOptionalAction},
        "train the same net dense too, and compare (default: yes)",
    ),
    "resume": (None, {"metavar": "FOLDER"}, "go on with the run in this folder (default: none)"),
    "quiet": (False, {"action": "store_true"}, "print only the result (default: no)"),
}
# Options that are arguments of a method of backprop, where they have another name there
ARGUMENTS = {"gradient_sparsity": "sparsity", "reuse_warmup": "warmup"}
OF_BACKPROP = (
    "s",
    "gradient_sparsity",
    "bits",
    "precision",
    "reuse",
    "reuse_warmup",
    "control",
    "k",
    "policy",
    "memory",
    "decay",
    "angles",
)
# Options of methods that change weights while training, and the argument that they are
OF_CHANGES = {
    "change_every": "every",
    "change_until": "stop",
    "drop_fraction": "fraction",
    "initial_sparsity": "initial",
    "pattern": "n",
}
LONG = 1 << 40  # steps, to check the options before it is known how many there are
# What may be given with --resume: the rest stays as the run's config.json has it.
ON_RESUME = {"epochs", "threads", "isa", "data_dir", "compare", "resume", "quiet"}


# finetune has these, and other defaults for some of train's
FINETUNE = {
    "weights": (
        None,
        {"metavar": "FILE", "required": True},
        "weights to begin with: .safetensors, .npz, .pt, .pth or .th",
    ),
    "sparsity-from-weights": (
        False,
        {"action": "store_true"},
        "weights that are zero in the file are not stored, and --sparsity is not used (default: no)",
    ),
    "head": ("auto", {}, "last layer: keep the file's, new, or auto, which keeps it if it has as many classes"),
    **OPTIONS,
} | {
    name: (default, *OPTIONS[name][1:])
    for name, default in {"data": "cifar10", "model": "resnet20-a", "exclude": ["first"], "compare": False}.items()
}
del FINETUNE["resume"]  # train --resume goes on with these runs too
FINETUNE["lr"] = (None, {"type": float}, "highest learning rate (default: 0.01 for sgd, else 0.0002)")


def resolved(given, table):
    """Every option, resolved and checked, and the run folder."""
    found = {"weights": None, "sparsity_from_weights": False, "head": None} | options.defaults(table)
    folder = given.get("resume")
    if folder is not None:
        folder = Path(folder)
        found |= _read_config(folder)
        for name in given:
            if name not in ON_RESUME:
                raise ValueError(f"{_option(name)} cannot be given with --resume, whose run has its own")
    o = argparse.Namespace(**found | given)
    choices = {
        "data": data.NAMES,
        "model": MODELS,
        "method": METHODS,
        "distribution": DISTRIBUTIONS,
        "optimizer": tuple(OPTIMIZERS),
        "schedule": SCHEDULES,
        "backprop": BACKPROP,
    }
    for name, allowed in choices.items():
        if getattr(o, name) is not None:
            checks.one_of(f"--{name}", getattr(o, name), allowed)
    checks.integer("--epochs", o.epochs, low=1)
    checks.integer("--batch-size", o.batch_size, low=1)
    checks.integer("--warmup", o.warmup, low=0, high=o.epochs)
    checks.integer("--seed", o.seed, low=0)
    checks.integer("--keep", o.keep, low=1)
    for name in ("threads", "checkpoint_every"):
        if getattr(o, name) is not None:
            checks.integer(_option(name), getattr(o, name), low=1)
    if "momentum" in given and o.optimizer != "sgd":
        raise ValueError(f"--momentum is not for --optimizer {o.optimizer}")
    if not 0 <= o.sparsity < 1:
        raise ValueError(f"--sparsity is {o.sparsity}, must be in [0, 1)")
    if o.weights is not None:
        checks.one_of("--head", o.head, ("auto", "keep", "new"))
        o.weights = str(Path(o.weights).absolute())  # for --resume from another folder
        if o.sparsity_from_weights:
            for name in ("sparsity", "method", "distribution"):
                if name in given:
                    raise ValueError(f"--{name} and --sparsity-from-weights were given, must be one of them")
            o.sparsity = 0.0
            o.exclude = given.get("exclude", [])
    backprop_method(o)  # its checks
    changing = sparsity_method(o, LONG)
    if o.method == "n:m":
        if "sparsity" in given:
            raise ValueError("--sparsity is not for --method n:m, whose --pattern says it")
        o.sparsity = changing.sparsity
    if o.lr is None:
        o.lr = (0.1 if o.optimizer == "sgd" else 0.002) * (1 if o.weights is None else 0.1)
    if o.weight_decay is None:
        o.weight_decay = 0.01 if o.optimizer == "adamw" else 5e-4
    if o.augment is None:
        o.augment = o.data.startswith("cifar")
    if o.plans is not None:
        o.plans = str(Path(o.plans).absolute())  # for --resume from another folder
    if folder is None:
        now = time.strftime("%Y%m%d-%H%M%S")
        folder = Path(o.out or f"runs/{o.data}-{o.model}-{now}")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out is {folder}, which is there already, must be a new folder")
    return o, folder


def backprop_method(o):
    """The method of backprop that the options ask for, None for exact gradients; ValueError if it lacks one of them."""
    given = {name: getattr(o, name) for name in OF_BACKPROP if getattr(o, name) is not None}
    make = BACKPROP[o.backprop]
    known = set() if make is None else {field.name for field in dataclasses.fields(make)}
    for name in given:
        if ARGUMENTS.get(name, name) not in known:
            raise ValueError(f"{_option(name)} is not for --backprop {o.backprop}")
    if make is None:
        if o.exact_layers:
            raise ValueError("--exact-layers is not for --backprop exact")
        return None
    options = {ARGUMENTS.get(name, name): name for name in given}
    return _made(make, options, seed=o.seed, **{argument: given[name] for argument, name in options.items()})


def sparsity_method(o, steps, exclude=()):
    """The method of sparsity that the options ask for; None for weights chosen once. ValueError for an option that the
    method does not have."""
    given = {name: getattr(o, name) for name in OF_CHANGES if getattr(o, name) is not None}
    make = WHILE_TRAINING.get(o.method)
    if make is None:
        for name in given:
            raise ValueError(f"{_option(name)} is not for --method {o.method}")
        return None
    until = checks.fraction("--change-until", given.pop("change_until", 0.75))
    stop = min(round(until * steps), steps - 1)  # or the last change would never come
    arguments = {"stop": stop, "exclude": exclude}
    if make is sparsity.NM:
        if o.distribution is not None:
            raise ValueError(f"--distribution is not for --method {o.method}")
        pattern = given.pop("pattern", "2:4")
        n, colon, m = pattern.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal()):
            raise ValueError(f"--pattern is {pattern!r}, must be N:M such as 2:4")
        arguments |= {"n": int(n), "m": int(m)}
    else:
        arguments |= {"sparsity": o.sparsity, "every": given.pop("change_every", max(1, min(100, stop // 10)))}
        if o.distribution is not None:
            arguments["distribution"] = o.distribution
    known = {field.name for field in dataclasses.fields(make) if field.init}
    for name, value in given.items():
        if OF_CHANGES[name] not in known:
            raise ValueError(f"{_option(name)} is not for --method {o.method}")
        arguments[OF_CHANGES[name]] = value
    return _made(make, {argument: name for name, argument in OF_CHANGES.items()} | {"m": "pattern"}, **arguments)


def _option(name):
    return f"--{name.replace('_', '-')}"


def _made(make, options, **arguments):
    """make(**arguments); an error that begins with an argument of {argument: option} begins with the option."""
    try:
        return make(**arguments)
    except ValueError as error:
        argument, _, rest = str(error).partition(" ")
        if argument not in options:
            raise
        said = rest if options[argument] != "pattern" else f"of N:M: {error}"
        raise ValueError(f"{_option(options[argument])} {said}") from error


def _read_config(folder):
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["options"]
        for name, value in config.items():
            default, settings, _ = FINETUNE[name.replace("_", "-")]
            kind = settings.get("type", bool if "action" in settings else str)
            for one in value if "nargs" in settings and value is not None else [value]:
                unset = one is None and (default is None or name == "head")  # which train has not
                if not (isinstance(one, (float, int) if kind is float else kind) or unset):
                    raise TypeError(f"{name} is {value!r}")
    except FileNotFoundError:
        raise ValueError(f"--resume is {folder}, which has no config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the config.json of a run: {error!r}") from error
    return config
