"""Order and number of repetitions, and what the cases are."""

import math

import pytest

from sparsetrain._kernels import core
from sparsetrain.bench import measure, shapes


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Work:
    """A case that takes so many seconds a repetition."""

    def __init__(self, clock, name, seconds, log):
        self.clock, self.name, self.seconds, self.log = clock, name, seconds, log

    def repeat(self, settle):
        settle(2)
        self.clock.now += self.seconds
        self.log.append(self.name)


def order(repeats, budget, **seconds):
    clock, log, done, settled = Clock(), [], [], []
    cases = [Work(clock, name, s, log) for name, s in seconds.items()]
    measure.run(cases, repeats, budget, settled.append, clock, done=lambda: done.append(1))
    assert len(done) == len(log) == len(settled)
    return "".join(log)


def test_repetitions_take_turns():
    assert order(3, 100, a=1, b=2) == "ababab"


def test_every_case_runs_once_whatever_the_budget():
    assert order(3, 1, a=2, b=2, c=2) == "abc"
    assert order(3, -5, a=2, b=2) == "ab"


def test_the_budget_ends_the_rounds():
    assert order(9, 7, a=2, b=1) == "ababa"


def test_a_repetition_has_passes_until_enough_is_measured():
    passes = []

    def build(about):
        about["stored"] = 5

        def one_pass():
            passes.append(1)
            return {"forward": 0.002, "backward": 0.006}

        return one_pass

    case = measure.Case("layer", {"name": "x", "batch": 1, "sparsity": 0.5}, 1, build)
    settled = []
    case.repeat(settled.append)
    case.repeat(settled.append)
    assert len(passes) == 1 + 2 * (2 + math.ceil(measure.MIN_SECONDS / 0.008))  # the first, then two to warm up
    assert settled == [1, 1]
    assert case.result() == {
        "what": "layer", "name": "x", "batch": 1, "sparsity": 0.5, "stored": 5, "threads": 1,
        "seconds": {"forward": [pytest.approx(0.002)] * 2, "backward": [pytest.approx(0.006)] * 2},
    }  # fmt: skip


@pytest.mark.parametrize("threads, counts", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_thread_counts(threads, counts):
    assert measure.thread_counts(threads) == counts


def test_layers_and_nets_are_as_sparse_as_asked(tmp_path):
    path = tmp_path / "shapes"
    path.write_text("conv 4 4 3 1 1 6 16\n")
    cases = measure.layer_cases(shapes.read(path), [0, 0.75], 1) + measure.net_cases(["lenet5"], [0, 0.9], 2)
    for case in cases:
        case.repeat(lambda threads: None)
        assert core.get_num_threads() == case.threads
    stored = [case.result()["stored"] for case in cases]
    assert stored[:2] == [144, 36]
    first, second, hidden, last = 20 * 25, 50 * 20 * 25, 800 * 500, 500 * 10
    assert stored[2:] == [first + second + hidden + last, first + (second + hidden) // 10 + last]
    assert set(cases[0].result()["seconds"]) == {"forward", "backward"}
    assert set(cases[-1].result()["seconds"]) == {"step"}


def test_scaling_has_each_number_of_threads_and_batch():
    layers = shapes.read(shapes.DEFAULT)
    cases = measure.scaling_cases(layers, ["lenet5", "mlp"], 0.9, 4)
    assert [(c.about["name"], c.threads) for c in cases if c.what == "threads"] == [
        *(("conv3x3-256-256-14-b64", n) for n in (1, 2, 4)),
        *(("mlp", n) for n in (1, 2, 4)),
    ]
    assert [(c.about["batch"], c.threads) for c in cases if c.what == "batch"] == [(b, 4) for b in measure.BATCHES]
    assert [c.what for c in measure.scaling_cases(layers, ["mlp"], 0.9, 1)] == ["batch"] * 5
    assert measure.scaling_cases([], [], 0.9, 1) == []
    (linear,) = {c.about["in"] for c in measure.scaling_cases(layers[-2:], [], 0.9, 1)}
    assert linear == 768
