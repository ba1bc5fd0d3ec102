"""RigL's look at the gradients of weights that are not stored: the largest of the dense gradient, in little memory."""

import tracemalloc

import numpy as np
import pytest

import sparsetrain as st
from sparsetrain import nn, ops
from sparsetrain.backprop import Dithered
from sparsetrain.sparsity import RigL
from sparsetrain.sparsity.method import Layer
from sparsetrain.sparsity.probe import Probe

CONVOLUTIONS = {
    "plain": {},
    "padding": {"padding": 1},
    "stride": {"stride": 2, "padding": (1, 0)},
    "dilation": {"dilation": (2, 1), "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "stride": 2},
    "1x1": {"kernel_size": 1},
    "all": {"stride": (2, 1), "dilation": (1, 2), "padding": 2, "groups": 2, "bias": False},
}


def conv(**settings):
    return nn.Conv2d(4, 8, **({"kernel_size": 3} | settings))


def exact(layer, x, dy):
    """The gradient of all weights of the layer, in float64."""
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        other = nn.Linear(layer.in_features, layer.out_features)
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        other = nn.Conv2d(*(getattr(layer, name) for name in names))
    other.to(np.float64)
    other.weight.data[...] = weight.to_dense()
    other(x.astype(np.float64))
    other.backward(dy.astype(np.float64), input_gradient=False)
    return other.weight.grad


def assert_best(probe, weight, gradient, count, rtol):
    """The probe found `count` different weights that are not stored, with their gradients, and none is larger."""
    assert probe.magnitudes.dtype == weight.data.dtype
    places, magnitudes = probe.places, abs(gradient.reshape(-1))
    assert len(places) == len(set(places.tolist())) == len(probe.magnitudes) == count
    assert not np.isin(places, weight.places()).any()
    scale = magnitudes.max()
    np.testing.assert_allclose(probe.magnitudes, magnitudes[places], rtol=rtol, atol=rtol * scale)
    free = np.setdiff1d(np.arange(len(magnitudes)), weight.places())
    best = np.sort(magnitudes[free])[len(free) - count :]
    np.testing.assert_allclose(np.sort(magnitudes[places]), best, rtol=rtol, atol=rtol * scale)


def probed(layer, x, dy, count, keep):
    """The Probe of a layer after one step, and the layer's gradient."""
    model = nn.Sequential(layer)
    layer.weight.keep(np.random.default_rng(2).random(layer.weight.shape) < keep)
    named = Layer("0", layer)
    named.probe(count)
    model(x)
    model.backward(dy)
    found, layer.probe = layer.probe, None
    return found


@pytest.mark.parametrize("block", [1, 20, 100, None])
@pytest.mark.parametrize("keep", [0.1, 0.8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, dtype, keep, block, monkeypatch):
    if block:
        monkeypatch.setattr(Probe, "BLOCK", block)
    st.manual_seed(0)
    layer = conv(**CONVOLUTIONS[name]).to(dtype)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 4, 9, 8)).astype(dtype)
    dy = rng.standard_normal(layer(x).shape).astype(dtype)
    found = probed(layer, x, dy, 5, keep)
    assert_best(found, layer.weight, exact(layer, x, dy), 5, 1e-4 if dtype == np.float32 else 1e-10)


@pytest.mark.parametrize("block", [1, 50, 121, None])
@pytest.mark.parametrize("count", [1, 12, 200])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_linear(dtype, count, block, isa, monkeypatch):
    if block:
        monkeypatch.setattr(Probe, "BLOCK", block)
    st.manual_seed(0)
    layer = nn.Linear(40, 11).to(dtype)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((18, 40)).astype(dtype), rng.standard_normal((18, 11)).astype(dtype)
    found = probed(layer, x, dy, count, 0.4)
    assert_best(found, layer.weight, exact(layer, x, dy), count, 1e-4 if dtype == np.float32 else 1e-10)


@pytest.mark.parametrize("block", [1, 50, None])
def test_ties_are_the_first_whatever_the_blocks(block, monkeypatch):
    if block:
        monkeypatch.setattr(Probe, "BLOCK", block)
    layer = nn.Linear(10, 8)
    found = probed(layer, np.ones((3, 10), np.float32), np.ones((3, 8), np.float32), 7, 0.3)
    free = np.setdiff1d(np.arange(80), layer.weight.places())
    assert found.places.tolist() == free[:7].tolist() and (found.magnitudes == 3).all()


@pytest.mark.parametrize("layer", [lambda: nn.Linear(36, 8), lambda: conv(padding=1, groups=2)])
def test_the_same_bits_for_any_number_of_threads(layer):
    rng, found = np.random.default_rng(0), []
    x = rng.standard_normal((40, 36) if isinstance(layer(), nn.Linear) else (40, 4, 8, 8)).astype(np.float32)
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        st.manual_seed(0)
        fresh = layer()
        found.append(probed(fresh, x, np.ascontiguousarray(fresh(x)), 9, 0.3))
    for other in found[1:]:
        np.testing.assert_array_equal(other.places, found[0].places)
        np.testing.assert_array_equal(other.magnitudes, found[0].magnitudes)


def test_the_relu_that_follows_is_taken_into_account():
    st.manual_seed(0)
    layer = nn.Linear(12, 9).to(np.float64)
    layer.weight.keep(np.random.default_rng(2).random((9, 12)) < 0.4)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((6, 12)), rng.standard_normal((6, 9))
    open_ = layer(x) > 0
    assert 0.2 < open_.mean() < 0.8
    model = nn.Sequential(layer, nn.ReLU())
    Layer("0", layer).probe(6)
    model(x)
    model.backward(dy)
    assert_best(layer.probe, layer.weight, exact(layer, x, dy * open_), 6, 1e-10)


# ---- within nets


def normed_net():
    """Convolutions with batch norms that run as one step, one behind the other and around a shortcut."""
    st.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Residual(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
            )
        ),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def dense_gradients(model, x, dy):
    """{layer: gradient of all weights} of a copy that stores them all, in float64, layer by layer."""
    other = normed_net().to(np.float64)
    state = {name: v.astype(np.float64) if v.dtype.kind == "f" else v for name, v in model.state_dict().items()}
    other.load_state_dict(state)
    with nn.unfused():
        other(x.astype(np.float64))
        other.backward(dy.astype(np.float64))
    return {name: parameter.grad for name, parameter in other.named_parameters()}


def one_pass(model, x, dy):
    buffers = {name: buffer.copy() for name, buffer in model.named_buffers()}
    model.zero_grad()
    y = model(x)
    result = [y, model.backward(dy), *(p.grad.copy() for p in model.parameters())]
    result += [buffer.copy() for _, buffer in model.named_buffers()]
    for name, buffer in model.named_buffers():
        buffer[...] = buffers[name]
    return result


def test_behind_fused_batch_norms(monkeypatch):
    """The step with probes gives what the step without gives, to rounding, and the probes the dense gradients' best."""
    bands, fused = ops.conv2d_bands, []
    monkeypatch.setattr(ops, "conv2d_bands", lambda *args: fused.append(1) or bands(*args))
    model = normed_net()
    method = RigL(0.7, fraction=0.3, stop=10, every=1).attach(model)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((20, 3, 16, 16)).astype(np.float32), rng.standard_normal((20, 5)).astype(np.float32)
    plain = one_pass(model, x, dy)
    assert len(fused) >= 3
    wanted = dense_gradients(model, x, dy)
    method.step = 1
    method.begin_step()
    number = len(fused)
    looked = one_pass(model, x, dy)
    assert len(fused) == number + sum(method.count(la) == 0 for la in method.layers if la.name != "10")
    for ours, theirs in zip(looked, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * max(1e-3, abs(theirs).max()))
    for layer in method.layers:
        count = method.count(layer)
        if count:
            assert_best(layer.module.probe, layer.weight, wanted[layer.name + ".weight"], count, 1e-3)
    assert sum(method.count(layer) > 0 for layer in method.layers) >= 4
    before = {layer.name: (layer.weight.to_dense(), layer.weight.nnz) for layer in method.layers}
    assert method.end_step()
    for layer in method.layers:
        dense, nnz = before[layer.name]
        now = layer.weight.to_dense()
        assert layer.module.probe is None and layer.weight.nnz == nnz
        np.testing.assert_array_equal(now[now != 0], dense[now != 0])
    number = len(fused)
    one_pass(model, x, dy)
    assert len(fused) >= number + 3


@pytest.mark.parametrize("precision", [None, 8])
def test_with_dithered_backprop(precision):
    """The probe takes the gradient that arrives, before it is rounded, and the inputs that the layer read."""
    st.manual_seed(0)
    layer = conv(padding=1)
    layer.weight.keep(np.random.default_rng(2).random(layer.weight.shape) < 0.3)
    model = nn.Sequential(layer)
    Dithered(s=1.0, precision=precision).attach(model)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((6, 4, 9, 8)).astype(np.float32), rng.standard_normal((6, 8, 9, 8)).astype(np.float32)
    Layer("0", layer).probe(9)
    model(x)
    model.backward(dy)
    found = layer.probe
    gradient = abs(exact(layer, x, dy)).reshape(-1)
    # Inputs in 256 levels between -4 and 4 have errors of about 0.01, of which a gradient sums 432.
    tolerance = 1e-3 if precision is None else 0.05 * np.sqrt(432)
    np.testing.assert_allclose(found.magnitudes, gradient[found.places], atol=tolerance)
    free = np.setdiff1d(np.arange(gradient.size), layer.weight.places())
    best = np.sort(gradient[free])[-9:]
    np.testing.assert_allclose(np.sort(gradient[found.places]), best, atol=tolerance)


# ---- errors and memory


def test_a_layer_that_runs_twice():
    st.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(6, 6), shared, nn.ReLU(), shared)
    method = RigL(0.5, stop=5, every=1, exclude=["0"]).attach(model)
    method.step = 1
    method.begin_step()
    x = np.ones((2, 6), np.float32)
    model(x)
    with pytest.raises(ValueError, match="layer 1 ran twice between begin_step.. and end_step"):
        model.backward(x)
    method.cancel_step()
    assert shared.probe is None
    model(x)
    model.backward(x)


def test_a_layer_without_a_backward_pass():
    st.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    method = RigL(0.5, stop=5, every=1).attach(model)
    method.step = 1
    method.begin_step()
    model(np.ones((2, 6), np.float32))
    before = model[0].weight.to_dense()
    with pytest.raises(ValueError, match="layer 0 has seen no backward pass since begin_step"):
        method.end_step()
    np.testing.assert_array_equal(model[0].weight.to_dense(), before)


def test_nothing_is_probed_where_nothing_is_due():
    model = nn.Sequential(nn.Linear(20, 20))
    method = RigL(0.5, stop=7, every=3).attach(model)
    x = np.ones((2, 20), np.float32)
    for i in range(10):
        method.begin_step()
        assert (model[0].probe is not None) == (i in (3, 6))  # at 7 the fraction is 0
        model(x)
        model.backward(x)
        assert bool(method.end_step()) == (i in (3, 6, 7))
        assert model[0].probe is None


def test_no_array_of_the_dense_weights_size(monkeypatch):
    """2000 x 2000 weights, 1 % stored: all gradients would be 16 MB; what is there at any time is below 3 MB."""
    monkeypatch.setattr(Probe, "BLOCK", 20_000)
    layer = nn.Linear(2000, 2000, bias=False)
    rng = np.random.default_rng(0)
    layer.weight.keep(rng.random((2000, 2000)) < 0.01)
    model = nn.Sequential(layer)
    x = rng.standard_normal((4, 2000)).astype(np.float32)
    model(x)
    model.backward(x, input_gradient=False)
    Layer("0", layer).probe(12_000)
    model(x)
    tracemalloc.start()
    try:
        model.backward(x, input_gradient=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(layer.probe.places) == 12_000
    assert peak < 3e6
