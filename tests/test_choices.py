"""The planner's choices: the same in every process, written, read back, and used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reference as ref
import sparsetrain as st
from sparsetrain import choices, cli, nn
from sparsetrain._kernels import core
from sparsetrain.record import record

KINDS = {"winograd", "winograd gradient", "tile", "dense gradient tile", "gradient parts", "bands", "band parts"}


@pytest.fixture(autouse=True)
def no_choices():
    """None before and after."""
    choices.clear()
    yield
    choices.clear()


def net():
    """A sparse convolution by bands, two dense ones, of which the second has stride 1, and a linear layer."""
    st.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )
    return st.sparsify(model, 0.5, "random", exclude=["3", "4", "6"])


X = np.random.default_rng(0).standard_normal((20, 3, 12, 12)).astype(np.float32)
DY = np.random.default_rng(1).standard_normal((20, 5)).astype(np.float32)


def run(model):
    """Output and gradients."""
    model.zero_grad()
    y = model(X)
    return [y, model.backward(DY), *(p.grad.copy() for p in model.parameters())]


def saved(path):
    choices.save(path)
    return json.loads(path.read_text())


def test_every_choice_is_kept_by_what_it_depends_on(tmp_path):
    run(net())
    found = saved(tmp_path / "plans.json")
    assert (found["format"], found["schema"]) == ("sparsetrain plans", 1)
    assert {entry["choice"] for entry in found["choices"]} == KINDS
    assert {entry["isa"] for entry in found["choices"]} == {st.get_isa()}
    (first, *_) = (e for e in found["choices"] if e["choice"] == "tile" and e["for"]["extent"] == [2, 6, 6])
    assert first["for"].keys() == {
        *("extent", "taps", "x_pixels", "rows", "channels", "weights", "limit", "rows_at_once", "itemsize"),
        "gradient",
    }
    assert first["is"].keys() == {"order", "tile", "group"}


PROGRAM = """
import sys, test_choices
test_choices.st.set_num_threads(int(sys.argv[2]))
test_choices.run(test_choices.net())
test_choices.choices.save(sys.argv[1])
"""


def test_two_processes_choose_the_same(tmp_path):
    """With any number of threads, and in any order."""
    paths = [str(Path(st.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SPARSETRAIN_ISA": st.get_isa()}
    for threads in ("1", "2"):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / threads), threads]
        # Not in the checkout, whose package would shadow the installed one.
        subprocess.run(command, cwd=tmp_path.parent, env=environment, check=True, timeout=60)
    run(net())
    choices.save(tmp_path / "here")
    texts = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(texts) == 1


def test_saving_what_was_loaded_gives_the_same_file(tmp_path):
    run(net())
    choices.save(tmp_path / "a")
    choices.clear()
    assert choices.load(tmp_path / "a") == len(json.loads((tmp_path / "a").read_text())["choices"])
    choices.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def pin(entry):
    """Another choice that can run."""
    said, about = entry["is"], entry["for"]
    if entry["choice"] in ("tile", "dense gradient tile"):
        order = [1, 0, 2] if said["order"] != [1, 0, 2] else [0, 1, 2]
        said |= {"order": order, "tile": [1, 1, 1]}
        if entry["choice"] == "tile":
            said |= {"tile": [1, 2, 1], "group": max(1, about["channels"] // 2)}
    elif entry["choice"] == "bands":
        said |= {"run": 5, "rows": 3} if about["height"] >= 5 else {"run": 1, "rows": 1}
    elif entry["choice"].startswith("winograd"):
        said["run"] = 3
    else:
        said["parts"] = max(1, said["parts"] // 2)


def test_what_is_pinned_is_used_and_gives_the_same_results(isa, tmp_path):
    model, path = net(), tmp_path / "plans.json"
    expected, found = run(model), saved(path)
    for entry in found["choices"]:
        pin(entry)
    path.write_text(json.dumps(found))
    choices.load(path)

    plans = []
    with record(lambda run: plans.extend(run.plans)):
        pinned = run(model)  # plans that were made before do not count
    bands = [plan for plan in plans if isinstance(plan, core.BandPlan)]
    assert bands and all((plan.run, plan.rows) == (5, 3) for plan in bands)
    products = [plan for plan in plans if isinstance(plan, core.Plan)]
    assert {(plan.run, plan.tile) for plan in products if plan.run} == {(3, (1, 1, 3))}
    # (1, 1, 1): the weight gradients of the dense ones
    assert {plan.tile for plan in products if not plan.run} == {(1, 2, 1), (1, 1, 1)}
    for a, b in zip(pinned, expected, strict=True):
        ref.assert_close(a, b, 20 * 12 * 12, 20)


def test_only_the_cases_of_the_file_are_pinned(tmp_path):
    model, path = net(), tmp_path / "plans.json"
    run(model)
    found = saved(path)
    whole = path.read_bytes()
    found["choices"] = found["choices"][:2]
    path.write_text(json.dumps(found))
    choices.clear()
    assert choices.load(path) == 2
    run(model)
    choices.save(path)
    assert path.read_bytes() == whole


def case(kind, **of):
    """The first entry of this kind, as run() leaves it, with other numbers."""
    run(net())
    choices.save(Path("plans.json"))
    entry = next(e for e in json.loads(Path("plans.json").read_text())["choices"] if e["choice"] == kind)
    for name, value in of.items():
        entry["for" if name in entry["for"] else "is"][name] = value
    return entry


@pytest.mark.parametrize(
    "kind, of, words",
    [
        ("tile", {"tile": [1, 5, 1]}, "tile is (1, 5, 1), must be (1, R, W)"),
        ("tile", {"tile": [1, 4, 16]}, "tile is (1, 4, 16), must be (1, R, W)"),
        ("tile", {"tile": [2, 1, 1]}, "tile is (2, 1, 1), must be (1, R, W)"),
        ("tile", {"tile": [1, 1, 0]}, "tile is (1, 1, 0)"),
        ("tile", {"tile": [1, 1]}, "tile is [1, 1], must be 3 whole numbers"),
        ("tile", {"tile": [1, 1, -1]}, "tile is [1, 1, -1], must be 3 whole numbers"),
        ("tile", {"order": [0, 2, 1]}, "order is (0, 2, 1), must be one of (0, 1, 2)"),
        ("tile", {"group": 0}, "group is 0, must be in [1, "),
        ("tile", {"group": 1000}, "group is 1000, must be in [1, "),
        ("tile", {"group": 1.5}, "group is 1.5, must be a whole number"),
        ("tile", {"group": True}, "group is True, must be a whole number"),
        ("tile", {"limit": 99}, "limit is 99, on "),
        ("tile", {"other": 1}, "is has order, tile, group, other, must have order, tile, group"),
        ("winograd", {"run": 9}, "run is 9, must be in [0, 8]"),
        ("winograd", {"output": [1, 2]}, "output is [1, 2], must be 3 whole numbers"),
        ("dense gradient tile", {"tile": [1, 13, 1]}, "tile is (1, 13, 1), must be (1, R, W) with R <= "),
        ("dense gradient tile", {"order": [0, 2, 1]}, "order is (0, 2, 1), must be one of (0, 1, 2)"),
        ("winograd gradient", {"run": 9}, "run is 9, must be in [0, 8]"),
        ("gradient parts", {"parts": 0}, "parts is 0, must be in [1, "),
        ("gradient parts", {"parts": 17}, "parts is 17, must be in [1, "),
        ("bands", {"rows": 0}, "must be 1 <= rows <= run <= 12"),
        ("bands", {"run": 13}, "must be 1 <= rows <= run <= 12"),
        ("bands", {"run": 2, "rows": 3}, "run and rows are 2 and 3"),
        ("band parts", {"parts": 100}, "parts is 100, must be in [1, "),
    ],
    ids=str,
)
def test_a_choice_that_cannot_run_is_refused(kind, of, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = case(kind, **of)
    before, edition = Path("plans.json").read_bytes(), choices.edition()
    good = json.loads(before)["choices"][0]
    Path("bad.json").write_text(json.dumps({"format": "sparsetrain plans", "schema": 1, "choices": [good, entry]}))
    with pytest.raises(ValueError) as error:
        choices.load("bad.json")
    assert str(error.value).startswith("bad.json: choices[1]: ") and words in str(error.value)
    choices.save(Path("plans.json"))
    assert Path("plans.json").read_bytes() == before and choices.edition() == edition


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not whole JSON"),
        ("[]", "has no sparsetrain plans"),
        ('{"format": "sparsetrain bench"}', "has no sparsetrain plans"),
        ('{"format": "sparsetrain plans", "schema": 2}', "has schema 2 of sparsetrain plans, this version reads 1"),
        ('{"format": "sparsetrain plans", "schema": 1}', "has no list 'choices'"),
        ('{"format": "sparsetrain plans", "schema": 1, "choices": [1]}', "choices[0]: must have choice, isa"),
        (
            '{"format": "sparsetrain plans", "schema": 1, "choices":'
            ' [{"choice": "x", "isa": "base", "for": {}, "is": {}}]}',
            "choice is 'x', must be one of winograd, winograd gradient, tile",
        ),
        (
            '{"format": "sparsetrain plans", "schema": 1, "choices":'
            ' [{"choice": "tile", "isa": "z", "for": 1, "is": {}}]}',
            "isa is 'z', this machine runs",
        ),
        (
            '{"format": "sparsetrain plans", "schema": 1, "choices":'
            ' [{"choice": "tile", "isa": "base", "for": 1, "is": {}}]}',
            "for has 1, must have extent",
        ),
    ],
)
def test_a_file_that_has_no_choices_is_refused(text, words, tmp_path, capsys):
    path = tmp_path / "plans.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        choices.load(path)
    assert str(error.value).startswith(str(path)) and words in str(error.value)
    for command in ("train", "profile"):
        assert cli.main([command, "--plans", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_a_case_that_comes_twice_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = case("bands")
    Path("bad.json").write_text(json.dumps({"format": "sparsetrain plans", "schema": 1, "choices": [entry, entry]}))
    with pytest.raises(ValueError, match=r"choices\[1\]: the same case again"):
        choices.load("bad.json")
