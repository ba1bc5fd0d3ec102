"""A table of a model's layers: shapes, weights, operations, bytes."""

from typing import NamedTuple

import numpy as np

from sparsetrain import checks
from sparsetrain.nn.module import evaluating, observe


class Row(NamedTuple):
    """One layer, or the totals.

    output: shape without the batch. parameters: as if dense; nnz: those that are stored.
    sparsity: fraction of zeros among the weights (arrays of two dimensions or more), None without
    weights. flops: of the forward pass for one image, a multiply and an add counting as two, over
    stored weights only. size_bytes: of the stored parameters and their indices.
    """

    name: str
    type: str
    output: tuple
    parameters: int
    nnz: int
    sparsity: float | None
    flops: int
    size_bytes: int


class Summary:
    """What `model.summary(input_shape)` returns: `rows`, `total`; str() is a table."""

    def __init__(self, rows, total):
        self.rows = rows
        self.total = total

    def __str__(self):
        head = ("layer", "type", "output", "parameters", "nnz", "sparsity", "FLOPs", "bytes")
        return table(head, [_cells(row) for row in (*self.rows, self.total)], rule_before_last=True)

    __repr__ = __str__


def summary(model, input_shape):
    """Run a batch of one zero image of input_shape, (C, H, W) or (F,), and describe each layer.

    Layers come in the order they run. A ReLU done by the layer before it has no row.
    ValueError where a layer cannot take its input. The model is left as it was.
    """
    shape = tuple(checks.integer(f"input_shape[{i}]", n, low=1) for i, n in enumerate(input_shape))
    if len(shape) not in (1, 3):
        raise ValueError(f"input_shape is {shape}, must be (C, H, W) or (F,)")
    parameters = list(model.parameters())
    dtype = parameters[0].data.dtype if parameters else np.float32
    rows = []

    def record(name, module, phase, seconds, y):
        rows.append(_row(name, module, y.shape[1:]))

    with evaluating(model), observe(model, record):
        model(np.zeros((1, *shape), dtype))
    flops = sum(row.flops for row in rows)
    return Summary(rows, Row("total", "", (), *_counts(parameters), flops, _bytes(parameters)))


def _row(name, module, output):
    parameters = list(module.parameters())
    pixels = int(np.prod(output[1:]))
    flops = sum(2 * p.nnz * pixels for p in parameters if len(p.shape) > 1)
    counts = _counts(parameters)
    return Row(name, type(module).__name__, output, *counts, flops, _bytes(parameters))


def _counts(parameters):
    """How many parameters as if dense, how many stored, and the sparsity of the weights."""
    weights = [p for p in parameters if len(p.shape) > 1]
    size = sum(int(np.prod(w.shape)) for w in weights)
    sparsity = 1 - sum(w.nnz for w in weights) / size if size else None
    return sum(int(np.prod(p.shape)) for p in parameters), sum(p.nnz for p in parameters), sparsity


def _bytes(parameters):
    indices = ("indptr", "indices")
    return sum(p.data.nbytes + sum(getattr(p, name).nbytes for name in indices if hasattr(p, name)) for p in parameters)


def _cells(row):
    return (
        row.name,
        row.type,
        "x".join(map(str, row.output)),
        f"{row.parameters:,}",
        f"{row.nnz:,}",
        "-" if row.sparsity is None else f"{row.sparsity:.4f}",
        f"{row.flops:,}",
        f"{row.size_bytes:,}",
    )


def table(head, rows, rule_before_last=False, left=(0, 1)):
    """Lines of aligned columns: text that names, the columns `left`, to the left, the rest right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines.insert(1, rule)
    if rule_before_last:
        lines.insert(-1, rule)
    return "\n".join(lines)
