"""Which weights are worth keeping: each function gives every stored weight of a layer a score, higher is better.

Those WITH_GRADIENTS look at a model and batches first, and give such a function; the scores are formed in the
arrays of gradients.
"""

import math

import numpy as np

from sparsetrain import nn, rng

WITH_GRADIENTS = ("snip", "grasp")


def magnitude(parameter):
    """The absolute value."""
    return np.abs(parameter.data)


def random(parameter):
    """A random number, from manual_seed()'s generator."""
    return rng.generator().random(parameter.data.shape)


def snip(model, weights, batches, loss=None):
    """|g w|: how much the loss changes, to first order, without the weight.

    Source: Lee, Ajanthan & Torr, SNIP, ICLR 2019, arXiv 1810.02340, equation 5, with the sum of the gradients of the
    batches; dividing by the sum of all scores, as there, changes no order.
    """
    _gradients(model, batches, loss or nn.cross_entropy, 1.0)
    found = {id(w): np.abs(np.multiply(w.grad, w.data, out=w.grad), out=w.grad) for w in weights}
    model.zero_grad()
    return lambda parameter: found.pop(id(parameter))


def grasp(model, weights, batches, loss=None, temperature=200.0, reach=0.1):
    """w H g: how much of the squared gradient norm is lost, to first order, without the weight.

    Source: Wang, Zhang & Grosse, GraSP, ICLR 2020, arXiv 2002.07376, equation 8 (there the score is its negative, and
    the largest are removed), outputs divided by the temperature as in its code. H g is not differentiated but the
    difference of the gradients at w + e g and w - e g, divided by 2 e; e g has `reach` times the norm of w.
    """
    loss = loss or nn.cross_entropy
    _gradients(model, batches, loss, temperature)
    steps = [w.grad.copy() for w in weights]
    norms = [
        np.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays))
        for arrays in (steps, [w.data for w in weights])
    ]
    e = reach * norms[1] / norms[0] if norms[0] > 0 else 0.0
    kept = [w.data for w in weights]
    curved = [np.zeros_like(w.data) for w in weights]
    try:
        for sign in (1, -1):
            for w, data, g in zip(weights, kept, steps, strict=True):
                w.data = data + w.data.dtype.type(sign * e) * g
            _gradients(model, batches, loss, temperature)
            for c, w in zip(curved, weights, strict=True):
                (np.add if sign > 0 else np.subtract)(c, w.grad, out=c)
    finally:
        for w, data in zip(weights, kept, strict=True):
            w.data = data
        model.zero_grad()
    found = {id(w): np.multiply(w.data, c, out=c) for w, c in zip(weights, curved, strict=True)}
    return lambda parameter: found.pop(id(parameter))


def _gradients(model, batches, loss, temperature):
    """Leaves the sum of the batches' gradients in the model's parameters; batch-norm statistics stay as they are, and
    so does the generator, so that Dropout leaves out the same each time."""
    if not batches:
        raise ValueError("batches is empty, must hold at least one (x, y)")
    buffers = {name: buffer.copy() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for _, module in model.named_modules()]
    generator = rng.generator().bit_generator
    state = generator.state
    model.zero_grad()
    model.train()
    try:
        for x, y in batches:
            value, gradient = loss(model(x) / np.dtype(x.dtype).type(temperature), y)
            if not math.isfinite(value):
                raise ValueError(f"the loss of a batch is {value}: its gradients say nothing of the weights")
            model.backward(gradient / gradient.dtype.type(temperature), input_gradient=False)
    finally:
        generator.state = state
        for name, buffer in model.named_buffers():
            buffer[...] = buffers[name]
        for module, training in modes:
            module.training = training
