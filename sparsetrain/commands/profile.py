"""The command `sparsetrain profile`: its options and a run."""

import argparse
from pathlib import Path

import numpy as np

import sparsetrain as st
from sparsetrain import checks, choices, named, options
from sparsetrain.bench.measure import NETS

# Default, argparse's settings, help. Where the default is None the help explains it.
OPTIONS = {
    "model": ("small-cnn", {}, f"model: {', '.join(named.MODELS)}"),
    "image": (None, {"metavar": "C,H,W"}, "channels, height, width of an image (default: as the model is used)"),
    "batch-size": (None, {"type": int}, "images a step (default: as the model is used, 64 or 128)"),
    "sparsity": (0.9, {"type": float}, "fraction of the weights to remove, at random, in [0, 1)"),
    "distribution": (
        "uniform",
        {},
        f"how the sparsity is spread over the layers: {', '.join(named.DISTRIBUTIONS)}",
    ),
    "exclude": (
        ["first"],
        {"nargs": "*", "metavar": "LAYER"},
        "layers to keep dense: names as in the table, patterns such as '3.*', or first, the layer next to the images; "
        "none if no name follows",
    ),
    "repeats": (10, {"type": int}, "repetitions, of which medians are shown"),
    "threads": (None, {"type": int}, "threads (default: as many as this process may use)"),
    "isa": (None, {}, "instruction set: base, avx2 or avx512 (default: the best there is)"),
    "unfused": (False, {"action": "store_true"}, "run every layer by itself (default: no)"),
    "json": (None, {"metavar": "FILE"}, "write the profile there too (default: nowhere)"),
    "plans": (None, {"metavar": "FILE"}, "take the planner's choices from this file, see --save-plans (default: none)"),
    "save-plans": (None, {"metavar": "FILE"}, "write the planner's choices there (default: nowhere)"),
}


def add_parser(commands):
    """Add `profile` to the subparsers of the command line."""
    options.add_parser(
        commands,
        "profile",
        OPTIONS,
        help="what each layer and pass of a training step costs",
        description="Run training steps of a model with random weights on random images and print, for each layer and "
        "pass, its time, speed, bytes, share of the roofline, kernel and tile, and what runs in the same pass.",
    )


def run(given):
    """Run the command with the options that were given; returns the exit code."""
    o = _options(given)
    if o.threads is not None:
        st.set_num_threads(o.threads)
    if o.isa is not None:
        st.set_isa(o.isa)
    if o.plans is not None:
        choices.load(o.plans)
    st.manual_seed(0)
    model = named.model(o.model, o.image, 10)
    exclude = named.layers(o.exclude, model)
    if o.sparsity:
        st.sparsify(model, o.sparsity, "random", o.distribution, exclude)
    weights = [p for p in model.parameters() if len(p.shape) > 1]
    stored, size = sum(p.nnz for p in weights), sum(int(np.prod(p.shape)) for p in weights)
    print(f"{o.model}, sparsity {o.sparsity:g} ({o.distribution}): {stored:,} of {size:,} weights", flush=True)
    x = np.random.default_rng(0).standard_normal((o.batch_size, *o.image), np.float32)
    profile = st.profile(model, x, repeats=o.repeats, unfused=o.unfused)
    print(profile)
    if o.json is not None:
        profile.save(o.json)
        print(f"wrote {o.json}")
    if o.save_plans is not None:
        choices.save(o.save_plans)
        print(f"wrote {o.save_plans}")
    return 0


def _options(given):
    """Every option, resolved and checked."""
    o = argparse.Namespace(**options.defaults(OPTIONS) | given)
    checks.one_of("--model", o.model, named.MODELS)
    checks.one_of("--distribution", o.distribution, named.DISTRIBUTIONS)
    image, batch = NETS[o.model]
    o.image = image if o.image is None else _image(o.image)
    o.batch_size = batch if o.batch_size is None else checks.integer("--batch-size", o.batch_size, low=1)
    checks.fraction("--sparsity", o.sparsity)
    checks.integer("--repeats", o.repeats, low=1)
    if o.threads is not None:
        checks.integer("--threads", o.threads, low=1)
    if o.isa is not None:
        checks.one_of("--isa", o.isa, st.available_isas())
    for option, path in (("--json", o.json), ("--save-plans", o.save_plans)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{option} is {path}, whose folder is not there")
    return o


def _image(text):
    words = text.split(",")
    if len(words) != 3 or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ValueError(f"--image is {text!r}, must be channels, height and width, such as 3,32,32")
    return tuple(map(int, words))
