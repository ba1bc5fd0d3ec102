"""What all methods of sparsity share: where and when they act, the sparsity they hold, reports, state and errors."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

import sparsetrain as st
from nets import images, small_net
from sparsetrain import nn, optim, sparsify
from sparsetrain.sparse import SparseParameter
from sparsetrain.sparsity import ACDC, GMP, NM, SET, DropGrow, GraNet, Magnitude, Method, RigL, Static, Timed
from sparsetrain.sparsity.gmp import cubic

LAYERS = ["0", "4.body.0", "4.body.3", "6.body.0", "6.shortcut", "10", "13"]


def step(method, model, x, labels):
    """One step without an optimiser; whether layers changed."""
    method.begin_step()
    model.zero_grad()
    model.backward(nn.cross_entropy(model(x), labels)[1], input_gradient=False)
    return bool(method.end_step())


def weights(model):
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def densities(model):
    return {name: (w.nnz, math.prod(w.shape)) for name, w in weights(model).items()}


def untouched(model):
    return all(type(p) is nn.Parameter and p.structure.dense for p in model.parameters())


@pytest.fixture
def net():
    st.manual_seed(0)
    return small_net(width=8)


# ---- when


class Noted(Timed):
    """Notes when it is called."""

    def begin(self):
        self.prepared, self.updated = [], []

    def prepare(self):
        self.prepared.append(self.step)

    def update(self):
        self.updated.append((self.step, self.progress()))


class NotedLater(Noted):
    changes_at_start = False


@pytest.mark.parametrize(
    ("start", "stop", "every", "due"),
    [
        (0, 0, 1, [0]),
        (0, 4, 1, [0, 1, 2, 3, 4]),
        (0, 5, 2, [0, 2, 4, 5]),
        (2, 8, 3, [2, 5, 8]),
        (2, 9, 3, [2, 5, 8, 9]),
        (3, 3, 5, [3]),
        (1, 11, 100, [1, 11]),
        (0, 50, 12, [0, 12]),  # the run ends before
        (30, 40, 1, []),
    ],
)
@pytest.mark.parametrize("kind", [Noted, NotedLater])
def test_times_in_steps(kind, start, stop, every, due):
    model = nn.Sequential(nn.Linear(2, 2))
    if kind is NotedLater and start == stop:
        with pytest.raises(ValueError, match="would never change a weight"):
            kind(start=start, stop=stop, every=every, sparsity=0.5)
        return
    method = kind(start=start, stop=stop, every=every, sparsity=0.5).attach(model)
    returned = [step(method, model, np.ones((1, 2), np.float32), np.zeros(1, np.int64)) for _ in range(20)]
    due = due if kind is Noted else [t for t in due if t != start]
    assert method.prepared == [t for t, _ in method.updated] == np.flatnonzero(returned).tolist() == due
    for t, progress in method.updated:
        assert progress == ((t - start) / (stop - start) if stop > start else 1)


@pytest.mark.parametrize(
    ("start", "stop", "every", "epochs"),
    [(0, 3, 1, [0, 1, 2, 3]), (1, 5, 2, [1, 3, 5]), (1, 4, 2, [1, 3, 4]), (2, 2, 9, [2]), (0, 100, 4, [0, 4])],
)
def test_times_in_epochs(start, stop, every, epochs):
    """At the end of an epoch's first step."""
    model = nn.Sequential(nn.Linear(2, 2))
    method = Noted(start=start, stop=stop, every=every, unit="epochs", sparsity=0.5).attach(model)
    for epoch in range(7):
        method.begin_epoch(epoch, 3)
        for _ in range(3):
            step(method, model, np.ones((1, 2), np.float32), np.zeros(1, np.int64))
    assert [t for t, _ in method.updated] == [3 * epoch for epoch in epochs]


@pytest.mark.parametrize("steps", ["not said", None])
def test_times_in_epochs_need_their_length(steps):
    model = nn.Sequential(nn.Linear(2, 2))
    method = Noted(stop=3, unit="epochs", sparsity=0.5).attach(model)
    if steps is None:
        method.begin_epoch(0, None)
    with pytest.raises(ValueError, match="unit is 'epochs': begin_epoch"):
        method.begin_step()


def test_a_cancelled_step_does_not_count():
    model = nn.Sequential(nn.Linear(2, 2))
    method = Noted(start=1, stop=1, sparsity=0.5).attach(model)
    for _ in range(3):
        method.begin_step()
        method.cancel_step()
    assert method.step == 0
    done = [step(method, model, np.ones((1, 2), np.float32), np.zeros(1, np.int64)) for _ in range(3)]
    assert done == [False, True, False]


# ---- arguments

WRONG = [
    (lambda: GMP(1.0, stop=5), ValueError, r"sparsity is 1.0, must be in \[0, 1\)"),
    (lambda: Static(-0.1), ValueError, r"sparsity is -0.1, must be in \[0, 1\)"),
    (lambda: RigL("0.9", stop=5), TypeError, "sparsity is '0.9'"),
    (lambda: SET(np.nan, stop=5), ValueError, "sparsity is nan"),
    (lambda: GMP(0.9), ValueError, "stop is None: GMP needs the last of the steps at which weights change"),
    (lambda: SET(0.9, unit="epochs"), ValueError, "stop is None: SET needs the last of the epochs"),
    (lambda: NM(2, 4), ValueError, "stop is None: NM"),
    (lambda: ACDC(0.9, start=6, stop=5), ValueError, "stop is 5, before start, which is 6"),
    (lambda: RigL(0.9, stop=5, every=0), ValueError, "every is 0, must be >= 1"),
    (lambda: RigL(0.9, stop=5, every=1.5), TypeError, "every is 1.5, must be an int"),
    (lambda: RigL(0.9, stop=-1), ValueError, "stop is -1"),
    (lambda: RigL(0.9, start=-1, stop=3), ValueError, "start is -1"),
    (lambda: RigL(0.9, stop=5, unit="step"), ValueError, "unit is 'step', must be one of steps, epochs; did you mean"),
    (lambda: RigL(0.9, stop=5, fraction=0), ValueError, r"fraction is 0, must be in \(0, 1\)"),
    (lambda: SET(0.9, stop=5, fraction=1), ValueError, r"fraction is 1, must be in \(0, 1\)"),
    (lambda: SET(0.9, stop=5, fraction="a"), TypeError, "fraction is 'a'"),
    (lambda: SET(0.9, stop=5, anneal=1), TypeError, "anneal is 1, must be True or False"),
    (lambda: RigL(0.9, stop=5, distribution="global"), ValueError, "distribution is 'global', RigL needs uniform or"),
    (lambda: SET(0.9, stop=5, distribution="global"), ValueError, "distribution is 'global', SET needs uniform or erk"),
    (lambda: GraNet(0.9, stop=5, distribution="global"), ValueError, "GraNet needs uniform or erk"),
    (lambda: GMP(0.9, stop=5, distribution="erks"), ValueError, "distribution is 'erks'.*did you mean 'erk'"),
    (lambda: GMP(0.9, stop=5, initial=0.95), ValueError, "initial is 0.95, above the sparsity 0.9"),
    (lambda: GraNet(0.4, stop=5), ValueError, "initial is 0.5, above the sparsity 0.4"),
    (lambda: GMP(0.9, stop=5, initial=-0.5), ValueError, "initial is -0.5"),
    (lambda: Magnitude(0.9, 0), ValueError, "rounds is 0, must be >= 1"),
    (lambda: Static(0.9, "snip"), ValueError, "method is 'snip', must be one of random, magnitude"),
    (lambda: NM(5, 4, stop=0), ValueError, "n is 5, more than m, which is 4"),
    (lambda: NM(0, 4, stop=0), ValueError, "n is 0, must be >= 1"),
    (lambda: NM(2, 4, stop=0, decay=-1), ValueError, "decay is -1"),
    (lambda: NM(2, 4, stop=0, sparsity=0.5), TypeError, "sparsity"),
    (lambda: Static(0.9, exclude="0"), TypeError, "exclude is '0', must be a sequence of layer names or globs"),
    (lambda: Static(0.9, include="*"), TypeError, "include is '.', must be a sequence of layer names or globs"),
]


@pytest.mark.parametrize(("make", "error", "match"), WRONG, ids=[match[:30] for _, _, match in WRONG])
def test_wrong_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_sparsity_of_n_m():
    assert (NM(2, 4, stop=0).sparsity, NM(1, 4, stop=0).sparsity, NM(3, 3, stop=0).sparsity) == (0.5, 0.75, 0)


# ---- where


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (["*"], [], LAYERS),
        (["*"], ["0", "13"], LAYERS[1:-1]),
        (["4.*", "0"], [], ["0", "4.body.0", "4.body.3"]),
        (["*.body.*"], ["4.body.3"], ["4.body.0", "6.body.0"]),
        (("1?",), (), ["10", "13"]),
        (["13"], ["0"], ["13"]),
    ],
)
def test_include_and_exclude(net, include, exclude, names):
    method = Static(0.5, "magnitude", distribution="uniform", include=include, exclude=exclude).attach(net)
    assert [layer.name for layer in method.layers] == list(method.report()) == names
    assert [name for name, w in weights(net).items() if isinstance(w, SparseParameter)] == names
    assert (method.include, method.exclude) == (tuple(include), tuple(exclude))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"include": ["99"]}, "include has '99', which matches none of the layers 0, 4.body.0"),
        ({"exclude": ["3.boddy.*"]}, "exclude has '3.boddy"),
        ({"include": ["0"], "exclude": ["0"]}, "no convolution or linear layer"),
        ({"include": ["13"], "sparsity": 0.99}, "layer 13 has 35 weights, of which sparsity 0.99 would leave none"),
    ],
)
@pytest.mark.parametrize("kind", [Static, GMP, SET, RigL, GraNet, ACDC])
def test_attach_to_what_is_not_there(net, kind, settings, match):
    before = net.state_dict()
    times = {} if kind is Static else {"stop": 5, "every": 1}
    with pytest.raises(ValueError, match=match):
        kind(**({"distribution": "uniform"} | times | settings)).attach(net)
    assert untouched(net)
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="the model has no convolution or linear layer to make sparse"):
        Static(0.5).attach(nn.Sequential(nn.ReLU(), nn.Flatten()))


def test_a_layer_by_itself_is_a_model():
    layer = nn.Linear(8, 8)
    method = RigL(0.5, stop=5, every=1).attach(layer)
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    assert [step(method, layer, x, np.arange(4)) for _ in range(3)] == [False, True, True]
    assert layer.weight.nnz == 32 and list(method.report()) == [""]


def test_n_m_needs_channels_in_groups_of_m(net):
    for method in (NM(2, 4, stop=0), NM(2, 4, stop=3)):
        with pytest.raises(ValueError, match="layer 0 has 3 input channels a group, must be a multiple of m = 4: excl"):
            method.attach(net)
        assert untouched(net) and method.layers == []
    with pytest.raises(ValueError, match="layer 13 has 7 input channels a group"):
        NM(2, 4, stop=0, exclude=["0"]).attach(net)
    assert untouched(net)
    NM(2, 4, stop=0, exclude=["0", "13"]).attach(net)
    assert [w.sparsity for w in weights(net).values()] == [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0]


def test_n_m_needs_a_dense_model(net):
    sparsify(net, 0.5, include=["10"])
    before = net[10].weight.structure
    with pytest.raises(ValueError, match="layer 10 is sparse already, NM chooses among all weights"):
        NM(2, 4, stop=3, exclude=["0", "13"]).attach(net)
    assert net[10].weight.structure is before and net[4].body[0].weight.structure.dense


def test_detach_leaves_the_layers_as_they_are(net):
    method = RigL(0.5, stop=9, every=1).attach(net)
    x, labels = images()
    step(method, net, x, labels)
    method.begin_step()
    before = densities(net)
    method.detach()
    assert method.layers == [] and all(m.probe is None for _, m in net.named_modules() if hasattr(m, "probe"))
    step(method, net, x, labels)
    assert densities(net) == before and method.report() == {}


# ---- how sparse, at each update

SHARES = {
    "gmp": (lambda d: GMP(0.9, initial=0.2, stop=9, every=2, distribution=d), lambda t: cubic(0.2, 0.9, t / 9)),
    "set": (lambda d: SET(0.8, stop=9, every=2, distribution=d), lambda t: 0.8),
    "rigl": (lambda d: RigL(0.8, stop=9, every=2, distribution=d), lambda t: 0.8),
    "granet": (lambda d: GraNet(0.9, stop=9, every=2, distribution=d), lambda t: cubic(0.5, 0.9, t / 9)),
    "ac/dc": (lambda d: ACDC(0.9, stop=9, every=2, distribution=d), lambda t: 0.9 if t in (0, 4, 8, 9) else 0),
    "rounds": (lambda d: Magnitude(0.9, 3, every=2, distribution=d), lambda t: 1 - 0.1 ** ((t // 2 + 1) / 3)),
}


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
@pytest.mark.parametrize("name", SHARES)
def test_sparsity_is_the_target_to_one_weight(net, name, distribution):
    make, wanted = SHARES[name]
    if distribution == "global" and name in ("set", "rigl", "granet"):
        return
    method = make(distribution).attach(net)
    optimizer = optim.SGD(net.named_parameters(), lr=0.02, momentum=0.9)
    x, labels = images(12)
    updates = 0
    for t in range(12):
        if step(method, net, x, labels):
            updates += 1
            kept, total = (sum(numbers) for numbers in zip(*densities(net).values(), strict=True))
            assert abs(kept - (1 - wanted(t)) * total) <= (1 if distribution != "uniform" else len(LAYERS)), t
            if distribution == "uniform":
                for layer, (nnz, size) in densities(net).items():
                    assert abs(nnz - (1 - wanted(t)) * size) <= 1, (t, layer)
        optimizer.step()
    assert updates == {"rounds": 3, "ac/dc": 6, "gmp": 6}.get(name, 5)


@pytest.mark.parametrize("kind", [SET, RigL])
def test_drop_and_growth_keep_each_layers_number(net, kind):
    method = kind(0.8, stop=9, every=1).attach(net)
    before = densities(net)
    x, labels = images(12)
    masks = {name: w.mask for name, w in weights(net).items()}
    for _ in range(6):
        step(method, net, x, labels)
        assert densities(net) == before
    assert all((w.mask != masks[name]).any() for name, w in weights(net).items() if w.sparsity > 0.3)


def test_a_model_that_is_sparse_already(net):
    """Only weights beyond the target go."""
    sparsify(net, 0.8, "random")
    before = densities(net)
    method = SET(0.8, stop=9, every=1, distribution="uniform").attach(net)
    assert densities(net) == before
    assert sum(row["dropped"] for row in method.report().values()) == 0
    RigL(0.9, stop=9, every=1, distribution="uniform").attach(net)
    assert all(abs(nnz - 0.1 * size) <= 1 for nnz, size in densities(net).values())


def test_layers_may_lose_all_weights_where_all_compete():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    model[0].weight.data[...] = 1e-3
    method = GMP(0.9, stop=2, every=1, distribution="global").attach(model)
    x = np.ones((4, 4), np.float32)
    for _ in range(5):
        step(method, model, x, np.arange(4))
    assert [w.nnz for w in weights(model).values()] == [0, 6]
    acdc = ACDC(0.9, stop=3, every=1, distribution="global").attach(model)
    assert [step(acdc, model, x, np.arange(4)) for _ in range(5)] == [True] * 4 + [False]


@pytest.mark.parametrize("name", SHARES)
def test_batch_norms_are_not_touched_by_an_update(net, name):
    method = SHARES[name][0]("uniform").attach(net)
    x, labels = images(12)
    for _ in range(5):
        method.begin_step()
        net.zero_grad()
        net.backward(nn.cross_entropy(net(x), labels)[1])
        before = {key: buffer.copy() for key, buffer in net.named_buffers()}
        others = {key: p.data.copy() for key, p in net.named_parameters() if len(p.shape) == 1}
        gradients = {key: p.grad.copy() for key, p in net.named_parameters() if len(p.shape) == 1}
        method.end_step()
        for key, buffer in net.named_buffers():
            np.testing.assert_array_equal(buffer, before[key])
        for key, p in net.named_parameters():
            if len(p.shape) == 1:
                np.testing.assert_array_equal(p.data, others[key])
                np.testing.assert_array_equal(p.grad, gradients[key])


# ---- reports and state


def linear(values, stored):
    model = nn.Sequential(nn.Linear(len(values[0]), len(values), bias=False))
    model[0].weight.data[...] = values
    model[0].weight.keep(np.array(stored, bool))
    return model


def test_report_of_a_small_example():
    """Two of five weights are exchanged: at first one comes back and one is new, then both are new."""
    model = linear([[4, 0.1, -3, 0], [0, 0, 0.2, 5]], [[1, 1, 1, 0], [0, 0, 1, 1]])
    method = RigL(0.375, fraction=0.4, anneal=False, stop=9, every=1).attach(model)
    assert method.report() == {
        "0": {"weights": 8, "nnz": 5, "sparsity": 0.375, "dropped": 0, "grown": 0, "explored": 5 / 8}
    }
    explored = []
    for large in ([1, 5], [1, 5], [3, 4], [3, 4], [0, 7]):
        gradient = np.zeros(8, np.float32)
        gradient[large] = 1
        method.begin_step()
        model.zero_grad()
        model(np.eye(4, dtype=np.float32))
        model.backward(np.ascontiguousarray(gradient.reshape(2, 4).T))
        changed = method.end_step()
        row = method.report()["0"]
        assert (row["nnz"], row["dropped"], row["grown"]) == ((5, 2, 2) if changed else (5, 0, 0))
        explored.append(row["explored"])
        again = method.report()["0"]
        assert again == row | {"dropped": 0, "grown": 0}
    assert explored == [5 / 8, 6 / 8, 1, 1, 1]


def test_counts_add_up_until_they_are_reported(net):
    method = SET(0.8, stop=9, every=1, distribution="uniform").attach(net)
    begun = method.report()
    assert all(row["dropped"] == row["weights"] - row["nnz"] and row["grown"] == 0 for row in begun.values())
    x, labels = images()
    for _ in range(4):
        step(method, net, x, labels)
    for row in method.report().values():
        assert row["dropped"] == row["grown"] == 3 * round(0.3 * row["nnz"])
    assert all(row["dropped"] == row["grown"] == 0 for row in method.report().values())


def alive(weight):
    """Which weights exist, as a boolean array."""
    return weight.mask if isinstance(weight, SparseParameter) else np.ones(weight.shape, bool)


@pytest.mark.parametrize("kind", [SET, RigL, GraNet])
def test_explored_never_falls(net, kind):
    method = kind(0.9, stop=20, every=1).attach(net)
    x, labels = images()
    seen = {name: alive(w) for name, w in weights(net).items()}
    for _ in range(8):
        step(method, net, x, labels)
        for name, row in method.report().items():
            seen[name] = seen[name] | alive(weights(net)[name])
            assert row["explored"] == pytest.approx(seen[name].mean())
    row = method.report()["4.body.3"]
    assert 1 - row["sparsity"] < row["explored"] < 1


def test_dense_layers_have_been_everywhere(net):
    for method in (GMP(0.9, stop=3), ACDC(0.9, start=1, stop=3), NM(2, 4, stop=3, exclude=["0", "13"])):
        assert all(row["explored"] == 1 for row in method.attach(net).report().values())


def test_state_dict_brings_everything_back(net):
    method = SET(0.8, stop=20, every=1).attach(net)
    x, labels = images()
    for _ in range(3):
        step(method, net, x, labels)
    state = method.state_dict()
    assert all(isinstance(value, int | np.ndarray) for value in state.values())
    other = SET(0.8, stop=20, every=1).attach(net, begin=False)
    other.load_state_dict(state)
    assert other.step == 3
    assert other.report() == method.report()
    for key, value in other.state_dict().items():
        if not key.endswith("changed"):
            np.testing.assert_array_equal(value, state[key])
    step(other, net, x, labels)
    assert state["step"] == 3 and state["10/changed"][0] > 0  # a copy


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop("step"), "the state does not fit the layers 0, 4.body.0.*: 'step'"),
        (lambda state: state.update({"99/explored": 0}), "99/explored"),
        (lambda state: state.pop("10/changed"), "10/changed"),
        (lambda state: state.update({"10/explored": np.zeros(3, np.uint8)}), "10/explored cannot be decompressed"),
        (lambda state: state.update({"10/explored": state["0/explored"]}), "10/explored is not of 84 weights"),
        (lambda state: state.update({"10/explored": state["10/explored"][:-4]}), "10/explored is not of 84 weights"),
        (lambda state: state.update({"10/explored": np.full(9, np.nan)}), "10/explored cannot be decompressed"),
        (lambda state: state.update({"10/changed": np.zeros(3, int)}), r"10/changed has shape \(3,\)"),
        (lambda state: state.update({"10/changed": np.array([3, -1])}), "10/changed is -1"),
        (lambda state: state.update({"step": -5}), "step is -5"),
    ],
)
def test_state_of_other_layers(net, change, match):
    method = SET(0.8, stop=20, every=1).attach(net)
    x, labels = images()
    step(method, net, x, labels)
    state, before = method.state_dict() | {"step": 7}, method.state_dict()
    change(state)
    with pytest.raises(ValueError, match=match):
        method.load_state_dict(state)
    for key, value in method.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


# ---- rules of one's own


def test_a_method_that_defines_nothing(net):
    @dataclass
    class Empty(Timed):
        pass

    @dataclass
    class Grows(DropGrow):
        pass

    x, labels = images()
    with pytest.raises(NotImplementedError, match="Empty is due but does not define update"):
        step(Empty(0.5, stop=1).attach(net), net, x, labels)
    method = Grows(0.5, stop=5, every=1).attach(net)
    step(method, net, x, labels)
    with pytest.raises(NotImplementedError, match=r"Grows does not define drop\(layer, count\)"):
        step(method, net, x, labels)
    assert not step(Method(0.5).attach(net), net, x, labels)


@dataclass
class Oldest(DropGrow):
    """The first weights go, the last free places grow."""

    def drop(self, layer, count):
        kept = np.ones(layer.weight.nnz, bool)
        kept[:count] = False
        return kept

    def grow(self, layer, kept, count):
        return np.setdiff1d(np.arange(layer.size), layer.weight.places()[kept])[-count:]


def test_a_rule_of_drop_and_growth_of_ones_own():
    model = nn.Sequential(nn.Linear(4, 4))
    method = Oldest(0.5, fraction=0.25, anneal=False, stop=9, every=2).attach(model)
    x, labels = np.ones((2, 4), np.float32), np.array([0, 1])
    for _ in range(9):
        step(method, model, x, labels)
    assert model[0].weight.places().tolist() == list(range(8, 16))
    assert method.report()["0"]["grown"] == 8


@dataclass
class Steps(Timed):
    """Sparsity rises in a straight line; the weights go that have the least gradients."""

    distributions = ("uniform", "erk", "global")

    def update(self):
        self.prune(self.progress() * self.sparsity, lambda weight: np.abs(weight.grad))


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_a_schedule_of_ones_own(net, distribution):
    method = Steps(0.8, start=1, stop=5, every=1, distribution=distribution).attach(net)
    x, labels = images()
    for t in range(8):
        step(method, net, x, labels)
        kept, total = (sum(numbers) for numbers in zip(*densities(net).values(), strict=True))
        assert abs(kept - total * (1 - 0.8 * min(1, max(0, (t - 1) / 4)))) <= len(LAYERS)


# ---- corners


def test_a_schedule_of_one_step_ends_at_its_sparsity(net):
    method = GMP(0.8, start=2, stop=2, every=1).attach(net)
    x, labels = images()
    assert [step(method, net, x, labels) for _ in range(4)] == [False, False, True, False]
    assert all(abs(nnz - 0.2 * size) <= 1 for nnz, size in densities(net).values())


@pytest.mark.parametrize("kind", [SET, RigL, GraNet])
def test_a_layer_that_has_lost_all_weights_before(kind):
    model = linear([[1, 2], [3, 4]], [[0, 0], [0, 0]])
    method = kind(0.5, stop=5, every=1).attach(model)
    for _ in range(4):
        step(method, model, np.eye(2, dtype=np.float32), np.array([0, 1]))
    assert model[0].weight.nnz in (0, 2)


def test_nothing_is_lost_where_nothing_is_removed(net):
    """GMP begins with sparsity 0: the first update is none."""
    method = GMP(0.8, start=0, stop=9, every=1).attach(net)
    x, labels = images()
    step(method, net, x, labels)
    assert all(w.nnz == w.data.size and w.grad is not None for w in weights(net).values())
