"""The command line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sparsetrain as st
from sparsetrain import choices, cli, data, named
from sparsetrain.commands.train_options import OPTIONS
from sparsetrain.data import Dataset
from sparsetrain.train import CSVLog, Trainer

FAST = ["--epochs", "2", "--batch-size", "32", "--warmup", "0", "--lr", "0.05"]


def stripes(n, shape=(1, 28, 28), seed=0):
    """Noisy uint8 images of four classes: a bright stripe at one of four heights."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    x = rng.integers(0, 100, (n, *shape), dtype=np.uint8)
    for image, label in zip(x, y, strict=True):
        image[:, 7 * label : 7 * label + 7] += 120
    return x, y


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, a small data set in place of every named one, settings restored."""
    small = Dataset("small", stripes(96), stripes(48, seed=1), ("a", "b", "c", "d"))
    monkeypatch.setattr(data, "load", lambda name, data_dir: small)
    monkeypatch.chdir(tmp_path)
    threads, isa = st.get_num_threads(), st.get_isa()
    yield tmp_path
    st.set_num_threads(threads)
    st.set_isa(isa)


def history(path):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("time_s", "images_per_s")} for row in csv.DictReader(file)]


def test_train_writes_a_run_folder(folder, capsys):
    assert cli.main(["train", *FAST, "--threads", "1", "--isa", "base"]) == 0
    (run,) = (folder / "runs").iterdir()
    assert run.name.startswith("fashion-mini-small-cnn-")
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["sparsity"] == 0.9
    assert config["options"]["lr"] == 0.05
    assert config["ran_with"]["isa"] == "base"
    assert config["ran_with"]["threads"] == 1
    for place in (run, run / "dense"):
        assert [row["epoch"] for row in history(place / "history.csv")] == ["1", "2"]
    trainer = Trainer.resume(run / "checkpoint.safetensors", schedule=None)
    assert trainer.epoch == 2
    weights = [p for p in trainer.model.parameters() if len(p.shape) > 1]
    assert 1 - sum(p.nnz for p in weights) / sum(np.prod(p.shape) for p in weights) > 0.85
    names = {path.name for path in run.iterdir()}
    assert names - {"curves.png"} == {"config.json", "history.csv", "checkpoint.safetensors", "dense"}

    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    for word in ("shape", "weights kept", "sparsity", "ms forward", "ms backward"):
        assert word in lines[head]
    name, kind, shape, kept, sparsity, forward, backward = lines[head + 2].split()
    assert (name, kind, shape, kept, sparsity) == ("0", "Conv2d", "32x1x3x3", "288", "0.000")
    assert "kept dense: 0 (--exclude)" in lines
    assert float(forward) > 0 and float(backward) > 0
    for word in ("sparse: accuracy", "dense: accuracy", "ms a step", "as fast"):
        assert word in lines[-1]


def test_curves(folder):
    pytest.importorskip("matplotlib")
    assert cli.main(["train", *FAST, "--out", "run", "--no-compare", "--quiet"]) == 0
    assert (folder / "run/curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["train", *FAST, "--out", "run", "--no-compare"]) == 0
    assert "pip install 'sparsetrain[plot]'" in capsys.readouterr().out
    assert not (folder / "run/curves.png").exists()


def test_quiet_and_dense(folder, capsys):
    assert cli.main(["train", *FAST, "--out", "run", "--sparsity", "0", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "epoch" not in out
    assert out.splitlines()[-1].startswith("dense: accuracy")
    assert "sparse:" not in out
    assert not (folder / "run/dense").exists()


def test_same_seed_same_run(folder):
    for out in ("one", "two"):
        assert cli.main(["train", *FAST, "--no-compare", "--out", out, "--augment"]) == 0
    assert history("one/history.csv") == history("two/history.csv")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "lenet5", "--optimizer", "adam", "--schedule", "step"],
        ["--model", "lenet300", "--optimizer", "adamw", "--distribution", "erk"],
        ["--model", "mlp", "--exclude", "--method", "random", "--distribution", "global"],
        ["--exclude", "first", "13", "--label-smoothing", "0.1", "--schedule", "constant"],
    ],
    ids=" ".join,
)
def test_choices(folder, arguments):
    common = ["--epochs", "1", "--no-compare", "--quiet", "--out", "run"]
    assert cli.main(["train", *common, *arguments]) == 0


def test_normalisation_is_the_one_given(folder):
    for out, given in (("own", []), ("given", ["--mean", "0.4", "--std", "0.3"]), ("again", ["--resume", "given"])):
        arguments = given if out == "again" else [*FAST, "--no-compare", "--out", out, *given]
        assert cli.main(["train", *arguments, *(["--epochs", "3"] if out == "again" else [])]) == 0
    assert history("own/history.csv")[0] != history("given/history.csv")[0]
    config = json.loads(Path("given/config.json").read_text())["options"]
    assert (config["mean"], config["std"]) == ([0.4], [0.3])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", named.MODELS)
def test_every_model_takes_every_data_set(name, shape):
    assert named.model(name, shape, 4).summary(shape).rows[-1].output == (4,)


@pytest.mark.parametrize("stop_in", ["sparse", "dense"])
def test_ctrl_c_and_resume(folder, capsys, monkeypatch, stop_in):
    assert cli.main(["train", *FAST, "--out", "whole"]) == 0
    on_epoch_end = CSVLog.on_epoch_end

    def interrupted(log, trainer, row):
        in_dense = "dense" in str(log.path)
        if row["epoch"] == 2 and in_dense == (stop_in == "dense"):
            raise KeyboardInterrupt
        on_epoch_end(log, trainer, row)

    monkeypatch.setattr(CSVLog, "on_epoch_end", interrupted)
    assert cli.main(["train", *FAST, "--out", "half"]) == 130
    assert "sparsetrain train --resume half" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    small = Dataset("small", stripes(96), stripes(48, seed=1), ("a", "b", "c", "d"))
    monkeypatch.setattr(data, "load", lambda name, data_dir: small)
    assert cli.main(["train", "--resume", "half"]) == 0
    for log in ("history.csv", "dense/history.csv"):
        assert history(f"half/{log}") == history(f"whole/{log}")


def test_ctrl_c_outside_the_loop(folder, capsys, monkeypatch):
    def load(name, data_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", load)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "sparsetrain: interrupted\n"
    assert not any(folder.iterdir())


def test_resume_to_more_epochs(folder):
    assert cli.main(["train", *FAST, "--no-compare", "--out", "run"]) == 0
    assert cli.main(["train", "--resume", "run", "--epochs", "3"]) == 0
    assert len(history("run/history.csv")) == 3


def error_line(capsys):
    out, err = capsys.readouterr()
    assert err.startswith("sparsetrain: error: ") and err.count("\n") == 1, err
    return err


def test_divergence_keeps_the_checkpoint(folder, capsys):
    assert cli.main(["train", *FAST, "--lr", "1e30", "--out", "run"]) == 2
    line = error_line(capsys)
    assert "step" in line and "the last good checkpoint is run/checkpoint.safetensors" in line
    assert Trainer.resume("run/checkpoint.safetensors", schedule=None).epoch == 0


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ([], "required"),
        (["tarin"], "'tarin'"),
        (["train", "--epoch", "3"], "--epoch"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--epochs", "0"], "--epochs is 0"),
        (["train", "--model", "lenet"], "lenet5"),
        (["train", "--data", "fashion"], "fashion-mnist"),
        (["train", "--optimizer", "adma"], "adam"),
        (["train", "--schedule", "cosin"], "cosine"),
        (["train", "--method", "magnitud"], "magnitude"),
        (["train", "--distribution", "ekr"], "erk"),
        (["train", "--sparsity", "1"], "--sparsity is 1.0"),
        (["train", "--sparsity", "nan"], "--sparsity is nan"),
        (["train", "--exclude", "conv9"], "conv9"),
        (["train", "--batch-size", "0"], "--batch-size is 0"),
        (["train", "--lr", "-1"], "lr is -1"),
        (["train", "--momentum", "1"], "momentum is 1"),
        (["train", "--weight-decay", "-1"], "weight_decay is -1"),
        (["train", "--label-smoothing", "2"], "label_smoothing is 2"),
        (["train", "--warmup", "9"], "--warmup is 9"),
        (["train", "--mean", "0.5"], "std is None, mean is not"),
        (["train", "--mean", "0.5", "--std", "0"], "std[0] is 0"),
        (["train", "--mean", "0.5", "0.5", "--std", "1", "1"], "mean"),
        (["train", "--seed", "-1"], "--seed is -1"),
        (["train", "--threads", "0"], "0"),
        (["train", "--isa", "avx3"], "avx2"),
        (["train", "--resume", "nowhere"], "no config.json"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_line_and_write_nothing(folder, capsys, arguments, wanted):
    assert cli.main(arguments) == 2
    assert wanted in error_line(capsys)
    assert not any(folder.iterdir())


def test_missing_data_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--data", "mnist", "--data-dir", "nowhere"]) == 2
    assert "nowhere" in error_line(capsys)


def test_folders_that_do_not_do(folder, capsys):
    (folder / "full").mkdir()
    (folder / "full/file").write_text("x")
    assert cli.main(["train", "--out", "full"]) == 2
    assert "--out is full" in error_line(capsys)
    assert cli.main(["train", "--resume", "full", "--model", "mlp"]) == 2
    (folder / "full/config.json").write_text("{")
    error_line(capsys)
    assert cli.main(["train", "--resume", "full"]) == 2
    assert "config.json" in error_line(capsys)
    for wrong in (
        '{"epochs": "two"}',
        '{"lr": [1]}',
        '{"exclude": 3}',
        '{"data": null}',
        '{"augment": 1}',
        '{"x": 1}',
        "3",
    ):
        (folder / "full/config.json").write_text(f'{{"options": {wrong}}}')
        assert cli.main(["train", "--resume", "full"]) == 2
        assert "full/config.json is not the config.json of a run" in error_line(capsys)
    (folder / "full/config.json").write_text('{"options": {}}')
    assert cli.main(["train", "--resume", "full", "--model", "mlp"]) == 2
    assert "--model cannot be given with --resume" in error_line(capsys)


def test_plans_stay_with_the_run(folder, monkeypatch):
    common = ["--epochs", "1", "--no-compare", "--quiet", "--warmup", "0"]
    assert cli.main(["train", *common, "--out", "one"]) == 0
    choices.save("plans.json")
    assert cli.main(["train", *common, "--out", "two", "--plans", "plans.json"]) == 0
    assert history("one/history.csv") == history("two/history.csv")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    loaded = []
    monkeypatch.setattr(choices, "load", loaded.append)
    assert cli.main(["train", "--resume", "../two", "--epochs", "2"]) == 0
    assert loaded == [str(folder / "plans.json")]


def test_help_explains_every_option(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in OPTIONS:
        assert f"--{name}" in text
    assert text.count("(default: ") == len(OPTIONS)
    assert "SUPPRESS" not in text


def test_info(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSETRAIN_DATA", str(tmp_path))
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (st.__version__, st.get_isa(), "threads", "numpy", "L1d", str(tmp_path)):
        assert word in out


def test_module_runs(tmp_path):
    # The package under test, whether it is installed or built in the checkout.
    environment = {**os.environ, "PYTHONPATH": str(Path(st.__file__).parents[1])}
    command = [sys.executable, "-m", "sparsetrain", "--version"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"sparsetrain {st.__version__}\n")
