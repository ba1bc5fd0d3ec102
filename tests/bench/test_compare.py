"""Comparing two results, and the files that are none."""

import json

import pytest

import bench_runs
from bench_runs import layer, net, report
from sparsetrain.bench import compare, results


def write(path, *cases, **changes):
    results.write(path, report(*cases, **changes))
    return path


def lines_of(tmp_path, a, b):
    return compare.compare(write(tmp_path / "a.json", *a), write(tmp_path / "b.json", *b)).splitlines()


def row(lines, *words):
    (found,) = [line.split() for line in lines if all(word in line for word in words)]
    return found


def test_ratio_and_noise(tmp_path):
    a = [layer(0.9, [0.010, 0.011, 0.012], [0.020, 0.030, 0.040]), net(0.5, [0.1, 0.1])]
    b = [layer(0.9, [0.005, 0.0055, 0.006], [0.021, 0.033, 0.041]), net(0.5, [0.2, 0.2])]
    lines = lines_of(tmp_path, a, b)
    assert row(lines, "forward")[-6:] == ["11.0", "5.500", "0.500", "3,", "3", "yes"]
    assert row(lines, "backward")[-4:] == ["1.100", "3,", "3", "no"]
    assert row(lines, "lenet5", "step")[-6:] == ["200", "2.000", "2,", "2", "too", "few"]
    assert "3 in both; geometric mean of B / A: 1.032" in lines  # (0.5 * 1.1 * 2) ** (1 / 3)


def test_cases_in_one_only(tmp_path):
    same = layer(0.9, [0.1], [0.1])
    others = [layer(0.5, [0.1], [0.1]), layer(0.9, [0.1], [0.1], "threads", 2)]
    lines = lines_of(tmp_path, [same, *others], [same, net(0.9, [0.1])])
    assert lines[lines.index("only in A:") + 1] == "  linear-64-32-b32 at 0.5, 0.9 (threads 2)"
    assert lines[lines.index("only in B:") + 1] == "  lenet5 batch 64 at 0.9"
    assert "no case is in both" in lines_of(tmp_path, [same], [net(0.9, [0.1])])


def test_scaling_cases_are_told_apart(tmp_path):
    cases = [
        layer(0.9, [1.0], [1.0]),
        layer(0.9, [2.0], [1.0], "threads", 1),
        layer(0.9, [3.0], [1.0], "threads", 2),
        layer(0.9, [4.0], [1.0], "batch"),
    ]
    lines = lines_of(tmp_path, cases, cases)
    assert "8 in both; geometric mean of B / A: 1.000" in lines


def test_a_run_on_a_busy_machine_is_marked(tmp_path):
    quiet = {"others": 0.01, "stolen": 0.0, "seconds": 1.0, "load_average": 0.1}
    a = write(tmp_path / "a.json", net(0.5, [0.1]), load={"before": quiet, "during": quiet})
    b = write(tmp_path / "b.json", net(0.5, [0.1]), load={"before": quiet, "during": {**quiet, "others": 0.5}})
    (warning,) = [line for line in compare.compare(a, b).splitlines() if "WARNING" in line]
    assert "others took 50% of a core" in warning


def test_machines_that_differ_are_shown(tmp_path):
    limits = {**bench_runs.LIMITS, "fma_gflops": 150.0}
    a = write(tmp_path / "a.json", net(0.5, [0.1]))
    b = write(tmp_path / "b.json", net(0.5, [0.1]), machine={"cpu": "two", "cpus": 1, "caches": {}}, limits=[limits])
    lines = compare.compare(a, b).splitlines()
    assert row(lines, "cpu ") == ["cpu", "one", "two"]
    assert row(lines, "multiply-adds")[-3:] == ["100", "150", "1.500"]
    assert not any(line.startswith("cpus ") for line in lines)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("", "not whole JSON"),
        ('{"format": "sparsetrain bench", "sch', "not whole JSON"),
        ("[]", "has no sparsetrain bench"),
        ('{"machine": {}, "results": []}', "has no sparsetrain bench"),
        (
            json.dumps({"format": results.FORMAT, "schema": 0}),
            "has schema 0 of sparsetrain bench, this",
        ),
        (json.dumps({"format": results.FORMAT, "schema": 1, "machine": {}}), "has no 'ran_with'"),
    ],
)
def test_files_that_are_no_results(tmp_path, text, wanted):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=wanted) as error:
        results.read(tmp_path / "x.json")
    assert "x.json" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"sparsity": "0.9"},
        {"seconds": {}},
        {"seconds": {"step": []}},
        {"seconds": {"step": [0.1, 0]}},
        {"seconds": {"step": [float("nan")]}},
        {"seconds": {"sideways": [0.1]}},
    ],
    ids=str,
)
def test_damaged_cases_are_named(tmp_path, change):
    path = write(tmp_path / "x.json", net(0.9, [0.1]), {**net(0.8, [0.1]), **change})
    with pytest.raises(ValueError, match=r"cases\[1\] is not a measured case"):
        results.read(path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="x.json is not whole JSON"):
        results.read(tmp_path / "x.json")
