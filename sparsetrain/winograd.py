"""Which products of dense 3x3 convolutions run with fewer multiply-adds: by tiles of 2 x 2 pixels (winograd.hh)."""

import math

from sparsetrain._kernels.core import MAX_RUN
from sparsetrain.choices import kept

RATE = 2.25  # multiply-adds of the sums over the taps for each that is left


def fits(kernel, geometry):
    """Whether a dense convolution of floats can run so."""
    steps = geometry.stride, geometry.dilation, geometry.groups
    return tuple(kernel) == (3, 3) and steps == ((1, 1), (1, 1), 1)


def tiles(extent):
    """How many of them an array of (blocks, height, width) has on each axis."""
    blocks, height, width = extent
    return blocks, -(-height // 2), -(-width // 2)


def _check(isa, about, says):
    if not 0 <= says["run"] <= MAX_RUN:
        raise ValueError(f"run is {says['run']}, must be in [0, {MAX_RUN}], 0 for sums over the taps")


@kept("winograd", about=("output", "rows", "channels", "times"), says=("run",), check=_check)
def choose_run(output, rows, channels, times):
    """How many tiles a run has, 0 where sums over the taps are faster. output: (blocks, height, width) of what is
    written, so many `times` with the same weights; rows: its channels."""
    # Cycles, at 0.92 and 0.88 of what the multipliers can do. To transform takes 113 to 144 a tile and channel, and 65
    # a weight where they leave L2 (nine layers of 16 to 512 channels, 2 cores of a Zen 5, AVX-512).
    n = times * math.prod(tiles(output))
    taps = 9 / 2 * rows * channels * times * math.prod(output) / 0.92
    transformed = 16 / 2 * rows * channels * n / 0.88 + 135 * n * (rows + channels) + 65 * rows * channels
    # Runs of 4 to 18 tiles take the same time within 4 %, longer ones leave L2: up to 1.3 times.
    return min(MAX_RUN, n) if transformed < 0.95 * taps else 0


@kept("winograd gradient", about=("output", "rows", "channels", "times"), says=("run",), check=_check)
def choose_gradient_run(output, rows, channels, times):
    """The same of a weight gradient, whose sums over so many outputs are transformed once."""
    # Cycles as above. To transform takes 60 a tile and channel, and the sixteen sums of a weight, zeroed, added up over
    # the tasks and transformed, 20 (22 layers of 3 to 512 channels, 2 cores of a Zen 3, AVX2, halved).
    n = times * math.prod(tiles(output))
    taps = 9 / 2 * rows * channels * times * math.prod(output) / 0.92
    transformed = 16 / 2 * rows * channels * n / 0.88 + 60 * n * (rows + channels) + 20 * rows * channels
    return min(MAX_RUN, n) if transformed < 0.95 * taps else 0


def task_tile(extent, run):
    """Tiles of a task on each axis, of `extent` in all: about a run of them."""
    _, rows, columns = extent
    if rows * columns <= run:
        return run // (rows * columns), rows, columns
    return 1, max(1, run // columns), columns
