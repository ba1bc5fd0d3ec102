"""The command line: methods of sparsity, training on from given weights, checkpoints that are kept."""

import csv
import json
import sys

import numpy as np
import pytest
import safetensors.numpy

import sparsetrain as st
import torch_files
from sparsetrain import cli, data, nn
from sparsetrain.commands.train_options import FINETUNE
from sparsetrain.data import Dataset
from sparsetrain.interchange import load_state, read_state, write_state, zeros_to_structure
from sparsetrain.sparse import SparseParameter
from sparsetrain.train import Checkpoint, Trainer

QUICK = ["--model", "lenet300", "--epochs", "1", "--warmup", "0", "--lr", "0.02", "--batch-size", "32", "--quiet"]
RUN = [*QUICK, "--no-compare", "--out", "run"]
EVERY = {
    "gmp": ["--change-every", "2", "--change-until", "0.5", "--initial-sparsity", "0.2", "--distribution", "erk"],
    "set": ["--change-every", "2", "--change-until", "0.9", "--drop-fraction", "0.4"],
    "rigl": ["--change-every", "2", "--drop-fraction", "0.4", "--distribution", "uniform"],
    "granet": ["--change-every", "2", "--drop-fraction", "0.2", "--initial-sparsity", "0.6"],
    "ac-dc": ["--change-every", "1"],
    "n:m": ["--pattern", "1:4", "--change-until", "0.5"],
    "snip": ["--distribution", "global"],
    "grasp": [],
}


@pytest.fixture(scope="module")
def small():
    """A part of fashion-mini."""
    whole = data.load("fashion-mini")
    part = [tuple(array[:n] for array in pair) for pair, n in ((whole.train, 192), (whole.test, 64))]
    return Dataset("small", *part, whole.classes)


@pytest.fixture
def folder(small, tmp_path, monkeypatch):
    """An empty current folder, and the small data set in place of every named one."""
    monkeypatch.setattr(data, "load", lambda name, data_dir: small)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # curves take longer than these runs
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def untouched(folder):
    """The empty folder, which stays empty."""
    yield folder
    assert not any(folder.iterdir())


def error_line(capsys):
    out, err = capsys.readouterr()
    assert err.startswith("sparsetrain: error: ") and err.count("\n") == 1, err
    return err


def history(path):
    timed = {"time_s", "images_per_s"}
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def model(path="run/checkpoint.safetensors"):
    return Trainer.resume(path, schedule=None).model


# ---- methods


@pytest.mark.parametrize("method", EVERY)
def test_every_method_trains(folder, capsys, method):
    sparsity = [] if method == "n:m" else ["--sparsity", "0.75"]
    assert cli.main(["train", *RUN, "--method", method, *sparsity, *EVERY[method]]) == 0
    config = json.loads((folder / "run/config.json").read_text())["options"]
    assert (config["method"], config["sparsity"]) == (method, 0.75)
    found = model()
    assert type(found[1].weight) is not SparseParameter  # the layer next to the images
    stored = sum(found[i].weight.nnz for i in (3, 5)), 300 * 100 + 100 * 10
    assert stored[0] == pytest.approx(0.25 * stored[1], abs=2)
    if method == "n:m":
        kept = (found[3].weight.to_dense().reshape(100, -1, 4) != 0).sum(2)
        assert (kept <= 1).all()
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines()[-1].startswith("sparse: accuracy")


def test_without_options_of_its_own(folder):
    assert cli.main(["train", *RUN, "--method", "n:m", "--exclude", "1"]) == 0
    config = json.loads((folder / "run/config.json").read_text())["options"]
    assert config["sparsity"] == 0.5 and config["pattern"] is None
    assert model()[3].weight.nnz == 15_000


@pytest.mark.parametrize("method", ["gmp", "ac-dc", "rigl"])
def test_the_sparsity_is_reached_whatever_the_times(method, folder):
    """A run of 6 steps: the last change comes before its end, and some change comes in a short run too."""
    for out, options in (("late", ["--change-until", "0.9999", "--change-every", "4"]), ("short", [])):
        assert cli.main(["train", *QUICK, "--no-compare", "--out", out, "--method", method, *options]) == 0
        net = model(f"{out}/checkpoint.safetensors")
        assert net[3].weight.nnz + net[5].weight.nnz == 3100


def test_the_last_layer_can_stay_dense(folder):
    assert cli.main(["train", *RUN, "--exclude", "first", "last"]) == 0
    assert [layer.weight.structure.dense for layer in (model()[1], model()[3], model()[5])] == [True, False, True]


def test_with_a_method_of_backprop(folder):
    arguments = ["--method", "rigl", "--change-every", "2", "--backprop", "dithered"]
    assert cli.main(["train", *RUN, *arguments]) == 0
    assert history("run/history.csv")[0]["gradient_sparsity"]


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--method", "magnitude", "--change-every", "5"], "--change-every is not for --method magnitude"),
        (["--method", "snip", "--change-until", "0.5"], "--change-until is not for --method snip"),
        (["--method", "random", "--drop-fraction", "0.5"], "--drop-fraction is not for --method random"),
        (["--method", "grasp", "--initial-sparsity", "0.5"], "--initial-sparsity is not for --method grasp"),
        (["--pattern", "2:4"], "--pattern is not for --method magnitude"),
        (["--method", "rigl", "--pattern", "2:4"], "--pattern is not for --method rigl"),
        (["--method", "rigl", "--initial-sparsity", "0.5"], "--initial-sparsity is not for --method rigl"),
        (["--method", "set", "--initial-sparsity", "0.5"], "--initial-sparsity is not for --method set"),
        (["--method", "gmp", "--drop-fraction", "0.5"], "--drop-fraction is not for --method gmp"),
        (["--method", "ac-dc", "--drop-fraction", "0.5"], "--drop-fraction is not for --method ac-dc"),
        (["--method", "n:m", "--change-every", "5"], "--change-every is not for --method n:m"),
        (["--method", "n:m", "--distribution", "erk"], "--distribution is not for --method n:m"),
        (["--method", "n:m", "--pattern", "5:4"], "--pattern of N:M: n is 5, more than m, which is 4"),
        (["--method", "n:m", "--pattern", "0:4"], "--pattern of N:M: n is 0"),
        (["--method", "n:m", "--pattern", "2"], "--pattern is '2', must be N:M such as 2:4"),
        (["--method", "n:m", "--pattern", "2:x"], "must be N:M"),
        (["--method", "n:m", "--pattern=-2:4"], "must be N:M"),
        (["--method", "n:m", "--pattern", "2:7"], "must be a multiple of m = 7"),
        (["--method", "rigl", "--change-every", "0"], "--change-every is 0"),
        (["--method", "rigl", "--change-every", "often"], "--change-every"),
        (["--method", "rigl", "--change-until", "1"], "--change-until is 1.0"),
        (["--method", "rigl", "--change-until", "-1"], "--change-until is -1"),
        (["--method", "rigl", "--change-until", "nan"], "--change-until is nan"),
        (["--method", "set", "--drop-fraction", "1.5"], "--drop-fraction is 1.5"),
        (["--method", "set", "--drop-fraction", "0"], "--drop-fraction is 0"),
        (["--method", "gmp", "--initial-sparsity", "0.95"], "--initial-sparsity is 0.95"),
        (["--method", "granet", "--initial-sparsity", "1"], "--initial-sparsity is 1"),
        (["--method", "rigle"], "rigl"),
        (["--method", "ac/dc"], "ac-dc"),
        (["--method", "rigl", "--exclude", "conv"], "--exclude has 'conv', which matches none of the layers 1"),
        (["--checkpoint-every", "0"], "--checkpoint-every is 0"),
        (["--keep", "0"], "--keep is 0"),
        (["--keep", "two"], "--keep"),
        (["--threads", "0"], "--threads is 0"),
        (["--method", "rigl", "--change-until", "0"], "--change-until is 0, as is start: RigL would never change"),
        (["--method", "n:m", "--sparsity", "0.5"], "--sparsity is not for --method n:m"),
        (["--optimizer", "adam", "--momentum", "0.5"], "--momentum is not for --optimizer adam"),
        (["--sparsity", "0", "--exclude", "nope"], "--exclude has 'nope', which matches none"),
        (["--weights", "a.pth"], "--weights"),
        (["--head", "new"], "--head"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "says",
)
def test_combinations_that_do_not_go(untouched, capsys, arguments, wanted):
    assert cli.main(["train", *RUN, *arguments]) == 2
    assert wanted in error_line(capsys)


@pytest.mark.parametrize("method", ["rigl", "n:m", "gmp"])
def test_resume(folder, monkeypatch, method):
    """After Ctrl-C in the middle of an epoch a run goes on as if nothing had been."""
    change = EVERY[method]
    common = [*QUICK, "--no-compare", "--method", method, "--epochs", "2", "--checkpoint-every", "1", *change]
    assert cli.main(["train", *common, "--out", "whole"]) == 0
    save = Checkpoint.on_batch_end

    def stop(checkpoint, trainer, mean):
        save(checkpoint, trainer, mean)
        if trainer.step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "on_batch_end", stop)
    assert cli.main(["train", *common, "--out", "half"]) == 130
    assert Trainer.resume("half/checkpoint.safetensors", schedule=None).step == 8
    monkeypatch.setattr(Checkpoint, "on_batch_end", save)
    assert cli.main(["train", "--resume", "half"]) == 0
    assert history("half/history.csv") == history("whole/history.csv")
    ours, theirs = (model(f"{name}/checkpoint.safetensors").state_dict() for name in ("half", "whole"))
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def test_what_stays_on_resume(folder, capsys):
    assert cli.main(["train", *RUN, "--method", "rigl", "--change-every", "2"]) == 0
    for arguments in (["--method", "set"], ["--change-every", "3"], ["--keep", "2"], ["--drop-fraction", "0.1"]):
        assert cli.main(["train", "--resume", "run", *arguments]) == 2
        assert f"{arguments[0]} cannot be given with --resume" in error_line(capsys)
    assert cli.main(["train", "--resume", "run", "--epochs", "2"]) == 0
    assert len(history("run/history.csv")) == 2


@pytest.mark.parametrize("keep, names", [(1, ["checkpoint"]), (2, ["checkpoint", "checkpoint-1"])])
def test_checkpoints_that_are_kept(folder, keep, names):
    arguments = ["--keep", str(keep), "--checkpoint-every", "2", "--epochs", "2"]
    assert cli.main(["train", *RUN, *arguments]) == 0
    found = sorted(path.name for path in (folder / "run").glob("*.safetensors"))
    assert found == sorted(f"{name}.safetensors" for name in names)
    steps = [Trainer.resume(folder / "run" / f"{name}.safetensors", schedule=None).step for name in names]
    assert steps[0] == 12 and steps[1:] in ([], [12])  # the last step and the end of the epoch


# ---- from given weights


def lenet(classes=10, seed=5):
    st.manual_seed(seed)
    return nn.models.lenet300(classes)


def with_zeros(found, share=0.8):
    rng = np.random.default_rng(0)
    for i in (1, 3, 5):
        weight = found[i].weight.data
        weight[rng.random(weight.shape) < share] = 0
    return found


def test_the_zeros_of_a_file_stay(folder, capsys):
    """Of a checkpoint, of a run that has not trained a step, and after an epoch."""
    given = with_zeros(lenet())
    weights = given.state_dict()
    torch_files.write_state("a.pth", weights)
    common = [*QUICK, "--weights", "a.pth", "--sparsity-from-weights", "--out"]
    assert cli.main(["finetune", *common, "run", "--lr", "0"]) == 0
    assert cli.main(["finetune", *common, "trained"]) == 0
    assert not (folder / "run/dense").exists()
    for name, same in (("run", True), ("trained", False)):
        found = model(f"{name}/checkpoint.safetensors")
        for i in (1, 3, 5):
            weight, wanted = found[i].weight, weights[f"{i}.weight"]
            assert isinstance(weight, SparseParameter)
            np.testing.assert_array_equal(weight.mask, wanted != 0)
            assert np.array_equal(weight.to_dense(), wanted) == same
    assert capsys.readouterr().out.splitlines()[-1].startswith("sparse: accuracy")
    # and of our own checkpoint, which says no more than that about zeros
    common[common.index("a.pth")] = "trained/checkpoint.safetensors"
    assert cli.main(["finetune", *common, "again"]) == 0
    found, before = model("again/checkpoint.safetensors"), model("trained/checkpoint.safetensors")
    for i in (1, 3, 5):
        np.testing.assert_array_equal(found[i].weight.mask, before[i].weight.mask)


@pytest.mark.parametrize("kind", ["pth", "th", "npz", "safetensors", "checkpoint"])
def test_every_kind_of_file(folder, kind):
    given = lenet()
    path = f"a.{kind}"
    if kind in ("pth", "th"):
        torch_files.write_state(path, given.state_dict(), lambda state: {"state_dict": state}, old=kind == "th")
    elif kind == "npz":
        np.savez(path, **given.state_dict())
    elif kind == "safetensors":
        write_state(path, given)
    else:
        path = "a.safetensors"
        Trainer(given, st.optim.SGD(given.named_parameters(), lr=0.1)).save(path)
    arguments = ["--weights", path, "--head", "keep", "--sparsity", "0", "--out", "run", "--lr", "0"]
    assert cli.main(["finetune", *QUICK, *arguments]) == 0
    for name, array in given.state_dict().items():
        np.testing.assert_array_equal(model().state_dict()[name], array)


def test_pruned_first(folder):
    given = lenet()
    torch_files.write_state("a.pth", given.state_dict())
    assert cli.main(["finetune", *QUICK, "--weights", "a.pth", "--sparsity", "0.5", "--out", "run", "--lr", "0"]) == 0
    found = model()
    assert type(found[1].weight) is not SparseParameter
    weight, dense = found[3].weight, given.state_dict()["3.weight"]
    assert weight.nnz == 15_000
    np.testing.assert_array_equal(weight.to_dense(), dense * weight.mask)
    assert abs(dense[weight.mask]).min() >= abs(dense[~weight.mask]).max()


def test_a_learning_rate_for_it(folder):
    torch_files.write_state("a.pth", lenet().state_dict())
    without = [a for a in QUICK if a not in ("--lr", "0.02")]
    for optimizer, rate in (("sgd", 0.01), ("adam", 0.0002)):
        arguments = ["--weights", "a.pth", "--optimizer", optimizer, "--out", optimizer]
        assert cli.main(["finetune", *without, *arguments]) == 0
        options = json.loads((folder / optimizer / "config.json").read_text())["options"]
        assert options["lr"] == pytest.approx(rate)
        assert options["weights"] == str(folder / "a.pth")


@pytest.mark.parametrize(
    "head, classes, kept",
    [("auto", 10, True), ("auto", 7, False), ("keep", 10, True), ("new", 10, False), ("new", 7, False)],
)
def test_heads(folder, head, classes, kept):
    given = lenet(classes).state_dict()
    torch_files.write_state("a.pth", given)
    arguments = ["--weights", "a.pth", "--head", head, "--sparsity", "0", "--out", "run", "--lr", "0"]
    assert cli.main(["finetune", *QUICK, *arguments]) == 0
    found = model().state_dict()
    for name in ("1.weight", "1.bias", "3.weight", "3.bias"):
        np.testing.assert_array_equal(found[name], given[name])
    assert found["5.weight"].shape == (10, 100)
    assert np.array_equal(found["5.weight"], given["5.weight"]) == kept


def test_heads_of_a_safetensors_file(folder):
    given = nn.models.small_cnn()
    write_state("a.safetensors", given)
    arguments = ["--model", "small-cnn", "--weights", "a.safetensors", "--sparsity", "0", "--out", "run", "--lr", "0"]
    assert cli.main(["finetune", *QUICK, *arguments]) == 0
    np.testing.assert_array_equal(model().state_dict()["13.weight"], given.state_dict()["13.weight"])


def write_bad(folder):
    """Files that do not do, by what is wrong."""
    torch_files.write_state("other.pth", nn.models.lenet5().state_dict())
    torch_files.write_state("classes.pth", lenet(7).state_dict())
    torch_files.write_archive("code.pth", {"a": torch_files.call(torch_files.named("os", "system"), "touch ran")}, {})
    (folder / "cut.pth").write_bytes((folder / "other.pth").read_bytes()[:1000])
    (folder / "cut.npz").write_bytes(b"PK")
    (folder / "weights.h5").write_bytes(b"")
    (folder / "a.safetensors").write_bytes(safetensors.numpy.save({"a": np.zeros(3, np.float32)}))


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--weights", "other.pth"], "give names="),
        (["--weights", "classes.pth", "--head", "keep"], "5.weight has shape (7, 100)"),
        (["--weights", "code.pth"], "holds os.system, which is no tensor"),
        (["--weights", "cut.pth"], "cut.pth"),
        (["--weights", "cut.npz"], "cut.npz"),
        (["--weights", "weights.h5"], "must end in .safetensors"),
        (["--weights", "a.safetensors"], "keeps no order"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--weights", "."], "must end in"),
        (["--weights", "classes.pth", "--head", "old"], "--head is 'old'"),
        (["--weights", "classes.pth", "--sparsity", "0.5", "--sparsity-from-weights"], "must be one of them"),
        (["--weights", "classes.pth", "--sparsity-from-weights", "--method", "snip"], "must be one of them"),
        (["--weights", "classes.pth", "--sparsity-from-weights"], "classes.pth has no zero in a layer"),
        (["--weights", "classes.pth", "--sparsity-from-weights", "--exclude", "no"], "exclude has 'no', which matches"),
        (["--weights", "classes.pth", "--resume", "run"], "--resume"),
        (["--weights", "classes.pth", "--method", "rigl", "--pattern", "2:4"], "--pattern is not for --method rigl"),
        ([], "--weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "says",
)
def test_finetune_says_what_is_wrong(folder, capsys, arguments, wanted):
    write_bad(folder)
    before = sorted(folder.iterdir())
    assert cli.main(["finetune", *QUICK, "--out", "run", *arguments]) == 2
    assert wanted in error_line(capsys)
    assert sorted(folder.iterdir()) == before


def test_finetune_and_resume(folder, monkeypatch):
    """A run from weights goes on without them."""
    torch_files.write_state("a.pth", with_zeros(lenet()).state_dict())
    common = [*QUICK, "--weights", "a.pth", "--sparsity-from-weights", "--out", "run"]
    assert cli.main(["finetune", *common]) == 0
    (folder / "a.pth").unlink()
    assert cli.main(["train", "--resume", "run", "--epochs", "2"]) == 0
    assert len(history("run/history.csv")) == 2
    given = zeros_to_structure(with_zeros(lenet()))
    np.testing.assert_array_equal(model()[3].weight.mask, given[3].weight.mask)


def test_with_changes_and_a_dense_twin(folder):
    """finetune takes the methods that change weights, and trains the dense net from the same weights."""
    torch_files.write_state("a.pth", lenet().state_dict())
    arguments = ["--weights", "a.pth", "--method", "gmp", "--change-every", "1", "--compare", "--lr", "0"]
    assert cli.main(["finetune", *QUICK, "--out", "run", *arguments]) == 0
    dense = model("run/dense/checkpoint.safetensors").state_dict()
    for name, array in lenet().state_dict().items():
        np.testing.assert_array_equal(dense[name], array)
    sparse = model()[3].weight
    assert sparse.nnz == 3000
    np.testing.assert_array_equal(sparse.to_dense(), dense["3.weight"] * sparse.mask)


def test_help_of_finetune(capsys):
    assert cli.main(["finetune", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in FINETUNE:
        assert f"--{name}" in text
    assert "--resume" not in text and "SUPPRESS" not in text


def test_read_again(folder):
    """What finetune writes is read as any other file."""
    torch_files.write_state("a.pth", with_zeros(lenet()).state_dict())
    assert cli.main(["finetune", *QUICK, "--weights", "a.pth", "--sparsity-from-weights", "--out", "run"]) == 0
    state = read_state("run/checkpoint.safetensors")
    found = load_state(lenet(seed=8), state)
    for name, array in model().state_dict().items():
        np.testing.assert_array_equal(found.state_dict()[name], array)
