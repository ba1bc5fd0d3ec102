"""Methods of backprop in a Trainer and on the command line: history, files, going on, threads, errors."""

import csv
import json

import numpy as np
import pytest

import sparsetrain as st
from quadrants import images
from sparsetrain import cli, data, manual_seed, nn, optim, sparsify
from sparsetrain.backprop import Dithered, MemAOP, ReSprop, TopK
from sparsetrain.data import Dataset
from sparsetrain.train import CSVLog, Trainer

METHODS = {
    "dithered": lambda: Dithered(1.5, bits=8, layers={"3.body.0": {"s": 1.0}}),
    "dithered to a target": lambda: Dithered(sparsity=0.8),
    "resprop": lambda: ReSprop(0.7, exclude=("8",)),
    "w-resprop by quantile": lambda: ReSprop(0.8, True, "quantile"),
    "mem-aop": lambda: MemAOP(0.5, exclude=["0"]),
    "mem-aop, weightedk": lambda: MemAOP(0.5, "weightedk", decay=0.5),
    "mem-aop, randk without memory": lambda: MemAOP(0.5, "randk", memory=False),
    "top-k": lambda: TopK(0.3),
}
methods = pytest.mark.parametrize("name", METHODS)
KEYS = {"values", "gradient_sparsity", "ms", "angle", "clipped"}


def trainer(method, sparsity=0.5, **settings):
    manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 16, 4),
    )
    if sparsity:
        sparsify(model, sparsity)
    return Trainer(model, optim.SGD(model.named_parameters(), lr=0.02, momentum=0.5), backprop=method, **settings)


def batches(n=200):
    return data.Batches(*images(n), 32, shuffle=True, seed=3, drop_last=True)


def measured(history):
    """The rows without what differs from run to run."""
    rows = []
    for row in history:
        layers = {name: {k: v for k, v in values.items() if k != "ms"} for name, values in row["layers"].items()}
        rows.append({k: v for k, v in row.items() if k not in ("time_s", "images_per_s")} | {"layers": layers})
    return rows


def assert_same(run, other):
    """The same bits in history, model and method."""
    assert measured(run.history) == measured(other.history)
    for ours, theirs in ((run.model, other.model), (run.backprop, other.backprop)):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert sorted(ours) == sorted(theirs)
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


# ---- Trainer


@methods
def test_a_net_learns(name):
    run = trainer(METHODS[name]())
    history = run.fit(batches(400), 6, data.Batches(*images(100, seed=1), 64))
    assert history[-1]["val_accuracy"] > 0.9
    assert history[-1]["loss"] < history[0]["loss"]


@methods
def test_history_and_its_files(name, tmp_path):
    run = trainer(METHODS[name](), callbacks=[CSVLog(tmp_path / "history.csv")])
    run.fit(batches(), 3)
    names = [layer.name for layer in run.backprop.attached]
    assert names == [n for n in ("0", "3.body.0", "8") if n not in run.backprop.exclude]
    for row in run.history:
        assert list(row["layers"]) == names
        assert all(set(values) == KEYS and values["ms"] > 0 for values in row["layers"].values())
        used = sum(values["values"] * (1 - values["gradient_sparsity"]) for values in row["layers"].values())
        assert row["gradient_sparsity"] == pytest.approx(1 - used / sum(v["values"] for v in row["layers"].values()))
    sizes = {"0": 8 * 64, "3.body.0": 8 * 64, "8": 4}
    assert {n: v["values"] for n, v in run.history[0]["layers"].items()} == {n: 192 * sizes[n] for n in names}
    assert 0.1 < run.history.column("gradient_sparsity")[-1] < 1

    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["gradient_sparsity"]) for row in rows] == run.history.column("gradient_sparsity")
    with open(tmp_path / "history-layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "layer", "gradient_sparsity", "ms", "angle", "clipped"]
    assert [(row["epoch"], row["layer"]) for row in rows] == [(str(e), n) for e in (1, 2, 3) for n in names]
    assert [float(row["gradient_sparsity"]) for row in rows] == [
        v["gradient_sparsity"] for row in run.history for v in row["layers"].values()
    ]


def test_without_a_method_nothing_is_measured(tmp_path):
    run = trainer(None, callbacks=[CSVLog(tmp_path / "history.csv")])
    run.fit(batches(), 1)
    assert run.history.column("gradient_sparsity") == [None]
    assert run.history[0]["layers"] == {}
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_angles_are_in_the_history(tmp_path):
    run = trainer(Dithered(angles=True), callbacks=[CSVLog(tmp_path / "history.csv")])
    run.fit(batches(), 1)
    assert all(1 < values["angle"] < 90 for values in run.history[0]["layers"].values())
    with open(tmp_path / "history-layers.csv", newline="") as file:
        assert all(float(row["angle"]) > 1 for row in csv.DictReader(file))


@methods
def test_going_on_from_a_file_gives_the_same_bits(name, tmp_path):
    whole = trainer(METHODS[name]())
    whole.fit(batches(), 4)
    run = trainer(METHODS[name]())
    run.fit(batches(), 2)
    run.save(tmp_path / "run.safetensors")
    resumed = Trainer.resume(tmp_path / "run.safetensors")
    assert type(resumed.backprop) is type(run.backprop)
    assert resumed.backprop.exclude == run.backprop.exclude and resumed.backprop.layers == run.backprop.layers
    assert [layer.name for layer in resumed.backprop.attached] == [layer.name for layer in run.backprop.attached]
    assert_same(run, resumed)
    resumed.fit(batches(), 2)
    assert_same(whole, resumed)


def test_going_on_with_another_method(tmp_path):
    run = trainer(TopK(0.3))
    run.fit(batches(), 1)
    run.save(tmp_path / "run.safetensors")
    assert Trainer.resume(tmp_path / "run.safetensors", backprop=None).backprop is None
    resumed = Trainer.resume(tmp_path / "run.safetensors", backprop=TopK(0.5))
    assert resumed.backprop.k == 0.5 and resumed.backprop.attached[0].passes == 6


def test_a_method_of_ones_own_must_be_given_again(tmp_path):
    class Own(TopK):
        pass

    whole = trainer(Own(0.3))
    whole.fit(batches(), 2)
    run = trainer(Own(0.3))
    run.fit(batches(), 1)
    run.save(tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="a method of backprop of your own: give backprop="):
        Trainer.resume(tmp_path / "run.safetensors")
    resumed = Trainer.resume(tmp_path / "run.safetensors", backprop=Own(0.3))
    resumed.fit(batches(), 1)
    assert_same(whole, resumed)


@methods
def test_1_and_2_threads_give_the_same_bits(name):
    runs = []
    for threads in (1, 2):
        st.set_num_threads(threads)
        runs.append(trainer(METHODS[name]()))
        runs[-1].fit(batches(), 2)
    assert_same(*runs)


@methods
def test_the_same_seed_gives_the_same_run(name):
    runs = []
    for _ in range(2):
        runs.append(trainer(METHODS[name]()))
        runs[-1].fit(batches(), 2)
    assert_same(*runs)


def test_steps_of_an_epoch_are_known_to_the_method():
    seen, exact = [], []

    class Spy(ReSprop):
        def after(self, layer, dy, used):
            super().after(layer, dy, used)
            if layer.name == "8":
                seen.append((layer.epoch, layer.step, layer.steps))
                exact.append(used is None)

    run = trainer(Spy(0.9, control="quantile"))
    run.fit(batches(), 2)
    assert seen == [(epoch, step, 6) for epoch in range(2) for step in range(6)]
    assert exact == 2 * [True, False, False, False, False, True]


def test_a_last_batch_of_another_size_is_an_error_with_memory(tmp_path):
    with pytest.raises(ValueError, match="a batch of 8, the memory of MemAOP has slots for 32: drop the last batch"):
        trainer(MemAOP()).fit(data.Batches(*images(200), 32), 1)


@pytest.mark.parametrize("method", ["dithered", Dithered])
def test_what_is_not_a_method(method):
    with pytest.raises(TypeError, match="must be a backprop.Method or None"):
        trainer(method)


# ---- the command line


FAST = [
    "--epochs",
    "2",
    "--batch-size",
    "32",
    "--warmup",
    "0",
    "--lr",
    "0.02",
    "--model",
    "lenet5",
    "--sparsity",
    "0.5",
]
ALONE = ["--no-compare", "--quiet", "--out", "run"]
COMMANDS = {
    "dithered": (["--s", "1.5", "--bits", "8"], {"s": 1.5, "bits": 8}),
    "dithered to a target": (["--gradient-sparsity", "0.8"], {"sparsity": 0.8}),
    "resprop": (["--reuse", "0.7", "--control", "quantile"], {"reuse": 0.7, "control": "quantile", "warmup": False}),
    "resprop, warm-up": (["--reuse-warmup"], {"warmup": True, "reuse": 0.9}),
    "mem-aop": (
        ["--k", "0.5", "--policy", "weightedk", "--decay", "0.9"],
        {"k": 0.5, "policy": "weightedk", "decay": 0.9},
    ),
    "mem-aop without memory": (["--no-memory"], {"memory": False, "k": 0.1}),
    "top-k": (["--k", "0.3"], {"k": 0.3}),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, and a small data set in place of every named one."""

    def stripes(n, seed):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 4, n)
        x = rng.integers(0, 100, (n, 1, 28, 28), dtype=np.uint8)
        for image, label in zip(x, y, strict=True):
            image[:, 7 * label : 7 * label + 7] += 120
        return x, y

    small = Dataset("small", stripes(104, 0), stripes(48, 1), ("a", "b", "c", "d"))
    monkeypatch.setattr(data, "load", lambda name, data_dir: small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path):
    with open(path, newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("time_s", "images_per_s", "ms")} for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("name", COMMANDS)
def test_train(name, folder):
    options, settings = COMMANDS[name]
    method = name.split(",")[0].split(" ")[0]
    command = ["train", *FAST, *ALONE, "--seed", "3", "--backprop", method, *options]
    assert cli.main(command) == 0
    saved = Trainer.resume(folder / "run/checkpoint.safetensors", schedule=None).backprop
    assert {key: getattr(saved, key) for key in settings} == settings
    assert saved.seed == 3 and saved.exclude == ()
    assert json.loads((folder / "run/config.json").read_text())["options"]["backprop"] == method
    found = rows(folder / "run/history.csv")
    reused = 0 if name == "resprop, warm-up" else 0.01
    assert [float(row["gradient_sparsity"]) >= reused for row in found] == [True, True]
    assert [row["step"] for row in found] == (["3", "6"] if name == "mem-aop" else ["4", "8"])
    layers = rows(folder / "run/history-layers.csv")
    assert len(layers) == 2 * len(saved.attached)


def test_train_shows_sparsity_and_angle_of_each_layer_and_compares(folder, capsys):
    command = [
        "train",
        *FAST,
        "--out",
        "run",
        "--backprop",
        "top-k",
        "--k",
        "0.25",
        "--angles",
        "--exact-layers",
        "first",
    ]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    assert lines[head].split()[-3:] == ["gradient", "sparsity", "angle"]
    shown = {line.split()[0]: line.split()[-2:] for line in lines[head + 2 :] if "Conv2d" in line or "Linear" in line}
    method = Trainer.resume(folder / "run/checkpoint.safetensors", schedule=None).backprop
    assert shown.pop("0") == ["-", "-"] and method.exclude == ("0",)
    assert list(shown) == [layer.name for layer in method.attached]
    for sparsity, angle in shown.values():
        assert 0.7 < float(sparsity) < 1 and 0 <= float(angle) < 90
    assert max(float(angle) for _, angle in shown.values()) > 5
    for word in ("sparse top-k: accuracy", "dense: accuracy"):
        assert word in lines[-1]
    assert (folder / "run/history-layers.csv").exists()
    assert not (folder / "run/dense/history-layers.csv").exists()
    assert not any(row["gradient_sparsity"] for row in rows(folder / "run/dense/history.csv"))


def test_the_table_of_mem_aop_shows_the_rows_that_were_left_out(folder, capsys):
    """Although the schedule has ended at a rate of 0, where the method does nothing."""
    assert cli.main(["train", *FAST, *ALONE, "--backprop", "mem-aop", "--k", "0.25", "--exact-layers", "first"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[-1] for line in lines if "Conv2d" in line or "Linear" in line]
    assert shown[0] == "-" and all(0.7 <= float(sparsity) < 0.8 for sparsity in shown[1:]) and len(shown) > 2


@pytest.mark.parametrize("method", ["resprop", "mem-aop"])
def test_resume(method, folder):
    common = [
        "train",
        *FAST[2:],
        "--schedule",
        "constant",
        "--momentum",
        "0",
        "--no-compare",
        "--quiet",
        "--backprop",
        method,
    ]
    assert cli.main([*common, "--epochs", "2", "--out", "whole"]) == 0
    assert cli.main([*common, "--epochs", "1", "--out", "run"]) == 0
    assert cli.main(["train", "--resume", "run", "--epochs", "2", "--quiet"]) == 0
    for file in ("history.csv", "history-layers.csv"):
        assert rows(folder / "run" / file) == rows(folder / "whole" / file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--s", "2"], "--s is not for --backprop exact"),
        (["--angles"], "--angles is not for --backprop exact"),
        (["--exact-layers", "first"], "--exact-layers is not for --backprop exact"),
        (["--backprop", "dithered", "--k", "0.1"], "--k is not for --backprop dithered"),
        (["--backprop", "dithered", "--reuse-warmup"], "--reuse-warmup is not for --backprop dithered"),
        (["--backprop", "resprop", "--gradient-sparsity", "0.9"], "--gradient-sparsity is not for --backprop resprop"),
        (["--backprop", "top-k", "--no-memory"], "--memory is not for --backprop top-k"),
        (["--backprop", "mem-aop", "--control", "paper"], "--control is not for --backprop mem-aop"),
        (["--backprop", "ditherd"], "did you mean 'dithered'"),
        (["--backprop", "dithered", "--s", "0"], "--s is 0.0, must be above 0"),
        (["--backprop", "dithered", "--bits", "4"], "--bits is 4"),
        (["--backprop", "dithered", "--gradient-sparsity", "1"], "--gradient-sparsity is 1.0, must be in (0, 1)"),
        (["--backprop", "resprop", "--reuse", "1"], "--reuse is 1.0, must be in [0, 1)"),
        (["--backprop", "mem-aop", "--policy", "topk2"], "--policy is 'topk2'"),
        (["--backprop", "top-k", "--k", "2"], "--k is 2.0, must be in (0, 1]"),
        (["--backprop", "top-k", "--exact-layers", "77"], "--exact-layers has '77', which matches none of the layers"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors(options, message, folder, capsys):
    assert cli.main(["train", *FAST, *ALONE, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "run").exists()
