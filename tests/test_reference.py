"""The float64 reference against PyTorch, so that the other tests can trust it."""

import numpy as np
import pytest

import reference as ref

torch = pytest.importorskip("torch")

F = torch.nn.functional

POOLS = [
    ((2, 2), (2, 2), (0, 0)),
    ((3, 3), (2, 2), (1, 1)),
    ((3, 2), (1, 3), (1, 0)),
    ((2, 5), (3, 1), (0, 2)),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def torch_gradients(f, *arrays):
    """f's value, a random upstream gradient, and with it the gradients of the arrays."""
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    y = f(*tensors)
    dy = normal(*y.shape, seed=99)
    y.backward(torch.tensor(dy))
    return y.detach().numpy(), dy, [t.grad.numpy() for t in tensors]


def agree(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1), 1),
        ((1, 5), (2, 1), (0, 3), (1, 1), 2),
        ((2, 3), (3, 2), (2, 0), (2, 1), 3),
        ((1, 1), (2, 2), (1, 2), (1, 1), 6),
        ((3, 2), (1, 2), (3, 4), (3, 3), 1),
    ],
)
def test_conv2d(kernel, stride, padding, dilation, groups):
    x, w, b = normal(2, 6, 8, 9), normal(12, 6 // groups, *kernel, seed=1), normal(12, seed=2)
    y, dy, gradients = torch_gradients(lambda *a: F.conv2d(*a, stride, padding, dilation, groups), x, w, b)
    agree(ref.conv2d(x, w, b, stride, padding, dilation, groups), y)
    for actual, expected in zip(
        ref.conv2d_backward(dy, x, w, stride, padding, dilation, groups), gradients, strict=True
    ):
        agree(actual, expected)


def test_conv2d_without_bias():
    x, w = normal(2, 3, 5, 5), normal(4, 3, 3, 3, seed=1)
    agree(ref.conv2d(x, w), F.conv2d(torch.tensor(x), torch.tensor(w)).numpy())


def test_linear():
    x, w, b = normal(4, 5), normal(3, 5, seed=1), normal(3, seed=2)
    y, dy, gradients = torch_gradients(F.linear, x, w, b)
    agree(ref.linear(x, w, b), y)
    agree(ref.linear(x, w), F.linear(torch.tensor(x), torch.tensor(w)).numpy())
    for actual, expected in zip(ref.linear_backward(dy, x, w), gradients, strict=True):
        agree(actual, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5, 2)])
def test_batch_norm(shape, training):
    x, w, b = normal(*shape) * 2 + 3, normal(3, seed=1), normal(3, seed=2)
    mean, var = normal(3, seed=3), normal(3, seed=4) ** 2 + 0.1
    running = torch.tensor(mean), torch.tensor(var)
    y, dy, gradients = torch_gradients(lambda x, w, b: F.batch_norm(x, *running, w, b, training, 0.3, 1e-2), x, w, b)
    actual = ref.batch_norm(x, w, b, mean, var, training, 0.3, 1e-2)
    for a, expected in zip(actual, (y, *running), strict=True):
        agree(a, expected)
    for a, expected in zip(ref.batch_norm_backward(dy, x, w, mean, var, training, 1e-2), gradients, strict=True):
        agree(a, expected)


def test_relu():
    x = normal(4, 5)
    x[0, :4] = [0.0, -0.0, np.nan, -np.inf]
    y, dy, (dx,) = torch_gradients(F.relu, x)
    np.testing.assert_array_equal(ref.relu(x), y)
    np.testing.assert_array_equal(ref.relu_backward(dy, x), dx)


@pytest.mark.parametrize(("kernel", "stride", "padding"), POOLS)
@pytest.mark.parametrize("values", ["different", "equal", "nan", "-inf"])
def test_max_pool2d(kernel, stride, padding, values):
    x = normal(2, 3, 7, 8)
    if values == "equal":
        x = np.round(x)
    elif values == "nan":
        x[np.random.default_rng(1).random(x.shape) < 0.3] = np.nan
    elif values == "-inf":
        x[:, :2] = -np.inf
    y, dy, (dx,) = torch_gradients(lambda x: F.max_pool2d(x, kernel, stride, padding), x)
    np.testing.assert_array_equal(ref.max_pool2d(x, kernel, stride, padding), y)
    agree(ref.max_pool2d_backward(dy, x, kernel, stride, padding), dx)


@pytest.mark.parametrize(("kernel", "stride", "padding"), POOLS)
def test_avg_pool2d(kernel, stride, padding):
    x = normal(2, 3, 7, 8)
    y, dy, (dx,) = torch_gradients(lambda x: F.avg_pool2d(x, kernel, stride, padding), x)
    agree(ref.avg_pool2d(x, kernel, stride, padding), y)
    agree(ref.avg_pool2d_backward(dy, x, kernel, stride, padding), dx)


@pytest.mark.parametrize("output", [(1, 1), (2, 4), (7, 8), (3, 5), (9, 3)])
def test_adaptive_avg_pool2d(output):
    x = normal(2, 3, 7, 8)
    y, dy, (dx,) = torch_gradients(lambda x: F.adaptive_avg_pool2d(x, output), x)
    agree(ref.adaptive_avg_pool2d(x, output), y)
    agree(ref.adaptive_avg_pool2d_backward(dy, x), dx)


def test_flatten():
    x = normal(2, 3, 4, 5)
    y, dy, (dx,) = torch_gradients(lambda x: x.flatten(1), x)
    np.testing.assert_array_equal(ref.flatten(x), y)
    np.testing.assert_array_equal(ref.flatten_backward(dy, x), dx)


def test_dropout_scales_what_stays():
    y = ref.dropout(np.array([1.0, 2.0, 3.0]), np.array([True, False, True]), 0.75)
    assert y.tolist() == [4.0, 0.0, 12.0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(label_smoothing):
    logits, labels = normal(6, 4) * 5, np.array([0, 3, 1, 1, 2, 0])
    tensor = torch.tensor(logits, requires_grad=True)
    loss = F.cross_entropy(tensor, torch.tensor(labels), label_smoothing=label_smoothing)
    loss.backward()
    actual, gradient = ref.cross_entropy(logits, labels, label_smoothing)
    agree(actual, loss.item())
    agree(gradient, tensor.grad.numpy())


def test_mse_loss():
    y, target = normal(3, 4), normal(3, 4, seed=1)
    tensor = torch.tensor(y, requires_grad=True)
    loss = F.mse_loss(tensor, torch.tensor(target))
    loss.backward()
    actual, gradient = ref.mse_loss(y, target)
    agree(actual, loss.item())
    agree(gradient, tensor.grad.numpy())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_optimiser_steps(name, weight_decay):
    w, state = normal(5), (None, None)
    parameter = torch.tensor(w, requires_grad=True)
    settings = {
        "sgd": {},
        "momentum": {"momentum": 0.9},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "adam": {"betas": (0.8, 0.99), "eps": 1e-3},
        "adamw": {"betas": (0.8, 0.99), "eps": 1e-3},
    }[name] | {"lr": 0.1, "weight_decay": weight_decay}
    peers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    peer = peers.get(name, torch.optim.SGD)([parameter], **settings)
    for step in range(1, 5):
        dw = normal(5, seed=step)
        parameter.grad = torch.tensor(dw)
        peer.step()
        if name in peers:
            m, v = state if step > 1 else (np.zeros(5), np.zeros(5))
            w, *state = getattr(ref, name)(w, dw, m, v, step, **settings)
        else:
            w, *state = ref.sgd(w, dw, state[0], **settings)
        agree(w, parameter.detach().numpy())


def test_assert_close_fails_where_it_should():
    one = np.ones(3, np.float32)
    ref.assert_close(one, np.ones(3), 1, 1)
    ref.assert_close(one + np.float32(1e-6), np.ones(3), 10, 1)
    for wrong in (one + np.float32(1e-6), one * np.float32(np.nan), one[:2]):
        with pytest.raises(AssertionError):
            ref.assert_close(wrong, np.ones(3), 1, 1)
