"""nn.Sequential, nn.Residual, and what every Module has: names, state, no_grad, observe."""

import copy
import pickle

import numpy as np
import pytest

import sparsetrain as st
from nets import images, small_net
from sparsetrain import nn
from sparsetrain.sparse import SparseParameter

KEPT = ["running_mean", "running_var", "num_batches_tracked"]
NAMES = [
    f"{layer}.{name}"
    for layer, names in {
        "0": ["weight", "bias"],
        "1": ["weight", "bias", *KEPT],
        "4.body.0": ["weight"],
        "4.body.1": ["weight", "bias", *KEPT],
        "4.body.3": ["weight"],
        "4.body.4": ["weight", "bias", *KEPT],
        "6.body.0": ["weight"],
        "6.body.1": ["weight", "bias", *KEPT],
        "6.shortcut": ["weight", "bias"],
        "10": ["weight", "bias"],
        "11": ["weight", "bias", *KEPT],
        "13": ["weight", "bias"],
    }.items()
    for name in names
]
LEAVES = [
    *("0", "1", "2", "3"),
    *(f"4.body.{i}" for i in range(5)),
    *("5", "6.body.0", "6.body.1", "6.shortcut"),
    *("7", "8", "9", "10", "11", "12", "13"),
]


@pytest.fixture
def net():
    st.manual_seed(0)
    return small_net()


def same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype, name
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


def test_sequential_is_its_layers_one_after_the_other():
    layers = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)
    model = nn.Sequential(*layers)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((17, c)).astype(np.float32) for c in (6, 4))
    y, dx = model(x), model.backward(dy)
    gradients = [p.grad.copy() for p in model.parameters()]
    model.zero_grad()
    expected_y, expected_dx = x, dy
    for layer in layers:
        expected_y = layer(expected_y)
    for layer in reversed(layers):
        expected_dx = layer.backward(expected_dx)
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(dx, expected_dx)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        np.testing.assert_array_equal(gradient, parameter.grad)


def test_empty_sequential_is_the_identity():
    x = np.random.default_rng(0).standard_normal((3, 2, 4, 4)).astype(np.float32)
    model = nn.Sequential()
    np.testing.assert_array_equal(model(x), x)
    np.testing.assert_array_equal(model.backward(x), x)


@pytest.mark.parametrize("with_shortcut", [False, True])
def test_residual_adds(with_shortcut, isa):
    body = nn.Conv2d(3, 3, 3, padding=1)
    shortcut = nn.Conv2d(3, 3, 1) if with_shortcut else None
    model = nn.Residual(body, shortcut)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 17, 3, 5, 5)).astype(np.float32)
    y, dx = model(x), model.backward(dy)
    expected = body(x) + (shortcut(x) if shortcut else x)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    expected = body.backward(dy) + (shortcut.backward(dy) if shortcut else dy)
    np.testing.assert_allclose(dx, expected, rtol=1e-6, atol=1e-6)


def test_relu_after_a_residual_leaves_its_input_alone(isa):
    """What a ReLU does in place must not reach the shortcut, which is the same array."""
    layer = nn.Conv2d(2, 2, 1, bias=False)
    layer.weight.data[...] = np.eye(2).reshape(2, 2, 1, 1)
    model = nn.Sequential(nn.Residual(nn.Sequential(nn.ReLU(), layer)), nn.ReLU())
    x = np.array([-2.0, 3.0], np.float32).reshape(1, 2, 1, 1)
    assert model(x).ravel().tolist() == [0, 6]
    assert model.backward(np.ones_like(x)).ravel().tolist() == [0, 2]


def test_residual_needs_equal_shapes():
    model = nn.Residual(nn.Conv2d(3, 4, 3, padding=1))
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b3\b)(?=.*\b4\b)"):
        model(np.zeros((2, 3, 5, 5), np.float32))


def test_a_container_takes_modules_only():
    for make in (lambda: nn.Sequential(nn.ReLU(), np.tanh), lambda: nn.Residual("body")):
        with pytest.raises(TypeError, match="tanh|ufunc|str|body"):
            make()


def test_names_are_pytorch_names(net):
    assert sorted(net.state_dict()) == sorted(NAMES)
    parameters = [name for name in NAMES if name.endswith((".weight", ".bias"))]
    assert [name for name, _ in net.named_parameters()] == parameters
    assert [name for name, _ in net.named_buffers()] == [n for n in NAMES if n not in parameters]
    pairs = zip(net.parameters(), net.named_parameters(), strict=True)
    assert all(parameter is named for parameter, (_, named) in pairs)
    modules = dict(net.named_modules())
    assert set(LEAVES) < set(modules) and modules["4.body.1"].weight.shape == (4,)


def test_a_layer_used_twice_has_its_parameters_once():
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias"]
    assert len(list(net.parameters())) == 2


def test_what_is_used_twice_has_its_first_name():
    shared = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    tied = nn.Linear(3, 3)
    tied.weight = shared[0].weight
    net = nn.Sequential(shared, shared, tied)
    assert [name for name, _ in net.named_modules()] == ["", "0", "0.0", "0.1", "2"]
    assert [name for name, _ in net.named_parameters()] == ["0.0.weight", "0.0.bias", "2.bias"]


def test_train_and_eval_reach_every_layer(net):
    assert net.training
    assert net.eval() is net and not any(m.training for _, m in net.named_modules())
    assert net.train() is net
    assert all(m.training for _, m in net.named_modules())


def test_state_dict_is_a_copy(net):
    state = net.state_dict()
    for values in state.values():
        values[...] = 7
    assert not (net.state_dict()["0.weight"] == 7).any()


def test_state_round_trip(net):
    x, _ = images()
    net(x)
    other = small_net()
    other.load_state_dict(net.state_dict())
    same_state(other.state_dict(), net.state_dict())
    net.eval()
    other.eval()
    np.testing.assert_array_equal(other(x), net(x))


def test_state_round_trip_of_a_sparse_net(net):
    st.sparsify(net, 0.8)
    state = net.state_dict()
    assert state["0.weight"].shape == (4, 3, 3, 3)
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        parameter.data[...] = 0
    other.load_state_dict(state)
    same_state(other.state_dict(), state)
    assert isinstance(dict(other.named_parameters())["0.weight"], SparseParameter)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("4.body.3.weight"), "4.body.3.weight"),
        (lambda s: s.update(extra=np.zeros(3, np.float32)), "extra"),
        (lambda s: s.update({"0.weight": np.zeros((4, 3, 3, 2), np.float32)}), "0.weight"),
        (lambda s: s.update({"13.bias": np.zeros(4, np.float32)}), "13.bias"),
        (lambda s: s.update({"11.running_var": np.zeros(8, np.float32)}), "11.running_var"),
        (lambda s: s.update({"13.bias": np.zeros(5)}), "13.bias"),
        (lambda s: s.update({"13.bias": [0.0] * 5}), "13.bias"),
    ],
    ids=["missing", "unexpected", "shape", "last", "buffer", "dtype", "list"],
)
@pytest.mark.parametrize("sparsity", [0, 0.8])
def test_state_that_does_not_fit_changes_nothing(net, sparsity, change, match):
    if sparsity:
        st.sparsify(net, sparsity)
    before, state = net.state_dict(), small_net().state_dict()
    if sparsity:
        state = {name: np.where(before[name] == 0, 0, v) for name, v in state.items()}
        state = {name: v.astype(before[name].dtype) for name, v in state.items()}
    change(state)
    with pytest.raises((ValueError, KeyError, TypeError), match=match):
        net.load_state_dict(state)
    same_state(net.state_dict(), before)


def test_zero_grad(net):
    x, _ = images()
    net.backward(net(x))
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_no_grad_keeps_nothing(net):
    x, _ = images()
    net.eval()
    with nn.no_grad():
        y = net(x)
    with pytest.raises((RuntimeError, ValueError), match="no_grad|forward|backward"):
        net.backward(y)
    np.testing.assert_array_equal(net(x), y)
    net.backward(y)


def test_no_grad_ends_after_an_error(net):
    with pytest.raises(ZeroDivisionError), nn.no_grad():
        raise ZeroDivisionError
    net.backward(net(images()[0]))


def test_without_input_gradient(net):
    other = copy.deepcopy(net)
    x, _ = images()
    y = net(x)
    other(x)
    assert net.backward(y, input_gradient=False) is None
    assert other.backward(y).shape == x.shape
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(p.grad, q.grad)


def test_observe_sees_every_layer_forward_and_backward(net):
    x, _ = images(n=17)
    seen = []

    def callback(name, module, phase, seconds, y):
        assert module is modules[name] and 0 <= seconds < 10
        if y is not None:
            assert y.n == 17 and y.array.ndim == 5 and y.array.shape[::4] == (2, 16)
        seen.append((name, phase))

    modules = dict(net.named_modules())
    with nn.observe(net, callback):
        net.backward(net(x))
    net.backward(net(x))  # no longer observed
    fused = {name for name in LEAVES if isinstance(modules[name], nn.ReLU)}
    forward = [name for name, phase in seen if phase == "forward"]
    backward = [name for name, phase in seen if phase == "backward"]
    # body and shortcut may run in any order, and a ReLU inside the batch norm before it
    assert set(LEAVES) - fused <= set(forward) <= set(LEAVES)
    assert sorted(forward) == sorted(set(forward))
    assert sorted(backward) == sorted(forward)
    assert forward[0] == "0" and forward[-1] == "13"
    assert backward[0] == "13" and backward[-1] == "0"


def test_observe_sees_dx_of_a_layer_that_also_adds():
    body = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))
    net = nn.Sequential(nn.Residual(body), nn.ReLU())
    seen = {}

    def callback(name, module, phase, seconds, y):
        seen[name, phase] = y.shape

    x = np.random.default_rng(0).standard_normal((3, 2, 4, 4)).astype(np.float32)
    with nn.observe(net, callback):
        net.backward(net(x))
    assert seen["0.body.1", "backward"] == x.shape


def test_observe_shows_outputs(net):
    x, _ = images()
    seen = {}

    def callback(name, module, phase, seconds, y):
        seen[name, phase] = y.array.copy()

    with nn.observe(net, callback):
        y = net(x)
        net.backward(y)
    np.testing.assert_array_equal(seen["13", "forward"][0, :, 0, 0, :6], y.T)
    assert seen["0", "forward"].shape[:4] == (1, 4, 8, 8)


def test_an_error_names_the_layer(net):
    with pytest.raises(ValueError, match=r"\b4\b") as error:
        net(np.zeros((2, 4, 8, 8), np.float32))
    assert "0" in str(error.value) or "Conv2d" in str(error.value)


def test_float64(net):
    x, _ = images(dtype=np.float64)
    as_float32 = net(x.astype(np.float32))
    double = small_net()
    double.load_state_dict(net.state_dict())
    double.to(np.float64)
    for name, values in double.state_dict().items():
        assert values.dtype == (np.int64 if "tracked" in name else np.float64), name
    with pytest.raises(TypeError, match="(?s)(?=.*float32)(?=.*float64)"):
        double(x.astype(np.float32))
    y = double(x)
    assert y.dtype == double.backward(y).dtype == np.float64
    np.testing.assert_allclose(y, as_float32, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float16])
def test_a_gradient_of_another_dtype_changes_nothing(net, dtype):
    y = net(images()[0])
    with pytest.raises(TypeError, match=f"dy has dtype {np.dtype(dtype)}.*float32"):
        net.backward(y.astype(dtype))
    assert all(p.grad is None for p in net.parameters())
    net.backward(y)


@pytest.mark.parametrize("sparsity", [0, 0.7])
def test_a_kept_gradient_stays(net, sparsity):
    """After zero_grad(): the memory of a gradient is used again only where nobody holds it."""
    if sparsity:
        st.sparsify(net, sparsity)
    x, _ = images()
    net.backward(net(x))
    kept = {name: p.grad for name, p in net.named_parameters()}
    rows = {name: p.grad[:1] for name, p in net.named_parameters()}
    expected = {name: grad.copy() for name, grad in kept.items()}
    for i in range(2):
        if i:
            kept = dict.fromkeys(kept)  # the views still hold the memory
        net.zero_grad()
        net.backward(2 * net(x))
        for name, grad in (rows if i else kept).items():
            np.testing.assert_array_equal(grad, expected[name][:1] if i else expected[name])
    del rows
    memory = [p.grad.ctypes.data for p in net.parameters()]
    net.zero_grad()
    net.backward(net(x))
    assert [p.grad.ctypes.data for p in net.parameters()] == memory


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_not_run(net, copied):
    x, _ = images()
    y = net(x)
    other = copied(net)
    with pytest.raises(ValueError, match="call"):
        other.backward(y)
    net.backward(y)
    assert all(p.grad is None for p in other.parameters())
    np.testing.assert_array_equal(other.eval()(x), net.eval()(x))


def test_a_deepcopy_shares_what_says_which_weights_are_stored(net):
    assert copy.deepcopy(net)[0].weight.structure is net[0].weight.structure


def test_deepcopy_is_independent(net):
    x, _ = images()
    net.backward(net(x))
    other = copy.deepcopy(net)
    before = net.state_dict()
    for parameter in other.parameters():
        parameter.data[...] += 1
    other(x)
    same_state(net.state_dict(), before)


@pytest.mark.parametrize("sparsity", [0, 0.7])
def test_same_seed_and_any_thread_count_give_the_same_bits(sparsity, isa, same_bits):
    x, labels = images(n=33)

    def run():
        model = nn.Sequential(nn.Dropout(0.2), small_net(width=6))
        if sparsity:
            st.sparsify(model, sparsity, method="random")
        optimizer = st.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        results = []
        for _ in range(3):
            optimizer.zero_grad()
            y = model(x)
            loss, dy = nn.cross_entropy(y, labels)
            results += [y, np.array(loss), model.backward(dy)]
            results += [p.grad.copy() for p in model.parameters()]
            optimizer.step()
        return results + list(model.state_dict().values())

    same_bits(run)


@pytest.mark.parametrize("sizes", [(33, 17), (1, 16), (17, 33)])
def test_a_batch_of_another_size_leaves_no_trace(net, sizes):
    other = copy.deepcopy(net)
    net.eval()
    other.eval()
    for size in sizes:
        x, _ = images(n=size, seed=size)
        y = net(x)
        dx = net.backward(y)
    net.zero_grad()
    x, _ = images(n=sizes[-1], seed=sizes[-1])
    np.testing.assert_array_equal(other(x), y)
    np.testing.assert_array_equal(other.backward(y), dx)


def test_each_image_is_alone_in_evaluation(net):
    """No image sees another: alone, each gives what it gives in the batch, whatever its lane."""
    x, _ = images(n=17)
    net.eval()
    together = net(x)
    for i in range(17):
        np.testing.assert_allclose(net(x[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-5)
