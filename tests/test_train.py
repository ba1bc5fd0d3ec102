"""Trainer, history, callbacks, checkpoints."""

import csv
import io
import math

import numpy as np
import pytest

from quadrants import images
from sparsetrain import data, manual_seed, nn, optim, sparsify
from sparsetrain.files import replacing
from sparsetrain.train import (
    Callback,
    Checkpoint,
    CSVLog,
    EarlyStopping,
    EpochLines,
    History,
    Progress,
    Trainer,
    TrainingDiverged,
    checkpoint,
)


def network(sparsity=0.5, dropout=0.0):
    manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8 * 16, 4),
    )
    return sparsify(model, sparsity) if sparsity else model


def trainer(model=None, kind=optim.SGD, **settings):
    model = network() if model is None else model
    rates = {"lr": 0.05, "momentum": 0.9} if kind is optim.SGD else {"lr": 0.01}
    return Trainer(model, kind(model.named_parameters(), **rates), **settings)


def batches(n=200, **settings):
    return data.Batches(*images(n), 32, shuffle=True, seed=3, **settings)


def measured(history):
    """The rows without what differs from run to run."""
    return [{k: v for k, v in row.items() if k not in ("time_s", "images_per_s")} for row in history]


def assert_same_state(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


class At(Callback):
    """Does something after one step of the run."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_batch_end(self, trainer, mean):
        if trainer.step == self.step:
            self.action(trainer)


def raise_interrupt(trainer):
    raise KeyboardInterrupt


# The loop


def test_a_sparse_cnn_learns_real_images():
    """90 % of the weights removed, 5,000 images of Fashion-MNIST, 2 epochs: 10 % would be chance."""
    manual_seed(0)
    sets = data.load("fashion-mini")
    scale = {"mean": sets.mean, "std": sets.std}
    train = data.Batches(*(a[::2] for a in sets.train), 32, shuffle=True, **scale)
    model = sparsify(nn.models.small_cnn(), 0.9, exclude=["0"])
    run = Trainer(model, optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9))
    history = run.fit(train, 2, data.Batches(*sets.test, 250, **scale))
    assert history[-1]["val_accuracy"] > 0.7


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
def test_a_sparse_net_learns(kind):
    run = trainer(network(0.8), kind, label_smoothing=0.1)
    test = data.Batches(*images(100, seed=1), 64)
    history = run.fit(batches(), 5, test)
    assert history[-1]["val_accuracy"] > 0.95
    assert history[-1]["loss"] < history[0]["loss"]
    assert run.evaluate(test)["accuracy"] == history[-1]["val_accuracy"]
    assert [m.sparsity for n, m in run.model.named_parameters() if n == "0.weight"] == [pytest.approx(0.8, abs=0.02)]


def test_history_rows():
    run = trainer(schedule=optim.step(0.1, every=7, factor=0.5))
    history = run.fit(batches(), 2)  # 7 batches each, the last of 8 images
    assert history is run.history
    assert history.column("epoch") == [1, 2]
    assert history.column("step") == [7, 14]
    assert history.column("lr") == [0.1, 0.05]
    assert history.column("val_loss") == [None, None]
    for row in history:
        assert row["images_per_s"] == pytest.approx(200 / row["time_s"], rel=0.2)
    run.fit(batches(), 1)
    assert run.epoch == 3 and history.column("epoch") == [1, 2, 3]


def test_means_weigh_the_last_batch_by_its_images():
    x, y = images(40)
    run = trainer()
    result = run.evaluate(data.Batches(x, y, 32))
    logits = run.predict(x)
    assert result["loss"] == pytest.approx(nn.cross_entropy(logits, y)[0], rel=1e-5)
    assert result["accuracy"] == np.mean(logits.argmax(axis=1) == y)


def test_predict():
    x, y = images(50)
    run = trainer()
    run.model.train()
    logits = run.predict(x, batch_size=16)
    assert logits.shape == (50, 4)
    assert run.model.training
    np.testing.assert_allclose(run.predict(data.Batches(x, y, 20)), logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="data is empty"):
        run.predict(x[:0])


def test_another_loss_has_no_accuracy():
    x, _ = images(40)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    pairs = [(x, x.reshape(40, 64)[:, :2])]
    run = Trainer(model, optim.SGD(model.parameters(), lr=0.1), loss=nn.mse_loss)
    history = run.fit(pairs, 3, validation=pairs)
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    assert history.column("accuracy") == [None] * 3


def test_same_seed_same_run():
    histories = [trainer(network(dropout=0.2)).fit(batches(crop=1, flip=True), 2) for _ in range(2)]
    assert measured(histories[0]) == measured(histories[1])


def test_bad_arguments():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    cases = [
        (lambda: Trainer("model", optimizer), TypeError, "model is a str"),
        (lambda: Trainer(model, optimizer, callbacks=[print]), TypeError, "not a Callback"),
        (lambda: Trainer(model, optimizer, label_smoothing=1.5), ValueError, "label_smoothing is"),
        (
            lambda: Trainer(model, optimizer, loss=nn.mse_loss, label_smoothing=0.1),
            ValueError,
            "label_smoothing is for nn.cross_entropy",
        ),
        (lambda: Trainer(model, optimizer).fit(batches(), 0), ValueError, "epochs is 0"),
        (lambda: Trainer(model, optimizer).fit([], 1), ValueError, "train gave no batches"),
        (lambda: Trainer(model, optimizer).evaluate([]), ValueError, "gave no batches"),
        (lambda: EarlyStopping(0), ValueError, "patience is 0"),
        (lambda: EarlyStopping(1, "val_los"), ValueError, "val_loss"),
        (lambda: Checkpoint("x", best="acuracy"), ValueError, "accuracy"),
    ]
    for make, error, message in cases:
        with pytest.raises(error, match=message):
            make()


def test_labels_out_of_range():
    x, y = images(32)
    y[5] = 4
    with pytest.raises(ValueError, match="label"):
        trainer().fit(data.Batches(x, y, 32), 1)


# Ctrl-C and NaN


def test_interrupt_returns_the_history_so_far(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    log = tmp_path / "history.csv"
    run = trainer(callbacks=[CSVLog(log), Checkpoint(path), At(17, raise_interrupt)])
    history = run.fit(batches(), 5)
    assert history.interrupted
    assert len(history) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors", "history.csv"]
    again = Trainer.resume(path)
    assert (again.epoch, again.step) == (2, 14)
    assert again.fit(batches(), 1).interrupted is False
    assert len(log.read_text().splitlines()) == 3


def test_interrupt_while_a_file_is_written(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def poison(name):
    def action(trainer):
        dict(trainer.model.named_parameters())[name].data[0] = np.nan

    return action


def test_nan_names_step_and_layer_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    run = trainer(callbacks=[Checkpoint(path), At(9, poison("3.body.1.weight"))])
    with pytest.raises(TrainingDiverged, match=r"step 10 .*layer 3\.body\.1 \(BatchNorm2d\)"):
        run.fit(batches(), 3)
    kept = Trainer.resume(path)
    assert kept.epoch == 1
    assert all(np.isfinite(p.data).all() for p in kept.model.parameters())


def test_nan_in_the_last_step_is_not_saved(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    run = trainer(callbacks=[At(7, poison("8.bias")), Checkpoint(path)])
    with pytest.raises(TrainingDiverged, match=r"8\.bias is no longer finite after step 7"):
        run.fit(batches(), 1)
    assert Trainer.resume(path).epoch == 0


def test_nan_in_the_batch():
    x, y = images(32)
    x[3, 0, 0, 0] = np.nan
    with pytest.raises(TrainingDiverged, match="step 1 .*the input batch"):
        trainer().fit([(x, y)], 1)
    with pytest.raises(TrainingDiverged, match="evaluation loss is nan after step 0"):
        trainer().evaluate([(x, y)])


def test_nan_in_the_loss():
    def loss(outputs, y):
        return math.nan, outputs

    with pytest.raises(TrainingDiverged, match="the loss, every layer's output is finite"):
        trainer(loss=loss).fit([images(32)], 1)


# Callbacks


def test_csv_log(tmp_path):
    run = trainer(callbacks=[CSVLog(tmp_path / "history.csv")])
    history = run.fit(batches(), 2, batches())
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["val_loss"]) for r in rows] == history.column("val_loss")
    assert [int(r["step"]) for r in rows] == [7, 14]


def rows(monitor, values):
    return History({monitor: v} for v in values)


@pytest.mark.parametrize(
    "monitor, values, stop",
    [
        ("val_loss", [3, 2, 1, 1.5, 1.2], True),
        ("val_loss", [3, 2, 1, 1.5, 0.9], False),
        ("val_accuracy", [0.1, 0.5, 0.4, 0.5], True),
        ("val_accuracy", [0.5, 0.4, 0.6], False),
    ],
)
def test_early_stopping(monitor, values, stop):
    run = trainer()
    run.history = rows(monitor, values)
    EarlyStopping(2, monitor).on_epoch_end(run, run.history[-1])
    assert run.stop is stop


def test_early_stopping_ends_the_run():
    run = trainer(schedule=optim.constant(0.0), callbacks=[EarlyStopping(2, "val_loss")])
    for _, module in run.model.named_modules():
        module.momentum = 0.0  # batch norm's running means stay as they are: so does the loss
    history = run.fit(batches(), 20, [images(32)])
    assert len(history) == 3
    with pytest.raises(ValueError, match="val_loss was not measured"):
        run.fit(batches(), 1)


def test_checkpoint_every_and_best(tmp_path):
    run = trainer(callbacks=[Checkpoint(tmp_path / "every", every=2)])
    run.fit(batches(), 3)
    assert Trainer.resume(tmp_path / "every").epoch == 2
    best = Checkpoint(tmp_path / "best", best="val_loss")
    for values, saved in (([2.0], True), ([2.0, 3.0], False), ([2.0, 3.0, 1.0], True)):
        run.history = rows("val_loss", values)
        (tmp_path / "best").unlink(missing_ok=True)
        best.on_epoch_end(run, run.history[-1])
        assert (tmp_path / "best").exists() is saved


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals(capsys):
    terminal, pipe, silent = Terminal(), io.StringIO(), Terminal()
    callbacks = [
        Progress(label="sparse", file=terminal),
        Progress(file=pipe),
        Progress(verbose=False, file=silent),
        EpochLines("sparse"),
    ]
    trainer(callbacks=callbacks).fit(batches(), 1, batches())
    assert (pipe.getvalue(), silent.getvalue()) == ("", "")
    for text in (terminal.getvalue(), capsys.readouterr().out):
        assert "sparse epoch 1/1" in text
        for word in ("loss", "accuracy", "validation loss", "images/s"):
            assert word in text


# Checkpoints


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW])
def test_resume_goes_on_bit_for_bit(tmp_path, kind):
    path = tmp_path / "checkpoint.safetensors"
    settings = {"schedule": optim.cosine(0.05, 28), "label_smoothing": 0.1}
    whole = trainer(network(dropout=0.3), kind, **settings)
    whole.fit(batches(crop=1), 2, batches())
    whole.save(path)
    whole.fit(batches(crop=1), 2, batches())

    manual_seed(99)
    half = Trainer.resume(path, schedule=settings["schedule"])
    assert half.label_smoothing == 0.1
    half.fit(batches(crop=1), 2, batches())
    assert measured(half.history) == measured(whole.history)
    assert_same_state(half.model, whole.model)


def test_resume_into_a_given_model(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    run = trainer()
    run.fit(batches(), 1)
    run.save(path)
    given = network(sparsity=0.0)
    optimizer = optim.SGD(given.named_parameters(), lr=0.01, momentum=0.9)
    again = Trainer.resume(path, given, optimizer)
    assert again.model is given and again.optimizer is optimizer and optimizer.lr == 0.01
    assert_same_state(given, run.model)
    optimizer.lr = run.optimizer.lr
    run.fit(batches(), 1)
    again.fit(batches(), 1)
    assert_same_state(given, run.model)


def test_removed_weights_are_not_stored(tmp_path):
    run = trainer(network(0.9))
    run.fit([images(32)], 1)
    run.save(tmp_path / "c.safetensors")
    meta, arrays = checkpoint.read(tmp_path / "c.safetensors")
    for name, parameter in run.model.named_parameters():
        assert arrays[f"parameter/{name}/data"].shape == parameter.data.shape
        assert arrays[f"slot/{name}/momentum"].size == parameter.nnz
    assert meta["epoch"] == 1


class Passing(nn.Module):
    """A layer of somebody's own."""

    def forward(self, x, halo):
        return x.with_halo(halo), lambda dy, halo: dy.with_halo(halo or (0, 0))


def test_a_foreign_layer_needs_its_model(tmp_path):
    path = tmp_path / "c.safetensors"

    def make():
        return nn.Sequential(nn.Flatten(), nn.Sequential(Passing()), nn.Linear(64, 4))

    run = trainer(make())
    run.save(path)
    with pytest.raises(ValueError, match="class Passing, .* give resume"):
        Trainer.resume(path)
    assert_same_state(Trainer.resume(path, make()).model, run.model)


def test_what_a_file_cannot_hold_must_be_given(tmp_path):
    path = tmp_path / "c.safetensors"
    trainer(schedule=optim.constant(0.1)).save(path)
    with pytest.raises(ValueError, match="give schedule="):
        Trainer.resume(path)
    assert Trainer.resume(path, schedule=None).schedule is None
    trainer(loss=lambda outputs, y: (0.0, outputs)).save(path)
    with pytest.raises(ValueError, match="give loss="):
        Trainer.resume(path)
    model = network()
    with pytest.raises(ValueError, match="optimizer is given without model"):
        Trainer.resume(path, optimizer=optim.SGD(model.parameters(), lr=0.1), loss=nn.mse_loss)


def changed_network(change):
    layers = [nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)]
    if change == "missing":
        layers.append(nn.Linear(4, 4))
    elif change == "unexpected":
        layers.pop()
    elif change == "shape":
        layers[3] = nn.Linear(8, 5)
    elif change == "buffer":
        layers[2] = nn.Linear(8, 8)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", "lacks parameter 4.weight"),
        ("unexpected", "has parameter 3.weight, which the model lacks"),
        ("shape", r"3.weight has shape \(4, 8\), the model's has \(5, 8\)"),
        ("buffer", r"2.weight has shape \(8,\), the model's has \(8, 8\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, change, message):
    path = tmp_path / "c.safetensors"
    trainer(changed_network(None)).save(path)
    model = changed_network(change)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        Trainer.resume(path, model)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_an_optimizer_that_does_not_fit(tmp_path):
    path = tmp_path / "c.safetensors"
    trainer().save(path)
    model = network()
    with pytest.raises(ValueError, match="ran with SGD, this is Adam"):
        Trainer.resume(path, model, optim.Adam(model.named_parameters()))
    with pytest.raises(ValueError, match="the optimiser held the parameters"):
        Trainer.resume(path, model, optim.SGD([next(iter(model.parameters()))], lr=0.1))
    run = Trainer(model, optim.SGD(network().named_parameters(), lr=0.1))
    with pytest.raises(ValueError, match="optimizer holds 0.weight, which is not a parameter"):
        run.save(path)


def test_damaged_files(tmp_path):
    path = tmp_path / "c.safetensors"
    trainer().save(path)
    whole = path.read_bytes()
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    contents = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "flipped": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:],
        "another": (tmp_path / "other.npz").read_bytes(),
        "pickle": (tmp_path / "pickle.npy").read_bytes(),
    }
    for content in contents.values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a checkpoint of sparsetrain, or is damaged"):
            Trainer.resume(path)
    with pytest.raises(FileNotFoundError):
        Trainer.resume(tmp_path / "none.npz")
