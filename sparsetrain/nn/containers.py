"""Layers in a row, and a body with a shortcut around it.

A container gives each layer's output the halo that the next layer reads, so nothing is padded twice, and lets a
batch norm do a ReLU and a residual add in its own pass. The result is that of the layers one by one.
"""

from sparsetrain import ops
from sparsetrain.nn.module import Module
from sparsetrain.nn.relu import ReLU


class Sequential(Module):
    """The layers one after the other; named "0", "1", ... Indexing and len() work as for a list."""

    def __init__(self, *layers):
        for i, layer in enumerate(layers):
            if not isinstance(layer, Module):
                raise TypeError(f"layer {i} is a {type(layer).__name__}, must be a Module")
        self.layers = list(layers)

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

    def _steps(self):
        """(layer, whether the ReLU after it runs with it)."""
        steps = []
        for layer in self.layers:
            if type(layer) is ReLU and steps and steps[-1][0].fuses_relu and not steps[-1][1]:
                steps[-1] = steps[-1][0], True
            else:
                steps.append((layer, False))
        return steps

    def forward(self, x, halo, **fused):
        steps = self._steps()
        if not steps:
            return x.with_halo(halo), lambda dy, halo: dy.with_halo(halo or (0, 0))
        backwards = []
        for i, (layer, relu) in enumerate(steps):
            last = i + 1 == len(steps)
            options = {"relu": True} if relu else {}
            x, backward = layer.run(x, halo if last else steps[i + 1][0].halo, **options, **(fused if last else {}))
            backwards.append(backward)
        # A layer's backward reads dy with its own halo; the gradient that it makes has the one of the layer before.
        halos = [layer.grad_halo for layer, _ in steps[:-1]]

        def backward(dy, halo, *add_halo):
            dadd = None
            for i in reversed(range(len(backwards))):
                wanted = halos[i - 1] if i else halo
                if add_halo and i + 1 == len(backwards):
                    dy, dadd = backwards[i](dy, wanted, *add_halo)
                else:
                    dy = backwards[i](dy, wanted)
                backwards[i] = None  # what it kept is free for the gradients to come
            return (dy, dadd) if add_halo else dy

        return x, backward


class Residual(Module):
    """body(x) + shortcut(x), or body(x) + x without a shortcut."""

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
        if self.body.fuses_add:
            return self.body.grad_halo
        other = self.shortcut.grad_halo if self.shortcut else (0, 0)
        return tuple(max(pair) for pair in zip(self.body.grad_halo, other, strict=True))

    @property
    def fuses_relu(self):
        return self.body.fuses_add

    def forward(self, x, halo, relu=False):
        fused = self.body.fuses_add
        around, around_backward = self.shortcut.run(x, (0, 0)) if self.shortcut else (x, None)
        if fused:
            y, body_backward = self.body.run(x, halo, add=around, relu=relu)
        else:
            body, body_backward = self.body.run(x, (0, 0))
            if body.shape != around.shape:
                raise ValueError(f"body gives shape {body.shape}, the shortcut {around.shape}")
            y = ops.add(body, around, halo)
        around_halo = self.shortcut.grad_halo if self.shortcut else (0, 0)

        def backward(dy, halo):
            if fused:
                dx, around = body_backward(dy, halo, around_halo)
            else:
                dx, around = body_backward(dy, halo), dy
            if around_backward is not None:
                around = around_backward(around, None if halo is None else (0, 0))
            if halo is None:
                return None
            # dx is this function's own unless the body passed dy on
            result = dx if dx is not dy else dx.like(halo)
            ops.core.add(dx.array, around.array, result.array)
            return result

        return y, backward
