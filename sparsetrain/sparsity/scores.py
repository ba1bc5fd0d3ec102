"""Which weights are worth keeping: each function gives every stored weight of a layer a score, higher is better."""

import numpy as np

from sparsetrain import rng


def magnitude(parameter):
    """The absolute value."""
    return np.abs(parameter.data)


def random(parameter):
    """A random number, from manual_seed()'s generator."""
    return rng.generator().random(parameter.data.shape)
