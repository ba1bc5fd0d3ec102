"""Layer shapes: a text file with one layer a line, and what follows from a shape."""

import fnmatch
import math
from pathlib import Path

from sparsetrain import nn

DEFAULT = Path(__file__).with_name("layers.txt")
FIELDS = {
    "conv": ("in", "out", "kernel", "stride", "padding", "size", "batch"),
    "linear": ("in", "out", "batch"),
}


def read(path):
    """The layers of a file: [{"name", "kind", ...}], with the fields that FIELDS lists as ints.

    A line is a kind and its fields in order; # begins a comment. ValueError names a line that is something else,
    a layer with an empty output or one that is there twice.
    """
    cases = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        words = line.split("#")[0].split()
        if words:
            try:
                case = _parsed(*words)
                if case["name"] in cases:
                    raise ValueError("the same layer again")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {line.strip()!r}: {error}") from None
            cases[case["name"]] = case
    if not cases:
        raise ValueError(f"{path} has no layers")
    return list(cases.values())


def _parsed(kind, *values):
    fields = FIELDS.get(kind)
    if fields is None or len(values) != len(fields) or not all(v.isascii() and v.isdigit() for v in values):
        forms = " or ".join(f"'{kind} {' '.join(fields).upper()}'" for kind, fields in FIELDS.items())
        raise ValueError(f"wanted {forms}, whole numbers")
    case = {"kind": kind, **dict(zip(fields, map(int, values), strict=True))}
    if min(value for field, value in case.items() if field not in ("kind", "padding")) < 1:
        raise ValueError("every number but the padding must be at least 1")
    if min(output_shape(case)) < 1:
        raise ValueError("the kernel is larger than the padded image")
    return {"name": _name(case), **case}


def _name(case):
    if case["kind"] == "linear":
        return f"linear-{case['in']}-{case['out']}-b{case['batch']}"
    stride = f"s{case['stride']}" if case["stride"] > 1 else ""
    kernel = f"{case['kernel']}x{case['kernel']}{stride}"
    return f"conv{kernel}-{case['in']}-{case['out']}-{case['size']}-b{case['batch']}"


def chosen(cases, globs):
    """The cases whose names match one of the globs; ValueError names a glob that matches none."""
    names = [case["name"] for case in cases]
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise ValueError(f"{glob!r} matches none of the layers {', '.join(names)}")
    return [case for case in cases if any(fnmatch.fnmatchcase(case["name"], glob) for glob in globs)]


def with_batch(case, batch):
    """The same layer with another batch."""
    case = {**case, "batch": batch}
    return {**case, "name": _name(case)}


def module(case):
    """The layer of a case, dense, with new weights."""
    if case["kind"] == "linear":
        return nn.Linear(case["in"], case["out"])
    return nn.Conv2d(case["in"], case["out"], case["kernel"], stride=case["stride"], padding=case["padding"])


def input_shape(case):
    """Shape of x: (N, C, H, W) or (N, F)."""
    return (case["batch"], case["in"], *[case["size"]] * 2) if case["kind"] == "conv" else (case["batch"], case["in"])


def output_shape(case):
    """Shape of y: (N, C, H, W) or (N, F)."""
    if case["kind"] == "linear":
        return case["batch"], case["out"]
    size = (case["size"] + 2 * case["padding"] - case["kernel"]) // case["stride"] + 1
    return case["batch"], case["out"], size, size


def work(case, stored, dense):
    """{pass: (operations, bytes)} of a layer with so many stored weights, float32.

    Operations: a multiplication and an addition for every stored weight, output pixel and image; those on the
    padding count. Bytes: x, y, their gradients, the stored weights with their indices (none if dense) and the
    weights' gradient, each moved once.
    """
    x, y = 4 * math.prod(input_shape(case)), 4 * math.prod(output_shape(case))
    weights = (4 if dense else 8) * stored
    operations = 2 * stored * math.prod(output_shape(case)) // case["out"]
    return {
        "forward": (operations, x + y + weights),
        "backward": (2 * operations, 2 * x + y + weights + 4 * stored),
    }
