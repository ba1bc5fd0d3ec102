"""The command line: `sparsetrain train`, `profile`, `bench` and `info`."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

import threadpoolctl

import sparsetrain as st
from sparsetrain import checks, choices, data, interchange, named, optim, options, profile_command, sparsity
from sparsetrain._kernels import threads
from sparsetrain.bench import command as bench
from sparsetrain.bench.machine import caches
from sparsetrain.files import replacing
from sparsetrain.named import AT_ONCE, BACKPROP, DISTRIBUTIONS, METHODS, MODELS, WHILE_TRAINING
from sparsetrain.train import (
    Checkpoint,
    CSVLog,
    EpochLines,
    Progress,
    Trainer,
    TrainingDiverged,
    report,
)

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
    "change-every": (None, {"type": int}, "steps between changes of the weights while training (default: 100)"),
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
        "n:m: N of M neighbouring weights exist, and --sparsity is not used (default: 2:4)",
    ),
    # Keeping the first layer dense is the "uniform" of Evci et al., RigL, ICML 2020: it has few
    # weights, and small-cnn on fashion-mini gains 1.5 to 2 points of accuracy.
    "exclude": (
        ["first"],
        {"nargs": "*", "metavar": "LAYER"},
        "layers to keep dense: names as in the table, patterns such as '3.*', or first, the layer "
        "next to the images; none if no name follows",
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


def main(argv=None):
    """Run a command line; returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    try:
        given = vars(_parser().parse_args(argv))
        command = given.pop("command")
        run = {
            "train": _train,
            "finetune": _finetune,
            "profile": profile_command.run,
            "bench": bench.run,
            "info": _info,
        }
        return run[command](given)
    except SystemExit as end:  # --help, --version
        return end.code
    except KeyboardInterrupt:
        print("sparsetrain: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `sparsetrain info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush into at exit
        return 0
    except (ValueError, OSError, TrainingDiverged) as error:
        print(f"sparsetrain: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser():
    parser = _Parser("sparsetrain", description="Train neural networks with sparse weights.")
    parser.add_argument("--version", action="version", version=f"sparsetrain {st.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | finetune | profile | bench | info")
    options.add_parser(
        commands,
        "train",
        OPTIONS,
        help="train a model on images",
        description="Train a model with sparse weights on images, and the same model dense to "
        "compare. Writes a run folder with config.json, history.csv, checkpoint.safetensors (the dense "
        "model's in dense/), and curves.png where matplotlib is installed.",
    )
    options.add_parser(
        commands,
        "finetune",
        FINETUNE,
        help="train a model further from given weights",
        description="Train a model on images from weights of a file on, pruned first or with the zeros that the "
        "file has. Writes a run folder as train does.",
    )
    profile_command.add_parser(commands)
    bench.add_parser(commands)
    commands.add_parser("info", help="versions, instruction sets, threads, caches, data sets")
    return parser


def _finetune(given):
    return _train(given, FINETUNE)


def _train(given, table=OPTIONS):
    o, folder = _options(given, table)
    if o.threads is not None:
        st.set_num_threads(o.threads)
    if o.isa is not None:
        st.set_isa(o.isa)
    if o.plans is not None:
        choices.load(o.plans)
    dataset = data.load(o.data, o.data_dir)
    train, test = _batches(o, dataset)
    exact = o.backprop == "exact"
    main = (
        " ".join((["sparse"] if o.sparsity or o.sparsity_from_weights else []) + ([] if exact else [o.backprop]))
        or "dense"
    )
    nets = {main: (True, folder, _backprop(o))}
    if main != "dense" and o.compare:
        nets["dense"] = (False, folder / "dense", None)
    trainers = {}
    for name, (sparse, place, method) in nets.items():
        trainers[name] = trainer = _trainer(o, dataset, train, sparse, place, name, method)
        if len(trainers) == 1:
            trainer.model.summary(dataset.train[0].shape[1:])  # says if it cannot take the images
            _write_config(o, folder)
            _say(o, _opening(o, dataset, trainer, folder))
        if not _fit(trainer, train, test, o.epochs, place):
            again = f"sparsetrain train --resume {folder}"
            print(f"interrupted; all finished epochs are kept, go on with: {again}")
            return 130
    how = f"sparsity {o.sparsity:g}" + ("" if exact else f", {o.backprop} backprop")
    _say(o, _plot(trainers, folder, f"{o.model} on {o.data}, {how}"))
    _print_result(o, trainers, *next(iter(train)))
    return 0


def _options(given, table):
    """Every option, resolved and checked, and the run folder."""
    found = {"weights": None, "sparsity_from_weights": False, "head": None} | options.defaults(table)
    folder = given.get("resume")
    if folder is not None:
        folder = Path(folder)
        found |= _read_config(folder)
        for name in given:
            if name not in ON_RESUME:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} cannot be given with --resume, whose run has its own")
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
    if not 0 <= o.sparsity < 1:
        raise ValueError(f"--sparsity is {o.sparsity}, must be in [0, 1)")
    if o.weights is not None:
        checks.one_of("--head", o.head, ("auto", "keep", "new"))
        o.weights = str(Path(o.weights).absolute())  # for --resume from another folder
        if o.sparsity_from_weights:
            if "sparsity" in given:
                raise ValueError("--sparsity and --sparsity-from-weights were given, must be one of them")
            o.sparsity = 0.0
    _backprop(o)  # its checks
    changing = _changing(o, 1000)
    if changing is not None and o.sparsity_from_weights:
        raise ValueError(f"--method {o.method} is not for --sparsity-from-weights")
    if o.method == "n:m" and o.sparsity:
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


def _backprop(o):
    """The method of backprop that the options ask for, None for exact gradients; ValueError if it lacks one of them."""
    given = {name: getattr(o, name) for name in OF_BACKPROP if getattr(o, name) is not None}
    make = BACKPROP[o.backprop]
    known = set() if make is None else {field.name for field in dataclasses.fields(make)}
    for name in given:
        if ARGUMENTS.get(name, name) not in known:
            raise ValueError(f"--{name.replace('_', '-')} is not for --backprop {o.backprop}")
    if make is None:
        if o.exact_layers:
            raise ValueError("--exact-layers is not for --backprop exact")
        return None
    return make(seed=o.seed, **{ARGUMENTS.get(name, name): value for name, value in given.items()})


def _read_config(folder):
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["options"]
    except FileNotFoundError:
        raise ValueError(f"--resume is {folder}, which has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the config.json of a run: {error!r}") from error


def _write_config(o, folder):
    folder.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in vars(o).items() if name not in ("resume", "quiet")}
    ran_with = {"isa": st.get_isa(), "threads": st.get_num_threads(), "versions": _versions()}
    with replacing(folder / "config.json") as file:
        json.dump({"options": given, "ran_with": ran_with}, file, indent=2)
        file.write("\n")


def _batches(o, dataset):
    scale = {"mean": dataset.mean, "std": dataset.std}
    if o.mean is not None or o.std is not None:
        scale = {"mean": o.mean, "std": o.std}
    augment = {}
    if o.augment:
        crop = 4 if o.data.startswith("cifar") else 2  # 4: He et al., CVPR 2016, section 4.2
        augment = {"crop": crop, "flip": o.data != "mnist"}
    # A row's memory belongs to its place in the batch
    whole = o.backprop == "mem-aop" and o.memory is not False
    train = data.Batches(*dataset.train, o.batch_size, shuffle=True, seed=o.seed, drop_last=whole, **augment, **scale)
    return train, data.Batches(*dataset.test, 256, **scale)


def _changing(o, steps, exclude=()):
    """The method of sparsity that the options ask for; None for weights chosen once. ValueError for an option that the
    method does not have."""
    given = {name: getattr(o, name) for name in OF_CHANGES if getattr(o, name) is not None}
    make = WHILE_TRAINING.get(o.method)
    if make is None:
        for name in given:
            raise ValueError(f"--{name.replace('_', '-')} is not for --method {o.method}")
        return None
    until = checks.fraction("--change-until", given.pop("change_until", 0.75))
    arguments = {"stop": round(until * steps), "exclude": exclude}
    if make is sparsity.NM:
        if o.distribution is not None:
            raise ValueError(f"--distribution is not for --method {o.method}")
        pattern = given.pop("pattern", "2:4")
        n, colon, m = pattern.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal()):
            raise ValueError(f"--pattern is {pattern!r}, must be N:M such as 2:4")
        arguments |= {"n": int(n), "m": int(m)}
    else:
        arguments |= {"sparsity": o.sparsity, "every": given.pop("change_every", 100)}
        if o.distribution is not None:
            arguments["distribution"] = o.distribution
    known = {field.name for field in dataclasses.fields(make) if field.init}
    for name, value in given.items():
        if OF_CHANGES[name] not in known:
            raise ValueError(f"--{name.replace('_', '-')} is not for --method {o.method}")
        arguments[OF_CHANGES[name]] = value
    return make(**arguments)


def _trainer(o, dataset, train, sparse, folder, name, method):
    """The trainer of one net, as its last checkpoint in the folder left it if there is one."""
    steps = len(train)
    checkpoint = folder / "checkpoint.safetensors"
    show = Progress(label=name) if sys.stderr.isatty() else EpochLines(label=name)
    settings = {
        "schedule": _schedule(o, steps),
        "callbacks": [
            *([] if o.quiet else [show]),
            CSVLog(folder / "history.csv"),
            Checkpoint(checkpoint, steps=o.checkpoint_every, keep=o.keep),
        ],
    }
    st.manual_seed(o.seed)  # sparse and dense start from the same weights
    if checkpoint.exists():
        return Trainer.resume(checkpoint, **settings)
    model = named.model(o.model, dataset.train[0].shape[1:], len(dataset.classes))
    if o.weights is not None:
        _load(o, model)
        if sparse and o.sparsity_from_weights:
            interchange.zeros_to_structure(model)
    exclude, sparse = named.layers(o.exclude, model), sparse and o.sparsity
    changing = _changing(o, steps * o.epochs, exclude) if sparse else None
    if sparse and changing is None:
        batches = [next(iter(train))] if o.method in ("snip", "grasp") else None
        st.sparsify(model, o.sparsity, o.method, o.distribution or "uniform", exclude, batches=batches)
    rates = {"lr": o.lr, "weight_decay": o.weight_decay}
    if o.optimizer == "sgd":
        rates["momentum"] = o.momentum
    optimizer = OPTIMIZERS[o.optimizer](model.named_parameters(), **rates)
    if method is not None:
        method = dataclasses.replace(method, exclude=tuple(named.layers(o.exact_layers or (), model)))
    methods = {"backprop": method, "sparsity": changing}
    return Trainer(model, optimizer, label_smoothing=o.label_smoothing, **methods, **settings)


def _load(o, model):
    """Put the weights of --weights into the model."""
    state = interchange.read_state(o.weights)
    head = o.head
    if head == "auto":
        name, last = [(name, p) for name, p in model.named_parameters() if len(p.shape) > 1][-1]
        theirs = [state[name]] if name in state else [array for array in state.values() if array.ndim > 1]
        head = "keep" if theirs and theirs[-1].shape == last.shape else "new"
    interchange.load_state(model, state, head=head)


def _schedule(o, steps):
    total = steps * o.epochs
    if o.schedule == "cosine":
        schedule = optim.cosine(o.lr, total)
    elif o.schedule == "step":
        schedule = optim.step(o.lr, -(-total // 3), 0.1)
    else:
        schedule = optim.constant(o.lr)
    return optim.warmup(schedule, steps * o.warmup)


def _fit(trainer, train, test, epochs, folder):
    """Train up to so many epochs in all; False after Ctrl-C."""
    if trainer.epoch >= epochs:
        return True
    folder.mkdir(exist_ok=True)
    try:
        return not trainer.fit(train, epochs - trainer.epoch, test).interrupted
    except TrainingDiverged as error:
        kept = folder / "checkpoint.safetensors"
        raise TrainingDiverged(f"{error}; the last good checkpoint is {kept}") from error


def _say(o, text):
    if not o.quiet:
        print(text, flush=True)


def _opening(o, dataset, trainer, folder):
    total = trainer.model.summary(dataset.train[0].shape[1:]).total
    return (
        f"{o.model} on {o.data}: {len(dataset.train[0]):,} training images, "
        f"{len(dataset.test[0]):,} test images; {total.nnz:,} of {total.parameters:,} parameters; "
        f"{st.get_num_threads()} threads, {st.get_isa()}; run folder {folder}"
    )


def _plot(trainers, folder, title):
    path = folder / "curves.png"
    try:
        report.plot_curves(path, {name: t.history for name, t in trainers.items()}, title)
    except ImportError:
        return "no curves.png: that needs matplotlib (pip install 'sparsetrain[plot]')"
    return f"wrote {path}"


def _print_result(o, trainers, x, y):
    """The table of layers, and one line with the accuracy and the step time of each net."""
    accuracies = [t.history[-1]["val_accuracy"] for t in trainers.values()]
    seconds = report.step_times(list(trainers.values()), x, y)
    first = next(iter(trainers.values()))
    print(f"\n{report.layer_table(first, x, y)}")
    if o.sparsity and o.exclude:
        print(f"kept dense: {', '.join(named.layers(o.exclude, first.model))} (--exclude)")
    changed = first.history[-1]["weights"].values()
    if changed:
        size = sum(layer["weights"] for layer in changed)
        explored = sum(layer["weights"] * layer["explored"] for layer in changed) / size
        print(f"{o.method}: {explored:.1%} of the weights of {len(changed)} layers existed at some time")
    nets = [
        f"{name}: accuracy {100 * accuracy:.1f} %, {1e3 * time_s:.2f} ms a step"
        for name, accuracy, time_s in zip(trainers, accuracies, seconds, strict=True)
    ]
    if len(nets) == 2:
        nets.append(f"{next(iter(trainers))} is {seconds[1] / seconds[0]:.1f}x as fast")
    print(f"\n{'; '.join(nets)} (test images; median step of {len(x)} images)")


def _info(given):
    limit = threads.container_limit()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"sparsetrain        {st.__version__}")
    print(f"instruction set    {st.get_isa()} (available: {', '.join(st.available_isas())})")
    allowed = "no container limit" if limit is None else f"container limit {limit:g}"
    print(f"threads            {st.get_num_threads()} ({cpus} CPUs for this process, {allowed})")
    for pool in threadpoolctl.threadpool_info():
        name = f"{pool['internal_api']} {pool['version'] or ''}".strip()
        print(f"thread pool        {name}, {pool['num_threads']} threads ({pool['filepath']})")
    sizes = ", ".join(f"{name} {size >> 10}K" for name, size, _ in caches())
    print(f"caches             {sizes or 'unknown'}")
    for name, version in _versions().items():
        print(f"{name:<19}{version or 'not installed'}")
    for name in data.NAMES:
        places = data.where(name)
        found = next((p for p in places if p.found), None)
        if found:
            print(f"data {name:<13} in {found.folder} ({found.named_by})")
        else:
            looked = ", ".join(f"{p.folder} ({p.named_by})" for p in places)
            print(f"data {name:<13} not found, looked in {looked}")
    return 0


def _versions():
    """Versions of Python and of what sparsetrain uses; None for what is not installed."""
    versions = {"python": platform.python_version()}
    for name in ("numpy", "scipy", "threadpoolctl", "tqdm", "matplotlib", "pooch", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
