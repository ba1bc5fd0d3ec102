"""What all methods have in common: attaching, layers, reports, state, whole nets, and which kernel runs."""

import copy
import itertools
import json

import numpy as np
import pytest

import reference as ref
import sparsetrain as st
from backward_passes import KINDS, Passes, close
from sparsetrain import arrays, nn, plans, sparse_gradient, sparsify
from sparsetrain.backprop import Dithered, MemAOP, Method, ReSprop, TopK, above, dither
from sparsetrain.sparse import Parameter, SparseParameter

METHODS = {
    "dithered": lambda: Dithered(1.5),
    "dithered to a target": lambda: Dithered(sparsity=0.8, bits=8),
    "resprop": lambda: ReSprop(0.7),
    "resprop by quantile": lambda: ReSprop(0.7, control="quantile"),
    "mem-aop": lambda: MemAOP(0.3),
    "mem-aop, weightedk": lambda: MemAOP(0.3, "weightedk", decay=0.9),
    "mem-aop, randk without memory": lambda: MemAOP(0.3, "randk", memory=False),
    "top-k": lambda: TopK(0.2),
}
EXACT = {
    "dithered": lambda: Dithered(1e-8),
    "resprop": lambda: ReSprop(0.0),
    "mem-aop": lambda: MemAOP(1.0),
    "mem-aop without memory": lambda: MemAOP(1.0, "weightedk", memory=False),
    "top-k": lambda: TopK(1.0),
}
LAYERS = ["0", "3.body.0", "3.body.3", "3.shortcut.0", "8"]
methods = pytest.mark.parametrize("name", METHODS)


def net(sparsity=0.0, dtype=np.float64):
    """A small residual net of convolutions and batch norms, and a linear layer; 1x8x8 images, 4 classes."""
    st.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(6, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
    )
    shortcut = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Residual(body, shortcut), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.0), nn.Linear(8 * 4, 4),
    )  # fmt: skip
    return (sparsify(model, sparsity) if sparsity else model).to(dtype)


def data(t, n=18, dtype=np.float64):
    rng = np.random.default_rng((t, 3))
    return rng.standard_normal((n, 1, 8, 8)).astype(dtype), rng.standard_normal((n, 4)).astype(dtype)


def steps(model, count, first=0, dtype=np.float64):
    """The gradients of all parameters after each of some steps, which change no parameter."""
    found = []
    for t in range(first, first + count):
        x, dy = data(t, dtype=dtype)
        for parameter in model.parameters():
            parameter.grad = None
        model(x)
        model.backward(dy, input_gradient=False)
        found.append([p.grad.copy() for p in model.parameters()])
    return found


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


# ---- whole nets


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("sparsity", [0.0, 0.6], ids=["dense", "sparse"])
def test_a_method_that_uses_all_is_exact_in_a_net(sparsity, name, kernel):
    model = net(sparsity)
    exact = steps(model, 3)
    EXACT[name]().attach(model)
    for found, expected in zip(steps(model, 3), exact, strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(
                a, b, rtol=0, atol=(1e-6 if name == "dithered" else 1e-12) * abs(b).max() + 1e-13
            )


@methods
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_sparse_weights_have_the_gradients_of_dense_ones_where_they_are_stored(sparsity, name, kernel):
    sparse = net(sparsity)
    dense = copy.deepcopy(sparse)
    for (_, module), (_, other) in zip(dense.named_modules(), sparse.named_modules(), strict=True):
        if isinstance(getattr(module, "weight", None), SparseParameter):
            module.weight = Parameter(other.weight.to_dense())
    masks = [p.mask if isinstance(p, SparseParameter) else ... for p in sparse.parameters()]
    assert sum(mask is not ... for mask in masks) == len(LAYERS)
    for model in (sparse, dense):
        METHODS[name]().attach(model)
    for found, expected in zip(steps(sparse, 4), steps(dense, 4), strict=True):
        for a, b, mask in zip(found, expected, masks, strict=True):
            np.testing.assert_allclose(a, b[mask], rtol=1e-9, atol=1e-10)


@methods
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_both_kernels_give_the_same_to_rounding(sparsity, name, monkeypatch):
    found = []
    for skip in (True, False):
        monkeypatch.setattr(sparse_gradient, "skips", lambda *_, skip=skip: skip)
        model = net(sparsity)
        METHODS[name]().attach(model)
        found.append(steps(model, 4))
    for a, b in zip(*found, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10)


@methods
def test_1_and_2_threads_give_the_same_bits(name):
    found = []
    for threads in (1, 2):
        st.set_num_threads(threads)
        model = net(0.5, np.float32)
        METHODS[name]().attach(model)
        found.append(steps(model, 4, dtype=np.float32))
    assert_equal(*found)


@methods
def test_no_input_gradient_of_the_first_layer_is_needed(name):
    results = []
    for wanted in (True, False):
        passes = Passes("conv", METHODS[name]())
        for t in range(2):
            passes.module.weight.grad = passes.module.bias.grad = None
            passes.model(passes.x)
            dx = passes.model.backward(passes.gradient(t), input_gradient=wanted)
        assert (dx is not None) == wanted
        results.append((passes.module.weight.grad.copy(), passes.module.bias.grad.copy()))
    assert_equal(results[:1], results[1:])


@pytest.mark.parametrize("kind", KINDS)
@methods
def test_gradients_add_to_what_is_there(name, kind, kernel):
    apart, together = (Passes(kind, METHODS[name](), dtype=np.float64) for _ in range(2))
    total = [0, 0]
    for t in range(3):
        dy = apart.gradient(t)
        total = [sum_ + part for sum_, part in zip(total, apart.step(dy)[1:], strict=True)]
        together.model(together.x)
        together.model.backward(dy)
    close(together.module.weight.grad, total[0])
    close(together.module.bias.grad, total[1])


@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("method", [Dithered(), TopK(0.1), ReSprop(control="quantile")], ids=lambda m: type(m).__name__)
def test_groups(method, groups):
    model = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1, groups=groups))
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((18, c, 7, 6)).astype(np.float32) for c in (6, 12))
    used, run = [], sparse_gradient.written_out

    def spy(*arguments):
        used.append(run(*arguments))
        return used[-1]

    method.attach(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_gradient, "written_out", spy)
        for _ in range(2):
            model[0].weight.grad = None
            model(x)
            dx = model.backward(dy)
    gradient, counted = used[-1]
    assert counted.kernel == "weight" and 0 < counted.nnz < dy.size
    expected = ref.conv2d_backward(st.arrays.unpack(gradient), x, model[0].weight.data, padding=(1, 1), groups=groups)
    close(dx, expected[0])
    close(model[0].weight.grad, expected[1])


# ---- which kernel


@pytest.mark.parametrize(
    ("density", "sparsity", "groups", "expected"),
    [(0.02, 0.0, 1, True), (1.0, 0.0, 1, False), (0.02, 0.0, 2, False), (0.9, 0.99, 1, False), (0.01, 0.5, 1, True)],
)
def test_the_kernel_that_is_faster_is_used(density, sparsity, groups, expected):
    layer = nn.Conv2d(64, 64, 3, groups=groups)
    if sparsity:
        sparsify(nn.Sequential(layer), sparsity)
    assert sparse_gradient.skips(layer.weight, layer.geometry, density) == expected


def test_dense_kernels_with_a_transform_are_faster_for_longer():
    for stride, expected in ((1, False), (2, True)):
        layer = nn.Conv2d(64, 64, 3, stride=stride)
        assert sparse_gradient.skips(layer.weight, layer.geometry, 0.45) == expected


class Watched(Method):
    """Uses what is not zero; keeps what each pass used."""

    def __post_init__(self):
        super().__post_init__()
        self.seen = []

    def select(self, layer, x, geometry, dy):
        return sparse_gradient.nonzero()

    def after(self, layer, dy, used):
        self.seen.append(used)


def test_the_kernel_follows_what_is_used_and_is_known_of_the_last_pass():
    model, method = nn.Sequential(nn.Linear(256, 64)), Watched()
    method.attach(model)
    x = np.ones((32, 256), np.float32)
    dense = np.ones((32, 64), np.float32)
    few = dense * (np.arange(64) % 32 == 0)
    for dy in (few, few, dense, dense, few, few):
        model(x)
        model.backward(dy)
    seen = method.attached[0].method.seen
    assert [used.kernel for used in seen] == ["gradient", "gradient", "weight", "weight", "weight", "gradient"]
    assert [used.nnz for used in seen] == [64, 64, 2048, 2048, 64, 64]
    assert [used.density for used in seen] == [1 / 32, 1 / 32, 1, 1, 1 / 32, 1 / 32]
    assert all(used.values == 2048 and used.clipped == 0 for used in seen)


# ---- layers


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), LAYERS),
        (("0",), LAYERS[1:]),
        (["3.*"], ["0", "8"]),
        (("*.0", "8"), ["0", "3.body.3"]),
        ("*8", None),
        (("*",), []),
    ],
    ids=str,
)
def test_excluded_layers(exclude, left):
    if left is None:
        with pytest.raises(TypeError, match=r"exclude is '\*8', must be a sequence"):
            TopK(exclude=exclude)
        return
    model = net()
    method = TopK(exclude=exclude).attach(model)
    assert [layer.name for layer in method.attached] == left
    assert list(method.report()) == left
    for name, module in model.named_modules():
        assert (getattr(module, "backprop", None) is not None) == (name in left)


def test_excluded_layers_stay_exact():
    passes, plain = Passes("conv", TopK(0.01, exclude=["0"])), Passes("conv")
    for a, b in zip(passes.step(passes.gradient()), plain.step(plain.gradient()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_arguments_of_single_layers():
    layers = {"3.body.*": {"k": 0.5}, "3*": {"k": 0.25}, "8": {"k": 1.0}}
    method = TopK(0.1, exclude=["3.shortcut.*"], layers=layers, seed=7).attach(net())
    assert {layer.name: layer.method.k for layer in method.attached} == {
        "0": 0.1,
        "3.body.0": 0.5,
        "3.body.3": 0.5,
        "8": 1.0,
    }
    assert {layer.method.seed for layer in method.attached} == {7}


def test_arguments_of_a_layer_reach_its_passes():
    model = net(dtype=np.float32)
    method = TopK(0.25, layers={"8": {"k": 0.5}}).attach(model)
    steps(model, 1, dtype=np.float32)
    report = method.report()
    assert report["8"]["gradient_sparsity"] == pytest.approx(0.5)
    assert report["0"]["gradient_sparsity"] >= 0.75


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TopK(exclude=["1"]).attach(net()),
            ValueError,
            "exclude has '1', which matches none of the layers 0, 3.bo",
        ),
        (lambda: TopK(exclude=["0", "conv*"]).attach(net()), ValueError, r"exclude has 'conv\*'"),
        (lambda: TopK(layers={"9": {"k": 0.5}}).attach(net()), ValueError, "layers has '9', which matches none"),
        (lambda: TopK(layers={"0": {"s": 2}}), ValueError, r"an argument in layers\['0'\] is 's', must be one of k"),
        (lambda: TopK(layers={"0": {"seed": 2}}), ValueError, "is 'seed'"),
        (lambda: TopK(layers={"0": {"k": 2}}), ValueError, "k is 2"),
        (lambda: Dithered(layers={"0": {"bits": 4}}), ValueError, "bits is 4"),
        (lambda: TopK(seed=-1), ValueError, "seed is -1"),
        (lambda: TopK(seed=0.5), TypeError, "seed is 0.5, must be an int"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_glob_that_matches_nothing_changes_nothing():
    model = net()
    first = TopK().attach(model)
    before = [layer.module.backprop for layer in first.attached]
    with pytest.raises(ValueError, match="matches none"):
        TopK(exclude=["nothing"]).attach(model)
    assert [layer.module.backprop for layer in first.attached] == before


def test_a_method_without_select():
    passes = Passes("linear", Method())
    with pytest.raises(NotImplementedError, match=r"Method does not define select\(layer, x, geometry, dy\)"):
        passes.step(passes.gradient())


# ---- attaching


def test_detached_layers_are_exact_again():
    model = net()
    exact = steps(model, 2)
    method = TopK(0.1)
    assert method.attach(model) is method
    assert not all(np.array_equal(a, b) for a, b in zip(steps(model, 2)[1], exact[1], strict=True))
    method.detach()
    assert method.attached == [] and method.report() == {}
    assert_equal(steps(model, 2), exact)


def test_attached_again_it_starts_anew_and_leaves_the_other_model():
    first, second = net(), net()
    method = MemAOP(0.3).attach(first)
    steps(first, 2)
    method.attach(first)
    assert all(layer.passes == 0 and layer.state == {} for layer in method.attached)
    assert_equal(steps(first, 2), steps(attached(net()), 2))
    method.attach(second)
    assert all(getattr(module, "backprop", None) is None for _, module in first.named_modules())
    assert len(method.attached) == len(LAYERS)


def attached(model):
    MemAOP(0.3).attach(model)
    return model


def test_the_last_method_that_is_attached_counts():
    model, other = net(), net()
    TopK(0.1).attach(model)
    Dithered().attach(model)
    Dithered().attach(other)
    assert_equal(steps(model, 2), steps(other, 2))


# ---- reports


def test_a_report_is_of_the_passes_since_the_last():
    passes = Passes("linear", TopK(0.4))
    empty = {"values": 0, "gradient_sparsity": 0.0, "ms": 0.0, "angle": None, "clipped": 0.0}
    assert passes.method.report() == {"0": empty}
    for n in (18, 7):
        passes.step(passes.gradient()[:n], passes.x[:n])
    row = passes.method.report()["0"]
    assert row["values"] == 25 * 5
    assert row["gradient_sparsity"] == pytest.approx(0.6)
    assert row["ms"] > 0 and row["angle"] is None and row["clipped"] == 0
    assert passes.method.report() == {"0": empty}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [Dithered, TopK, ReSprop])
def test_the_angle_is_that_between_used_and_exact_gradient(method, kind, kernel):
    passes = Passes(kind, method(angles=True), identity=True)
    plain = Passes(kind, method(), identity=True)
    angles = []
    for t in range(4):
        dy = passes.gradient(t)
        if method is ReSprop and t:
            passes.state["threshold"] = plain.state["threshold"] = 1.0
        used = passes.step(dy)[0]
        np.testing.assert_array_equal(used, plain.step(dy)[0])
        a, b = (v.astype(np.float64).reshape(-1) for v in (used, dy))
        if method is not ReSprop or t:  # the first step is exact, and not measured
            angles.append(np.degrees(np.arccos(a @ b / np.sqrt((a @ a) * (b @ b)))))
    assert passes.method.report()["0"]["angle"] == pytest.approx(np.mean(angles), abs=1e-3)
    assert 5 < np.mean(angles) < 85
    assert plain.method.report()["0"]["angle"] is None


def test_no_angle_of_a_gradient_of_zero():
    passes = Passes("linear", TopK(angles=True))
    passes.step(0 * passes.gradient())
    assert passes.method.report()["0"]["angle"] is None


def test_an_epoch_counts_its_steps():
    passes = Passes("linear", TopK())
    for t in range(2):
        passes.step(passes.gradient(t))
    assert (passes.layer.epoch, passes.layer.step, passes.layer.steps) == (0, 2, None)
    passes.method.begin_epoch(4, 10)
    passes.step(passes.gradient())
    assert (passes.layer.epoch, passes.layer.step, passes.layer.steps, passes.layer.passes) == (4, 1, 10, 3)


# ---- state


@methods
def test_a_run_goes_on_from_its_state(name):
    model, other = net(0.5, np.float32), net(0.5, np.float32)
    method, again = METHODS[name]().attach(model), METHODS[name]().attach(other)
    steps(model, 3, dtype=np.float32)
    steps(other, 1, first=9, dtype=np.float32)  # what it has is replaced
    state = {key: np.array(value)[()] for key, value in method.state_dict().items()}
    assert all(isinstance(value, (np.ndarray, np.generic)) for value in state.values())
    again.load_state_dict(state)
    for both in (method, again):
        both.begin_epoch(1)
    assert_equal(steps(model, 3, 3, np.float32), steps(other, 3, 3, np.float32))


def test_a_state_of_another_model_changes_nothing():
    passes = Passes("linear", MemAOP(0.3))
    passes.step(passes.gradient())
    before = dict(passes.state)
    with pytest.raises(KeyError, match="the state has '3.body.0/passes', the method is used in the layers 0"):
        passes.method.load_state_dict({"0/passes": 5, "3.body.0/passes": 2})
    assert passes.layer.passes == 1 and list(passes.state) == list(before)


def test_the_state_of_a_model_that_is_a_layer():
    layer = nn.Linear(6, 5)
    method = Dithered(sparsity=0.9).attach(layer)
    layer(np.ones((18, 6), np.float32))
    layer.backward(np.random.default_rng(0).standard_normal((18, 5)).astype(np.float32))
    other = Dithered(sparsity=0.9).attach(nn.Linear(6, 5))
    other.load_state_dict(method.state_dict())
    np.testing.assert_equal(other.state_dict(), method.state_dict())
    assert set(other.state_dict()) == {"/passes", "/density", "/report", "/state.s"}


def test_a_state_is_a_copy():
    p, other = Passes("linear", MemAOP(0.1)), Passes("linear", MemAOP(0.1))
    p.step(p.gradient())
    state = p.method.state_dict()
    before = {key: np.array(value) for key, value in state.items()}
    other.method.load_state_dict(state)
    p.step(p.gradient(1))
    other.step(other.gradient(2))
    for key, value in state.items():
        np.testing.assert_array_equal(value, before[key])


def test_detaching_an_older_method_leaves_the_newer():
    model = nn.Sequential(nn.Linear(2, 2))
    older = TopK().attach(model)
    newer = Dithered().attach(model)
    older.detach()
    assert model[0].backprop is newer.attached[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: MemAOP(memory="no"),
        lambda: ReSprop(warmup="no"),
        lambda: Dithered(angles="no"),
        lambda: TopK(layers=["0"]),
        lambda: TopK(layers={"0": 3}),
        lambda: TopK(exclude=3),
        lambda: TopK(exclude=[3]),
    ],
)
def test_arguments_of_a_wrong_type(make):
    with pytest.raises(TypeError):
        make()


def test_numpy_numbers_are_python_numbers():
    method = Dithered(s=np.float32(1.5), seed=np.int64(3), angles=np.bool_(True), layers={"0": {"s": np.float32(2)}})
    assert json.loads(json.dumps([method.s, method.seed, method.angles, method.layers])) == [
        1.5, 3, True, {"0": {"s": 2.0}}
    ]  # fmt: skip


@pytest.mark.parametrize("step", [0.0, -1.0, np.nan, np.inf])
def test_a_step_of_dither_that_is_none(step):
    with pytest.raises(ValueError, match=f"step is {step}, must be above 0 and finite"):
        dither(step, 0)


@pytest.mark.parametrize("thresholds", [-1.0, np.nan])
def test_a_threshold_that_is_none(thresholds):
    with pytest.raises(ValueError, match=f"thresholds is {thresholds}, must be 0 or more"):
        above(thresholds)


def test_neighbouring_seeds_dither_alike_no_two_images():
    """A value of a half between two steps goes up for half of the images, and for others with each seed."""
    x, weight = arrays.pack(np.ones((64, 4), np.float32)), nn.Linear(4, 4).weight
    dy = arrays.pack(np.full((64, 4), 0.5, np.float32))
    up = []
    for seed in range(4):
        used, _ = sparse_gradient.written_out(x, weight, plans.Geometry(), dy, dither(1.0, seed))
        up.append(arrays.unpack(used) > 0)
    for a, b in itertools.combinations(up, 2):
        for shift in (0, 1, 2):
            assert 0.3 < np.mean(np.roll(a, shift, axis=0) == b) < 0.7


class Halved(Method):
    """Every second image, as an array of its own."""

    def select(self, layer, x, geometry, dy):
        used = dy.like()
        used.array[...] = dy.array
        used.array[..., ::2] = 0
        return used


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_may_return_an_array(kind, kernel):
    p = Passes(kind, Halved(angles=True))
    dy = p.gradient()
    used = dy.copy()
    used[::2] = 0
    p.check(p.step(dy), used, dy)
    assert 30 < p.method.report()["0"]["angle"] < 60
