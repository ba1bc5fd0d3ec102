"""The choice of tiles: which positions of a product stay in registers, and how many channels are met at once."""

import math
from itertools import product

from sparsetrain._kernels import core
from sparsetrain.choices import kept

# How much of x a tile may touch in one group of input channels before loads miss the L1 (of 48 KB) and the L2 (1 MB),
# and over how much more the share that misses rises to all.
L1_BYTES, L1_RISE = 32 << 10, 120 << 10
# The same L1 (of 32 KB) for dense tiles whose registers are parts of a line: they meet all lines of x once for each
# part, and sums of twelve registers stream through beside them. Nine dense layers in turn with the values above (Zen 3,
# AVX2): forward 0.94 of the time, input gradients 0.92; 3x3 layers with 256 channels 0.8, linear layers 0.9 to 1.0.
PARTS_L1 = 12 << 10, 30 << 10
L2_BYTES, L2_RISE = 600 << 10, 400 << 10
# The same for all groups together: past it what was fetched ahead has left the L2 before the tile uses it, since the
# sums of all rows and what is fetched for the next tile are there too.
AHEAD_BYTES, AHEAD_RISE = 80 << 10, 320 << 10

# Positions of a dense weight gradient's tile: what they have of dy, turned, stays in the caches. Its sums are loaded
# and stored for each, or, where outputs are few, are sums over the lanes.
GRADIENT_POSITIONS, FEW_POSITIONS = 32, 96

ORDERS = ((0, 1, 2), (1, 0, 2), (2, 1, 0))
_GRID = ("extent", "taps", "x_pixels")


def _is_compiled(r, w, limit):
    """Whether there is a kernel for tiles of r x w positions, as in product.hh."""
    return 1 <= r <= 4 and 1 <= w <= 16 and r * w <= limit and (w <= 8 or r <= 2)


def _check_order(says):
    if says["order"] not in ORDERS:
        raise ValueError(f"order is {says['order']}, must be one of {', '.join(map(str, ORDERS))}")


def _check_group(about, says):
    _check_order(says)
    if not 1 <= says["group"] <= about["channels"]:
        raise ValueError(f"group is {says['group']}, must be in [1, {about['channels']}], as there are channels")


def _check_tile(isa, about, says):
    _check_group(about, says)
    limits, (one, r, w) = core.tile_limits(isa), says["tile"]
    if about["limit"] not in limits:
        raise ValueError(f"limit is {about['limit']}, on {isa} it is one of {', '.join(map(str, limits))}")
    if one != 1 or not _is_compiled(r, w, about["limit"]):
        raise ValueError(
            f"tile is {says['tile']}, must be (1, R, W) with R <= 4, W <= 16, R * W <= {about['limit']}, "
            "and R <= 2 where W > 8"
        )


@kept(
    "tile",
    about=(*_GRID, "rows", "channels", "weights", "limit", "rows_at_once", "itemsize", "gradient"),
    says=("order", "tile", "group"),
    check=_check_tile,
)
def choose_tile(grid, rows, channels, weights, limit, rows_at_once, itemsize, gradient):
    """(order, tile, channels of a group) with the least estimated time.

    rows and channels are those of the output and the input of the product, weights its number of stored
    weights, limit the positions that the registers hold; gradient: whether it is that of the weights. order says which
    axes of `grid` the tile's are.
    """
    in_parts = rows_at_once > 1 and core.vector_lanes("float32") < 16
    groups = sorted({-(-channels // n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)})
    best = None
    for order in ORDERS:
        extent = [grid.extent[axis] for axis in order]
        for r, w in product(range(1, min(4, extent[1]) + 1), range(1, min(16, extent[2]) + 1)):
            if not _is_compiled(r, w, limit):
                continue
            size = dict(zip(order, (1, r, w), strict=True))
            # Rows and pixels of one input channel that the tile reads.
            lines, columns = ((size[i + 1] - 1) * grid.x_pixels[i] + grid.taps[i] for i in (0, 1))
            lines *= size[0]
            tiles = extent[0] * -(-extent[1] // r) * -(-extent[2] // w)
            positions = math.prod(extent) / tiles
            for group in groups:
                time = tiles * _tile_time(
                    positions,
                    r,
                    lines,
                    columns,
                    rows / rows_at_once,
                    channels,
                    group,
                    weights / rows_at_once,
                    rows_at_once,
                    itemsize,
                    gradient,
                    in_parts,
                )
                if best is None or time < best[0]:
                    best = time, order, (1, r, w), group
    return best[1:]


def _tile_time(
    positions, r, lines, columns, blocks, channels, group, entries, rows_at_once, itemsize, gradient, in_parts
):
    """Estimated cycles of a tile with r rows of positions, which reads lines x columns pixels of each input channel.

    blocks: of rows_at_once output rows; entries: in all of them together.

    The form is by reasoning; the factors are set by 17,000 timed tiles (up to 52 of each of 21 layers at sparsities
    from 0.5 to 0.98, forward and weight gradient; 2 cores of a Zen 5, AVX-512), once run over and over, once in turn
    with the layer's other tiles, whose weights push theirs out of the caches: the choice takes on average 1.04 and 1.02
    of the time of the best three. Dense products were not among them. in_parts: see PARTS_L1.
    """
    width = itemsize / 4
    multiply = entries * max(positions * rows_at_once * width / 2, 2.7)
    read_entries = entries * (0.5 + 0.3 * (r - 1) if gradient else 1.4 + 0.1 * (r - 1))
    runs = blocks * -(-channels // group)
    segments = runs * (1 - math.exp(-entries / runs))  # runs that have a weight at all
    unfinished = max(0.0, segments - blocks) * positions * rows_at_once * width
    touched = lines * columns * group * 16 * itemsize
    loads = entries * positions * width
    l1 = (L1_BYTES, L1_RISE)
    if in_parts:  # the taps of a run share what they miss
        l1, loads = PARTS_L1, min(loads, runs * lines * columns * group * width)
    misses = loads * (0.4 * _share(touched, *l1) + 1.5 * _share(touched, L2_BYTES, L2_RISE))
    late = _share(touched * channels / group, AHEAD_BYTES, AHEAD_RISE)
    # 28: short lines leave the prefetcher behind.
    read = channels * lines * (28 + columns * width * (0.2 + 8.8 * late))
    return multiply + read_entries + 16.5 * segments + 1.9 * unfinished + misses + read


def _share(size, begin, rise):
    return min(1.0, max(0.0, (size - begin) / rise))


def _check_dense_tile(isa, about, says):
    _check_order(says)
    one, r, w = says["tile"]
    rows, columns = (about["extent"][axis] for axis in says["order"][1:])
    if one != 1 or not (1 <= r <= rows and 1 <= w <= columns):
        raise ValueError(f"tile is {says['tile']}, must be (1, R, W) with R <= {rows}, W <= {columns}")


@kept("dense gradient tile", about=(*_GRID, "few"), says=("order", "tile"), check=_check_dense_tile)
def dense_gradient_tile(grid, few):
    """(order, tile) of a dense weight gradient: rows of positions, or those of several images where there are few. few:
    whether output channels or weights of one are (plans.py)."""
    blocks, rows, columns = grid.extent
    limit = FEW_POSITIONS if few else GRADIENT_POSITIONS
    order = (0, 1, 2) if blocks == 1 or rows * columns >= limit else (1, 0, 2) if columns > 1 else (2, 1, 0)
    extent = [grid.extent[axis] for axis in order]
    w = -(-extent[2] // -(-extent[2] // limit))
    return order, (1, max(1, min(extent[1], limit // w)), w)
