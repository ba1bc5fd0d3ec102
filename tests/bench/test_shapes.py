"""Files of layer shapes, and what follows from a shape."""

import numpy as np
import pytest

from sparsetrain.bench import shapes


def read(tmp_path, text):
    path = tmp_path / "shapes.txt"
    path.write_text(text)
    return shapes.read(path)


def test_reads_comments_and_both_kinds(tmp_path):
    conv, linear = read(tmp_path, "# comment\n\nconv 3 8 5 2 1 28 16  # first\n  linear 10 20 30\n")
    assert conv == {
        "name": "conv5x5s2-3-8-28-b16", "kind": "conv",
        "in": 3, "out": 8, "kernel": 5, "stride": 2, "padding": 1, "size": 28, "batch": 16,
    }  # fmt: skip
    assert linear == {"name": "linear-10-20-b30", "kind": "linear", "in": 10, "out": 20, "batch": 30}


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("pool 2 2", "wanted 'conv IN OUT KERNEL STRIDE PADDING SIZE BATCH' or 'linear IN OUT BATCH'"),
        ("linear 10 20", "wanted"),
        ("linear 10 20 30 40", "wanted"),
        ("linear 10 x 30", "whole numbers"),
        ("linear 10 -2 30", "whole numbers"),
        ("linear 10 0 30", "at least 1"),
        ("conv 3 8 3 0 0 28 16", "at least 1"),
        ("conv 3 8 5 1 0 4 16", "kernel is larger"),
        ("linear 1 1 1", "the same layer again"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, wanted):
    with pytest.raises(ValueError, match="line 2: ") as error:
        read(tmp_path, f"linear 1 1 1\n{line}\n")
    assert wanted in str(error.value) and repr(line) in str(error.value)
    assert "shapes.txt" in str(error.value)


def test_a_file_without_layers(tmp_path):
    with pytest.raises(ValueError, match="no layers"):
        read(tmp_path, "# nothing\n")


def test_the_default_list():
    names = [case["name"] for case in shapes.read(shapes.DEFAULT)]
    assert len(names) == 8
    assert names[0] == "conv3x3-64-64-56-b32" and names[-1] == "linear-768-3072-b128"


def test_chosen():
    cases = shapes.read(shapes.DEFAULT)
    assert [c["name"] for c in shapes.chosen(cases, ["linear-768*", "*-7-*"])] == [
        "conv3x3-512-512-7-b64",
        "linear-768-3072-b128",
    ]
    with pytest.raises(ValueError, match="'conv9.' matches none of the layers conv3x3-64-64-56-b32, "):
        shapes.chosen(cases, ["linear*", "conv9*"])


def test_module_and_shapes_agree(tmp_path):
    for case in read(tmp_path, "conv 3 8 5 2 1 11 16\nconv 4 4 1 1 0 6 2\nlinear 10 20 3\n"):
        x = np.zeros(shapes.input_shape(case), np.float32)
        assert shapes.module(case)(x).shape == shapes.output_shape(case)
        assert shapes.with_batch(case, 48)["name"] == case["name"].rpartition("-")[0] + "-b48"


def test_work_counts_each_number_once(tmp_path):
    (case,) = read(tmp_path, "conv 2 3 3 2 1 8 10\n")
    assert shapes.output_shape(case) == (10, 3, 4, 4)
    x, y, stored = 4 * 10 * 2 * 64, 4 * 10 * 3 * 16, 20
    operations = 2 * stored * 10 * 16
    assert shapes.work(case, stored, dense=False) == {
        "forward": (operations, x + y + 8 * stored),
        "backward": (2 * operations, 2 * x + y + 12 * stored),
    }
    assert shapes.work(case, stored, dense=True)["forward"] == (operations, x + y + 4 * stored)
