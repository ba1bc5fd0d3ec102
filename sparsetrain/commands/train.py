"""The commands `sparsetrain train` and `finetune`: a run folder, the nets in it, and what is printed of them."""

import dataclasses
import json
import sys

import sparsetrain as st
from sparsetrain import choices, data, interchange, named, optim, options, sparsity
from sparsetrain.commands.info import versions
from sparsetrain.commands.train_options import FINETUNE, OPTIMIZERS, OPTIONS, backprop_method, resolved, sparsity_method
from sparsetrain.files import replacing
from sparsetrain.train import Checkpoint, CSVLog, EpochLines, Progress, Trainer, TrainingDiverged, report


def add_parsers(commands):
    """Add `train` and `finetune` to the subparsers of the command line."""
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


def finetune(given):
    """Run `finetune` with the options that were given; returns the exit code."""
    return run(given, FINETUNE)


def run(given, table=OPTIONS):
    """Run `train` with the options that were given; returns the exit code."""
    o, folder = resolved(given, table)
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
    nets = {main: (True, folder, backprop_method(o))}
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


def _write_config(o, folder):
    folder.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in vars(o).items() if name not in ("resume", "quiet")}
    ran_with = {"isa": st.get_isa(), "threads": st.get_num_threads(), "versions": versions()}
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
    exclude = named.layers(o.exclude, model)
    if o.weights is not None:
        _load(o, model)
        if sparse and o.sparsity_from_weights:
            interchange.zeros_to_structure(model, exclude)
            if all(layer.weight.structure.dense for _, layer in sparsity.sparsifiable(model)):
                raise ValueError(f"--sparsity-from-weights: {o.weights} has no zero in a layer that is not excluded")
    sparse = sparse and o.sparsity
    changing = sparsity_method(o, steps * o.epochs, exclude) if sparse else None
    if sparse and changing is None:
        batches = [next(iter(train))] if o.method in ("snip", "grasp") else None
        st.sparsify(model, o.sparsity, o.method, o.distribution or "uniform", exclude, batches=batches)
    rates = {"lr": o.lr, "weight_decay": o.weight_decay}
    if o.optimizer == "sgd":
        rates["momentum"] = o.momentum
    optimizer = OPTIMIZERS[o.optimizer](model.named_parameters(), **rates)
    if method is not None:
        method = dataclasses.replace(method, exclude=tuple(named.layers(o.exact_layers or (), model, "--exact-layers")))
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
    for trainer in trainers.values():
        # The run's schedule may have come to 0, at which MemAOP does nothing; the weights should hardly move.
        trainer.schedule = optim.constant(1e-3 * o.lr)
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
