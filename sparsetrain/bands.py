"""How a convolution between batch norms runs: the bands of output rows, and their products (see bands.hh)."""

import math
from dataclasses import dataclass

import numpy as np

from sparsetrain import plans
from sparsetrain._kernels import core
from sparsetrain.choices import kept
from sparsetrain.plans import TASKS, strides

BAND_BYTES = 100 << 10  # of what is formed for a band: with what is fetched for the next it stays in L2


@dataclass(frozen=True)
class Layout:
    """Where something lies, for a plan: an array that is never read."""

    array: np.ndarray

    @classmethod
    def of(cls, shape, strides, dtype):
        """(blocks, channels, height, width), elements between blocks, channels and rows."""
        size = np.dtype(dtype).itemsize
        strides = tuple(size * s for s in (*strides, 16, 1))
        return cls(np.lib.stride_tricks.as_strided(np.empty(1, dtype), (*shape, 16), strides))

    @classmethod
    def scratch(cls, channels, lines, width, dtype):
        """Pixels packed tightly, an odd number of them from channel to channel (see arrays._allocate)."""
        row = width * 16
        return cls.of((1, channels, lines, width), (0, (lines * width | 1) * 16, row), dtype)

    @property
    def size(self):
        """Elements of a block."""
        return self.array.shape[1] * strides(self)[1]


def can_band(structure, geometry, x_shape, output):
    """Whether a convolution of an x of the blocked shape to an output of (height, width) runs by bands: its images are
    not tiny, and its weights fewer than its activations."""
    blocks, channels, height, width, images = x_shape
    activations = blocks * images * (channels * height * width + structure.shape[0] * math.prod(output))
    few = 4 * structure.nnz <= activations
    return math.prod(geometry.stride) <= core.MAX_PHASES and math.prod(output) >= 64 and few


def _check_rows(isa, about, says):
    if not 1 <= says["rows"] <= says["run"] <= about["height"]:
        raise ValueError(
            f"run and rows are {says['run']} and {says['rows']}, must be 1 <= rows <= run <= {about['height']}"
        )


@kept("bands", about=("blocks", "height", "line_bytes"), says=("run", "rows"), check=_check_rows)
def _run_and_rows(blocks, height, line_bytes):
    """Output rows of a task, TASKS of them where the shape allows, and of a band, 2 at least where there are."""
    runs = min(-(-TASKS // blocks), max(1, height // 8))
    run = -(-height // runs)
    bands = -(-run // max(2, BAND_BYTES // line_bytes // 2 * 2))
    return run, min(run, -(-run // bands // 2) * 2)


def _band_input(x, geometry, reach, run, formed):
    """The Layout of what a band reads of x, and the elements of its scratch: x itself if it is `formed`."""
    if formed:
        return x, 0
    _, channels, _, width, _ = x.array.shape
    lines = (run - 1) * geometry.stride[0] + reach[0] + 1
    scratch = Layout.scratch(channels, lines, width + 2 * geometry.padding[1], x.array.dtype)
    return scratch, scratch.size


def _line_bytes(array, pixels):
    return array.array.shape[1] * (array.array.shape[3] + pixels) * 16 * array.array.itemsize


def forward(structure, geometry, x, y, formed):
    """(BandPlan, Pass) of y = W x. formed: x is read where it lies, else it is formed in scratch."""
    kernel = structure.shape[2:]
    reach = geometry.reach(kernel)
    blocks, out, height, width, _ = y.array.shape
    line_bytes = 0 if formed else geometry.stride[0] * _line_bytes(x, 2 * geometry.padding[1])
    run, rows = _run_and_rows(blocks, height, line_bytes + _line_bytes(y, 0))
    source, size = _band_input(x, geometry, reach, run, formed)
    band = Layout.of((1, out, rows, width), strides(y), y.array.dtype)
    step = plans.forward(structure, geometry, source, band, tasks=1, times=blocks * -(-height // rows))
    plan = core.BandPlan(
        run=run, rows=rows, parts=1, stride=geometry.stride[0], padding=geometry.padding, reach=reach[0],
        forward=step.plan, gradient=None, input=(), phases_across=1, x_size=size, dy_size=0, dy_halo=(0, 0),
    )  # fmt: skip
    return plan, step


def _check_band_parts(isa, about, says):
    if not 1 <= says["parts"] <= about["tasks"]:
        raise ValueError(f"parts is {says['parts']}, must be in [1, {about['tasks']}], as there are tasks")


@kept("band parts", about=("tasks", "weights", "activations"), says=("parts",), check=_check_band_parts)
def _band_parts(tasks, weights, activations):
    """Into how many runs the tasks are cut, each with a weight gradient of its own."""
    parts = min(16, tasks)
    while parts > 4 and parts * weights > activations:
        parts //= 2
    return parts


def backward(structure, geometry, x, y, dx, formed):
    """(BandPlan, Passes of the input gradient) of y = W x. dx may be None."""
    kernel = structure.shape[2:]
    reach, halo, stride = geometry.reach(kernel), geometry.grad_halo(kernel), geometry.stride
    halo = max(halo[0], -(-geometry.padding[0] // stride[0])), halo[1]  # a row of dx may read rows of dy below its own
    blocks, out, height, width, _ = y.array.shape
    line_bytes = 0 if formed else stride[0] * _line_bytes(x, 2 * geometry.padding[1])
    run, rows = _run_and_rows(blocks, height, line_bytes + _line_bytes(y, 2 * halo[1]))
    source, x_size = _band_input(x, geometry, reach, run, formed)
    dy = Layout.scratch(out, run + 2 * halo[0], width + 2 * halo[1], y.array.dtype)
    band = Layout.of((1, out, rows, width), strides(dy), y.array.dtype)
    bands = blocks * -(-height // rows)
    gradient = plans.weight_gradient(structure, geometry, source, band, tasks=1, times=bands)
    steps = []
    if dx is not None:
        _, channels, dx_height, dx_width, _ = dx.array.shape
        dx_rows = rows * stride[0] if rows < height else dx_height
        dx_band = Layout.of((1, channels, dx_rows, dx_width), strides(dx), y.array.dtype)
        steps = plans.input_gradient(structure, geometry, band, dx_band, tasks=1, times=bands)
    parts = _band_parts(blocks * -(-height // run), structure.nnz, x.array.size + y.array.size)
    plan = core.BandPlan(
        run=run, rows=rows, parts=parts, stride=stride[0], padding=geometry.padding, reach=reach[0], forward=None,
        gradient=gradient, input=[step.plan for step in steps], phases_across=min(stride[1], x.array.shape[3]),
        x_size=x_size, dy_size=dy.size, dy_halo=halo,
    )  # fmt: skip
    return plan, steps
