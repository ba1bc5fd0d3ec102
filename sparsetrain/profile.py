"""What each layer and pass of a training step costs, how it runs, and what the machine would allow."""

import datetime
import json
import math
import statistics
import time
import weakref
from dataclasses import asdict, dataclass, field

import numpy as np

from sparsetrain import checks, nn, rng, winograd
from sparsetrain._kernels import core
from sparsetrain.arrays import IMAGES
from sparsetrain.bench import analysis, load, machine
from sparsetrain.bench.report import machine_lines, ms
from sparsetrain.files import read_json, replacing
from sparsetrain.nn import containers
from sparsetrain.nn.fusing import run_with
from sparsetrain.nn.module import watch
from sparsetrain.nn.summary import table
from sparsetrain.normed import Normed
from sparsetrain.record import record
from sparsetrain.tape import eager
from sparsetrain.version import VERSION

FORMAT, SCHEMA = "sparsetrain profile", 1
PASSES = ("forward", "backward", "weight gradient", "input gradient")


@dataclass(frozen=True)
class Row:
    """One layer's pass.

    part: one of PASSES; "backward" is both gradients of a convolution that runs by bands, and all of a layer without
    products. seconds: median over the repetitions. operations: a multiplication and an addition for every stored
    weight, output pixel and image; those on the padding count. bytes: the least that the pass must move, each array
    that it reads or writes once: activations without padding and halo, with what is formed on the way counted by what
    it is formed of; values and 4-byte indices of stored weights (none if dense), and their gradients. What has one
    number a channel is left out. None if unknown: a layer that is not of this package.
    least_seconds: what the roofline allows for them, and level, the memory that holds the bytes; None without bytes.
    kernel: "", "sparse", or "dense, N at once" for so many output channels, with "bands" before it where the pass runs
    band by band and "8 bits" where products, or the gradient alone, are of bytes; "dense, features at once" needs no
    plan. plans: of each product, and each phase of a strided one, as _described(). bands: {"run", "rows", "tasks"},
    output rows of a task and of a band. fused: what else the pass does, in words.
    """

    layer: str
    type: str
    part: str
    seconds: float
    operations: int
    bytes: int | None
    least_seconds: float | None
    level: str | None
    kernel: str = ""
    plans: list = field(default_factory=list)
    bands: dict | None = None
    fused: str = ""

    @property
    def gflops(self):
        """GFLOP/s on the stored weights."""
        return self.operations / self.seconds / 1e9

    @property
    def share(self):
        """Share of the roofline, None where it is unknown."""
        return self.least_seconds / self.seconds if self.least_seconds else None


@dataclass(frozen=True)
class Profile:
    """What profile() returns; str() is a table. about: what it was measured on; seconds: of a step, no optimiser."""

    about: dict
    rows: list
    seconds: float

    @property
    def outside(self):
        """Seconds outside the layers: conversion of x, the loss, gradients that are added where paths meet."""
        return self.seconds - sum(row.seconds for row in self.rows)

    def table(self):
        """The table alone: a line a layer and pass, then sums."""
        head = ("layer", "pass", "ms", "GFLOP/s", "MB", "roofline", "kernel", "tile", "tasks", "fused with")
        lines = [
            (
                row.layer, row.part, ms(row.seconds), f"{row.gflops:.1f}" if row.operations else "-",
                "-" if row.bytes is None else f"{row.bytes / 1e6:.2f}",
                "-" if row.share is None else f"{row.share:.0%}", row.kernel or "-", *_how(row), row.fused or "-",
            )
            for row in self.rows
        ]  # fmt: skip
        blank = ("-",) * 7
        lines.append(("outside layers", "", ms(max(0.0, self.outside)), *blank))
        operations, size = (sum(getattr(row, name) or 0 for row in self.rows) for name in ("operations", "bytes"))
        least = sum(row.least_seconds or 0.0 for row in self.rows) / self.seconds
        sums = f"{operations / self.seconds / 1e9:.1f}", f"{size / 1e6:.2f}", f"{least:.0%}"
        lines.append(("sum", "", ms(self.seconds), *sums, *blank[3:]))
        return table(head, lines, rule_before_last=True, left=(0, 1, 6, 7, 8, 9))

    def __str__(self):
        about, ran = self.about, self.about["ran_with"]
        how = "layers one by one" if ran["unfused"] else "layers fused"
        shape = "x".join(map(str, ran["x"]))
        lines = machine_lines(about)
        lines.append(
            f"x {shape} {ran['dtype']}, {how}; medians of {ran['repeats']} repetitions of forward and backward, "
            "optimiser step not included"
        )
        busy = load.too_busy(about["load"])
        if busy:
            lines.append(f"WARNING, not to be trusted: {busy}")
        if ran["restless"]:
            lines.append(f"{ran['restless']} repetitions began while the threads did not reach their speed together")
        return "\n".join([*lines, "", self.table()])

    __repr__ = __str__

    def save(self, path):
        """Write it as JSON, whole or not at all."""
        with replacing(path) as file:
            json.dump({"format": FORMAT, "schema": SCHEMA, **asdict(self)}, file, indent=1)
            file.write("\n")

    @classmethod
    def load(cls, path):
        """The Profile that was saved at path; ValueError if the file has none."""
        found = read_json(path, FORMAT, SCHEMA)
        try:
            return cls(found["about"], [Row(**row) for row in found["rows"]], found["seconds"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no whole profile: {error!r}") from None


def profile(model, x, labels=None, repeats=10, unfused=False):
    """A Profile of forward and backward of `model`, in training mode, with cross-entropy.

    x: a batch as the model takes it; labels (N,) int64, or None: random ones. unfused: every layer by itself. Measures
    the machine too, which takes a second. The model's parameters, gradients, buffers and modes, and the random numbers
    of dropout, are afterwards as they were. ValueError or TypeError where the model cannot take x, or the loss what it
    gives.
    """
    repeats = checks.integer("repeats", repeats, low=1)
    threads = core.get_num_threads()
    with _as_it_was(model), containers.unfused() if unfused else eager():
        model.train()
        model.zero_grad()
        logits = model(x)
        if labels is None:
            if logits.ndim != 2:
                raise ValueError(f"the model gives shape {logits.shape}, must be (N, classes)")
            labels = np.random.default_rng(0).integers(logits.shape[1], size=len(x))
        _step(model, x, labels)  # with the first call, makes plans and meets memory for the first time
        limits = machine.limits(threads)
        during, restless, repetitions = load.Load(), 0, []
        gathered = _Gathered(model)
        for _ in range(repeats):
            _step(model, x, labels)
            restless += not machine.settle(limits)
            gathered.begin()
            with record(gathered.run), watch(gathered.layer):
                start = time.perf_counter()
                _step(model, x, labels)
                repetitions.append(time.perf_counter() - start)
        taken = during.taken()
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sparsetrain": VERSION,
        "machine": machine.describe(),
        "ran_with": {
            "threads": threads,
            "isa": core.get_isa(),
            "x": list(x.shape),
            "dtype": str(x.dtype),
            "unfused": bool(unfused),
            "repeats": repeats,
            "restless": restless,
        },
        "limits": limits,
        "load": taken,
    }
    # The peak is that of float32.
    limits = limits | {"fma_gflops": limits["fma_gflops"] * 4 / x.dtype.itemsize}
    return Profile(about, gathered.rows(limits), statistics.median(repetitions))


def _step(model, x, labels):
    model.zero_grad()
    _, gradient = nn.cross_entropy(model(x), labels)
    model.backward(gradient, input_gradient=False)


class _as_it_was:
    """Puts parameters' gradients, buffers, modes, methods of backprop, the last call and random numbers back."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        modules = [module for _, module in self.model.named_modules()]
        self.modules = [(module, module.training) for module in modules]
        self.call = self.model.runner.last
        self.gradients = [(p, p.grad, p._buffer) for p in self.model.parameters()]
        self.buffers = [(b, b.copy()) for _, b in self.model.named_buffers()]
        backprop = [module.backprop for module in modules if getattr(module, "backprop", None) is not None]
        self.backprop = [(layer, layer.get_state(), layer.step) for layer in backprop]
        self.random = rng.generator().bit_generator.state

    def __exit__(self, *error):
        for module, training in self.modules:
            module.training = training
        self.model.runner.last = self.call
        for parameter, gradient, buffer in self.gradients:
            parameter.grad, parameter._buffer = gradient, buffer
        for buffer, before in self.buffers:
            buffer[...] = before
        for layer, state, step in self.backprop:
            layer.set_state(state)
            layer.step = step
        rng.generator().bit_generator.state = self.random


# ---- gathering


@dataclass
class _Pass:
    """A layer's pass over all repetitions: seconds of each, the rest of the last."""

    module: object
    seconds: list
    operations: int = 0
    rate: float = 1  # of operations, in multiples of float32's
    bytes: int | None = None
    kernel: str = ""
    plans: list = field(default_factory=list)
    bands: dict | None = None
    fused: list = field(default_factory=list)


class _Gathered:
    """Hears of operations and of layers that end, and puts the ones to the others."""

    def __init__(self, model):
        self.names = {id(module): name for name, module in model.named_modules()}
        self.also, self.norms = run_with(model)
        self.normed = weakref.WeakKeyDictionary()  # Normed: its batch norm
        self.passes, self.order = {}, []
        self.pending = []  # operations since a layer ended: (run without its arrays, seconds of it that are others')
        self.repetition = -1

    def begin(self):
        self.repetition += 1
        self.pending.clear()
        for p in self.passes.values():
            p.seconds.append(0.0)
            p.operations, p.bytes, p.plans, p.fused = 0, None, [], []

    def run(self, run):
        norm = self.normed.get(run.normed) if run.normed is not None else None
        size = sum(math.prod(a.shape) * a.dtype.itemsize for a in (*run.read, *run.written))
        if run.kind == "form" and norm is not None:
            # Somebody needs a batch norm's output in memory: that is the norm's work, wherever it comes.
            self._add(norm, "forward", run.end - run.start, size)
            self.pending.append({"kind": "form", "start": run.start, "end": run.end})
            return
        done = {"kind": run.kind, "start": run.start, "end": run.end, "bytes": size, "product": run.weight is not None}
        done |= {"norm": norm, "forms": run.forms, "kept": run.kept, "sums": run.sums}
        if run.weight is not None:
            done |= _work(run)
        self.pending.append(done)

    def layer(self, module, phase, start, end, y):
        if id(module) not in self.names:
            return
        if isinstance(y, Normed):
            self.normed[y] = module
        inside = [done for done in self.pending if start <= done["start"] and done["end"] <= end]
        self.pending.clear()
        forms = [done for done in inside if done["kind"] == "form"]
        own = [done for done in inside if done["kind"] != "form"]

        def seconds(start, end):
            """Without what was the work of others."""
            return end - start - sum(f["end"] - f["start"] for f in forms if start <= f["start"] and f["end"] <= end)

        products = [done for done in own if done["product"]]
        others = [done["bytes"] for done in own if not done["product"]]
        if not products:
            ours = type(module).__module__.startswith("sparsetrain.")
            found = self._add(module, phase, seconds(start, end), sum(others) if others or ours else None)
            found.fused = self.also.get(id(module), []).copy()
            for done in own:
                found.fused += self._forming(module, done)
            return
        rest = seconds(start, end) - sum(seconds(p["start"], p["end"]) for p in products)
        for number, product in enumerate(products):
            first = number == 0
            taken = seconds(product["start"], product["end"]) + (rest if first else 0.0)
            found = self._add(module, product["kind"], taken, product["bytes"] + (sum(others) if first else 0))
            found.operations += product["operations"]
            found.rate = product["rate"]
            found.kernel, found.bands = product["kernel"], product["bands"]
            found.plans += product["plans"]
            found.fused += self._fused(module, product)

    def _add(self, module, part, seconds, size):
        key = self.names[id(module)], part
        if key not in self.passes:
            self.passes[key] = _Pass(module, [0.0] * (self.repetition + 1))
        found = self.passes[key]
        found.seconds[-1] += seconds
        if size is not None:
            found.bytes = (found.bytes or 0) + size
        return found

    def _with(self, norm):
        return " + ".join([self.names[id(norm)], *self.also.get(id(norm), ())])

    def _fused(self, conv, product):
        words = list(self.also.get(id(conv), ())) if product["kind"] != "input gradient" else []
        if product["kind"] == "backward":
            words.append(f"gradient of {self.names[id(self.norms[id(conv)])]}")
        return words + self._forming(conv, product)

    def _forming(self, layer, done):
        """What is done for batch norms on the way."""
        words = []
        if done["forms"]:
            words.append(f"forms {'and keeps ' if done['kept'] else ''}{self._with(done['norm'])}")
        if done["sums"]:
            norm = self.norms[id(layer)] if done["kind"] == "forward" else done["norm"]
            words.append(f"sums for {self.names[id(norm)]}")
        return words

    def rows(self, limits):
        """All rows, by layer in the order of named_modules(), forward first."""
        places = {name: i for i, name in enumerate(self.names.values())}
        rows = []
        for name, part in sorted(self.passes, key=lambda key: (places[key[0]], PASSES.index(key[1]))):
            p = self.passes[name, part]
            least = level = None
            if p.bytes:
                least, level = analysis.least_seconds(limits, p.operations / p.rate, p.bytes)
            if p.bytes == 0 and p.fused and not p.plans:
                p.fused.append("runs in the layers around it")
            median, kind, fused = statistics.median(p.seconds), type(p.module).__name__, "; ".join(p.fused)
            counts = p.operations, p.bytes, least, level
            rows.append(Row(name, kind, part, median, *counts, p.kernel, p.plans, p.bands, fused))
        return rows


def _work(run):
    """Of a product: operations, bytes, kernel, plans and bands."""
    weight, output = run.weight, run.output
    n, rows, height, width = (*output.shape, 1, 1)[:4]
    both = run.kind == "backward" and bool(run.written)
    operations = 2 * weight.nnz * n * height * width * (2 if both else 1)
    values = weight.nnz * weight.data.itemsize
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in (*run.read, *run.written))
    size += (2 if both else 1) * values + (0 if weight.structure.dense else 4 * weight.nnz)
    if run.entries is not None:
        operations = 2 * run.entries.nnz * math.prod(weight.shape[1:])
        zeros = 1 - run.entries.nnz / (n * rows * height * width)
        eight = "8 bits, " if run.entries.dtype == np.int8 else ""
        return {
            "operations": operations,
            "rate": 1,
            "bytes": size,
            "kernel": f"{eight}skips {zeros:.0%} of dy",
            "bands": None,
            "plans": [],
        }
    eight = bool(run.read) and run.read[0].dtype == np.int32
    bands, plans = None, [(run.kind, plan) for plan in run.plans]
    if run.plans and isinstance(run.plans[0], core.BandPlan):
        (plan,) = run.plans
        tasks = -(-n // IMAGES) * -(-height // plan.run) if plan.forward else plan.parts
        bands = {"run": plan.run, "rows": plan.rows, "tasks": tasks}
        plans = [("forward", plan.forward)] if plan.forward else [("weight gradient", plan.gradient)]
        plans += [("input gradient", step) for step in plan.input]
    at_once = max((plan.rows_at_once for _, plan in plans), default=0)
    kind = f"dense, {at_once} at once" if at_once > 1 else "sparse" if plans else "dense, features at once"
    rates = {product: winograd.RATE if plan.run else 1 for product, plan in plans}
    rate = len(rates) / sum(1 / r for r in rates.values()) if rates else 1
    if rate > 1:
        kind += ", Winograd"
    return {
        "operations": operations,
        "rate": 4 if eight and core.get_isa() == "avx512" and core.get_vnni() else rate,  # four bytes for one float
        "bytes": size,
        "kernel": f"{'8 bits, ' if eight else ''}{'bands ' if bands else ''}{kind}",
        "bands": bands,
        "plans": [_described(product, plan) for product, plan in plans],
    }


def _described(product, plan):
    """What a core.Plan says: output channels at once, which axes a tile's are (0 block of images, 1 row, 2 column) and
    its positions on them, tiles of 2 x 2 pixels that winograd.hh meets at once (0: it does not run), input channels a
    group, chunks of rows of the weight, parts of a weight gradient, tasks."""
    tasks = plan.n_chunks * plan.parts if product == "weight gradient" else plan.n_tasks
    return {
        "product": product,
        "rows_at_once": plan.rows_at_once,
        "order": list(plan.order),
        "tile": list(plan.tile),
        "run": plan.run,
        "group": plan.group,
        "chunks": plan.n_chunks,
        "parts": plan.parts,
        "tasks": tasks,
    }


def _how(row):
    """The cells for tile and tasks: of the first plan, and how many others there are."""
    if not row.plans:
        return "-", "-"
    plan = row.plans[0]
    tile = " ".join(f"{n}{'nhw'[axis]}" for axis, n in list(zip(plan["order"], plan["tile"], strict=True))[1:])
    if plan["run"]:
        tile = f"{plan['run']} of 2x2"
    tile += f" {plan['group']}c"
    others = {(*p["order"], *p["tile"], p["run"], p["group"]) for p in row.plans}
    if len(others) > 1:
        tile += f" +{len(others) - 1}"
    if row.bands:
        return f"{tile}, {row.bands['rows']} of {row.bands['run']} rows", str(row.bands["tasks"])
    cuts = [f"{plan[name]} {name}" for name in ("chunks", "parts") if plan[name] > 1]
    return tile, str(plan["tasks"]) + (f" ({', '.join(cuts)})" if cuts else "")
