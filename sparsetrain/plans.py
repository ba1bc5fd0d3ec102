"""How a convolution runs: the offsets of its weights, the tiles, and the order in which both are met.

A linear layer is a 1x1 convolution of a 1x1 image. Three products with the stored weights make a layer:
forward, input gradient (the transposed, flipped weights over dy; with stride s, each of the s x s phases of dx
has its own taps) and weight gradient. Nothing here depends on the number of threads, so no result does.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from sparsetrain import winograd
from sparsetrain._kernels import core
from sparsetrain._kernels.core import FIRST, LAST, OUTPUTS, ROWS_AT_ONCE, STEPS
from sparsetrain.choices import kept
from sparsetrain.tiles import L2_BYTES, choose_tile, dense_gradient_tile

TASKS = 16  # at least, where the shape allows: enough for 8 threads to share evenly
# Output channels of a chunk of a dense weight gradient, and input channels with winograd.hh: its sums stay in L2.
BLOCK = 64


class Geometry(NamedTuple):
    """The arguments of a convolution, each a pair (vertical, horizontal), and its groups."""

    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    groups: int = 1

    def reach(self, kernel):
        """Distance in pixels between the first and the last tap."""
        (vertical, horizontal), (height, width) = self.dilation, kernel
        return vertical * (height - 1), horizontal * (width - 1)

    def output(self, kernel, height, width):
        """Height and width of the output; 0 or less where the kernel is larger than the padded input."""
        (down, right), (above, beside), (below, across) = self.stride, self.padding, self.reach(kernel)
        return (height + 2 * above - below - 1) // down + 1, (width + 2 * beside - across - 1) // right + 1

    def reads_in_step(self, kernel):
        """Whether each row of the input is read by the output row of its number, and no output row lies too low."""
        return self.stride[0] == 1 and self.padding[0] <= self.reach(kernel)[0]

    def grad_halo(self, kernel):
        """Zero pixels that the input gradient reads around dy."""
        return tuple(
            max(0, -(-(r - p) // s)) for r, p, s in zip(self.reach(kernel), self.padding, self.stride, strict=True)
        )


@dataclass(frozen=True)
class Grid:
    """The positions of a product: how many on each axis (image block, row, column), and how x and y step."""

    extent: tuple
    taps: tuple  # rows and columns of x that the taps of one position span
    x_origin: tuple  # row and column of x, from its position, where the first of them lies
    x_pixels: tuple = (1, 1)  # rows and columns of x from one position to the next
    y_pixels: tuple = (1, 1)
    y_origin: tuple = (0, 0)

    def about(self):
        """What the choice of a tile depends on."""
        return self.extent, self.taps, self.x_pixels


def strides(blocked):
    """Elements between blocks, channels and rows."""
    return tuple(s // blocked.array.itemsize for s in blocked.array.strides[:3])


# ---- segments


def _segments(rows, groups, chunks, every_row=True):
    """Runs of entries of one row and one group of channels, sorted by chunk of rows, group and row.

    rows and groups: of each entry, rows ascending and groups ascending within a row. chunks: the row at which
    each chunk begins, and the end. Rows without entries get an empty run if every_row.
    Returns segments (n, 5), as in kernels.hh, and the bounds of the chunks in them, both int32.
    """
    n = len(rows)
    new = np.flatnonzero(np.r_[True, (np.diff(rows) != 0) | (np.diff(groups) != 0)]) if n else np.zeros(0, int)
    count = np.diff(np.r_[new, n])
    row, group = rows[new], groups[new]
    first = np.r_[True, np.diff(row) != 0] if n else np.zeros(0, bool)
    last = np.r_[np.diff(row) != 0, True] if n else np.zeros(0, bool)
    flags = FIRST * first + LAST * last
    empty = np.setdiff1d(np.arange(chunks[-1]), row) if every_row else np.zeros(0, int)
    blank = np.zeros(len(empty), int)
    row, group, new = np.r_[row, empty], np.r_[group, blank], np.r_[new, blank]
    count, flags = np.r_[count, blank], np.r_[flags, blank + (FIRST | LAST)]
    chunk = np.searchsorted(chunks, row, side="right") - 1
    order = np.lexsort((row, group, chunk))
    segments = np.stack([row, new, new, count, flags], axis=1)[order].astype(np.int32)
    return segments, np.searchsorted(chunk[order], np.arange(len(chunks))).astype(np.int32)


def _as_met(segments):
    """The order in which runs meet the entries; each run's first one becomes its place in that order, its value stays.

    Offsets are read one after the other so: lists that lie by rows, of which a group has some 100 bytes each, come in
    parts of lines from L2 and L3. 3x3 layers at 80 and 90 % take 0.86 to 0.99 of the time (2 threads, AVX-512).
    """
    first, count = segments[:, 1], segments[:, 3]
    met = np.cumsum(count) - count
    order = np.repeat(first - met, count) + np.arange(count.sum())
    segments[:, 1] = met
    return order


def _dense_segments(rows, groups, pieces):
    """The same of blocks of ROWS_AT_ONCE rows that have all the entries, groups ascending, cut into at most `pieces`
    chunks; and the block at which each chunk begins."""
    blocks, n = -(-rows // ROWS_AT_ONCE), len(groups)
    chunks = _cut_rows(np.full(blocks, n), pieces)
    segments, bounds = _segments(np.repeat(np.arange(blocks), n), np.tile(groups, blocks), chunks)
    segments[:, 0] *= ROWS_AT_ONCE
    segments[:, 1] %= max(n, 1)
    return segments, bounds, chunks


def _cut_rows(weights_of_row, pieces):
    """Where to cut rows into at most `pieces` chunks of about equal work: first rows, and the end."""
    work = np.cumsum(weights_of_row + 1.0)
    cuts = np.searchsorted(work, work[-1] * np.arange(1, pieces) / pieces) + 1
    return np.unique(np.r_[0, np.minimum(cuts, len(work)), len(work)])


def _plan(
    x, y, grid, tile, order, group, rows, rows_at_once, offsets, segments, chunks, first_value, n_values, parts,
    weights, places=None, row_step=0, run=0, run_tile=0, size=(0, 0), transform=(0, 0, False),
    columns=0, block=(0, 0),
):  # fmt: skip
    positions = math.prod(grid.extent)
    # A tile's first rows and columns of x are the last ones of the tiles before, and need not be fetched again; rows
    # only if all channels of them still lie in L2.
    rows_bytes = (
        x.array.itemsize * strides(x)[2] * x.array.shape[1] * (dict(zip(order, tile, strict=True))[1] + grid.taps[0])
    )
    known = [max(0, taps - pixels) for taps, pixels in zip(grid.taps, grid.x_pixels, strict=True)]
    if rows_bytes > L2_BYTES:
        known[0] = 0
    if run:
        known = [0, 0]
    return core.Plan(
        offsets=np.pad(offsets, (0, STEPS)).astype(np.int32),
        places=places,
        row_step=row_step,
        segments=segments,
        chunks=chunks,
        first_value=first_value,
        x_strides=strides(x),
        y_strides=strides(y),
        order=order,
        extent=[grid.extent[i] for i in order],
        tile=tile,
        x_pixels=grid.x_pixels,
        y_pixels=grid.y_pixels,
        y_origin=grid.y_origin,
        overlap=[taps - pixels - skip for taps, pixels, skip in zip(grid.taps, grid.x_pixels, known, strict=True)],
        x_origin=[first + skip for first, skip in zip(grid.x_origin, known, strict=True)],
        channels=x.array.shape[1],
        group=group,
        rows=rows,
        rows_at_once=rows_at_once,
        n_values=n_values,
        parts=parts,
        work=weights * positions * 16.0,
        run=run,
        run_tile=run_tile,
        size=size,
        transform=transform,
        columns=columns,
        block=block,
    )


@dataclass
class Pass:
    """One product: its plan, and which of the parameter's values are the plan's, None if they are in its order.

    transposed: None, or (outputs, inputs, taps) for those taps of a dense layer's weights with inputs before outputs.
    """

    plan: object
    source: np.ndarray | None = None
    transposed: tuple | None = None

    _sorted: np.ndarray | None = None  # kept from call to call, so that nothing is allocated

    def values(self, data):
        """The parameter's flat values in the order of the plan; the next call writes over them."""
        if self.source is None and self.transposed is None:
            return data
        if self._sorted is None or self._sorted.dtype != data.dtype:
            self._sorted = np.empty(self.plan.n_values, data.dtype)
        if self.transposed is None:
            core.collect_values(data, self.source, self._sorted, False)
        else:
            core.transpose_weights(data, *self.transposed, self._sorted)
        return self._sorted


def _spmm(x, y, grid, rows, channels, entry_row, entry_channel, offsets, source, row_step, n_values, tasks):
    """The Pass that writes y.

    entry_row: of each entry, ascending, and source its value, None for all of them in order. In a dense layer
    entry_row is None, every row has all the entries, and source says where their values lie in the first row,
    row_step before those of the next.
    """
    limit, _, dense_limit = core.tile_limits()
    dense = entry_row is None
    at_once = ROWS_AT_ONCE if dense else 1
    weights = len(offsets) * (rows if dense else 1)
    order, tile, group = choose_tile(
        grid, rows, channels, weights, dense_limit if dense else limit, at_once, x.array.itemsize, False
    )
    tiles = math.prod(-(-grid.extent[axis] // size) for axis, size in zip(order, tile, strict=True))
    pieces = -(-tasks // tiles)
    groups = entry_channel // group
    if dense:
        segments, bounds, _ = _dense_segments(rows, groups, pieces)
    else:
        segments, bounds = _segments(entry_row, groups, _cut_rows(np.bincount(entry_row, minlength=rows), pieces))
        met = _as_met(segments)
        offsets = offsets[met]
        if source is not None:  # the values are sorted anyway
            source, segments[:, 2] = source[met], segments[:, 1]
    plan = _plan(
        x, y, grid, tile, order, group, rows, at_once, offsets, segments, bounds, None, n_values, 1, weights,
        source if dense else None, row_step,
    )  # fmt: skip
    return Pass(plan, None if dense else source)


def _winograd(x, y, grid, rows, channels, transform, run, tasks):
    """The Pass that writes y, `run` tiles of 2 x 2 pixels at once; grid: of the pixels; transform: as of core.Plan."""
    extent = winograd.tiles(grid.extent)
    run = min(run, math.prod(extent))
    line = Grid((1, 1, run), (1, 1), (0, 0))
    _, (_, _, run_tile), group = choose_tile(
        line, rows, channels, rows * channels, core.tile_limits()[2], ROWS_AT_ONCE, x.array.itemsize, False
    )
    tile = winograd.task_tile(extent, run)
    tiles = math.prod(-(-n // size) for n, size in zip(extent, tile, strict=True))
    # Chunks of rows each transform all of x again.
    pieces = max(1, min(-(-tasks // tiles), rows // 32))
    places = np.arange(channels, dtype=np.int32)
    segments, bounds, _ = _dense_segments(rows, places // group, pieces)
    weights = 16 * rows * channels
    plan = _plan(
        x, y, Grid(extent, (4, 4), grid.x_origin, (2, 2), (2, 2)), tile, (0, 1, 2), group, rows, ROWS_AT_ONCE,
        places * ((run | 1) * 16), segments, bounds, None, weights, 1, weights, places, channels, run, run_tile,
        grid.extent[1:], transform,
    )  # fmt: skip
    return Pass(plan)


def _dense_gradient(x, dy, grid, rows, offsets, run, tasks):
    """The plan of a dense layer's weight gradient, `run` tiles of 2 x 2 pixels at once unless that is 0; offsets: of
    the entries of a row."""
    channels, size = x.array.shape[1], grid.extent[1:]
    if run:
        extent, columns, sums = winograd.tiles(grid.extent), channels, 16
        grid = Grid(extent, (4, 4), grid.x_origin, (2, 2), (2, 2))
        order, tile = (0, 1, 2), winograd.task_tile(extent, run)
    else:
        columns, sums = len(offsets), 1
        # Too few outputs for more than a register of them, or so few weights of each that sums take little cache.
        few = 2 * rows <= 3 * core.vector_lanes(x.array.dtype) or columns <= 32
        order, tile = dense_gradient_tile(grid, few)
    tiles = math.prod(-(-grid.extent[axis] // n) for axis, n in zip(order, tile, strict=True))
    across = -(-rows // BLOCK)
    down = max(-(-channels // BLOCK) if run else 1, min(-(-tasks // (across * tiles)), columns // 32))
    block = -(-columns // down), -(-rows // across // OUTPUTS) * OUTPUTS
    chunks, sums = -(-columns // block[0]) * across, sums * math.prod(block)
    weights = (16 if run else 1) * rows * columns
    bounds = np.arange(chunks + 1, dtype=np.int32)
    return _plan(
        x, dy, grid, tile, order, channels, rows, OUTPUTS, offsets, np.zeros((chunks, 5), np.int32), bounds,
        bounds * sums, chunks * sums, max(1, min(tasks // chunks, tiles)), weights, run=run, size=size, columns=columns,
        block=block,
    )  # fmt: skip


# ---- the three products of a layer

# Below this sparsity the dense kernels are faster, zeros and all (2 threads, forward and backward). Linear layers break
# even between 0.4 (784 to 1024, batch 128) and 0.58 (2048 to 512, batch 32; AVX-512); convolutions whose dense kernels
# sum over the taps between 0.2 and 0.37 (1x1); those that winograd.hh transforms at 0.43 with 32 channels, and between
# 0.5 (64 on 8x8 maps) and 0.62 (128) with 64 to 512 (AVX2).
NEARLY_DENSE_LINEAR, NEARLY_DENSE_CONVOLUTION, NEARLY_DENSE_WINOGRAD, NEARLY_DENSE_WIDE = 0.48, 0.3, 0.43, 0.54


# From so many positions on, of 16 images each, a dense layer's input gradient reads a copy of its weights, inputs
# before outputs: in the parameter four rows' weights of an entry are a few bytes of one line or of four. Input
# gradients of a 3x3 layer with stride 2 take 0.74 of the time, 1x1 ones 0.9, linear ones 0.86 at 16 positions and 1.05
# at 8 (2 threads, AVX2).
TRANSPOSED_FROM = 16


def is_transformed(shape, geometry):
    """Whether the dense kernels for a weight of this shape are those of winograd.hh, unless images are tiny."""
    return winograd.fits(shape[2:], geometry) and min(shape[:2]) >= 32


def is_nearly_dense(structure, channels, geometry=None):
    """Whether so few weights are removed that the dense kernels, which know no groups, are faster. channels: of x;
    geometry: of a convolution of floats, None for others."""
    shape = structure.shape
    limit = NEARLY_DENSE_LINEAR if len(shape) == 2 else NEARLY_DENSE_CONVOLUTION
    if geometry is not None and is_transformed(shape, geometry):
        limit = NEARLY_DENSE_WINOGRAD if min(shape[:2]) < 64 else NEARLY_DENSE_WIDE
    return not structure.dense and shape[1] == channels and structure.nnz > (1 - limit) * math.prod(shape)


def _entries(structure, geometry):
    """(row, input channel, kernel row, kernel column) of each stored weight, in the parameter's order.

    row is None if the layer is dense without groups: then the entries of any one row.
    """
    out, per_group, kh, kw = (*structure.shape, 1, 1)[:4]
    if structure.dense and geometry.groups == 1:
        row, column = None, np.arange(per_group * kh * kw)
        channel = column // (kh * kw)
    else:
        row, column = structure.rows(), structure.csr()[1]
        channel = row // (out // geometry.groups) * per_group + column // (kh * kw)
    return row, channel, column // kw % kh, column % kw


def _forward_grid(structure, geometry, x, y):
    _, _, kh, kw = (*structure.shape, 1, 1)[:4]
    blocks, _, oh, ow, _ = y.array.shape
    reach = geometry.reach((kh, kw))
    return Grid((blocks, oh, ow), (reach[0] + 1, reach[1] + 1), tuple(-p for p in geometry.padding), geometry.stride)


def _offsets(channel, vertical, horizontal, x):
    _, per_channel, per_row = strides(x)
    offsets = channel.astype(np.int64) * per_channel + vertical * per_row + horizontal * 16
    if len(offsets) and max(offsets.max(), -offsets.min()) >= 2**31:
        raise ValueError(
            f"x has shape {x.array.shape}: 16 images of it reach 2**31 elements, more than an offset can say"
        )
    return offsets


def _forward_entries(structure, geometry, x):
    row, channel, kh, kw = _entries(structure, geometry)
    (dh, dw), (ph, pw) = geometry.dilation, geometry.padding
    return row, channel, _offsets(channel, kh * dh - ph, kw * dw - pw, x)


def _winograd_run(choose, structure, geometry, grid, rows, channels, x, times):
    """What `choose`, a function of winograd.py, says where a product can run so, else 0."""
    floats = x.array.dtype.kind == "f"
    if not (structure.dense and floats and winograd.fits(structure.shape[2:], geometry)):
        return 0
    return choose(grid.extent, rows, channels, times)


def forward(structure, geometry, x, y, tasks=TASKS, times=1):
    """The Pass y = W x, in at least so many tasks if the shape allows. times: so often it runs with the same values."""
    grid = _forward_grid(structure, geometry, x, y)
    rows, channels = structure.shape[0], x.array.shape[1]
    run = _winograd_run(winograd.choose_run, structure, geometry, grid, rows, channels, x, times)
    if run:
        return _winograd(x, y, grid, rows, channels, (9 * channels, 9, False), run, tasks)
    row, channel, offsets = _forward_entries(structure, geometry, x)
    source = np.arange(len(offsets), dtype=np.int32) if row is None else None
    columns = len(offsets)
    return _spmm(x, y, grid, rows, channels, row, channel, offsets, source, columns, structure.nnz, tasks)


def input_gradient(structure, geometry, dy, dx, tasks=TASKS, times=1):
    """The Passes that together write dx = W^T dy: one for each phase of the strides. times: as of forward()."""
    out, per_group, kernel_h, kernel_w = (*structure.shape, 1, 1)[:4]
    (sh, sw), (dh, dw), (ph, pw) = geometry.stride, geometry.dilation, geometry.padding
    taps, n_channels = kernel_h * kernel_w, dx.array.shape[1]
    blocks, _, height, width, _ = dx.array.shape
    around = Grid((blocks, height, width), (kernel_h, kernel_w), (ph + 1 - kernel_h, pw + 1 - kernel_w))
    run = _winograd_run(winograd.choose_run, structure, geometry, around, n_channels, out, dy, times)
    if run:
        return [_winograd(dy, dx, around, n_channels, out, (9, 9 * n_channels, True), run, tasks)]
    row, channel, kh, kw = _entries(structure, geometry)
    transposes = times * math.prod(around.extent) >= TRANSPOSED_FROM
    if row is None:  # the entries of any one row of W^T: all output channels
        oc = np.repeat(np.arange(out), taps)
        kh, kw = np.tile(kh[:taps], out), np.tile(kw[:taps], out)
        source, new_row = oc * per_group * taps + kh * kernel_w + kw, None
    else:
        source = np.argsort(channel, kind="stable")
        oc, kh, kw, new_row = row[source], kh[source], kw[source], channel[source]
    passes = []
    for a, b in product(range(min(sh, height)), range(min(sw, width))):
        here = ((a + ph - kh * dh) % sh == 0) & ((b + pw - kw * dw) % sw == 0)
        vertical, horizontal = (a + ph - kh[here] * dh) // sh, (b + pw - kw[here] * dw) // sw
        span = tuple(int(np.ptp(v)) + 1 if v.size else 1 for v in (vertical, horizontal))
        first = tuple(int(v.min()) if v.size else 0 for v in (vertical, horizontal))
        grid = Grid((blocks, -(-(height - a) // sh), -(-(width - b) // sw)), span, first, (1, 1), (sh, sw), (a, b))
        offsets = _offsets(oc[here], vertical, horizontal, dy)
        entry_row, used, row_step = None, source[here].astype(np.int32), taps
        n_values, transposed = structure.nnz, None
        if new_row is not None:
            entry_row, n_values = new_row[here], len(used)
        elif transposes and len(used):
            transposed = out, n_channels, np.flatnonzero(here[:taps]).astype(np.int32)
            used, row_step, n_values = np.arange(len(used), dtype=np.int32), len(used), len(used) * n_channels
        step = _spmm(dy, dx, grid, n_channels, out, entry_row, oc[here], offsets, used, row_step, n_values, tasks)
        step.transposed = transposed
        passes.append(step)
    return passes


def _check_parts(isa, about, says):
    most = min(about["tiles"], about["tasks"])
    if not 1 <= says["parts"] <= most:
        raise ValueError(f"parts is {says['parts']}, must be in [1, {most}], as there are tiles and tasks")


@kept(
    "gradient parts", about=("tiles", "tasks", "row_blocks", "x_size", "weights"), says=("parts",), check=_check_parts
)
def _gradient_parts(tiles, tasks, row_blocks, x_size, weights):
    """Into how many runs of tiles a weight gradient is cut, each of at most row_blocks chunks of rows."""
    # Chunks of rows each read all of x again; parts, runs of tiles, each need a copy of dW.
    copied = 3 * weights

    def cost(parts):
        chunks = min(row_blocks, tasks // parts)
        return chunks * x_size + parts * copied + (parts * chunks < tasks // 2) * 1e18

    return min((p for p in (1, 2, 4, 8, 16) if p <= min(tiles, tasks)), key=cost, default=1)


def weight_gradient(structure, geometry, x, dy, tasks=TASKS, times=1):
    """The plan dW = <dy, x> at the stored weights, in the parameter's order, run `times` times on the same sums."""
    grid = _forward_grid(structure, geometry, x, dy)
    out, weights, channels = structure.shape[0], structure.nnz, x.array.shape[1]
    row, channel, offsets = _forward_entries(structure, geometry, x)
    if row is None:
        run = _winograd_run(winograd.choose_gradient_run, structure, geometry, grid, out, channels, x, times)
        return _dense_gradient(x, dy, grid, out, offsets, run, tasks)
    limit = core.tile_limits()[1]
    order, tile, group = choose_tile(grid, out, channels, weights, limit, 1, x.array.itemsize, True)
    tiles = math.prod(-(-grid.extent[axis] // size) for axis, size in zip(order, tile, strict=True))
    parts = _gradient_parts(tiles, tasks, out, x.array.size, weights)
    indptr = structure.csr()[0]
    chunks = _cut_rows(np.diff(indptr), tasks // parts)
    segments, bounds = _segments(row, channel // group, chunks, every_row=False)
    offsets = offsets[_as_met(segments)]
    return _plan(
        x, dy, grid, tile, order, group, out, 1, offsets, segments, bounds, indptr[chunks].astype(np.int32), weights,
        parts, weights,
    )  # fmt: skip
