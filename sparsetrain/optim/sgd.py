"""What every optimiser shares, and stochastic gradient descent."""

import numpy as np

from sparsetrain import checks
from sparsetrain._kernels import core
from sparsetrain.sparse import Parameter


class Optimizer:
    """The parameters, the learning rate and the saved state of an optimiser.

    params: an iterable of Parameter, or of (name, Parameter) as `model.named_parameters()` gives
    them. A parameter whose grad is None is left as it is. Optimiser arrays live in
    `Parameter.slots`, shaped as `Parameter.data`: nnz long where the parameter is sparse.

    A subclass lists its settings besides `lr` and its slots, and writes `update`.
    """

    settings = ()
    slots = ()

    def __init__(self, params, lr):
        self.names, self.params = _named(params)
        self.steps = [0] * len(self.params)  # a parameter without gradient does not count a step
        self.lr = lr

    @property
    def lr(self):
        """The learning rate, a float >= 0; set it at any time."""
        return self._lr

    @lr.setter
    def lr(self, lr):
        self._lr = checks.number("lr", lr, low=0.0)

    def step(self):
        """Update every parameter that has a gradient, in place."""
        moving = [(i, parameter) for i, parameter in enumerate(self.params) if parameter.grad is not None]
        for i, parameter in moving:
            _check_gradient(self.names[i], parameter)
        slots = self.slots_of_now()
        rows = [(p.data, np.ascontiguousarray(p.grad), *[self.slot(p, name) for name in slots]) for _, p in moving]
        self.update(rows, [self.steps[i] + 1 for i, _ in moving])
        for i, _ in moving:
            self.steps[i] += 1

    def slots_of_now(self):
        """The slots that a step needs with the settings of now."""
        return self.slots

    def update(self, rows, steps):
        """Update parameters in place: of each a row (data, gradient, *slots_of_now()) and its step, counted from 1."""
        raise NotImplementedError(f"{type(self).__name__} has no update()")

    def zero_grad(self):
        """Set every gradient to None."""
        for parameter in self.params:
            parameter.grad = None

    def slot(self, parameter, name):
        """The parameter's optimiser array of this name; zeros when it is new."""
        if name not in parameter.slots:
            parameter.slots[name] = np.zeros_like(parameter.data)
        return parameter.slots[name]

    def state_dict(self):
        """Settings, steps taken, and copies of all slots, by parameter name."""
        return {
            "settings": {name: getattr(self, name) for name in ("lr", *self.settings)},
            "steps": list(self.steps),
            "slots": {
                name: {slot: array.copy() for slot, array in self._own_slots(parameter)}
                for name, parameter in zip(self.names, self.params, strict=True)
            },
        }

    def load_state_dict(self, state):
        """Take over what `state_dict()` gave. ValueError, and no change, if it does not fit."""
        if set(state["settings"]) != {"lr", *self.settings}:
            raise ValueError(
                f"state has the settings {sorted(state['settings'])}, {type(self).__name__} "
                f"has {sorted(('lr', *self.settings))}"
            )
        if list(state["slots"]) != self.names:
            raise ValueError(
                f"state is of the parameters {list(state['slots'])}, {type(self).__name__} has {self.names}"
            )
        for name, parameter in zip(self.names, self.params, strict=True):
            for slot, array in state["slots"][name].items():
                if slot not in self.slots or array.shape != parameter.data.shape:
                    raise ValueError(
                        f"state of {name}: slot {slot!r} has shape {array.shape}, "
                        f"wanted one of {self.slots} with shape {parameter.data.shape}"
                    )
        steps = [checks.integer("steps of state", n, low=0) for n in state["steps"]]
        if len(steps) != len(self.params):
            raise ValueError(f"state has the steps of {len(steps)} parameters, wanted those of {len(self.params)}")
        checked = type(self)(zip(self.names, self.params, strict=True), **state["settings"])
        for setting in state["settings"]:
            setattr(self, setting, getattr(checked, setting))
        self.steps = steps
        for name, parameter in zip(self.names, self.params, strict=True):
            for slot in self.slots:
                parameter.slots.pop(slot, None)
            for slot, array in state["slots"][name].items():
                parameter.slots[slot] = array.astype(parameter.data.dtype)

    def _own_slots(self, parameter):
        return [(slot, parameter.slots[slot]) for slot in self.slots if slot in parameter.slots]

    def __repr__(self):
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in ("lr", *self.settings))
        return f"{type(self).__name__}({len(self.params)} parameters, {settings})"


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, Nesterov's momentum and weight decay.

        d = grad + weight_decay * w;  v = momentum * v + d (the first v is d)
        w -= lr * (d + momentum * v if nesterov else v)

    Source: torch.optim.SGD with dampening 0. The slot is "momentum" (v).
    """

    settings = ("momentum", "nesterov", "weight_decay")
    slots = ("momentum",)

    def __init__(self, params, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
        super().__init__(params, lr)
        self.momentum = checks.fraction("momentum", momentum)
        self.nesterov = checks.flag("nesterov", nesterov)
        self.weight_decay = checks.number("weight_decay", weight_decay, low=0.0)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov is True and momentum is 0, nesterov needs a momentum > 0")

    def slots_of_now(self):
        return self.slots if self.momentum else ()

    def update(self, rows, steps):
        core.sgd_step(rows, self.lr, self.momentum, self.nesterov, self.weight_decay)


def _named(params):
    if isinstance(params, Parameter):
        raise TypeError("params is one Parameter, must be an iterable of them")
    pairs = [p if isinstance(p, tuple) else (str(i), p) for i, p in enumerate(params)]
    if not pairs:
        raise ValueError("params is empty, must hold at least one Parameter")
    seen, names = {}, set()
    for name, parameter in pairs:
        if not isinstance(parameter, Parameter):
            raise TypeError(f"params[{name!r}] is a {type(parameter).__name__}, not a Parameter")
        if id(parameter) in seen:
            raise ValueError(f"params holds one Parameter twice, as {seen[id(parameter)]} and {name}")
        if name in names:
            raise ValueError(f"params holds two Parameters named {name}")
        seen[id(parameter)] = name
        names.add(name)
    return [name for name, _ in pairs], [parameter for _, parameter in pairs]


def _check_gradient(name, parameter):
    data, grad = parameter.data, parameter.grad
    if grad.shape != data.shape or grad.dtype != data.dtype:
        raise ValueError(
            f"the gradient of {name} is {grad.dtype} {grad.shape}, must be {data.dtype} {data.shape} as its data"
        )
    if not data.flags.c_contiguous:  # a flat view of it would be a copy
        raise ValueError(f"the data of {name} is not contiguous, must be in C order")
