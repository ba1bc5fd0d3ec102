"""Methods of sparsity in a Trainer: history, files, going on from a file, threads, errors."""

import csv
import math

import numpy as np
import pytest
import safetensors.numpy

import sparsetrain as st
from quadrants import images
from sparsetrain import data, manual_seed, nn, optim, sparsify
from sparsetrain.backprop import Dithered, MemAOP, ReSprop, TopK
from sparsetrain.sparse import SparseParameter
from sparsetrain.sparsity import ACDC, GMP, NM, SET, GraNet, Magnitude, Method, RigL, Static
from sparsetrain.train import Callback, CSVLog, Trainer, TrainingDiverged

METHODS = {
    "static": lambda: Static(0.8),
    "static, global": lambda: Static(0.8, "magnitude", distribution="global"),
    "magnitude": lambda: Magnitude(0.8, 3, start=2, every=8),
    "gmp": lambda: GMP(0.8, start=1, stop=17, every=3),
    "gmp in epochs": lambda: GMP(0.8, initial=0.1, start=1, stop=3, every=1, unit="epochs", distribution="global"),
    "set in epochs": lambda: SET(0.8, stop=3, every=1, unit="epochs"),
    "rigl": lambda: RigL(0.8, stop=19, every=4),
    "rigl, one layer": lambda: RigL(0.8, stop=19, every=4, include=["3.*"], distribution="uniform"),
    "granet": lambda: GraNet(0.8, stop=19, every=3),
    "ac/dc": lambda: ACDC(0.8, start=2, stop=20, every=3),
    "ac/dc in epochs": lambda: ACDC(0.8, start=0, stop=3, every=1, unit="epochs", distribution="global"),
    "2:4": lambda: NM(2, 4, stop=15, exclude=["0"]),
    "1:4 from the start": lambda: NM(1, 4, stop=0, exclude=["0"]),
}
NAMES = ("0", "3.body.0", "8")
TIMED = [name for name in METHODS if "static" not in name and "start" not in name]
methods = pytest.mark.parametrize("name", METHODS)


def trainer(method, optimizer="sgd", **settings):
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
    if optimizer == "sgd":
        optimizer = optim.SGD(model.named_parameters(), lr=0.02, momentum=0.5)
    else:
        optimizer = optim.Adam(model.named_parameters(), lr=3e-3)
    return Trainer(model, optimizer, sparsity=method, **settings)


def batches(n=200):
    return data.Batches(*images(n), 32, shuffle=True, seed=3, drop_last=True)


def weights(model):
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def measured(history):
    """The rows without what differs from run to run."""
    rows = []
    for row in history:
        layers = {name: {k: v for k, v in values.items() if k != "ms"} for name, values in row["layers"].items()}
        rows.append({k: v for k, v in row.items() if k not in ("time_s", "images_per_s")} | {"layers": layers})
    return rows


def assert_same(run, other):
    """The same bits in history, model, slots and methods, and the same weights stored."""
    assert measured(run.history) == measured(other.history)
    for kind in ("model", "sparsity", "backprop"):
        ours, theirs = getattr(run, kind), getattr(other, kind)
        if ours is not None:
            ours, theirs = ours.state_dict(), theirs.state_dict()
            assert set(ours) == set(theirs)
            for key in ours:
                np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    assert run.optimizer.steps == other.optimizer.steps
    for ours, theirs in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert type(ours) is type(theirs) and ours.nnz == theirs.nnz
        if isinstance(ours, SparseParameter):
            np.testing.assert_array_equal(ours.places(), theirs.places())
        assert sorted(ours.slots) == sorted(theirs.slots)
        for slot, values in ours.slots.items():
            np.testing.assert_array_equal(values, theirs.slots[slot])


# ---- learning and the history


@methods
def test_a_net_learns(name):
    run = trainer(METHODS[name]())
    history = run.fit(batches(400), 4, data.Batches(*images(100, seed=1), 64))
    assert history[-1]["val_accuracy"] > 0.8
    assert history[-1]["loss"] < history[0]["loss"]
    wanted = run.sparsity.sparsity
    sizes = [(layer.weight.nnz, layer.size) for layer in run.sparsity.layers]
    kept, total = (sum(numbers) for numbers in zip(*sizes, strict=True))
    assert abs(kept - (1 - wanted) * total) <= len(sizes)
    for parameter in run.model.parameters():
        assert all(slot.shape == parameter.data.shape for slot in parameter.slots.values())


class Changes(Callback):
    """What it hears of each change, by step."""

    def __init__(self):
        self.heard = {}

    def on_weights_changed(self, trainer, layers):
        self.heard[trainer.step] = layers


@methods
def test_each_change_is_told_as_it_happens(name):
    run = trainer(METHODS[name](), callbacks=[changes := Changes()])
    first = {layer.name: layer.weight.nnz for layer in run.sparsity.layers}
    begun = {name: row["grown"] - row["dropped"] for name, row in run.sparsity.report().items()}
    rows = run.fit(batches(), 4)
    assert changes.heard or name not in TIMED
    for layer in run.sparsity.layers:
        told = [layers[layer.name] for layers in changes.heard.values()]
        assert all(row["sparsity"] == 1 - row["nnz"] / row["weights"] for row in told)
        for column in ("dropped", "grown"):
            assert sum(row[column] for row in told) == sum(row["weights"][layer.name][column] for row in rows)
        assert [row["nnz"] for row in told[-1:]] in ([], [layer.weight.nnz])
        assert first[layer.name] == layer.size + begun[layer.name]


@methods
def test_history_and_its_files(name, tmp_path):
    run = trainer(METHODS[name](), callbacks=[CSVLog(tmp_path / "history.csv")])
    run.fit(batches(), 4)
    names = [layer.name for layer in run.sparsity.layers]
    for row in run.history:
        assert list(row["weights"]) == names and row["gradient_sparsity"] is None
        dense = {n: math.prod(w.shape) for n, w in weights(run.model).items()}
        kept = {n: row["weights"][n]["nnz"] if n in names else dense[n] for n in dense}
        assert row["sparsity"] == pytest.approx(1 - sum(kept.values()) / sum(dense.values()))
        for n, values in row["weights"].items():
            assert values["weights"] == dense[n] and values["sparsity"] == 1 - values["nnz"] / dense[n]
    for n in names:
        rows, layer = [row["weights"][n] for row in run.history], weights(run.model)[n]
        explored = [values["explored"] for values in rows]
        assert explored == sorted(explored) and explored[0] > 0 and explored[-1] <= 1
        # Every weight is counted: those of the dense layer at first, and all that came and went.
        changes = sum(values["grown"] - values["dropped"] for values in rows)
        assert layer.nnz == math.prod(layer.shape) + changes

    with open(tmp_path / "history.csv", newline="") as file:
        assert [float(row["sparsity"]) for row in csv.DictReader(file)] == run.history.column("sparsity")
    with open(tmp_path / "history-weights.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["weights", "nnz", "sparsity", "dropped", "grown", "explored"]
    assert list(rows[0]) == ["epoch", "layer", *columns]
    assert [(row["epoch"], row["layer"]) for row in rows] == [(str(e), n) for e in (1, 2, 3, 4) for n in names]
    assert [[float(row[c]) for c in columns] for row in rows] == [
        [values[c] for c in columns] for row in run.history for values in row["weights"].values()
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history-weights.csv", "history.csv"]


def test_without_a_method(tmp_path):
    run = trainer(None, callbacks=[CSVLog(tmp_path / "history.csv")])
    sparsify(run.model, 0.5)
    run.fit(batches(), 1)
    assert run.history[0]["weights"] == {} and run.history[0]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_both_files_of_layers(tmp_path):
    run = trainer(SET(0.5, stop=5, every=2), backprop=TopK(0.5), callbacks=[CSVLog(tmp_path / "history.csv")])
    run.fit(batches(), 1)
    assert {path.stem for path in tmp_path.iterdir()} == {"history", "history-layers", "history-weights"}


@pytest.mark.parametrize("method", ["rigl", RigL, Dithered(), 0.9])
def test_what_is_not_a_method(method):
    with pytest.raises(TypeError, match="sparsity is a .*, must be a method of sparsity or None"):
        trainer(method)


def test_a_method_that_does_not_fit_is_an_error_at_once():
    with pytest.raises(ValueError, match="layer 0 has 1 input channels a group, must be a multiple of m = 4"):
        trainer(NM(2, 4, stop=0))


# ---- threads, and going on from a file


@methods
def test_1_2_and_5_threads_give_the_same_bits(name):
    runs = []
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        runs.append(trainer(METHODS[name]()))
        runs[-1].fit(batches(), 4)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.parametrize(
    ("name", "others"),
    [(name, "sgd") for name in METHODS]
    + [(name, "resprop, adam") for name in ("gmp in epochs", "set in epochs", "rigl", "granet", "ac/dc", "2:4")]
    + [(name, others) for name in ("rigl", "ac/dc", "2:4") for others in ("adam", "dithered", "8 bits", "mem-aop")],
)
def test_going_on_from_a_file_gives_the_same_bits(name, others, tmp_path):
    """After two of four epochs. Layers were dense or sparse then, and some methods change them in the next step."""
    backprop = {
        "dithered": lambda: Dithered(1.5),
        "8 bits": lambda: Dithered(1.5, precision=8),
        "resprop, adam": lambda: ReSprop(0.7),
        "mem-aop": lambda: MemAOP(0.5, exclude=["0"]),
    }.get(others, lambda: None)

    def new():
        optimizer = "adam" if "adam" in others else "sgd"
        return trainer(METHODS[name](), optimizer, backprop=backprop())

    whole = new()
    whole.fit(batches(), 4)
    run = new()
    run.fit(batches(), 2)
    run.save(tmp_path / "run.safetensors")
    resumed = Trainer.resume(tmp_path / "run.safetensors")
    assert resumed.sparsity == run.sparsity and type(resumed.sparsity) is type(run.sparsity)
    assert [layer.name for layer in resumed.sparsity.layers] == [layer.name for layer in run.sparsity.layers]
    assert_same(run, resumed)
    resumed.fit(batches(), 2)
    assert_same(whole, resumed)


@pytest.mark.parametrize("name", TIMED)
def test_going_on_from_the_middle_of_an_epoch(name, tmp_path):
    """Steps 7, 11 and 14: with six an epoch, the first of one, the last but one, and the second of the next."""

    class Save(Callback):
        def on_batch_end(self, run, mean):
            if run.step in (7, 11, 14):
                run.save(tmp_path / f"{run.step}.safetensors")

    whole = trainer(METHODS[name](), callbacks=[Save()])
    whole.fit(batches(), 4)
    for step in (7, 11, 14):
        manual_seed(99)
        resumed = Trainer.resume(tmp_path / f"{step}.safetensors")
        assert resumed.step == resumed.sparsity.step == step
        resumed.fit(batches(), 4 - step // 6)
        assert_same(whole, resumed)


def test_going_on_in_a_given_model(tmp_path):
    """Dense or sparse, it takes the weights that are stored in the file."""
    whole = trainer(RigL(0.8, stop=19, every=4))
    whole.fit(batches(), 3)
    run = trainer(RigL(0.8, stop=19, every=4))
    run.fit(batches(), 2)
    run.save(tmp_path / "run.safetensors")
    for method in (None, Static(0.3)):
        other = trainer(method)
        resumed = Trainer.resume(tmp_path / "run.safetensors", other.model, other.optimizer)
        resumed.fit(batches(), 1)
        assert_same(whole, resumed)


def test_going_on_with_other_layers_is_an_error(tmp_path):
    run = trainer(SET(0.8, stop=19, every=4))
    run.fit(batches(), 1)
    run.save(tmp_path / "run.safetensors")
    other = trainer(None)
    before = other.model.state_dict()
    for method in (SET(0.8, stop=19, every=4, exclude=["8"]), RigL(0.8, stop=19, every=4, include=["0"])):
        with pytest.raises(ValueError, match="the state does not fit the layers"):
            Trainer.resume(tmp_path / "run.safetensors", other.model, other.optimizer, sparsity=method)
    assert all(p.structure.dense and not p.slots for p in other.model.parameters())
    for name, value in other.model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    other.fit(batches(), 1)  # and it can be used


def test_going_on_with_another_method_or_none(tmp_path):
    run = trainer(SET(0.8, stop=19, every=4))
    run.fit(batches(), 2)
    run.save(tmp_path / "run.safetensors")
    nnz = [w.nnz for w in weights(run.model).values()]
    alone = Trainer.resume(tmp_path / "run.safetensors", sparsity=None)
    assert alone.sparsity is None
    alone.fit(batches(), 1)
    other = Trainer.resume(tmp_path / "run.safetensors", sparsity=RigL(0.8, stop=19, every=2))
    assert other.sparsity.step == 12
    other.fit(batches(), 1)
    for resumed in (alone, other):
        assert [w.nnz for w in weights(resumed.model).values()] == nnz
    assert sum(row["grown"] for row in other.history[-1]["weights"].values()) > 0
    pruned = Trainer.resume(
        tmp_path / "run.safetensors", sparsity=GMP(0.9, start=12, stop=14, every=1, distribution="erk")
    )
    pruned.fit(batches(), 1)
    assert pruned.history[-1]["sparsity"] == pytest.approx(0.9, abs=0.01)


class Own(SET):
    """A method that is not the package's."""


def test_a_method_of_ones_own_must_be_given_again(tmp_path):
    whole = trainer(Own(0.8, stop=19, every=4))
    whole.fit(batches(), 3)
    run = trainer(Own(0.8, stop=19, every=4))
    run.fit(batches(), 2)
    run.save(tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="a method of sparsity of your own: give sparsity="):
        Trainer.resume(tmp_path / "run.safetensors")
    resumed = Trainer.resume(tmp_path / "run.safetensors", sparsity=Own(0.8, stop=19, every=4))
    resumed.fit(batches(), 1)
    assert_same(whole, resumed)


def test_a_removed_weight_is_not_in_the_file(tmp_path):
    run = trainer(Static(0.8))
    run.fit(batches(), 1)
    run.save(tmp_path / "run.safetensors")
    arrays = safetensors.numpy.load_file(tmp_path / "run.safetensors")
    for name, weight in weights(run.model).items():
        for array in (f"parameter/{name}.weight/data", f"slot/{name}.weight/momentum"):
            assert arrays[array].shape == (weight.nnz,)


def test_times_in_epochs_need_batches_with_a_length():
    run = trainer(SET(0.8, stop=3, every=1, unit="epochs"))
    with pytest.raises(ValueError, match="unit is 'epochs': begin_epoch"):
        run.fit(iter(list(batches())), 1)


# ---- N:M, whose weights are not those that it trains


def test_evaluation_of_n_m_uses_the_chosen_weights():
    run = trainer(NM(2, 4, stop=100, exclude=["0"]))
    run.fit(batches(), 1)
    arrays = {name: w.data for name, w in weights(run.model).items()}
    trained = {name: values.copy() for name, values in arrays.items()}
    x, y = images(40, seed=1)
    outputs, result = run.predict(x), run.evaluate([(x, y)])
    for name, weight in weights(run.model).items():
        assert weight.data is arrays[name]
        np.testing.assert_array_equal(weight.data, trained[name])
        assert np.count_nonzero(weight.data) == weight.data.size

    other = trainer(None)
    other.model.load_state_dict(run.model.state_dict())
    for name in ("3.body.0", "8"):
        weight = weights(other.model)[name]
        weight.data *= NM(2, 4, stop=0).mask(weight.data)
    np.testing.assert_array_equal(outputs, other.predict(x))
    assert result == other.evaluate([(x, y)])
    assert (outputs != np.concatenate([run.model.eval()(x)])).any()


def test_evaluation_of_n_m_that_fails_leaves_the_trained_weights():
    run = trainer(NM(2, 4, stop=100, exclude=["0"]))
    before = run.model.state_dict()
    with pytest.raises(ValueError, match="layer '0'"):
        run.evaluate([(np.ones((2, 3, 8, 8), np.float32), np.zeros(2, np.int64))])
    for name, value in run.model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


# ---- steps that fail


def failing(how, run):
    """A batch with which a step fails, as the trainer's loss does if need be."""
    x, y = images(32)
    if how == "forward":
        return x[:, :, :, :5], y
    if how == "labels":
        return x, y + 9
    if how == "not finite":
        return x * np.float32(np.nan), y

    def interrupted(outputs, labels):
        run.loss = nn.cross_entropy
        raise KeyboardInterrupt

    run.loss = interrupted
    return x, y


@pytest.mark.parametrize("how", ["forward", "labels", "not finite", "interrupt"])
@pytest.mark.parametrize("name", ["rigl", "granet", "2:4", "gmp", "ac/dc"])
def test_a_step_that_fails(name, how):
    """Probes and choices of weights are gone, the step is not counted, and training goes on."""
    run = trainer(METHODS[name]())
    x, y = images(32)
    while True:  # up to a step at whose end layers would change
        run.sparsity.begin_step()
        due = run.sparsity.due() or name == "2:4"
        run.sparsity.cancel_step()
        if due:
            break
        run.train_step(x, y)
    before, steps = {n: (w.nnz, w.data.copy()) for n, w in weights(run.model).items()}, run.step
    with pytest.raises((ValueError, TrainingDiverged, KeyboardInterrupt)), np.errstate(all="ignore"):
        run.train_step(*failing(how, run))
    for n, module in run.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.probe is None
            assert module.weight.nnz == before[n][0]
            np.testing.assert_array_equal(module.weight.data, before[n][1])
    assert run.step == run.sparsity.step == steps
    run.train_step(x, y)
    assert run.sparsity.step == steps + 1


def test_a_layer_that_changes_leaves_out_the_optimisers_step():
    run = trainer(RigL(0.8, stop=19, every=2, distribution="uniform"))
    x, y = images(32)
    for step in range(6):
        before = {n: w.data.copy() for n, w in weights(run.model).items()}
        norm = run.model[1].bias.data.copy()
        run.train_step(x, y)
        for n, weight in weights(run.model).items():
            if step in (2, 4) and run.sparsity.count(run.sparsity.layers[0]):
                assert weight.grad is None
                assert np.isin(weight.data, [0, *before[n]]).all()
            else:
                assert (weight.data != before[n]).any()
        assert (run.model[1].bias.data != norm).any()


def test_a_method_attached_before():
    """It goes on where it is."""
    model = trainer(None).model
    method = Static(0.8).attach(model)
    nnz = [w.nnz for w in weights(model).values()]
    run = Trainer(model, optim.SGD(model.named_parameters(), lr=0.02), sparsity=method)
    run.fit(batches(), 1)
    assert [w.nnz for w in weights(model).values()] == nnz
    assert isinstance(run.sparsity, Method) and run.sparsity.step == 6


@pytest.mark.parametrize("name", ["rigl", "granet", "ac/dc", "2:4"])
@pytest.mark.parametrize("backprop", [lambda: Dithered(1.5, precision=8), lambda: ReSprop(0.7), lambda: TopK(0.5)])
def test_together_with_backprop(name, backprop):
    run = trainer(METHODS[name](), backprop=backprop())
    history = run.fit(batches(), 4)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["gradient_sparsity"] > 0.2 and history[-1]["sparsity"] > 0.4


# ---- going on, and errors


@pytest.mark.parametrize("make", [lambda: Static(0.8), lambda: SET(0.8, stop=19, every=2, distribution="uniform")])
def test_going_on_sparsely_from_a_dense_run(make, tmp_path):
    run = trainer(None)
    run.fit(batches(), 1)
    run.save(tmp_path / "run.safetensors")
    resumed = Trainer.resume(tmp_path / "run.safetensors", sparsity=make())
    resumed.fit(batches(), 1)
    assert resumed.history[-1]["sparsity"] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("make", [lambda: Static(0.8), lambda: GMP(0.8, stop=6, every=2)])
def test_a_method_of_another_trainer(make):
    """It begins anew: the second model ends like the first."""
    method = make()
    ends = [trainer(method).fit(batches(), 2)[-1]["sparsity"] for _ in range(2)]
    assert ends[0] == ends[1] > 0.5


def test_a_method_of_backprop_that_does_not_fit_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="exclude has 'nope'"):
        Trainer(model, optimizer, sparsity=Static(0.5), backprop=Dithered(exclude=["nope"]))
    with pytest.raises(ValueError, match="exclude has 'nope'"):
        Trainer(model, optimizer, sparsity=Static(0.5, exclude=["nope"]), backprop=Dithered())
    assert all(layer.weight.structure.dense and layer.backprop is None for layer in model)


def test_an_update_that_fails_leaves_no_probes():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    run = Trainer(model, optim.SGD(model.parameters(), lr=0.1), sparsity=RigL(0.5, stop=5, every=1))
    x, y = np.ones((4, 6), np.float32), np.zeros(4, np.int64)
    run.train_step(x, y)
    model.layers, unused = model.layers[:1], model.layers[1]
    with pytest.raises(ValueError, match="has seen no backward pass"):
        run.train_step(x, y)
    assert model[0].probe is None and unused.probe is None


def test_numpy_numbers_can_be_saved(tmp_path):
    run = trainer(GMP(np.float32(0.8), stop=np.int64(19), every=np.int64(4)))
    run.save(tmp_path / "run.safetensors")
