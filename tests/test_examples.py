"""README's Python and the examples run, on a few images; README's command lines exist."""

import csv
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import sparsetrain as st
from gradcheck import gradcheck
from sparsetrain import cli, data, named, nn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GRADIENTS = (ROOT / "docs" / "gradients.md").read_text(encoding="utf-8")
SPARSITY = (ROOT / "docs" / "sparsity.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def few_images(monkeypatch):
    """data.load() gives the first 512 training and 64 test images of the set."""
    load = data.load

    def load_few(name, data_dir=None):
        full = load(name, data_dir)
        train = tuple(part[:512] for part in full.train)
        return data.Dataset(name, train, tuple(part[:64] for part in full.test), full.classes)

    monkeypatch.setattr(data, "load", load_few)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, few_images, capsys):
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(r"epoch \d+/\d+: loss \d", out)
    assert "nan" not in out


def test_train_python_is_the_run_of_the_command(few_images, tmp_path):
    history = runpy.run_path(str(ROOT / "examples" / "train_python.py"))["history"]
    out = tmp_path / "run"
    assert cli.main(["train", "--no-compare", "--quiet", "--out", str(out)]) == 0
    with open(out / "history.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "lr"):
        assert [float(row[name]) for row in rows] == history.column(name)


def test_readme_has_both_blocks():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_readme_block_runs(block, few_images):
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_readme_blocks_are_those_of_the_examples(block):
    assert any(block in path.read_text(encoding="utf-8") for path in EXAMPLES)


@pytest.mark.parametrize("page, example", [(GRADIENTS, "own_backprop"), (SPARSITY, "own_rule")])
def test_the_method_in_docs_is_that_of_the_example(page, example):
    block = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[-1]
    assert block in (ROOT / "examples" / f"{example}.py").read_text(encoding="utf-8")


@pytest.fixture
def prelu():
    return runpy.run_path(str(ROOT / "examples" / "new_layer.py"))["PReLU"]


@pytest.mark.parametrize("shape", [(3, 2, 2, 5), (17, 3, 2, 1), (17, 4)])
def test_new_layer_has_the_right_gradients(shape, prelu):
    rng = np.random.default_rng(0)
    gradcheck(prelu(shape[1]), rng.choice([-1, 1], shape) * rng.uniform(0.1, 1, shape))


@pytest.mark.parametrize("n", [3, 17])
def test_new_layer_with_slope_0_is_relu_within_a_net(n, prelu):
    """Between layers that read halos, and with lanes of padding."""
    x = np.random.default_rng(0).standard_normal((n, 3, 4, 5)).astype(np.float32)

    def run(*activations):
        st.manual_seed(0)
        first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        net = nn.Sequential(first, activations[0], second, activations[1], nn.Flatten())
        y = net(x)
        return y, net.backward(y), first.weight.grad, second.weight.grad

    layers = prelu(4), prelu(2)
    for layer in layers:
        layer.slope.data[...] = 0
    for ours, relu in zip(run(*layers), run(nn.ReLU(), nn.ReLU()), strict=True):
        np.testing.assert_array_equal(ours, relu)


def test_readme_names_only_options_that_exist(capsys):
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.M))
    lines = spans + re.findall(r"^    (.*)$", README, re.M)
    ours = [s for s in lines if re.match(r"--|.*\bsparsetrain (train|info)\b", s)]
    named = {option for s in ours for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", s)}
    assert {"--data", "--sparsity", "--resume"} <= named
    assert cli.main(["train", "--help"]) == 0
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert named <= known


def test_readme_lists_every_model_and_data_set():
    for name in (*named.MODELS, *data.NAMES):
        assert f"`{name}`" in README
    for name in nn.__all__:
        if isinstance(getattr(nn, name), type):
            assert f"`{name}`" in README or name in ("Module", "Parameter"), name
