"""Weights as Keras lays them out."""

import math

import numpy as np

from sparsetrain import checks

# What follows the last slash or dot of a name, in Keras and here
KINDS = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def from_keras(state, flattened=None):
    """{name: array} with our axes and names, of one in Keras's: "conv2d/kernel" becomes "conv2d.weight".

    Kernels: (height, width, in, out) to (out, in, height, width), (in, out) to (out, in). flattened: {our
    name: (height, width, channels)} of dense layers that read a flattened image, whose features Keras has in that
    order. ValueError for a name of another kind, such as of depthwise or recurrent layers.
    """
    found, images = {}, dict(flattened or {})
    for name, array in state.items():
        layer, _, kind = name.removesuffix(":0").replace("/", ".").rpartition(".")
        if kind not in KINDS:
            raise ValueError(f"{name} is of kind {kind!r}, must be one of {', '.join(KINDS)}")
        if kind == "kernel":
            if array.ndim not in (2, 4):
                raise ValueError(f"{name} has shape {array.shape}, must have 2 or 4 axes")
            if array.ndim == 2 and layer in images:
                image = [checks.integer(f"flattened[{layer!r}]", n, low=1) for n in images.pop(layer)]
                if len(image) != 3 or math.prod(image) != len(array):
                    raise ValueError(
                        f"flattened[{layer!r}] is {image}, must be (height, width, channels) of {len(array)} inputs"
                    )
                array = array.reshape(*image, -1).transpose(2, 0, 1, 3).reshape(array.shape)
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        found[f"{layer}.{KINDS[kind]}"] = np.ascontiguousarray(array)
    if images:
        raise ValueError(f"flattened has {next(iter(images))!r}, which is no dense layer of the state")
    return found
