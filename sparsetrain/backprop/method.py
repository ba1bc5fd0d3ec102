"""What all methods have in common: the layers they are used in, their state, and what they report."""

import copy
import fnmatch
import math
import time
from dataclasses import dataclass, field, fields, replace

import numpy as np

from sparsetrain import arrays, checks, ops, sparse_gradient
from sparsetrain.nn import Conv2d, Linear


@dataclass
class Method:
    """How convolutions and linear layers use their output gradients. A method is a subclass with a `select`.

    exclude: layer names or globs ("0", "3.body.*") that stay exact. layers: {name or glob: {argument: value}}, other
    arguments for these layers; the first match counts. angles: measure the angle between the gradient that is used
    and the exact one, which takes longer than the step itself. seed: of the random numbers; they depend on it, the
    layer and the step alone.
    """

    exclude: tuple = field(default=(), kw_only=True)
    layers: dict = field(default_factory=dict, kw_only=True)
    angles: bool = field(default=False, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self):
        for name, value in vars(self).items():
            setattr(self, name, _plain(value))
        checks.integer("seed", self.seed, low=0)
        checks.flag("angles", self.angles)
        if not isinstance(self.exclude, (list, tuple)) or not all(isinstance(glob, str) for glob in self.exclude):
            raise TypeError(f"exclude is {self.exclude!r}, must be a sequence of layer names or globs")
        self.exclude, self.attached, self.optimizer = tuple(self.exclude), [], None
        known = {f.name for f in fields(self)} - {"exclude", "layers", "angles", "seed"}
        if not isinstance(self.layers, dict) or not all(isinstance(a, dict) for a in self.layers.values()):
            raise TypeError(f"layers is {self.layers!r}, must be a dict of layer name or glob to a dict of arguments")
        for glob, arguments in self.layers.items():
            for name in arguments:
                checks.one_of(f"an argument in layers[{glob!r}]", name, sorted(known))
            replace(self, layers={}, exclude=(), **arguments)  # its checks
        self.layers = {glob: {n: _plain(v) for n, v in arguments.items()} for glob, arguments in self.layers.items()}
        self.check()

    def check(self):
        """ValueError or TypeError unless the arguments are right."""

    # ---- what a method defines

    def select(self, layer, x, geometry, dy):
        """What is used of dy, a Blocked, which must not be changed: None for all of it, a Selection of its values, or a
        Blocked of its shape, whose zeros are skipped.

        x is the Blocked that the layer read. layer: a Layer, whose `state`, `random()` and counters are the method's
        to use.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define select(layer, x, geometry, dy)")

    def forward(self, x, weight, bias, geometry, halo, relu):
        """(y, what backward() takes as x) of a layer, as of ops.conv2d()."""
        return ops.conv2d(x, weight, bias, geometry, halo, relu), x

    def read(self, kept, geometry):
        """The Blocked that a layer read, from what forward() kept."""
        return kept

    def bias_gradient(self, bias, dy):
        """Adds the gradient of a bias (a Parameter or None), which is exact. Called before select()."""
        ops.bias_gradient(bias, dy)

    def after(self, layer, dy, used):
        """Called after each backward pass with what it used, a sparse_gradient.Used (None: all was used)."""

    def backward(self, layer, x, weight, bias, geometry, dy, halo, into):
        """dx of the layer; adds the gradients of weight and bias. Returns (dx, Used or None)."""
        self.bias_gradient(bias, dy)
        found = self.select(layer, x, geometry, dy)
        if found is None:
            return ops.conv2d_backward(x, weight, None, geometry, dy, halo, into), None
        if isinstance(found, arrays.Blocked):
            if self.angles:
                layer.note_angle(dy.array, found.array)
            dy, found = found, sparse_gradient.nonzero()
        elif self.angles:
            layer.note_angle(dy.array, sparse_gradient.written_out(x, weight, geometry, dy, found)[0].array)
        return sparse_gradient.backward(x, weight, geometry, dy, found, halo, into, layer.density)

    # ---- the model

    def attach(self, model, optimizer=None):
        """Use the method in the convolutions and linear layers of the model, from now on. Returns self.

        ValueError for a glob that matches none of them. optimizer: whose learning rate a method that needs one reads.
        """
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, (Conv2d, Linear))]
        names = [name for name, _ in found]
        checks.globs("exclude", self.exclude, names)
        checks.globs("layers", self.layers, names)
        self.detach()
        self.optimizer = optimizer
        for index, (name, module) in enumerate(found):
            module.backprop = None
            if not any(fnmatch.fnmatchcase(name, glob) for glob in self.exclude):
                module.backprop = Layer(self._for(name), name, index, module)
                module.backprop.method.optimizer = optimizer
                self.attached.append(module.backprop)
        return self

    def detach(self):
        """Go back to exact backward passes."""
        for layer in self.attached:
            if layer.module.backprop is layer:  # another method may have come since
                layer.module.backprop = None
        self.attached = []

    def _for(self, name):
        for glob, arguments in self.layers.items():
            if fnmatch.fnmatchcase(name, glob):
                return replace(self, layers={}, exclude=(), **arguments)
        return replace(self, layers={}, exclude=())

    def begin_epoch(self, epoch, steps=None, step=0):
        """Say that an epoch (from 0) of so many steps begins, or goes on at `step`, which some methods depend on. A
        Trainer does."""
        for layer in self.attached:
            layer.epoch, layer.step, layer.steps = epoch, step, steps

    def report(self):
        """{layer: {"values", "gradient_sparsity", "ms", "angle", "clipped"}}, means over the backward passes since
        the last report.

        values: of its output gradients, in all; gradient_sparsity: share of them that was not used; ms: of a backward
        pass; angle in degrees, None unless measured; clipped: share of the values.
        """
        return {layer.name: layer.report() for layer in self.attached}

    # ---- state

    def state_dict(self):
        """{"layer/name": number or array}: with it a run goes on as if it had not been interrupted."""
        return {f"{layer.name}/{key}": value for layer in self.attached for key, value in layer.get_state().items()}

    def load_state_dict(self, state):
        """Take the values of state_dict(); KeyError, with nothing changed, for one that belongs to no layer."""
        layers = {layer.name: layer for layer in self.attached}
        for key in state:
            if key.rpartition("/")[0] not in layers:
                raise KeyError(f"the state has {key!r}, the method is used in the layers {', '.join(layers)}")
        for name, layer in layers.items():
            layer.set_state({k.rpartition("/")[2]: v for k, v in state.items() if k.rpartition("/")[0] == name})


def _plain(value):
    """The number of a NumPy scalar, which a checkpoint could not hold; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


class Layer:
    """What a method knows of one layer: `state` is the method's own, numbers and arrays by name.

    passes: backward passes so far; epoch, step (in it) and steps (of it, None if unknown): as begin_epoch() said;
    density: the share of values that the last pass used, None at first.
    """

    def __init__(self, method, name, index, module):
        self.method, self.name, self.index, self.module = method, name, index, module
        self.state, self.passes, self.density = {}, 0, None
        self.epoch, self.step, self.steps = 0, 0, None
        self._start_report()

    def random(self):
        """A numpy Generator for this pass."""
        return np.random.default_rng((self.method.seed, self.index, self.passes))

    def seed(self):
        """A number of 64 bits for this pass."""
        return hash((self.method.seed, self.index, self.passes)) & (1 << 64) - 1

    def forward(self, x, weight, bias, geometry, halo, relu):
        """(y, what backward() takes as x), as of ops.conv2d()."""
        return self.method.forward(x, weight, bias, geometry, halo, relu)

    def read(self, kept, geometry):
        """The Blocked that the layer read, from what forward() kept."""
        return self.method.read(kept, geometry)

    def backward(self, x, weight, bias, geometry, dy, halo, into=None):
        """dx, as of ops.conv2d_backward()."""
        start = time.perf_counter()
        dx, used = self.method.backward(self, x, weight, bias, geometry, dy, halo, into)
        self._ms += 1e3 * (time.perf_counter() - start)
        values = math.prod(dy.shape)
        self._values += values
        self._used += values if used is None else used.nnz
        self._clipped += 0 if used is None else used.clipped
        self._passes += 1
        if used is not None:
            self.density = used.density
        self.method.after(self, dy, used)
        self.passes, self.step = self.passes + 1, self.step + 1
        return dx

    def note_angle(self, exact, used):
        """Note the angle between two arrays, in degrees, for the report."""
        exact, used = exact.astype(np.float64), used.astype(np.float64)
        lengths = np.sqrt((exact**2).sum() * (used**2).sum())
        if lengths > 0:
            self._angles.append(float(np.degrees(np.arccos(min(1.0, (exact * used).sum() / lengths)))))

    def report(self):
        passes, values = max(1, self._passes), max(1, self._values)
        row = {
            "values": self._values,
            "gradient_sparsity": 1 - self._used / values if self._passes else 0.0,
            "ms": self._ms / passes,
            "angle": float(np.mean(self._angles)) if self._angles else None,
            "clipped": self._clipped / values,
        }
        self._start_report()
        return row

    def _start_report(self):
        self._ms, self._used, self._values, self._clipped, self._passes, self._angles = 0.0, 0, 0, 0, 0, []

    def get_state(self):
        density = {} if self.density is None else {"density": self.density}
        state = {f"state.{k}": copy.copy(v) for k, v in self.state.items()}
        counts = [self._ms, self._used, self._values, self._clipped, self._passes]
        report = {"report": np.array([*counts, *self._angles], np.float64)} if self._passes else {}
        return {"passes": self.passes, **density, **report, **state}

    def set_state(self, saved):
        self.passes = checks.integer(f"{self.name}/passes", saved.get("passes", 0), low=0)
        density = saved.get("density")
        self.density = density if density is None else checks.number(f"{self.name}/density", density, low=0.0, high=1.0)
        self._start_report()
        if "report" in saved:
            if np.ndim(saved["report"]) != 1 or len(saved["report"]) < 5 or not np.isfinite(saved["report"]).all():
                raise ValueError(f"{self.name}/report is {saved['report']}, must be five finite numbers and angles")
            self._ms, *counts = (float(n) for n in saved["report"][:5])
            self._used, self._values, self._clipped, self._passes = map(int, counts)
            self._angles = [float(angle) for angle in saved["report"][5:]]
        prefix = "state."
        self.state = {k.removeprefix(prefix): copy.copy(v) for k, v in saved.items() if k.startswith(prefix)}
