"""FreeTickets: what is taken, what is predicted with it, and that the run does not notice."""

import json

import numpy as np
import pytest
import safetensors.numpy

import reference as ref
from sparsetrain import Trainer, data, manual_seed, nn, optim
from sparsetrain.sparsity import NM, SET, GraNet, RigL
from sparsetrain.train import Callback, Checkpoint, FreeTickets

STEPS = 4  # an epoch
SPARSITY = {
    "dense": lambda: None,
    "set": lambda: SET(0.8, start=1, stop=99, every=2),
    "rigl": lambda: RigL(0.8, start=1, stop=99, every=2),
    "granet": lambda: GraNet(0.8, start=1, stop=99, every=2),
    "n:m while training": lambda: NM(2, 4, stop=99),
    "n:m that ends": lambda: NM(2, 4, stop=6),
}
methods = pytest.mark.parametrize("method", SPARSITY)


def images(n=16 * STEPS, seed=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 4, 6, 6)).astype(np.float32), rng.integers(0, 4, n)


def batches():
    return data.Batches(*images(), 16, shuffle=True, seed=5)


def trainer(method="rigl", callbacks=(), **settings):
    manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(72, 4),
    )  # fmt: skip
    optimizer = optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9)
    return Trainer(model, optimizer, sparsity=SPARSITY[method](), callbacks=callbacks, **settings)


class Odds(Callback):
    """The probabilities of some inputs as the model of each epoch gives them."""

    def __init__(self, x):
        self.x, self.found = x, []

    def on_epoch_end(self, trainer, row):
        self.found.append(ref.softmax(trainer.predict(self.x)))


def state(run):
    """All that a run goes on with: weights, structure, slots, buffers, and which objects they are."""
    parameters = {name: (p, p.data.copy(), p.nnz, {k: v.copy() for k, v in p.slots.items()})
                  for name, p in run.model.named_parameters()}  # fmt: skip
    return parameters, run.model.state_dict(), [id(p) for p in run.optimizer.params]


def assert_unchanged(run, before):
    parameters, values, ids = before
    for name, parameter in run.model.named_parameters():
        same, numbers, nnz, slots = parameters[name]
        assert parameter is same and parameter.nnz == nnz
        np.testing.assert_array_equal(parameter.data, numbers)
        assert parameter.slots.keys() == slots.keys()
        for slot in slots:
            np.testing.assert_array_equal(parameter.slots[slot], slots[slot])
    assert [id(p) for p in run.optimizer.params] == ids
    for name, array in run.model.state_dict().items():
        np.testing.assert_array_equal(array, values[name])


@pytest.mark.parametrize(
    "every, start, epochs, taken", [(1, 1, 4, 4), (2, 1, 5, 3), (2, 2, 5, 2), (3, 3, 4, 1), (1, 4, 3, 0), (5, 1, 4, 1)]
)
def test_how_many_are_taken(every, start, epochs, taken):
    tickets = FreeTickets(every, start)
    trainer(callbacks=[tickets]).fit(batches(), epochs)
    assert len(tickets.tickets) == taken


@methods
def test_the_mean_of_each_tickets_own_model(method):
    x, _ = images(40, seed=9)
    tickets, odds = FreeTickets(), Odds(x)
    run = trainer(method, [odds, tickets])
    run.fit(batches(), 3)
    found = tickets.predict(x)
    assert found.shape == (40, 4) and len(odds.found) == 3
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found, np.mean(odds.found, 0), rtol=1e-4, atol=1e-6)
    assert abs(odds.found[0] - odds.found[2]).max() > 1e-3  # they differ
    np.testing.assert_array_equal(tickets.predict(x), found)


@methods
def test_the_run_does_not_notice(method):
    """Weights, structure, slots, statistics and mode are as before, and the run goes on with the same bits."""
    x, _ = images(8)
    tickets = FreeTickets()
    other = trainer(method)
    other.fit(batches(), 3)
    run = trainer(method, [tickets])
    for _ in range(3):
        run.fit(batches_from(run), 1)
        run.model.train()
        before = state(run)
        tickets.predict(x)
        assert all(module.training for _, module in run.model.named_modules())
        assert_unchanged(run, before)
    for name, array in run.model.state_dict().items():
        np.testing.assert_array_equal(array, other.model.state_dict()[name])


def batches_from(run):
    found = batches()
    found.epoch = run.epoch
    return found


class Broken:
    """Batches of which the second has images of another size."""

    def __iter__(self):
        yield images(8)
        yield np.zeros((8, 4, 3, 3), np.float32), np.zeros(8, int)


@methods
def test_an_error_leaves_the_model_too(method):
    tickets = FreeTickets()
    run = trainer(method, [tickets])
    run.fit(batches(), 2)
    before = state(run)
    with pytest.raises(ValueError):
        tickets.predict(Broken())
    assert_unchanged(run, before)


def test_tickets_are_copies():
    """They stay what they are while the run goes on and when the model's weights are changed."""
    x, _ = images(8)
    tickets = FreeTickets()
    run = trainer("rigl", [tickets])
    run.fit(batches(), 1)
    found = tickets.predict(x)
    kept = tickets.tickets[:]
    run.fit(batches(), 2)
    for parameter in run.model.parameters():
        parameter.data[...] = 7
    tickets.tickets = kept
    np.testing.assert_array_equal(tickets.predict(x), found)
    for parameter in kept[0][0]:
        assert parameter.slots == {} and parameter.grad is None


def test_a_ticket_has_the_weights_of_its_time():
    tickets = FreeTickets()
    run = trainer("rigl", [tickets])
    run.fit(batches(), 3)
    indices = [ticket[0][0].indices for ticket in tickets.tickets]
    assert any(not np.array_equal(indices[0], other) for other in indices[1:])
    assert all(ticket[0][0].nnz == tickets.tickets[0][0][0].nnz for ticket in tickets.tickets)


def test_a_ticket_of_n_m_has_its_pattern():
    tickets = FreeTickets()
    run = trainer("n:m while training", [tickets])
    run.fit(batches(), 1)
    weight = tickets.tickets[0][0][0].to_dense()  # 8 outputs, 4 channels, 3x3
    assert (np.count_nonzero(weight, axis=1) <= 2).all()
    assert np.count_nonzero(run.model[0].weight.to_dense()) > weight.size // 2


def test_what_can_be_predicted():
    tickets = FreeTickets()
    run = trainer(callbacks=[tickets])
    run.fit(batches(), 2)
    x, y = images(20, seed=9)
    whole = tickets.predict(x)
    for form in (tickets.predict(x, batch_size=7), tickets.predict([x[:16], x[16:]]), tickets.predict([(x, y)]),
                 tickets.predict(iter([(x[:3], y[:3]), (x[3:], y[3:])]))):  # fmt: skip
        np.testing.assert_allclose(form, whole, rtol=1e-4, atol=1e-6)
    share = tickets.accuracy(iter([(x[:9], y[:9]), (x[9:], y[9:])]))
    assert share == np.mean(whole.argmax(1) == y)


def test_large_outputs_do_not_overflow():
    tickets = FreeTickets()
    run = trainer("dense", [tickets])
    run.fit(batches(), 1)
    run.model[6].weight.data *= 1e6
    tickets.take(run)
    found = tickets.predict(images(8)[0])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_errors():
    tickets = FreeTickets()
    with pytest.raises(ValueError, match="no ticket was taken yet"):
        tickets.predict(images(4)[0])
    with pytest.raises(ValueError, match="every is 0"):
        FreeTickets(every=0)
    with pytest.raises(ValueError, match="start is 0"):
        FreeTickets(start=0)
    with pytest.raises(TypeError, match="every is 1.5"):
        FreeTickets(1.5)
    tickets.take(trainer())
    with pytest.raises(ValueError, match="the tickets are another trainer's"):
        tickets.take(trainer())
    with pytest.raises(ValueError, match="data is empty"):
        tickets.predict([])


@methods
def test_a_resumed_run_has_its_tickets_again(method, tmp_path):
    path, x = tmp_path / "run.safetensors", images(24, seed=9)[0]
    whole, half = FreeTickets(), FreeTickets()
    run = trainer(method, [whole])
    run.fit(batches(), 4)
    run = trainer(method, [half])
    run.fit(batches(), 2)
    run.save(path)
    again = FreeTickets()
    resumed = Trainer.resume(path, callbacks=[Callback(), again])
    np.testing.assert_array_equal(again.predict(x), half.predict(x))
    resumed.fit(batches(), 2)
    assert len(again.tickets) == 4
    np.testing.assert_array_equal(again.predict(x), whole.predict(x))
    assert Trainer.resume(path).callbacks == []


@pytest.mark.parametrize("checkpoint_first", [True, False])
def test_a_checkpoint_has_the_ticket_of_its_epoch(checkpoint_first, tmp_path):
    callbacks = [Checkpoint(tmp_path / "run.safetensors"), FreeTickets()]
    trainer(callbacks=callbacks if checkpoint_first else callbacks[::-1]).fit(batches(), 2)
    again = FreeTickets()
    Trainer.resume(tmp_path / "run.safetensors", callbacks=[again])
    assert len(again.tickets) == 2


def test_each_of_two_collections_has_its_own_tickets_again(tmp_path):
    path = tmp_path / "run.safetensors"
    run = trainer(callbacks=[FreeTickets(2), FreeTickets(1)])
    run.fit(batches(), 4)
    run.save(path)
    again = [FreeTickets(2), FreeTickets(1)]
    Trainer.resume(path, callbacks=again)
    assert [len(tickets.tickets) for tickets in again] == [2, 4]


def damage(path, change):
    """Write the checkpoint's tensors as change(arrays) leaves them."""
    with safetensors.safe_open(path, framework="np") as file:
        meta, arrays = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(arrays)
    meta["sparsetrain"] = json.dumps(json.loads(meta["sparsetrain"]) | {"tensors": sorted(arrays)})
    safetensors.numpy.save_file(arrays, path, meta)


@pytest.mark.parametrize(
    "key, array, words",
    [
        ("0/parameter/0.weight/indices", None, "sound"),
        ("0/buffer/1.running_mean", np.zeros(3, np.float32), "1.running_mean"),
        ("0/parameter/6.bias/data", np.zeros(4), "float64"),
        ("0/parameter/6.bias/data", np.zeros(5, np.float32), "6.bias"),
        ("x/parameter/6.bias/data", np.zeros(4, np.float32), "sound"),
    ],
)
def test_tickets_that_do_not_fit(key, array, words, tmp_path):
    path = tmp_path / "run.safetensors"
    run = trainer(callbacks=[FreeTickets()])
    run.fit(batches(), 1)
    run.save(path)

    def change(arrays):
        name = f"callback/FreeTickets-0/{key}"
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array

    damage(path, change)
    tickets = FreeTickets()
    with pytest.raises(ValueError, match=words):
        Trainer.resume(path, callbacks=[tickets])
    assert tickets.tickets == []


# ---- the learning rate that goes with it


def test_restarts():
    cosine = optim.cosine(1.0, 3)
    schedule = optim.restarts(cosine, 3)
    assert [schedule(step) for step in range(7)] == [cosine(step % 3) for step in range(7)]
    assert [optim.restarts(optim.step(1.0, 1, 0.5), 1)(step) for step in range(3)] == [1.0, 1.0, 1.0]
    warm = optim.warmup(optim.restarts(cosine, 3), 4)  # once, at the beginning of the run
    assert [warm(step) for step in range(7)] == [schedule(s) * min((s + 1) / 4, 1) for s in range(7)]
    run = trainer("set", schedule=optim.restarts(optim.cosine(0.1, STEPS), STEPS))
    rates = []
    for x, y in batches():
        run.train_step(x, y)
        rates.append(run.optimizer.lr)
    assert rates == [optim.cosine(0.1, STEPS)(step) for step in range(STEPS)]
    assert run.schedule(STEPS) == 0.1


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: optim.restarts(0.1, 5), TypeError, "schedule is 0.1"),
        (lambda: optim.restarts(optim.constant(0.1), 0), ValueError, "period is 0"),
        (lambda: optim.restarts(optim.constant(0.1), 2.5), TypeError, "period is 2.5"),
    ],
)
def test_bad_restarts(make, error, message):
    with pytest.raises(error, match=message):
        make()
