"""snip and grasp: against gradients and Hessians known otherwise, and what they leave behind."""

import numpy as np
import pytest

import sparsetrain as st
from nets import images, small_net
from sparsetrain import nn, sparsify
from sparsetrain.sparse import SparseParameter
from sparsetrain.sparsity import scores

METHODS = ["snip", "grasp"]


def linear(inputs, outputs, seed=0):
    st.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, outputs)).to(np.float64)


def summed(y, gradient):
    """A loss with a known gradient by the outputs."""
    return float((y * gradient).sum()), np.ascontiguousarray(gradient)


def batches(number=2, n=6, inputs=5, classes=3, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, inputs)).astype(dtype), rng.integers(0, classes, n)) for _ in range(number)]


def scored(method, model, data, **settings):
    """[the scores of each weight of more than one dimension]."""
    weights = [p for p in model.parameters() if len(p.shape) > 1]
    score = getattr(scores, method)(model, weights, data, **settings)
    return [score(weight) for weight in weights]


def gradients(model, data, temperature=1.0):
    """The weights' gradients, summed over the batches, of cross-entropy of the outputs divided by the temperature."""
    model.zero_grad()
    for x, y in data:
        _, dy = nn.cross_entropy(model(x) / temperature, y)
        model.backward(dy / temperature)
    found = [p.grad.copy() for p in model.parameters() if len(p.shape) > 1]
    model.zero_grad()
    return found


# ---- snip


def test_snip_of_known_gradients():
    """The gradient of the loss is G, so the scores are |G w|; the largest four of eight stay."""
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].weight.data[...] = [[1, -2, 3, 4], [5, 0, -7, 8]]
    gradient = np.array([[8, 1, -1, 0.5], [-0.1, 9, 2, -2]], np.float32)
    data = [(np.eye(4, dtype=np.float32), np.ascontiguousarray(gradient.T))]
    (found,) = scored("snip", model, data, loss=summed)
    np.testing.assert_allclose(found, [[8, 2, 3, 2], [0.5, 0, 14, 16]], rtol=1e-6)
    sparsify(model, 0.5, "snip", batches=data, loss=summed)
    assert model[0].weight.to_dense().tolist() == [[1, 0, 3, 0], [0, 0, -7, 8]]


def test_snip_sums_the_gradients_of_the_batches():
    """Their sum, not that of their magnitudes: opposite ones cancel."""
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].weight.data[...] = [[1, 1]]
    x = np.eye(2, dtype=np.float32)
    data = [(x, np.array([[3], [1]], np.float32)), (x, np.array([[-3], [1]], np.float32))]
    np.testing.assert_allclose(scored("snip", model, data, loss=summed)[0], [[0, 2]])


def test_snip_of_cross_entropy():
    model, data = linear(5, 3), batches()
    (gradient,) = gradients(model, data)
    (found,) = scored("snip", model, data)
    np.testing.assert_allclose(found, abs(gradient * model[0].weight.data), rtol=1e-12)


def test_snip_keeps_the_best_of_all_layers():
    st.manual_seed(0)
    model = small_net(width=6).to(np.float64)
    x, y = images(8, np.float64)
    found = np.concatenate([f.reshape(-1) for f in scored("snip", model, [(x, y)])])
    sparsify(model, 0.7, "snip", "global", batches=[(x, y)])
    kept = np.concatenate([p.mask.reshape(-1) for p in model.parameters() if len(p.shape) > 1])
    assert abs(kept.sum() - 0.3 * len(kept)) <= 1
    assert found[kept].min() >= found[~kept].max()


# ---- grasp


def hessian_times(model, data, direction, temperature=1.0, h=1e-5):
    """H d by central differences of the gradient, in float64."""
    weights = [p for p in model.parameters() if len(p.shape) > 1]
    before, sides = [w.data.copy() for w in weights], []
    for sign in (1, -1):
        for w, values, d in zip(weights, before, direction, strict=True):
            w.data[...] = values + sign * h * d
        sides.append(gradients(model, data, temperature))
    for w, values in zip(weights, before, strict=True):
        w.data[...] = values
    return [(a - b) / (2 * h) for a, b in zip(*sides, strict=True)]


def assert_proportional(found, wanted, tolerance):
    """Up to a positive factor, which changes no order."""
    found, wanted = (np.concatenate([a.reshape(-1) for a in arrays]) for arrays in (found, wanted))
    found, wanted = found / np.linalg.norm(found), wanted / np.linalg.norm(wanted)
    assert np.linalg.norm(found - wanted) < tolerance


def test_grasp_of_a_quadratic():
    """The mean square of x W^T - t has the Hessian x^T x in each row, so H g is known without differences."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=False)).to(np.float64)
    x, t = rng.standard_normal((10, 6)), rng.standard_normal((10, 3))
    w = model[0].weight.data
    gradient = 2 / t.size * (x @ w.T / 1 - t).T @ x
    wanted = w * (2 / t.size * gradient @ x.T @ x)
    assert_proportional(scored("grasp", model, [(x, t)], loss=nn.mse_loss, temperature=1.0), [wanted], 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_of_softmax_regression(temperature):
    model, data = linear(5, 3), batches()
    product = hessian_times(model, data, gradients(model, data, temperature), temperature, h=1e-3)
    wanted = [model[0].weight.data * p for p in product]
    assert_proportional(scored("grasp", model, data, temperature=temperature), wanted, 0.02)


@pytest.mark.parametrize("kept", [1.0, 0.7, 0.2])
def test_grasp_of_a_net(kept):
    """Steps are small enough here to meet no kink of the ReLU. Of sparse weights those stored have scores."""
    st.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3)).to(np.float64)
    data = batches(n=40)
    if kept < 1:
        sparsify(model, 1 - kept)
    product = hessian_times(model, data, gradients(model, data, 200.0), 200.0, h=1e-4)
    wanted = [p.data * h for p, h in zip((model[0].weight, model[2].weight), product, strict=True)]
    found = scored("grasp", model, data, reach=1e-6)
    assert [f.shape for f in found] == [model[0].weight.data.shape, model[2].weight.data.shape]
    assert_proportional(found, wanted, 1e-4)


def test_grasp_in_float32_is_near_that_in_float64():
    st.manual_seed(0)
    model = small_net(width=6)
    x, y = images(16)
    single = scored("grasp", model, [(x, y)])
    double = scored("grasp", model.to(np.float64), [(x.astype(np.float64), y)])
    assert_proportional(single, double, 0.05)


def test_grasp_keeps_the_largest():
    model, data = linear(5, 3), batches()
    (found,) = scored("grasp", model, data)
    sparsify(model, 0.6, "grasp", batches=data)
    mask = model[0].weight.mask
    assert mask.sum() == 6 and found[mask].min() >= found[~mask].max()


def test_grasp_without_a_gradient():
    """A model that is at its optimum has no scores, but keeps the right number of weights."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    x = np.eye(4, dtype=np.float32)
    target = model(x)
    sparsify(model, 0.5, "grasp", batches=[(x, target)], loss=nn.mse_loss)
    assert model[0].weight.nnz == 4


# ---- what they leave behind


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was(method, training):
    """Weights, buffers and modes; there are no gradients left; and the batches may be of any sizes."""
    st.manual_seed(0)
    model = small_net(width=6).train(training)
    model[4].eval()
    modes = [module.training for _, module in model.named_modules()]
    before = model.state_dict()
    x, y = images(9)
    scored(method, model, [(x, y), (x[:4], y[:4])])
    assert [module.training for _, module in model.named_modules()] == modes
    assert all(p.grad is None and not p.slots for p in model.parameters())
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_as_it_was_after_an_error(method):
    """A wrong batch behind a right one."""
    st.manual_seed(0)
    model = small_net(width=6).eval()
    before = model.state_dict()
    x, y = images(9)
    with pytest.raises(ValueError, match="layer '0'"):
        sparsify(model, 0.5, method, batches=[(x, y), (x[:, :2], y)])
    assert not any(module.training for _, module in model.named_modules())
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert not any(isinstance(p, SparseParameter) for p in model.parameters())


def test_an_error_in_the_second_pass_of_grasp():
    """The weights are back although they were moved."""
    model, data, calls = linear(5, 3), batches(1), []
    before = model.state_dict()

    def loss(y, labels):
        calls.append(model[0].weight.data.copy())
        if len(calls) == 2:
            raise RuntimeError("no")
        return nn.cross_entropy(y, labels)

    with pytest.raises(RuntimeError, match="no"):
        sparsify(model, 0.5, "grasp", batches=data, loss=loss)
    assert (calls[1] != calls[0]).any()
    np.testing.assert_array_equal(model[0].weight.data, before["0.weight"])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_the_batches_are_used(method):
    """Batch norms run in training mode, whatever the model's mode: scores do not depend on running statistics."""
    st.manual_seed(0)
    model = small_net(width=6).to(np.float64).eval()
    x, y = images(9, np.float64)
    first = scored(method, model, [(x, y)])
    for _, buffer in model.named_buffers():
        if buffer.dtype == np.float64:
            buffer += 3
    for a, b in zip(first, scored(method, model, [(x, y)]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
@pytest.mark.parametrize("method", METHODS)
def test_number_of_weights(method, distribution):
    st.manual_seed(0)
    model = small_net(width=6)
    for sparsity in (0.5, 0.9):
        sparsify(model, sparsity, method, distribution, exclude=["0"], batches=[images(8)])
        sizes = [(p.nnz, np.prod(p.shape)) for p in model.parameters()[1:] if len(p.shape) > 1]
        kept, total = (sum(numbers) for numbers in zip(*sizes, strict=True))
        assert abs(kept - (1 - sparsity) * total) <= (len(sizes) if distribution == "uniform" else 1)
    assert model[0].weight.structure.dense


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "snip"}, "method 'snip' needs batches, a list of"),
        ({"method": "grasp"}, "method 'grasp' needs batches"),
        ({"method": "snip", "batches": []}, "batches is empty, must hold at least one"),
        ({"method": "grasp", "batches": iter([])}, "batches is empty"),
        ({"batches": [images()]}, "batches and loss are for snip and grasp, method is 'magnitude'"),
        ({"method": "random", "batches": []}, "batches and loss are for snip and grasp, method is 'random'"),
        ({"loss": nn.mse_loss}, "batches and loss are for snip and grasp, method is 'magnitude'"),
    ],
)
def test_errors(settings, match):
    model = small_net()
    with pytest.raises(ValueError, match=match):
        sparsify(model, 0.5, **settings)
    assert not any(isinstance(p, SparseParameter) for p in model.parameters())


def test_grasp_with_dropout():
    """The scores are those of one choice of units: with the same seed they agree with H g of that choice."""
    st.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.Dropout(0.5), nn.Linear(20, 3)).to(np.float64)
    (x, y), *_ = batches(n=40)

    def seeded(temperature_gradients):
        st.manual_seed(7)
        return temperature_gradients()

    weights = [model[0].weight, model[2].weight]
    step = seeded(lambda: gradients(model, [(x, y)], 200.0))
    before, sides = [w.data.copy() for w in weights], []
    for sign in (1, -1):
        for w, values, d in zip(weights, before, step, strict=True):
            w.data[...] = values + sign * 1e-3 * d
        sides.append(seeded(lambda: gradients(model, [(x, y)], 200.0)))
    for w, values in zip(weights, before, strict=True):
        w.data[...] = values
    wanted = [w.data * (a - b) for w, a, b in zip(weights, *sides, strict=True)]
    assert_proportional(seeded(lambda: scored("grasp", model, [(x, y)])), wanted, 0.05)
