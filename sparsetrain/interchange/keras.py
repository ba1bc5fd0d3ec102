"""Weights as Keras lays them out."""

import numpy as np

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

    Kernels: (height, width, in, out) to (out, in, height, width), (in, out) to (out, in). flattened: {layer: (height,
    width, channels)} of dense layers that read a flattened image, whose features Keras has in that order. ValueError
    for a name of another kind, such as of depthwise or recurrent layers.
    """
    found = {}
    for name, array in state.items():
        layer, _, kind = name.removesuffix(":0").replace("/", ".").rpartition(".")
        if kind not in KINDS:
            raise ValueError(f"{name} is of kind {kind!r}, must be one of {', '.join(KINDS)}")
        if kind == "kernel":
            if array.ndim not in (2, 4):
                raise ValueError(f"{name} has shape {array.shape}, must have 2 or 4 axes")
            if array.ndim == 2 and flattened and layer in flattened:
                height, width, channels = flattened[layer]
                array = array.reshape(height, width, channels, -1).transpose(2, 0, 1, 3).reshape(array.shape)
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        found[f"{layer}.{KINDS[kind]}"] = np.ascontiguousarray(array)
    return found
