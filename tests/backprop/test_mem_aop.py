"""MemAOP: which rows are chosen, what is remembered, and the learning rate in it, against plain NumPy."""

from itertools import combinations
from math import sqrt
from types import SimpleNamespace

import numpy as np
import pytest

import sparsetrain as st
from backward_passes import KINDS, Passes, close
from sparsetrain import nn
from sparsetrain.backprop import MemAOP
from sparsetrain.backprop.mem_aop import POLICIES

kinds = pytest.mark.parametrize("kind", KINDS)
policies = pytest.mark.parametrize("policy", POLICIES)
memories = pytest.mark.parametrize("memory", [True, False], ids=["memory", "no memory"])


class Plain:
    """Section 4.1 of the description of the method, with rows that were chosen elsewhere."""

    def __init__(self, decay=1.0):
        self.decay, self.x, self.dy = decay, 0.0, 0.0

    def step(self, x, dy, lr, chosen):
        """The change of the weights (outputs, inputs)."""
        a, b = self.x + sqrt(lr) * x, self.dy + sqrt(lr) * dy
        change = b[chosen].T @ a[chosen]
        a[chosen] = b[chosen] = 0
        self.x, self.dy = sqrt(self.decay) * a, sqrt(self.decay) * b
        return change

    def worth(self, x, dy, lr):
        """The squares of |x| |dy|."""
        a, b = self.x + sqrt(lr) * x, self.dy + sqrt(lr) * dy
        return (a**2).sum(1) * (b**2).sum(1)


def fixed(monkeypatch, passes, choices):
    """Lets the method choose these rows, in turn."""
    turns = iter(choices)
    monkeypatch.setattr(passes.layer.method, "choose", lambda layer, worth: np.array(next(turns), int), raising=True)


def recorded(monkeypatch, passes):
    """A list to which the rows that the method chooses are added."""
    chosen, choose = [], passes.layer.method.choose

    def record(layer, worth):
        chosen.append(choose(layer, worth))
        return chosen[-1]

    monkeypatch.setattr(passes.layer.method, "choose", record)
    return chosen


def attached(**settings):
    """(method, layer) without passes."""
    method = MemAOP(**settings).attach(nn.Sequential(nn.Linear(2, 2)))
    return method, method.attached[0]


# ---- all rows


@kinds
@policies
@memories
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sparsity", [None, 0.6], ids=["dense", "sparse"])
def test_all_rows_give_the_exact_gradient(sparsity, dtype, memory, policy, kind):
    method = MemAOP(1.0, policy, memory)
    passes = Passes(kind, method, dtype=dtype, sparsity=sparsity, optimizer=SimpleNamespace(lr=0.3))
    for t in range(3):  # nothing is left for a later step
        dy = passes.gradient(t)
        passes.check(passes.step(dy), dy, dy)


@kinds
@policies
@memories
@pytest.mark.parametrize("k", [0.01, 0.4])
def test_input_and_bias_gradient_are_exact(k, memory, policy, kind):
    passes = Passes(kind, MemAOP(k, policy, memory))
    for t in range(3):
        dy = passes.gradient(t)
        dx, dw, db = passes.step(dy)
        exact = passes.reference(dy)
        close(dx, exact[0])
        close(db, exact[2])
        assert abs(dw - exact[1]).max() > 0.1 * abs(exact[1]).max()


# ---- which rows


@kinds
@memories
@pytest.mark.parametrize("k", [0.02, 0.1, 0.5])
def test_topk_takes_the_largest_products_of_norms(k, memory, kind, kernel):
    passes = Passes(kind, MemAOP(k, "topk", memory))
    dy = passes.gradient() * np.logspace(-2, 2, len(passes.x), dtype=np.float32).reshape(-1, *[1] * (passes.x.ndim - 1))
    x, g = passes.rows(dy)
    count = max(1, round(k * len(x)))
    chosen = np.argsort(-np.linalg.norm(x, axis=1) * np.linalg.norm(g, axis=1), kind="stable")[:count]
    close(passes.step(dy)[1].reshape(len(g.T), -1), g[chosen].T @ x[chosen])
    values = passes.method.report()["0"]
    assert values["values"] == dy.size
    assert values["gradient_sparsity"] == pytest.approx(1 - count / len(x))


@pytest.mark.parametrize("policy", ["topk", "weightedk"])
def test_equal_rows_are_taken_in_their_order(policy):
    method, layer = attached(k=0.5, policy=policy)
    worth = np.array([1, 0, 2, 0, 0, 0, 0, 0], np.float32)
    assert method.choose(layer, worth).tolist() == [0, 1, 2, 3]
    if policy == "topk":
        assert method.choose(layer, np.ones(8, np.float32)).tolist() == [0, 1, 2, 3]


@policies
@pytest.mark.parametrize(("k", "m", "count"), [(0.001, 40, 1), (0.1, 40, 4), (0.99, 40, 40), (0.5, 1, 1), (1.0, 7, 7)])
def test_k_of_the_rows_are_chosen_each_once_and_in_order(k, m, count, policy):
    method, layer = attached(k=k, policy=policy)
    chosen = method.choose(layer, np.random.default_rng(0).random(m).astype(np.float32))
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all() and chosen.min() >= 0 and chosen.max() < m


def shares(policy, worth, count, draws=6000):
    """How often each set of rows is chosen."""
    method, layer = attached(k=count / len(worth), policy=policy, seed=5)
    found = dict.fromkeys(combinations(range(len(worth)), count), 0)
    for layer.passes in range(draws):
        found[tuple(method.choose(layer, np.array(worth, np.float32)).tolist())] += 1 / draws
    return found


def sequential(worth, count):
    """The probability of each set of rows when rows are drawn one by one, those left in proportion to their worth."""
    found = dict.fromkeys(combinations(range(len(worth)), count), 0.0)

    def draw(chosen, probability):
        if len(chosen) == count:
            found[tuple(sorted(chosen))] += probability
            return
        left = sum(w for i, w in enumerate(worth) if i not in chosen)
        for i, w in enumerate(worth):
            if i not in chosen:
                draw((*chosen, i), probability * w / left)

    draw((), 1.0)
    return found


@pytest.mark.parametrize(
    ("policy", "worth", "as_if"),
    [
        ("weightedk", [1, 2, 4, 8, 1], [1, 2, 4, 8, 1]),
        ("weightedk", [3] * 5, [1] * 5),
        ("randk", [1, 9, 0, 1, 5], [1] * 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_frequencies_are_those_of_drawing_without_replacement(count, policy, worth, as_if):
    found, expected = shares(policy, worth, count), sequential(as_if, count)
    for rows, p in expected.items():
        assert abs(found[rows] - p) < 5 * sqrt(p * (1 - p) / 6000)


def test_weightedk_leaves_rows_that_are_worth_nothing():
    method, layer = attached(k=0.5, policy="weightedk")
    worth = np.array([0, 1, 0, 1e-6, 0, 5, 0, 1e6], np.float32)
    for layer.passes in range(50):
        assert method.choose(layer, worth).tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize("policy", ["weightedk", "randk"])
def test_the_choice_differs_between_steps_and_seeds(policy):
    def chosen(seed, passes):
        method, layer = attached(policy=policy, seed=seed)
        layer.passes = passes
        return method.choose(layer, np.ones(1000, np.float32)).tolist()

    first = chosen(0, 0)
    assert first == chosen(0, 0)
    for other in (chosen(0, 1), chosen(1, 0)):
        assert len(set(first) & set(other)) < 40


@kinds
def test_the_mean_without_memory_is_a_share_of_the_exact_gradient(kind):
    passes = Passes(kind, MemAOP(0.25, "randk", memory=False), n=20, dtype=np.float64)
    dy = passes.gradient()
    found = np.stack([passes.step(dy)[1] for _ in range(400)])
    error = found.std(0, ddof=1) / sqrt(400)
    assert (abs(found.mean(0) - 0.25 * passes.reference(dy)[1]) < 5.5 * error).all()


# ---- the memory


@kinds
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("decay", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("sparsity", [None, 0.6], ids=["dense", "sparse"])
def test_steps_are_those_of_the_description(sparsity, decay, policy, kind, monkeypatch):
    """With another learning rate in each step. The rows of a convolution are images x pixels."""
    optimizer, plain = SimpleNamespace(lr=None), Plain(decay)
    method = MemAOP(0.2, policy, decay=decay)
    passes = Passes(kind, method, dtype=np.float64, sparsity=sparsity, optimizer=optimizer)
    chosen = recorded(monkeypatch, passes)
    for t, optimizer.lr in enumerate((0.5, 0.1, 0.1, 2.0, 0.01)):
        dy, x = passes.gradient(t), passes.x * (1 + t)
        rows = passes.rows(dy, x)
        worth = plain.worth(*rows, optimizer.lr)
        dw = passes.step(dy, x)[1].reshape(len(rows[1].T), -1)
        assert len(chosen[-1]) == round(0.2 * len(worth))
        if policy == "topk":
            assert sorted(chosen[-1]) == sorted(np.argsort(-worth)[: len(chosen[-1])])
        change = plain.step(*rows, optimizer.lr, chosen[-1])
        close(dw * optimizer.lr, change * passes.mask.reshape(change.shape) if sparsity else change)


@kinds
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_wait_come_with_their_cross_terms(dtype, kind, monkeypatch):
    passes = Passes(kind, MemAOP(1.0), dtype=dtype, optimizer=SimpleNamespace(lr=0.25))
    rows = [passes.rows(passes.gradient(t), passes.x * (t + 1)) for t in range(4)]
    count = len(rows[0][0])
    fixed(monkeypatch, passes, [[], [], [], range(count)])
    for t in range(4):
        dw = passes.step(passes.gradient(t), passes.x * (t + 1))[1]
        if t < 3:
            assert not dw.any()
    total = sum(dy for _, dy in rows).T @ sum(x for x, _ in rows)
    close(dw.reshape(total.shape), total)
    apart = sum(dy.T @ x for x, dy in rows)
    assert abs(total - apart).max() > 0.1 * abs(total).max()


@kinds
def test_chosen_rows_are_forgotten_and_no_others(kind, monkeypatch):
    passes = Passes(kind, MemAOP(1.0), dtype=np.float64)
    x, dy = passes.rows(passes.gradient())
    count = len(x)
    first = [0, 3, count - 1]
    fixed(monkeypatch, passes, [first, range(count)])
    close(passes.step(passes.gradient())[1].reshape(5, -1), dy[first].T @ x[first])
    times = np.full((count, 1), 2.0)
    times[first] = 1
    close(passes.step(passes.gradient())[1].reshape(5, -1), (times * dy).T @ (times * x))


@kinds
def test_decay_scales_both_factors_by_its_root(kind, monkeypatch):
    passes = Passes(kind, MemAOP(1.0, decay=0.25), dtype=np.float64)
    x, dy = passes.rows(passes.gradient())
    fixed(monkeypatch, passes, [[], [], range(len(x))])
    for _ in range(3):
        dw = passes.step(passes.gradient())[1]
    close(dw.reshape(5, -1), (1 + 0.5 + 0.25) ** 2 * dy.T @ x)


@pytest.mark.parametrize("lr", [1e-3, 0.1, 7.0])
def test_the_learning_rate_enters_once(lr):
    """The memory holds lr x dy: what SGD takes off the weights is lr times the sum of the gradients of both steps and
    their cross terms, whatever the rate."""
    results = []
    for rate in (1.0, lr):
        passes = Passes("linear", MemAOP(0.3), dtype=np.float64, optimizer=SimpleNamespace(lr=rate))
        results.append([passes.step(passes.gradient(t))[1] for t in range(4)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_the_rate_is_that_of_the_trainers_optimizer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    optimizer = st.optim.SGD(model.named_parameters(), lr=0.5)
    rates = []

    class Spy(MemAOP):
        def choose(self, layer, worth):
            rates.append(self.optimizer.lr)
            return super().choose(layer, worth)

    trainer = st.Trainer(model, optimizer, backprop=Spy(), schedule=lambda step: 0.1 * (step + 1))
    x = np.random.default_rng(0).standard_normal((16, 1, 8, 8)).astype(np.float32)
    for _ in range(3):
        trainer.train_step(x, np.arange(16) % 4)
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.3])


def test_nothing_is_learned_nor_remembered_at_a_rate_of_zero():
    passes = Passes("conv", MemAOP(0.2), optimizer=SimpleNamespace(lr=0.1))
    passes.step(passes.gradient())
    before = {name: np.array(value) for name, value in passes.state.items()}
    passes.method.optimizer.lr = 0
    dx, dw, db = passes.step(passes.gradient(1))
    close(dx, passes.reference(passes.gradient(1))[0])
    assert not dw.any() and db.any()
    assert list(before) == list(passes.state)
    for name, value in before.items():
        np.testing.assert_array_equal(passes.state[name], value)


def test_without_memory_nothing_is_kept():
    passes = Passes("conv", MemAOP(0.2, memory=False))
    first = passes.step(passes.gradient())[1]
    passes.step(passes.gradient(1))
    assert passes.state == {}
    np.testing.assert_array_equal(passes.step(passes.gradient())[1], first)


@kinds
def test_a_changed_batch_size_is_an_error_with_memory_alone(kind):
    passes = Passes(kind, MemAOP(0.2))
    passes.step(passes.gradient())
    with pytest.raises(
        ValueError, match=r"layer 0 has a batch of 17, the memory of MemAOP has slots for 18.*memory=False"
    ):
        passes.step(passes.gradient()[:17], passes.x[:17])
    passes = Passes(kind, MemAOP(1.0, memory=False))
    for n in (18, 17, 3):
        dy, x = passes.gradient()[:n], passes.x[:n]
        passes.check(passes.step(dy, x), dy, dy, x)


def test_a_changed_image_size_is_an_error():
    passes = Passes("conv", MemAOP(0.2))
    passes.step(passes.gradient())
    passes.model(np.concatenate([passes.x, passes.x], 3))
    with pytest.raises(ValueError, match="layer 0"):
        passes.model.backward(np.ones((18, 5, 5, 14), np.float32))


def test_groups_are_an_error_that_names_the_layer():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="layer 0 has groups 2, MemAOP needs 1: exclude it"):
        MemAOP().attach(model)
    assert model[0].backprop is None and model[1].backprop is None
    MemAOP(exclude=["0"]).attach(model)
    assert model[1].backprop is not None


@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (2, 5), "stride": (3, 1), "padding": (0, 2)},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "stride": 2, "padding": (3, 1), "dilation": (1, 2)},
        {"kernel_size": (8, 9), "padding": (0, 1)},
    ],
    ids=str,
)
@memories
def test_any_convolution_is_a_linear_layer_of_its_windows(conv, memory):
    """Same memory, same choice: one layer reads the image, the other its windows."""
    rng = np.random.default_rng(0)
    layer = nn.Conv2d(3, 5, **conv)
    x = rng.standard_normal((18, 3, 8, 9))
    layer.to(np.float64)
    shape = layer.geometry.output(layer.kernel_size, 8, 9)
    (ph, pw), (sh, sw), (dh, dw), (kh, kw) = layer.padding, layer.stride, layer.dilation, layer.kernel_size
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    windows = np.stack(
        [
            padded[:, :, r * sh : r * sh + dh * (kh - 1) + 1 : dh, c * sw : c * sw + dw * (kw - 1) + 1 : dw].reshape(
                18, -1
            )
            for r in range(shape[0])
            for c in range(shape[1])
        ],
        1,
    ).reshape(18 * shape[0] * shape[1], -1)
    linear = nn.Linear(windows.shape[1], 5)
    linear.to(np.float64)
    found = []
    for module, data in ((layer, x), (linear, windows)):
        model = nn.Sequential(module)
        MemAOP(0.15, memory=memory).attach(model, SimpleNamespace(lr=0.2))
        for t in range(3):
            module.weight.grad = None
            y = model(data)
            dy = np.random.default_rng(t).standard_normal((18, 5, *shape))
            model.backward(dy if module is layer else np.moveaxis(dy, 1, 3).reshape(y.shape))
        found.append(module.weight.grad.reshape(5, -1))
    close(found[0], found[1])


# ---- the rest


@kinds
@memories
@policies
def test_any_thread_count_gives_the_same_bits(policy, memory, kind):
    results = set()
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        passes = Passes(kind, MemAOP(0.1, policy, memory), n=700 if kind == "linear" else 60)
        results.add(b"".join(a.tobytes() for t in range(3) for a in passes.step(passes.gradient(t))))
    assert len(results) == 1


@kinds
@memories
@policies
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_dx_and_dw(value, policy, memory, kind):
    passes = Passes(kind, MemAOP(0.2, policy, memory))
    dy = passes.gradient()
    dy.reshape(-1)[-1] = value
    dx, dw, db = passes.step(dy)
    assert not np.isfinite(dx[-1]).all() and np.isfinite(dx[:-1]).all()
    assert not np.isfinite(dw).all()
    assert not np.isfinite(db[-1])


@kinds
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_used_once(value, kind):
    """Rows that were chosen are forgotten, whatever they hold."""
    passes = Passes(kind, MemAOP(0.2))
    dy = passes.gradient()
    dy.reshape(-1)[-1] = value
    passes.step(dy)
    for result in passes.step(passes.gradient(1)):
        assert np.isfinite(result).all()


@memories
@policies
def test_a_gradient_of_zero(policy, memory):
    passes = Passes("conv", MemAOP(0.2, policy, memory))
    for result in passes.step(0 * passes.gradient()):
        assert not result.any()


@kinds
def test_the_state_goes_on_in_another_method(kind):
    first, second = Passes(kind, MemAOP(0.2, "weightedk")), Passes(kind, MemAOP(0.2, "weightedk"))
    for t in range(3):
        first.step(first.gradient(t))
    second.method.load_state_dict({name: np.array(value)[()] for name, value in first.method.state_dict().items()})
    for t in range(3, 5):
        for a, b in zip(first.step(first.gradient(t)), second.step(second.gradient(t)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k is 0"),
        ({"k": 1.5}, ValueError, "k is 1.5"),
        ({"k": np.inf}, ValueError, "k is inf"),
        ({"k": None}, TypeError, "k is None, must be a number"),
        ({"policy": "top-k"}, ValueError, "policy is 'top-k'.*did you mean 'topk'"),
        ({"decay": 1.1}, ValueError, "decay is 1.1"),
        ({"decay": -0.1}, ValueError, "decay is -0.1"),
        ({"decay": "1"}, TypeError, "decay is '1'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MemAOP(**arguments)


def test_rows_that_are_not_finite_are_chosen():
    method = MemAOP(k=0.5).attach(nn.Sequential(nn.Linear(2, 2)))
    assert method.choose(method.attached[0], np.array([np.nan, 1, 2, 3], np.float32)).tolist() == [0, 3]


@pytest.mark.parametrize("memory", [False, True])
def test_the_angle_is_that_of_the_rows(memory):
    p = Passes("linear", MemAOP(k=0.5, memory=memory, angles=True))
    p.step(p.gradient())
    assert 0 < p.method.report()["0"]["angle"] < 90
