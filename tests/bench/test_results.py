"""What is derived from measured times."""

import pytest

from bench_runs import LIMITS, layer, net
from sparsetrain.bench import results


def judged(*cases):
    return [results.judge(case, LIMITS) for case in cases]


def test_judge_takes_the_median_and_the_roofline():
    (case,) = judged(layer(0.5, [3e-6, 1e-6, 2e-6], [4e-6]))
    operations = 2 * 1024 * 32
    size = 4 * 32 * (64 + 32) + 8 * 1024
    forward = case["passes"]["forward"]
    assert forward["median"] == 2e-6
    assert (forward["operations"], forward["bytes"], forward["level"]) == (operations, size, "L1d")
    assert forward["gflops"] == pytest.approx(operations / 2e-6 / 1e9)
    assert forward["attainable_gflops"] == pytest.approx(100.0)
    assert forward["share"] == pytest.approx(forward["gflops"] / 100)
    assert case["passes"]["backward"]["operations"] == 2 * operations


def test_break_even_of_passes_and_of_both():
    cases = judged(layer(0, [1.0], [2.0]), layer(0.5, [2.0], [1.0]), layer(0.9, [0.5], [0.5]), net(0.9, [1.0]))
    found = {(point["name"], point["part"]): point["sparsity"] for point in results.break_evens(cases)}
    assert found == {
        ("linear-64-32-b32", "forward"): pytest.approx(0.5 + 0.4 * (1.0 / 1.5)),
        ("linear-64-32-b32", "backward"): "always",
        ("linear-64-32-b32", "both"): pytest.approx(0.5),
        ("lenet5", "step"): None,
    }


def test_lines_over_stored_weights_leave_the_dense_layer_out():
    cases = judged(layer(0, [9.0], [9.0]), *(layer(s, [1 + 2 * (1 - s)], [1.0]) for s in (0.25, 0.5, 0.75)))
    forward, backward = results.lines(cases)
    assert (forward["part"], forward["against"]) == ("forward", "stored")
    assert forward["start"] == pytest.approx(1) and forward["slope"] == pytest.approx(2 / 2048)
    assert forward["worst"] == pytest.approx(0, abs=1e-9)
    assert backward["slope"] == pytest.approx(0, abs=1e-9)


def test_lines_over_batch_join_the_batches_of_a_layer():
    cases = judged(*(layer(0.9, [0.5 + b], [b]) for b in (16, 32, 64)))
    for case, batch in zip(cases, (16, 32, 64), strict=True):
        case |= {"what": "batch", "batch": batch, "name": f"linear-64-32-b{batch}"}
    forward, _ = results.lines(cases)
    assert (forward["name"], forward["against"]) == ("linear-64-32", "batch")
    assert forward["start"] == pytest.approx(0.5) and forward["slope"] == pytest.approx(1)
