"""Layers in a row, and a body with a shortcut around it.

A container gives each layer's output the halo that the next layer reads, so nothing is padded twice. Convolutions,
linear layers and batch norms do the ReLU after them in their own pass, batch norms a residual add too. The result is
that of the layers one by one.
"""

from contextlib import contextmanager

from sparsetrain import ops
from sparsetrain.nn.batchnorm import BatchNorm2d
from sparsetrain.nn.conv import Conv2d
from sparsetrain.nn.convnorm import ConvNorm
from sparsetrain.nn.module import Module
from sparsetrain.nn.relu import ReLU
from sparsetrain.normed import Normed
from sparsetrain.tape import eager

_fuses = True


@contextmanager
def unfused():
    """Within it, every layer runs by itself: the reference that the fused passes are tested against."""
    global _fuses
    before, _fuses = _fuses, False
    try:
        with eager():
            yield
    finally:
        _fuses = before


class Sequential(Module):
    """The layers one after the other; named "0", "1", ... Indexing and len() work as for a list."""

    replays = True

    def __init__(self, *layers):
        for i, layer in enumerate(layers):
            if not isinstance(layer, Module):
                raise TypeError(f"layer {i} is a {type(layer).__name__}, must be a Module")
        self.layers = tuple(layers)

    def children(self):
        return [(str(i), layer) for i, layer in enumerate(self.layers)]

    def _is_container(self):
        return True

    def __len__(self):
        return len(self.layers)

    def __getitem__(self, index):
        return Sequential(*self.layers[index]) if isinstance(index, slice) else self.layers[index]

    def __iter__(self):
        return iter(self.layers)

    halo = property(lambda self: self.layers[0].halo if self.layers else (0, 0))
    grad_halo = property(lambda self: self.layers[-1].grad_halo if self.layers else (0, 0))
    fuses_relu = property(lambda self: bool(self.layers) and self.layers[-1].fuses_relu)
    fuses_add = property(lambda self: bool(self.layers) and self.layers[-1].fuses_add)

    def steps(self):
        """(layer or ConvNorm, whether the ReLU after it runs with it)."""
        steps = []
        for layer in self.layers:
            before, relu = steps[-1] if steps else (None, False)
            if _fuses and type(layer) is ReLU and before and before.fuses_relu and not relu:
                steps[-1] = before, True
            elif _fuses and type(layer) is BatchNorm2d and type(before) is Conv2d and before.bias is None and not relu:
                steps[-1] = ConvNorm(before, layer), False
            else:
                steps.append((layer, False))
        return steps

    def forward(self, x, halo, **fused):
        steps = self.steps()
        if not steps:
            return x.with_halo(halo), lambda dy, halo: dy.with_halo(halo or (0, 0))
        backwards = []
        for i, (layer, relu) in enumerate(steps):
            last = i + 1 == len(steps)
            options = {"relu": True} if relu else {}
            x, backward = layer.run(x, halo if last else steps[i + 1][0].halo, **options, **(fused if last else {}))
            backwards.append(backward)
        layers = [layer for layer, _ in steps]

        def backward(dy, halo, add_halo=None, into=None):
            """With add_halo: (dx, dadd), as of BatchNorm2d; dx alone, added to into(dadd), if that is given too."""
            wanted = _gradient_halos(layers, halo)
            dadd = target = None
            first = _first_to_train(layers) if halo is None and into is None else 0
            if first:
                wanted[first:] = [None, *wanted[first + 1 :]][: len(layers) - first]
            for i in reversed(range(first, len(layers))):
                if i == 0 and into is not None and len(layers) > 1:
                    target = into(dadd)
                options = {"into": target} if target is not None and layers[0].fuses_into else {}
                if add_halo is not None and i + 1 == len(layers):
                    dy, dadd = backwards[i](dy, wanted[i], add_halo, **options)
                else:
                    dy = backwards[i](dy, wanted[i], **options)
                backwards[i] = None  # what it kept is free for the gradients to come
            if into is None:
                dy = None if first else dy
                return dy if add_halo is None else (dy, dadd)
            if target is None:
                target = into(dadd)
            elif layers[0].fuses_into:
                return dy
            if halo is not None:
                ops.core.add(dy.array, target.array, target.array)
            return target

        return x, backward


def _first_to_train(layers):
    """How many layers at the beginning have no parameters: nobody needs their gradients."""
    for i, layer in enumerate(layers):
        if not isinstance(layer, Module) or next(layer.named_parameters(), None):
            return i
    return len(layers)


def _gradient_halos(layers, halo):
    """The halo that each layer's dx must have: what the layer before reads around it, and what that one's own dx
    must have if it is written into the same array. halo: of the first layer's dx, or None if that is not wanted."""
    wanted = [halo]
    for before in layers[:-1]:
        passed_on = (wanted[-1] or (0, 0)) if before.reuses_dy else (0, 0)
        wanted.append(tuple(map(max, before.grad_halo, passed_on)))
    return wanted


class Residual(Module):
    """body(x) + shortcut(x), or body(x) + x without a shortcut."""

    replays = True

    def __init__(self, body, shortcut=None):
        for name, module in (("body", body), ("shortcut", shortcut)):
            if not isinstance(module, Module) and not (name == "shortcut" and module is None):
                raise TypeError(f"{name} is a {type(module).__name__}, must be a Module")
        self.body, self.shortcut = body, shortcut

    @property
    def halo(self):
        other = self.shortcut.halo if self.shortcut else (0, 0)
        return tuple(max(pair) for pair in zip(self.body.halo, other, strict=True))

    @property
    def grad_halo(self):
        if _fuses and self.body.fuses_add:
            return self.body.grad_halo
        other = self.shortcut.grad_halo if self.shortcut else (0, 0)
        return tuple(max(pair) for pair in zip(self.body.grad_halo, other, strict=True))

    @property
    def fuses_relu(self):
        return _fuses and self.body.fuses_add

    def forward(self, x, halo, relu=False):
        fused = _fuses and self.body.fuses_add
        body = self.body if isinstance(self.body, Sequential) else Sequential(self.body)
        if isinstance(x, Normed):
            x.keep_for(self.halo)
        around, around_backward = self.shortcut.run(x.with_halo(self.halo), (0, 0)) if self.shortcut else (x, None)
        if fused:
            y, body_backward = body.run(x, halo, add=around, relu=relu)
        else:
            inner, body_backward = body.run(x, (0, 0))
            if inner.shape != around.shape:
                raise ValueError(f"body gives shape {inner.shape}, the shortcut {around.shape}")
            y = ops.add(inner, around, halo)
        around_halo = self.shortcut.grad_halo if self.shortcut else (0, 0)

        def backward(dy, halo):
            def around_dx(gradient):
                if around_backward is not None:
                    return around_backward(gradient, halo)
                return gradient if halo is None else gradient.with_halo(halo)

            if fused:
                wanted = tuple(map(max, halo or (0, 0), around_halo)) if around_backward is None else around_halo
                return body_backward(dy, halo, wanted, around_dx)
            own = dy.like(tuple(map(max, halo or (0, 0), around_halo)))
            ops.core.copy(dy.array, own.array)  # the body may write into dy
            dx, other = body_backward(dy, halo), around_dx(own)
            if halo is None:
                return None
            ops.core.add(dx.array, other.array, other.array)
            return other

        return y, backward
