"""Convolutions between batch norms, run by bands: what they give is what the layers one by one give."""

import copy
import resource

import numpy as np
import pytest

import sparsetrain as st
from sparsetrain import arrays, nn, ops, winograd
from sparsetrain._kernels import core
from sparsetrain.nn import convnorm
from sparsetrain.record import record


def conv_norm(channels, out, kernel=3, **options):
    return [nn.Conv2d(channels, out, kernel, bias=False, **options), nn.BatchNorm2d(out)]


def block(channels, out=None, stride=1, **options):
    """A residual block; with a shortcut if `out` differs."""
    out = out or channels
    body = nn.Sequential(
        *conv_norm(channels, out, stride=stride, padding=1), nn.ReLU(), *conv_norm(out, out, padding=1, **options)
    )
    shortcut = nn.Sequential(*conv_norm(channels, out, 1, stride=stride)) if out != channels or stride > 1 else None
    return nn.Residual(body, shortcut)


NETS = {
    "plain": lambda: [*conv_norm(3, 8, padding=1), nn.ReLU(), *conv_norm(8, 5, padding=1), nn.ReLU()],
    "residual blocks": lambda: [*conv_norm(3, 8, padding=1), nn.ReLU(), block(8), nn.ReLU(), block(8), nn.ReLU()],
    "many residual blocks": lambda: [
        *conv_norm(3, 6, padding=1), nn.ReLU(), *(layer for _ in range(4) for layer in (block(6), nn.ReLU())),
    ],
    "residual blocks after a shortcut": lambda: [
        *conv_norm(3, 6, padding=1), nn.ReLU(), block(6, 8, 2), block(8), nn.ReLU(), block(8), nn.ReLU(), block(8),
    ],
    "shortcuts": lambda: [*conv_norm(3, 8, padding=1), nn.ReLU(), block(8, 12, 2), nn.ReLU(), block(12, 4), nn.ReLU()],
    "groups and dilation": lambda: [
        *conv_norm(3, 8, padding=2, dilation=2), nn.ReLU(), block(8, groups=2), nn.ReLU(),
    ],
    "no ReLU, wide stride": lambda: [*conv_norm(3, 6, 5, padding=(2, 3)), *conv_norm(6, 7, (1, 3), stride=(1, 2))],
    "rows that no output reads": lambda: [*conv_norm(3, 4, 2), nn.ReLU(), *conv_norm(4, 5, 2, stride=2), nn.ReLU()],
    "a pool reads the norm": lambda: [
        *conv_norm(3, 6, padding=1), nn.ReLU(), nn.MaxPool2d(2), *conv_norm(6, 6, padding=1),
    ],
    "a pool reads the norm, its windows overlap": lambda: [
        *conv_norm(3, 6, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *conv_norm(6, 6, padding=1),
    ],
    "a pool reads the sum of a residual block": lambda: [
        *conv_norm(3, 6, padding=1), nn.ReLU(), block(6), nn.ReLU(), nn.MaxPool2d(2), *conv_norm(6, 6, padding=1),
    ],
    "a pool and a sum read the norm": lambda: [
        *conv_norm(3, 6, padding=1), nn.ReLU(),
        nn.Residual(nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv_norm(6, 6, padding=1))), nn.ReLU(),
    ],
    "a pool at the end, no ReLU": lambda: [*conv_norm(3, 6, padding=1), nn.MaxPool2d(2)],
    "a body of one step": lambda: [
        *conv_norm(3, 6, padding=1), nn.ReLU(), nn.Residual(nn.Sequential(*conv_norm(6, 6, padding=1))), nn.ReLU(),
    ],
    "a body that reads the rows late": lambda: [
        *conv_norm(3, 6, padding=1), nn.ReLU(),
        nn.Residual(nn.Sequential(*conv_norm(6, 6, 1, padding=1), *conv_norm(6, 6))),
    ],
    "a body that reads the rows late, after residual blocks": lambda: [
        *conv_norm(3, 6, padding=1), nn.ReLU(), block(6), nn.ReLU(), block(6), nn.ReLU(),
        nn.Residual(nn.Sequential(*conv_norm(6, 6, 1, padding=1), *conv_norm(6, 6))),
    ],
    "as much padding as there are taps": lambda: [
        *conv_norm(3, 4, 3, padding=2), nn.ReLU(), *conv_norm(4, 5, 2, padding=1),
    ],
    "a residual at the end": lambda: [*conv_norm(3, 6, padding=1), nn.ReLU(), block(6)],
    "a body that begins with another layer": lambda: [
        *conv_norm(3, 6, padding=1), nn.ReLU(), nn.Residual(nn.Sequential(nn.ReLU(), *conv_norm(6, 6, padding=1))),
    ],
}  # fmt: skip


def net(name, sparsity=0.5):
    st.manual_seed(0)
    model = nn.Sequential(*NETS[name]()).to(np.float64)
    rng = np.random.default_rng(1)
    for _, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            for parameter in (module.weight, module.bias):
                parameter.data[:] = rng.standard_normal(module.num_features)
    return st.sparsify(model, sparsity) if sparsity else model


def step(model, n=19, size=21):
    """Output, dx, gradients and buffers of one call."""
    rng = np.random.default_rng(2)
    y = model(rng.standard_normal((n, 3, size, size - 2)))
    dx = model.backward(rng.standard_normal(y.shape))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [y, dx, *gradients, *(buffer for _, buffer in model.named_buffers())]


def same_step(fused, alone, **shape):
    """A step of the one is that of the other without fusing, to rounding."""
    got = step(fused, **shape)
    with nn.unfused():
        wanted = step(alone, **shape)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * max(1, np.abs(b).max()))


@pytest.fixture
def bands(monkeypatch):
    """How many convolutions have run by bands, forward and backward."""
    ran = {"forward": 0, "backward": 0}

    def counting(kind, function):
        def counted(*args, **options):
            ran[kind] += 1
            return function(*args, **options)

        return counted

    monkeypatch.setattr(convnorm.ops, "conv2d_bands", counting("forward", ops.conv2d_bands))
    monkeypatch.setattr(convnorm.ops, "conv2d_bands_backward", counting("backward", ops.conv2d_bands_backward))
    return ran


@pytest.mark.parametrize("sparsity", [0, 0.2, 0.5])
@pytest.mark.parametrize("name", NETS)
def test_is_what_the_layers_one_by_one_give(name, sparsity, isa, bands):
    fused = net(name, sparsity)
    alone = copy.deepcopy(fused)
    convolutions = sum(isinstance(module, nn.Conv2d) for _, module in fused.named_modules())
    for _ in range(2):  # gradients add up, running means move
        same_step(fused, alone)
    assert bands == {"forward": 2 * convolutions, "backward": 2 * convolutions}


@pytest.mark.parametrize("name", NETS)
def test_winograd_in_bands(name, isa, bands, monkeypatch):
    fused = net(name, 0)
    with nn.unfused():
        wanted = step(copy.deepcopy(fused))
    ran = []
    for choose in ("choose_run", "choose_gradient_run"):
        monkeypatch.setattr(winograd, choose, lambda *_: core.MAX_RUN)
    with record(lambda run: ran.extend(p for p in run.plans if isinstance(p, core.BandPlan))):
        got = step(fused)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * max(1, np.abs(b).max()))
    fits = any(
        winograd.fits(m.weight.shape[2:], m.geometry) for _, m in fused.named_modules() if isinstance(m, nn.Conv2d)
    )
    for products in ([plan.forward for plan in ran], [plan.gradient for plan in ran]):
        assert any(plan.run == core.MAX_RUN for plan in products if plan) == fits
    assert bands["forward"] and bands["backward"]


@pytest.mark.parametrize("training", [True, False])
def test_what_a_pool_reads_is_not_written(training):
    model = net("a pool reads the norm").train(training)
    kinds = []
    with record(lambda run: kinds.append(run.kind)):
        step(model)
    assert "max_pool2d_backward" in kinds
    assert kinds.count("form") == kinds.count("normed_gradient") == 1  # of the last norm, whose output goes outside


def test_inputs_of_blocks_are_written_where_others_cannot_add_their_terms(isa, monkeypatch):
    """The third of four. The output has the bits that it has where all are written; bands of the way back differ."""
    model = net("many residual blocks").to(np.float32).to(np.float64)
    again = copy.deepcopy(model)
    kept = []
    with record(lambda run: kept.append(run.kept) if run.kind in ("forward", "form") else None):
        got = step(model)
        assert kept == [False] * 5 + [True] + [False] * 3 + [True]  # and the output
        kept.clear()
        monkeypatch.setattr(core, "MAX_ADDED", 0)
        wanted = step(again)
        assert sum(kept) == 5
    np.testing.assert_array_equal(got[0], wanted[0])
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * max(1, np.abs(b).max()))


def test_a_large_input_of_a_block_goes_straight_to_memory(isa):
    """Its arrays have 9.8 MB: product.pxi's FAR is 8."""
    fused = net("many residual blocks")
    same_step(fused, copy.deepcopy(fused), n=16, size=98)


@pytest.mark.parametrize("name", NETS)
def test_in_evaluation_mode_too(name):
    fused = net(name)
    step(fused)
    same_step(fused.eval(), copy.deepcopy(fused))


def test_in_evaluation_what_is_not_finite_stays_in_its_image():
    model = nn.Sequential(
        *(layer for _ in range(2) for layer in (nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)))
    )
    model(np.random.default_rng(0).standard_normal((32, 3, 16, 16)).astype(np.float32))
    model.eval()
    dy = np.ones_like(model(np.ones((32, 3, 16, 16), np.float32)))
    dy[0, :, 0, 0] = np.inf
    assert np.isfinite(model.backward(dy)[1:]).all()


@pytest.mark.parametrize("name", ["shortcuts", "no ReLU, wide stride"])
def test_same_bits_on_any_number_of_threads(name, same_bits):
    same_bits(lambda: step(net(name).to(np.float32).to(np.float64), n=40))


@pytest.mark.parametrize("name", NETS)
def test_what_lay_in_memory_before_changes_nothing(name, monkeypatch):
    model = net(name)
    with nn.eager():
        wanted = step(copy.deepcopy(model))
        allocate = arrays._allocate

        def nan(*geometry):
            array = allocate(*geometry)
            array[...] = np.nan
            return array

        monkeypatch.setattr(arrays, "_allocate", nan)
        for a, b in zip(step(model), wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_convolution_with_bias_or_tiny_images_runs_alone(bands):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), *conv_norm(4, 4, 1, stride=8))
    model.backward(model(np.zeros((3, 3, 16, 16), np.float32)))
    assert bands == {"forward": 0, "backward": 0}


def test_the_variance_of_a_channel_far_from_zero():
    """The sums are of deviations from a value near by, not of squares that cancel."""
    model = nn.Sequential(*conv_norm(1, 1, 1)).to(np.float32)
    model[0].weight.data[:] = 1
    x = (1000 + np.random.default_rng(0).standard_normal((33, 1, 16, 16))).astype(np.float32)
    model(x)
    variance = x.astype(np.float64).var()
    np.testing.assert_allclose(model[1].running_var, 0.9 + 0.1 * variance * x.size / (x.size - 1), rtol=1e-5)


def test_errors_name_the_layer():
    model = nn.Sequential(*conv_norm(3, 4), nn.ReLU(), *conv_norm(4, 4, 9))
    with pytest.raises(ValueError, match=r"layer '3' \(Conv2d\): .*smaller than the kernel"):
        model(np.zeros((2, 3, 9, 9), np.float32))
    with pytest.raises(TypeError, match=r"layer '0' \(Conv2d\): .*float64"):
        model(np.zeros((2, 3, 32, 32)))


def test_a_thousand_steps_take_no_more_memory_than_ten():
    model = net("shortcuts").to(np.float32)
    optimizer = st.optim.SGD(model.named_parameters(), 1e-3, momentum=0.9)
    x = np.random.default_rng(0).standard_normal((16, 3, 12, 12)).astype(np.float32)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            y = model(x)
            model.backward(y, input_gradient=False)
            optimizer.step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before, after = run(10), run(1000)
    assert after - before < 2048  # KB


@pytest.mark.parametrize("sparsity", [0, 0.2, 0.7])
def test_convolutions_and_linear_layers_do_the_relu_after_them(sparsity, isa, monkeypatch):
    class Shifted(nn.Linear):
        """A forward of its own, which knows no ReLU."""

        def forward(self, x, halo):
            return super().forward(x, halo)

    st.manual_seed(0)
    fused = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2), nn.ReLU(), nn.BatchNorm2d(5),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 20), nn.ReLU(), Shifted(20, 9), nn.ReLU(), nn.Linear(9, 4),
    ).to(np.float64)  # fmt: skip
    if sparsity:
        st.sparsify(fused, sparsity)
    alone = copy.deepcopy(fused)
    ran = []
    relu = ops.relu
    monkeypatch.setattr(ops, "relu", lambda *arguments: ran.append(1) or relu(*arguments))
    for _ in range(2):  # gradients add up
        got = step(fused)
        assert len(ran) == 2  # the second of the two in a row, and that after the subclass
        with nn.unfused():
            for a, b in zip(got, step(alone), strict=True):
                np.testing.assert_array_equal(a, b)
        ran.clear()
