"""What measured times mean: the share of the machine's limit, the break-even point, straight lines."""

import numpy as np


def fits_in(limits, size):
    """The first level of `machine.limits()` that holds so many bytes, else memory."""
    return next(level for level in limits["levels"] if level["bytes"] is None or size <= level["bytes"])


def bandwidth(level):
    """The better of reading and updating, in GB/s."""
    return max(level["read_gbs"], level["update_gbs"])


def attainable(limits, operations, size):
    """(GFLOP/s, level) that the machine allows for so many operations on so many bytes, each moved once.

    The roofline of Williams et al., CACM 2009: the multiply-add peak, or the bandwidth of the level that holds all the
    bytes times the operations a byte, whichever is less.
    """
    seconds, level = least_seconds(limits, operations, size)
    return operations / seconds / 1e9, level


def least_seconds(limits, operations, size):
    """(seconds, level) that so many operations on so many bytes take at that rate."""
    level = fits_in(limits, size)
    return max(operations / limits["fma_gflops"], size / bandwidth(level)) / 1e9, level["name"]


def break_even(times):
    """The sparsity from which sparse is faster than dense, for {sparsity: seconds}.

    Between two measured sparsities it lies on the straight line through their times. "always" if every measured
    sparsity is faster than dense, "none" if the highest is not, None if dense or sparse was not measured.
    """
    dense = times.get(0)
    sparse = sorted(item for item in times.items() if item[0] > 0)
    if dense is None or not sparse:
        return None
    slow = [i for i, (_, seconds) in enumerate(sparse) if seconds >= dense]
    if not slow:
        return "always"
    last = slow[-1]
    if last == len(sparse) - 1:
        return "none"
    (s0, t0), (s1, t1) = sparse[last : last + 2]
    return s0 + (s1 - s0) * (t0 - dense) / (t0 - t1)


def straight_line(x, seconds):
    """{"start", "slope", "worst"}: the line start + slope * x with the least squares of relative deviations.

    worst is the largest deviation of a time from the line, as a share of the time. None for fewer than three points,
    as two always lie on a line.
    """
    x, seconds = np.asarray(x, float), np.asarray(seconds, float)
    if len(set(x)) < 3:
        return None
    columns = np.stack([np.ones_like(x), x], axis=1)
    (start, slope), *_ = np.linalg.lstsq(columns / seconds[:, None], np.ones_like(x), rcond=None)
    worst = np.max(np.abs(columns @ (start, slope) / seconds - 1))
    return {"start": float(start), "slope": float(slope), "worst": float(worst)}
