"""nn.PadChannels, the shortcut without weights, against NumPy: alone, in residual blocks, and in files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

from gradcheck import gradcheck
from sparsetrain import Trainer, arrays, manual_seed, nn, optim
from sparsetrain.nn.containers import unfused
from strategies import quick

SHAPES = [(1, 1, 1, 1), (15, 3, 8, 8), (16, 3, 7, 9), (17, 5, 1, 14), (33, 2, 5, 4), (2, 3, 2, 1)]
PADS = [(0, 0), (2, 3), (0, 4), (4, 0)]


def normal(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def padded(x, before, after, stride):
    return np.pad(x[:, :, ::stride, ::stride], ((0, 0), (before, after), (0, 0), (0, 0)))


def padded_backward(dy, x, before, stride):
    dx = np.zeros_like(x)
    dx[:, :, ::stride, ::stride] = dy[:, before : before + x.shape[1]]
    return dx


def check(x, before, after, stride):
    layer, kept = nn.PadChannels(before, after, stride), x.copy()
    y = layer(x)
    dy = normal(y.shape, x.dtype, seed=1)
    dx = layer.backward(dy)
    assert y.dtype == dx.dtype == x.dtype
    np.testing.assert_array_equal(y, padded(kept, before, after, stride))
    np.testing.assert_array_equal(dx, padded_backward(dy, x, before, stride))
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(dy, normal(y.shape, x.dtype, seed=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pad", PADS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edges(shape, pad, stride, dtype):
    check(normal(shape, dtype), *pad, stride)


@quick
@given(
    n=hs.sampled_from([1, 15, 16, 17, 33]),
    channels=hs.integers(1, 4),
    size=hs.tuples(hs.integers(1, 9), hs.integers(1, 9)),
    pad=hs.tuples(hs.integers(0, 5), hs.integers(0, 5)),
    stride=hs.integers(1, 10),
)
def test_any_geometry(n, channels, size, pad, stride, isa):
    check(normal((n, channels, *size)), *pad, stride)


@pytest.mark.parametrize("halo", [(0, 0), (1, 2), (3, 0)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halos(shape, halo):
    """The output and the gradient have the zeros around them that are asked for, whatever was there before."""
    layer = nn.PadChannels(1, 2, 2)
    for value in (np.nan, 1.0):
        x = normal(shape)
        used = layer.run(arrays.pack(np.full(shape, value, np.float32), (2, 2)), halo)[0]
        del used  # its memory is used again
        y, backward = layer.run(arrays.pack(x, (1, 1)), halo)
        np.testing.assert_array_equal(arrays.unpack(y), padded(x, 1, 2, 2))
        check_halo(y, halo)
        dy = normal(y.shape, seed=1)
        dx = backward(arrays.pack(dy, (1, 0)), halo)
        np.testing.assert_array_equal(arrays.unpack(dx), padded_backward(dy, x, 1, 2))
        check_halo(dx, halo)
        assert backward(arrays.pack(dy), None) is None


def check_halo(blocked, halo):
    """In memory there are zeros around the values."""
    assert blocked.has_halo(halo)
    a, (vertical, horizontal) = blocked.array, halo
    shape = (*a.shape[:2], a.shape[2] + 2 * vertical, a.shape[3] + 2 * horizontal, a.shape[4])
    start = a.__array_interface__["data"][0] - np.frombuffer(a.base, np.uint8).__array_interface__["data"][0]
    start -= vertical * a.strides[2] + horizontal * a.strides[3]
    around = np.ndarray(shape, a.dtype, a.base, start, a.strides)
    border = (0, 0), (0, 0), (vertical, vertical), (horizontal, horizontal), (0, 0)
    np.testing.assert_array_equal(around, np.pad(a, border))


BODIES = {
    "convolution": lambda c, d, s: [nn.Conv2d(c, d, 3, s, 1)],
    "norm": lambda c, d, s: [nn.Conv2d(c, d, 3, s, 1, bias=False), nn.BatchNorm2d(d)],
    "block": lambda c, d, s: [
        nn.Conv2d(c, d, 3, s, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU(), nn.Conv2d(d, d, 3, padding=1, bias=False),
        nn.BatchNorm2d(d),
    ],
}  # fmt: skip


def block(body, stride, channels=3, out=8, before=2):
    shortcut = nn.PadChannels(before, out - channels - before, stride)
    return nn.Residual(nn.Sequential(*BODIES[body](channels, out, stride)), shortcut)


def net(body, stride):
    """A residual block between a norm and a convolution, which reads pixels around its input."""
    manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), block(body, stride), nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1),
    )  # fmt: skip
    rng = np.random.default_rng(1)
    for _, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[...] = rng.uniform(0.5, 1.5, module.num_features)
            module.bias.data[...] = rng.uniform(-0.5, 0.5, module.num_features)
    return model


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_gradients_alone(stride):
    gradcheck(nn.PadChannels(2, 1, stride), normal((2, 3, 5, 7)))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("body", BODIES)
def test_gradients_in_a_block(body, stride):
    gradcheck(net(body, stride), normal((3, 2, 5, 6), seed=3), h=1e-5, at_most=12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("body", BODIES)
def test_fused_as_layer_by_layer(body, stride):
    x = normal((19, 2, 9, 12), np.float64)
    results = []
    for fused in (True, False):
        model = net(body, stride).to(np.float64)
        if fused:
            y = model(x)
            dx = model.backward(normal(y.shape, np.float64, seed=1))
        else:
            with unfused():
                y = model(x)
                dx = model.backward(normal(y.shape, np.float64, seed=1))
        results.append([y, dx, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_any_thread_count_gives_the_same_bits(same_bits):
    model, x = net("block", 2), normal((33, 2, 9, 7))
    same_bits(lambda: (model(x), model.backward(model(x))))


def test_nothing_to_train():
    layer = nn.PadChannels(1, 2)
    assert layer.parameters() == [] and layer.state_dict() == {} and layer.stride == 2
    y = layer(normal((2, 3, 4, 4)))
    assert layer.backward(y, input_gradient=False) is None
    assert repr(layer) == "PadChannels(1, 2, stride=2)"


def test_checkpoints_hold_it(tmp_path):
    model = net("block", 2)
    run = Trainer(model, optim.SGD(model.named_parameters(), lr=0.1))
    run.save(tmp_path / "a.safetensors")
    other = Trainer.resume(tmp_path / "a.safetensors").model
    shortcut = other[3].shortcut
    assert (shortcut.before, shortcut.after, shortcut.stride) == (2, 3, 2)
    x = normal((4, 2, 9, 8))
    np.testing.assert_array_equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((1.5, 2), TypeError, "before is 1.5"),
        ((1, None), TypeError, "after is None"),
        ((1, 2, 0), ValueError, "stride is 0"),
        ((1, 2, (2, 2)), TypeError, "stride is"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        nn.PadChannels(*arguments)


@pytest.mark.parametrize("arguments", [(-1, 2), (1, -2)])
def test_fewer_than_no_channels(arguments):
    with pytest.raises(ValueError, match="before is -1|after is -2"):
        nn.PadChannels(*arguments)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.zeros((2, 3), np.float32), ValueError, r"x has shape \(2, 3\), must be \(N, C, H, W\)"),
        (np.zeros((3, 8, 8), np.float32), ValueError, "3, 8, 8"),
        (np.zeros((0, 3, 8, 8), np.float32), ValueError, "empty"),
        (np.zeros((2, 3, 8, 8), np.int32), TypeError, "int32"),
    ],
)
def test_bad_input(x, error, match):
    with pytest.raises(error, match=match):
        nn.PadChannels(1, 1)(x)


def test_a_shortcut_that_does_not_fit():
    model = nn.Residual(nn.Conv2d(3, 8, 3, 2, 1), nn.PadChannels(1, 1, 2))
    with pytest.raises(ValueError, match=r"shape.*8.*5|shape.*5.*8"):
        model(normal((2, 3, 8, 8)))
