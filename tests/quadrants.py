"""A data set that a small net learns in seconds."""

import numpy as np


def images(n, seed=0):
    """Noisy 8x8 images whose label is the bright quadrant, 0 to 3."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    x = rng.standard_normal((n, 1, 8, 8)).astype(np.float32)
    for image, label in zip(x, y, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.5
    return x, y
