"""What all methods have in common that change which weights exist: where, when, how much, and what they report."""

import math
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from sparsetrain import checks
from sparsetrain.sparse import SparseParameter
from sparsetrain.sparsity.probe import Probe
from sparsetrain.sparsity.sparsify import DISTRIBUTIONS, changeable, masks, numbers

UNITS = ("steps", "epochs")


@dataclass
class Method:
    """Which weights of convolutions and linear layers exist, and how that changes. A method is a subclass with an
    `update`, or with a `begin` alone if nothing changes later.

    sparsity in [0, 1): of the layers together, in the end. distribution: "uniform", "erk" or, where the method compares
    weights of several layers, "global". include, exclude: layer names or globs ("0", "3.body.*").

    A Trainer(sparsity=method) does the rest. By hand: attach(model); then in each step begin_step() before
    the forward pass, and end_step() between the backward pass and the optimiser's step; begin_epoch() before an epoch
    if times are in epochs.
    """

    sparsity: float = 0.9
    distribution: str = field(default="uniform", kw_only=True)
    include: tuple = field(default=("*",), kw_only=True)
    exclude: tuple = field(default=(), kw_only=True)

    distributions = ("uniform", "erk")  # that the method can follow

    def __post_init__(self):
        self.sparsity = checks.fraction("sparsity", self.sparsity)
        checks.one_of("distribution", self.distribution, DISTRIBUTIONS)
        if self.distribution not in self.distributions:
            raise ValueError(
                f"distribution is {self.distribution!r}, {type(self).__name__} needs {' or '.join(self.distributions)}"
            )
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            if isinstance(globs, str) or not isinstance(globs, (list, tuple)):
                raise TypeError(f"{name} is {globs!r}, must be a sequence of layer names or globs")
            setattr(self, name, tuple(globs))
        self.layers, self.step, self.steps_per_epoch = [], 0, None
        self.check()

    def check(self):
        """ValueError or TypeError unless the arguments are right."""

    # ---- what a method defines

    def begin(self):
        """What happens to the layers when the method is attached."""

    def due(self):
        """Whether update() is called at the end of this step."""
        return False

    def prepare(self):
        """Called before the forward pass of a step at whose end update() is called."""

    def update(self):
        """Change the layers. The gradients are those of this step; they are dropped in layers that change."""
        raise NotImplementedError(f"{type(self).__name__} is due but does not define update()")

    # ---- the model

    def attach(self, model, begin=True):
        """Take over the layers of the model, and give them their first structure unless `begin` is False. Returns self.

        ValueError if a glob matches no layer or the sparsity cannot be reached; then the model is as it was.
        """
        named = changeable(model, self.exclude, self.include)
        self.detach()
        if self.distribution != "global":
            numbers(named, self.sparsity, self.distribution)
        self.layers = [Layer(*pair) for pair in named]
        self.step = 0
        if begin:
            self.begin()
            for layer in self.layers:
                layer.note()
        return self

    def detach(self):
        """Leave the layers as they are from now on."""
        for layer in self.layers:
            layer.module.probe = None
        self.layers = []

    def begin_epoch(self, epoch, steps=None, step=0):
        """Say that an epoch of so many steps begins, or goes on at `step`. Times in epochs need it. A Trainer does."""
        self.steps_per_epoch = steps

    def begin_step(self):
        """Say that a step's forward pass follows."""
        if self.due():
            self.prepare()

    def end_step(self):
        """Change the layers where it is time to, after the backward pass of a step. Returns what became of them,
        {layer: {"weights", "nnz", "sparsity", "dropped", "grown"}}; {} where it was not time."""
        changed = {}
        if self.due():
            before = [(layer.dropped, layer.grown) for layer in self.layers]
            self.update()
            for layer, (dropped, grown) in zip(self.layers, before, strict=True):
                layer.module.probe = None
                layer.note()
                changed[layer.name] = layer.size_now() | {
                    "dropped": layer.dropped - dropped,
                    "grown": layer.grown - grown,
                }
        self.step += 1
        return changed

    def cancel_step(self):
        """Say that a step that had begun came to nothing."""
        for layer in self.layers:
            layer.module.probe = None

    @contextmanager
    def applied(self):
        """Within it, the layers have the weights that the method means them to have: what is to be evaluated."""
        yield

    def prune(self, sparsity, score):
        """Remove the weights with the lowest scores, until the layers have this sparsity. Layers that lose none keep
        their gradients."""
        for layer, mask in zip(self.layers, masks(self._named(), sparsity, score, self.distribution), strict=True):
            if not mask.all():
                layer.rewire(mask, ())

    def targets(self, sparsity):
        """How many of its weights each layer keeps at this sparsity."""
        return numbers(self._named(), sparsity, self.distribution)

    def _named(self):
        return [(layer.name, layer.module) for layer in self.layers]

    def report(self):
        """{layer: {"weights", "nnz", "sparsity", "dropped", "grown", "explored"}}.

        dropped, grown: weights since the last report; explored: share of all weights that existed at some time.
        """
        return {layer.name: layer.report() for layer in self.layers}

    # ---- state

    def state_dict(self):
        """{name: number or array}: with it, and the model's own structure, a run goes on as if not interrupted."""
        state = {"step": self.step}
        for layer in self.layers:
            state[f"{layer.name}/explored"] = np.frombuffer(zlib.compress(layer.explored), np.uint8)
            state[f"{layer.name}/changed"] = np.array([layer.dropped, layer.grown])
        return state

    def load_state_dict(self, state):
        """Take what state_dict() gave; ValueError, and nothing changed, if it is of other layers."""
        wanted = {"step"} | {f"{layer.name}/{key}" for layer in self.layers for key in ("explored", "changed")}
        if set(state) != wanted:
            other = sorted(set(state) ^ wanted)[0]
            raise ValueError(f"the state does not fit the layers {', '.join(la.name for la in self.layers)}: {other!r}")
        step, found = checks.integer("step", state["step"], low=0), []
        for layer in self.layers:
            changed = state[f"{layer.name}/changed"]
            if np.shape(changed) != (2,):
                raise ValueError(f"{layer.name}/changed has shape {np.shape(changed)}, must be two counts")
            counts = (checks.integer(f"{layer.name}/changed", n, low=0) for n in changed)
            found.append((_inflated(layer, state[f"{layer.name}/explored"]), *counts))
        self.step = step
        for layer, values in zip(self.layers, found, strict=True):
            layer.explored, layer.dropped, layer.grown = values


@dataclass
class Timed(Method):
    """A Method that changes its layers every so many steps, or epochs with unit="epochs": at start, start + every, ...,
    and not after stop, which must come before the end of training. A layer that changes leaves out the optimiser's step
    that follows, for want of a gradient."""

    start: int = field(default=0, kw_only=True)
    stop: int = field(default=None, kw_only=True)
    every: int = field(default=100, kw_only=True)
    unit: str = field(default="steps", kw_only=True)

    changes_at_start = True

    def __post_init__(self):
        checks.one_of("unit", self.unit, UNITS)
        self.start = checks.integer("start", self.start, low=0)
        self.every = checks.integer("every", self.every, low=1)
        if self.stop is None:
            raise ValueError(
                f"stop is None: {type(self).__name__} needs the last of the {self.unit} at which weights change"
            )
        self.stop = checks.integer("stop", self.stop, low=0)
        if self.stop < self.start:
            raise ValueError(f"stop is {self.stop}, before start, which is {self.start}")
        if self.stop == self.start and not self.changes_at_start:
            raise ValueError(f"stop is {self.stop}, as is start: {type(self).__name__} would never change a weight")
        super().__post_init__()

    def now(self):
        """The present time, in units: with epochs, only the first step of one counts."""
        if self.unit == "steps":
            return self.step
        if self.steps_per_epoch is None:
            raise ValueError("unit is 'epochs': begin_epoch(epoch, steps) must say how many steps an epoch has")
        epoch, step = divmod(self.step, self.steps_per_epoch)
        return epoch if step == 0 else None

    def due(self):
        now = self.now()
        if now is None or not self.start <= now <= self.stop or (now == self.start and not self.changes_at_start):
            return False
        return (now - self.start) % self.every == 0 or now == self.stop

    def progress(self):
        """From 0 at start to 1 at stop."""
        return (self.now() - self.start) / (self.stop - self.start) if self.stop > self.start else 1.0


def _inflated(layer, compressed):
    """The `explored` of a layer from state_dict(); ValueError if it is not one of as many weights."""
    size = len(layer.explored)
    inflate = zlib.decompressobj()
    try:
        found = inflate.decompress(compressed, size + 1)
    except zlib.error as error:
        raise ValueError(f"{layer.name}/explored cannot be decompressed: {error}") from None
    if len(found) != size or not inflate.eof:
        raise ValueError(f"{layer.name}/explored is not of {layer.size} weights")
    return np.frombuffer(bytearray(found), np.uint8)


class Layer:
    """A layer whose weights come and go. dropped, grown: weights since the last report. explored: a bit for each
    weight, set where it existed at some time."""

    def __init__(self, name, module):
        self.name, self.module = name, module
        self.dropped = self.grown = 0
        self.explored = np.zeros(-(-math.prod(module.weight.shape) // 8), np.uint8)

    weight = property(lambda self: self.module.weight)

    @property
    def size(self):
        """Weights, stored or not."""
        return math.prod(self.weight.shape)

    def rewire(self, kept, grown):
        """Drop the stored weights where `kept` (nnz) is false, then grow those at the positions `grown`, in any
        order."""
        dropped = int(np.size(kept) - np.count_nonzero(kept))
        if isinstance(self.weight, SparseParameter):
            self.weight.rewire(kept, np.sort(np.asarray(grown, np.int64)))
        elif len(grown):
            raise ValueError(f"layer {self.name} has all its weights: none of the {len(grown)} can grow")
        else:
            self.weight.keep(kept.reshape(self.weight.shape))
        self.dropped += dropped
        self.grown += len(grown)

    def note(self):
        """Remember which weights exist now."""
        weight = self.weight
        if isinstance(weight, SparseParameter):
            alive = np.zeros(self.size, bool)
            alive[weight.places()] = True
            self.explored |= np.packbits(alive)
        else:
            self.explored |= np.packbits(np.ones(self.size, bool))

    def probe(self, count):
        """Look in the backward pass of this step for the `count` largest gradients of weights that are not stored."""
        self.module.probe = Probe(self.name, self.weight, count)

    def probed(self):
        """(positions, magnitudes) that the probe has found; ValueError if no backward pass went by."""
        found = self.module.probe
        if found is None or found.places is None:
            raise ValueError(f"layer {self.name} has seen no backward pass since begin_step()")
        return found.places, found.magnitudes

    def report(self):
        explored = int(np.unpackbits(self.explored).sum()) / self.size
        row = self.size_now() | {"dropped": self.dropped, "grown": self.grown, "explored": explored}
        self.dropped = self.grown = 0
        return row

    def size_now(self):
        return {"weights": self.size, "nnz": self.weight.nnz, "sparsity": self.weight.sparsity}
