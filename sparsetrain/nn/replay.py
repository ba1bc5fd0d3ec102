"""How a module runs on NumPy arrays: its layers, or, once a step is as the one before, the calls that it came to.

The first call of a kind runs the layers. So does the second, and what it and its backward pass call of the kernels is
recorded (tape.py). From the third on these calls are made again, without the layers, as long as nothing changes that
they depend on: shape and dtype of x, the modules and what they hold, which arrays the parameters are and which weights
are stored, the instruction set, the planner's choices. Results are the same bits.

A backward pass that is not as it was recorded needs the layers' forward pass again. It reads the weights of now, so
between forward and backward, unlike between steps, no values may change in place.
"""

import sys
import threading
from contextlib import contextmanager
from itertools import chain
from operator import is_

from sparsetrain import arrays, choices
from sparsetrain._kernels import core
from sparsetrain.tape import Tape, allowed

TRIES = 3  # recordings in a row that came to nothing, after which a module is not recorded any more

_keep = True  # whether forward keeps what backward needs


@contextmanager
def no_grad():
    """Within it, forward keeps nothing for backward."""
    global _keep
    before, _keep = _keep, False
    try:
        yield
    finally:
        _keep = before


def keeps():
    """Whether forward keeps what backward needs."""
    return _keep


class Runner:
    """Runs one module. `last`: the call that its backward pass belongs to, None if that is done or there is none."""

    def __init__(self):
        self.last = None
        self._seen = self._step = None  # the _State of the last call whose layers ran; the _Step to replay
        self._tries = 0

    def forward(self, module, x):
        """The module's output for x, an ndarray."""
        arrays.check("x", x)
        call = self._next(module, x) if _keep and allowed() else _Call()
        y = call.forward(module, x)
        self.last = call if _keep else None
        return y

    def _next(self, module, x):
        """The call to make: the recorded one, one to record, or one of the layers alone."""
        about = x.shape, x.dtype, _where()
        step, seen = self._step, self._seen
        if step is not None and step.state.about == about:
            if step.state.holds(module):
                self._seen = None  # a batch of another size now and then does not become the recorded one
                return step
            self._step = None
        if seen is None or seen.about != about or not seen.holds(module):
            self._seen = _State(module, about)
        elif seen.records and self._tries < TRIES:
            self._tries += 1
            return _Recording(seen)
        return _Call()

    def backward(self, module, dy, input_gradient):
        """dx of the last call, None unless input_gradient."""
        call, self.last = self.last, None
        if isinstance(call, _Step):
            if call.goes_on(module, input_gradient):
                self._tries = 0
            else:
                self._step, call = None, call.run_again(module)
        dx = call.backward(module, dy, input_gradient)
        if isinstance(call, _Recording):
            self._step = call.step()
        return dx


def _where():
    """What the calls of a step depend on outside of the module and x, and whose they are."""
    return core.get_isa(), choices.edition(), threading.get_ident()


class _State:
    """What the calls of a step depend on, but the values in arrays; compared by identity."""

    def __init__(self, module, about):
        self.about = about
        modules = [m for _, m in module.named_modules()]
        self.attributes = [vars(m) for m in modules[1:]]  # the module's own hold the Runner, which holds this
        self.values = self._values(module)
        self.parameters = [(p, p.data, p.structure) for p in module.parameters()]
        self.records = all(map(_replays, modules))  # what changes in place would not be seen

    def _values(self, module):
        own = [value for name, value in vars(module).items() if name != "_runner"]
        return own + list(chain.from_iterable(map(dict.values, self.attributes)))

    def holds(self, module):
        """Whether the modules and their parameters are as they were."""
        values = self._values(module)
        same = len(values) == len(self.values) and all(map(is_, values, self.values))
        return same and all(p.data is data and p.structure is structure for p, data, structure in self.parameters)


def _replays(module):
    """Whether what a module does in training is the same in every step, as far as the module itself can tell."""
    kind, attributes = type(module), vars(module)
    plain = not any(isinstance(v, list | dict | set) or callable(getattr(kind, n, None)) for n, v in attributes.items())
    watched = any(getattr(module, name, None) is not None for name in ("backprop", "probe"))
    return vars(kind).get("replays", False) and module.training and plain and not watched


class _Call:
    """A call of a module that runs its layers."""

    def forward(self, module, x):
        y, self.back = module.run(arrays.pack(x, module.halo), (0, 0))
        self.output = y.shape, y.dtype
        return arrays.unpack(y)

    def backward(self, module, dy, input_gradient):
        back, self.back = self.back, None
        dx = back(arrays.pack(dy, module.grad_halo), (0, 0) if input_gradient else None)
        return arrays.unpack(dx) if input_gradient else None


class _Recording:
    """A call of a module that runs its layers, and records what they call of the kernels."""

    def __init__(self, state):
        self.state, self.forward_tape, self.backward_tape = state, Tape(), Tape()

    def forward(self, module, x):
        self.x = arrays.pack(x, module.halo)
        with self.forward_tape.recording():
            y, self.back = module.run(self.x, (0, 0))
            y = y.with_halo((0, 0))  # a Normed is written here
        self.y, self.output = self.forward_tape.blocked(y), (y.shape, y.dtype)
        return arrays.unpack(y)

    def backward(self, module, dy, input_gradient):
        self.anew = all(p.grad is None for p, *_ in self.state.parameters)
        dy = arrays.pack(dy, module.grad_halo)
        self.dy, self.dx = self.backward_tape.blocked(dy), None
        back, self.back = self.back, None
        with self.backward_tape.recording():
            dx = back(dy, (0, 0) if input_gradient else None)
        if not input_gradient:
            return None
        self.dx = self.backward_tape.blocked(dx)
        return arrays.unpack(dx)

    def step(self):
        """The _Step to replay, once nothing else uses the memory of this one; None if that cannot be."""
        tapes = self.forward_tape, self.backward_tape
        memory = None
        if self.anew and all(tape.whole for tape in tapes):
            used = set.union(*(tape.memory for tape in tapes))
            memory = arrays.Taken(used - {arrays.memory_of(self.x.array)})
        self.state.records = memory is not None and memory.whole
        return _Step(self, memory) if self.state.records else None


class _Step:
    """A recorded call and its backward pass, to be made again."""

    def __init__(self, recording, memory):
        self.state, self.output = recording.state, recording.output
        self._x, self._y, self._dy, self._dx = recording.x, recording.y, recording.dy, recording.dx
        self._forward, self._backward = recording.forward_tape, recording.backward_tape
        self._memory = memory  # that the calls write to is theirs as long as the step is here
        self._gradients = [(p, p.grad) for p, *_ in self.state.parameters if p.grad is not None]
        self._references = self._count_references()

    def _count_references(self):
        """Those to the arrays of gradients, but from the parameters."""
        return [sys.getrefcount(a) - (p.grad is a) - (p._buffer is a) for p, a in self._gradients]

    def forward(self, module, x):
        arrays.pack(x, into=self._x)
        self._forward.play()
        return arrays.unpack(self._y)

    def goes_on(self, module, input_gradient):
        """Whether the backward pass is as it was recorded: gradients begin anew, in arrays that nobody else holds."""
        anew = all(p.grad is None for p, *_ in self.state.parameters) and self._count_references() == self._references
        same = input_gradient == (self._dx is not None) and self.state.about[-1] == _where()
        return anew and same and self.state.holds(module)

    def backward(self, module, dy, input_gradient):
        arrays.pack(dy, into=self._dy)
        self._backward.play()
        for parameter, array in self._gradients:
            parameter.grad = parameter._buffer = array
        return arrays.unpack(self._dx) if input_gradient else None

    def run_again(self, module):
        """The _Call of the same x, with its layers, in training; no trace is left but what its backward pass needs."""
        global _keep
        call = _Call()
        modes = [(m, m.training) for _, m in module.named_modules()]
        buffers = [(buffer, buffer.copy()) for _, buffer in module.named_buffers()]
        before, _keep = _keep, True
        try:
            module.train()
            _, call.back = module.run(self._x, (0, 0))
        finally:
            _keep = before
            for m, training in modes:
                m.training = training
            for buffer, values in buffers:
                buffer[...] = values
        return call
