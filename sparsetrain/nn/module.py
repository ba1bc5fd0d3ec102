"""The base of all layers and containers: names, parameters, modes, and the way from NumPy arrays and back."""

import time
from contextlib import contextmanager

import numpy as np

from sparsetrain import arrays
from sparsetrain.nn.replay import Runner, keeps, no_grad
from sparsetrain.sparse import Parameter
from sparsetrain.tape import eager

_observer = None  # called after the forward and backward of every leaf layer


@contextmanager
def evaluating(model):
    """Within it, `model` is in evaluation mode and under no_grad().

    Afterwards each module's mode is put back, and backward() belongs to the last call before.
    """
    modes = [(module, module.training) for _, module in model.named_modules()]
    last_call = model.runner.last
    model.eval()
    try:
        with no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        model.runner.last = last_call


@contextmanager
def observe(model, callback):
    """Within it, callback(name, module, phase, seconds, y) follows every leaf layer of `model`.

    phase is "forward" (y the output, a Blocked) or "backward" (y is dx, or None). A ReLU that runs in the same
    pass as the layer before it is not called by itself.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def named(module, phase, start, end, y):
        if id(module) in names:
            callback(names[id(module)], module, phase, end - start, y)

    with watch(named):
        yield


@contextmanager
def watch(callback):
    """As observe(), for the leaf layers of any model: callback(module, phase, start, end, y), in perf_counter()."""
    global _observer
    before, _observer = _observer, callback
    try:
        with eager():
            yield
    finally:
        _observer = before


def report(layer, phase, start, y):
    """Tell who observes that `layer` has finished a phase that began at `start`."""
    if _observer is not None:
        _observer(layer, phase, start, time.perf_counter(), y)


class blamed:
    """Within it, an error is said to be the layer's."""

    __slots__ = ("layer",)  # every layer of every step enters one: a contextmanager takes three times as long

    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if isinstance(error, (TypeError, ValueError)) and not hasattr(error, "layer"):
            error.layer = self.layer


class Module:
    """A layer or a container of layers.

    A layer defines forward(x, halo): x is a Blocked, and it returns (y, backward), y with at least `halo` zero
    pixels around it and backward(dy, halo) -> dx, which also adds the gradients of the layer's parameters; halo
    None means that dx is not wanted, and dx may be written into dy. Parameters and modules that are attributes are
    found by themselves.

    A class may say `replays = True` of itself, not of its subclasses, if its passes do nothing to arrays but by ops.py,
    and depend on nothing but its attributes, of which none but arrays change in place: see replay.py.
    """

    training = True
    buffers = ()  # names of the arrays that belong to the state but are not trained
    halo = (0, 0)  # zero pixels (vertical, horizontal) that forward reads around x
    grad_halo = (0, 0)  # and backward around dy
    # What a container may ask for: forward(..., relu=True) and forward(..., add=Blocked) as in BatchNorm2d,
    # backward(..., into=Blocked), which dx is added to, as in Conv2d; and whether backward writes dx into dy.
    fuses_relu = fuses_add = fuses_into = reuses_dy = False

    def forward(self, x, halo):
        raise TypeError(f"{type(self).__name__} does not define forward(x, halo)")

    # ---- running

    def __call__(self, x):
        """The output for x, an ndarray (N, C, H, W) or (N, F) with the parameters' dtype, as an ndarray."""
        try:
            return self.runner.forward(self, x)
        except (TypeError, ValueError) as error:
            layer = self._name_of(getattr(error, "layer", self))
            raise type(error)(f"layer {layer}: {error}" if layer else str(error)) from error

    def backward(self, dy, input_gradient=True):
        """dx for the upstream gradient dy of the last call (None unless input_gradient); adds parameters' gradients.

        dy is an ndarray of the output's shape and dtype, else ValueError or TypeError. ValueError also if no call has
        kept what is needed.
        """
        if self.runner.last is None:
            raise ValueError("backward() needs a call of the module before it, outside no_grad()")
        arrays.check("dy", dy)
        shape, dtype = self.runner.last.output
        if dy.shape != shape:
            raise ValueError(f"dy has shape {dy.shape}, the output had {shape}")
        if dy.dtype != dtype:
            raise TypeError(f"dy has dtype {dy.dtype}, the output had {dtype}")
        return self.runner.backward(self, dy, input_gradient)

    @property
    def runner(self):
        """What runs this module on NumPy arrays."""
        if "_runner" not in vars(self):
            self._runner = Runner()
        return self._runner

    def run(self, x, halo, **fused):
        """forward(), timed and reported if somebody observes. Containers run their layers with it."""
        with blamed(self):
            if _observer is None or self._is_container():
                y, backward = self.forward(x, halo, **fused)
            else:
                y, backward = self._observed(x, halo, fused)
        return y, backward if keeps() else None

    def _observed(self, x, halo, fused):
        start = time.perf_counter()
        y, backward = self.forward(x, halo, **fused)
        _observer(self, "forward", start, time.perf_counter(), y)

        def observed(*args, **options):
            start = time.perf_counter()
            dx = backward(*args, **options)
            if _observer is not None:
                # (dx, dadd) of a layer that also adds
                first = dx[0] if isinstance(dx, tuple) else dx
                _observer(self, "backward", start, time.perf_counter(), first)
            return dx

        return y, observed

    # ---- the tree

    def children(self):
        """(name, module) of the modules directly inside."""
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Module)]

    def _is_container(self):
        return bool(self.children())

    def named_modules(self, prefix="", _seen=None):
        """(name, module) of this module (name "") and all inside, in order; one used twice has its first name."""
        seen = set() if _seen is None else _seen
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name, seen)

    def _name_of(self, module):
        return next((f"{n!r} ({type(m).__name__})" for n, m in self.named_modules() if m is module and n), "")

    def named_parameters(self):
        """(name, Parameter) of all parameters, named as in PyTorch: "3.body.0.weight"; one used twice comes once."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{prefix}.{name}" if prefix else name, value

    def parameters(self):
        """The parameters, in the order of named_parameters()."""
        return [p for _, p in self.named_parameters()]

    def named_buffers(self):
        """(name, ndarray) of the state that is not trained, such as running means."""
        for prefix, module in self.named_modules():
            for name in module.buffers:
                yield f"{prefix}.{name}" if prefix else name, getattr(module, name)

    # ---- state

    def train(self, mode=True):
        """Set training mode, or evaluation mode if not `mode`, here and inside. Returns self."""
        for _, module in self.named_modules():
            module.training = bool(mode)
        return self

    def eval(self):
        """Set evaluation mode here and inside. Returns self."""
        return self.train(False)

    def zero_grad(self):
        """Drop all gradients, so that the next backward starts anew."""
        for p in self.parameters():
            p.grad = None

    def to(self, dtype):
        """Convert parameters and floating-point buffers to float32 or float64 in place. Returns self."""
        for p in self.parameters():
            p.to(dtype)
        for _, module in self.named_modules():
            for name in module.buffers:
                if getattr(module, name).dtype in arrays.DTYPES:
                    setattr(module, name, getattr(module, name).astype(dtype))
        return self

    def state_dict(self):
        """{name: dense copy} of parameters and buffers, with PyTorch's names."""
        state = {name: p.to_dense() for name, p in self.named_parameters()}
        return state | {name: b.copy() for name, b in self.named_buffers()}

    def set_parameter(self, name, parameter):
        """Put a Parameter in the place of the one of this name; KeyError if no module has such a name."""
        path, _, attribute = name.rpartition(".")
        setattr(dict(self.named_modules())[path], attribute, parameter)

    def load_state_dict(self, state):
        """Take the values of state_dict(). Nothing is changed if a key is missing or too many, a shape or dtype
        differs, or a weight that is not stored here is not zero: ValueError (KeyError for keys)."""
        parameters, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        wanted = parameters | buffers
        missing, unexpected = [k for k in wanted if k not in state], [k for k in state if k not in wanted]
        if missing or unexpected:
            raise KeyError(f"state_dict lacks {missing or 'nothing'} and has unexpected {unexpected or 'nothing'}")
        for name, value in state.items():
            here = wanted[name].data if name in parameters else wanted[name]
            shape = tuple(wanted[name].shape)
            if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != here.dtype:
                got = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
                raise ValueError(f"{name} is {got}, must be {here.dtype} {shape}")
            if name in parameters:
                parameters[name].check_dense(name, value)
        for name, value in state.items():
            if name in parameters:
                parameters[name].set_dense(value)
            else:
                buffers[name][...] = value

    def __getstate__(self):
        """For copies and other processes: they have not run."""
        return {name: value for name, value in vars(self).items() if name != "_runner"}

    def __repr__(self):
        inside = [f"({name}): {module!r}".replace("\n", "\n  ") for name, module in self.children()]
        body = "\n  " + "\n  ".join(inside) + "\n" if inside else self._arguments()
        return f"{type(self).__name__}({body})"

    def _arguments(self):
        """The constructor's arguments, for repr()."""
        return ""


def check_input(x, weight, ndim, channels, note=""):
    """ValueError, which ends with the note, or TypeError unless the Blocked x has this ndim, these channels and the
    dtype of the Parameter."""
    if x.ndim != ndim or x.shape[1] != channels:
        wanted = f"(N, {channels}, H, W)" if ndim == 4 else f"(N, {channels})"
        raise ValueError(f"x has shape {x.shape}, must be {wanted}{note}")
    if x.dtype != weight.data.dtype:
        raise TypeError(f"x has dtype {x.dtype}, the parameters have {weight.data.dtype}")
