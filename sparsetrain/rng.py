"""The random numbers of initialisation and dropout: one generator, seeded by manual_seed()."""

import numpy as np

from sparsetrain import checks

_generator = np.random.default_rng()


def manual_seed(seed):
    """Restart the random numbers of initialisation and dropout from `seed`, an int >= 0."""
    global _generator
    _generator = np.random.default_rng(checks.integer("seed", seed, low=0))


def generator():
    """The numpy Generator in use; its `bit_generator.state` can be saved and set."""
    return _generator
