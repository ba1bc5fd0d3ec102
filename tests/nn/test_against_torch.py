"""Every layer and loss, and ten steps of a whole net, dense and sparse, against PyTorch."""

import numpy as np
import pytest

import sparsetrain as st
from nets import images, small_net
from sparsetrain import nn

torch = pytest.importorskip("torch")


class TorchResidual(torch.nn.Module):
    """PyTorch's twin of nn.Residual, with the same names."""

    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x):
        return self.body(x) + (x if self.shortcut is None else self.shortcut(x))


LAYERS = {
    "conv": (nn.Conv2d, torch.nn.Conv2d, (3, 5, 3), {"padding": 1}, (17, 3, 7, 8)),
    "conv pairs": (
        nn.Conv2d,
        torch.nn.Conv2d,
        (4, 6, (2, 3), (2, 1), (1, 2), (1, 2), 2),
        {"bias": False},
        (3, 4, 7, 8),
    ),
    "linear": (nn.Linear, torch.nn.Linear, (9, 7), {}, (17, 9)),
    "batch norm 2d": (nn.BatchNorm2d, torch.nn.BatchNorm2d, (3, 1e-3, 0.3), {}, (5, 3, 4, 4)),
    "batch norm 1d": (nn.BatchNorm1d, torch.nn.BatchNorm1d, (3,), {}, (17, 3)),
    "relu": (nn.ReLU, torch.nn.ReLU, (), {}, (5, 3, 4, 4)),
    "max pool": (nn.MaxPool2d, torch.nn.MaxPool2d, (3, 2), {"padding": 1}, (5, 3, 8, 9)),
    "avg pool": (nn.AvgPool2d, torch.nn.AvgPool2d, ((3, 2),), {"padding": (1, 0)}, (5, 3, 8, 9)),
    "adaptive": (nn.AdaptiveAvgPool2d, torch.nn.AdaptiveAvgPool2d, ((3, 2),), {}, (5, 3, 8, 9)),
    "flatten": (nn.Flatten, torch.nn.Flatten, (), {}, (5, 3, 2, 4)),
    "dropout": (nn.Dropout, torch.nn.Dropout, (0.0,), {}, (5, 12)),
}


def as_torch(state):
    return {name: torch.tensor(values) for name, values in state.items()}


def torch_twin(module):
    """The same net of PyTorch's layers, float64, with the same state."""

    def convert(m):
        if isinstance(m, nn.Sequential):
            children = dict(m.named_modules())
            return torch.nn.Sequential(*(convert(children[str(i)]) for i in range(sum(n.isdigit() for n in children))))
        if isinstance(m, nn.Residual):
            return TorchResidual(convert(m.body), m.shortcut and convert(m.shortcut))
        kind = getattr(torch.nn, type(m).__name__)
        names = {
            nn.Conv2d: "in_channels out_channels kernel_size stride padding dilation groups",
            nn.Linear: "in_features out_features",
            nn.BatchNorm2d: "num_features eps momentum",
            nn.BatchNorm1d: "num_features eps momentum",
            nn.MaxPool2d: "kernel_size stride padding",
            nn.AvgPool2d: "kernel_size stride padding",
            nn.AdaptiveAvgPool2d: "output_size",
        }.get(type(m), "")
        arguments = {name: getattr(m, name) for name in names.split()}
        if isinstance(m, nn.Conv2d | nn.Linear):
            arguments["bias"] = m.bias is not None
        return kind(**arguments)

    twin = convert(module).double()
    twin.load_state_dict(as_torch(module.state_dict()))
    return twin.train(module.training)


def agree(actual, expected, rtol=1e-10):
    """Equal but for rounding, relative to the largest value: terms that cancel have that size."""
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape
    scale = abs(expected).max(initial=1e-3)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, mode):
    kind, torch_kind, arguments, keywords, shape = LAYERS[name]
    st.manual_seed(0)
    layer, peer = kind(*arguments, **keywords), torch_kind(*arguments, **keywords).double()
    layer.to(np.float64)
    assert layer.state_dict().keys() == peer.state_dict().keys()
    peer.load_state_dict(as_torch(layer.state_dict()))
    layer.train(mode == "train")
    peer.train(mode == "train")
    rng = np.random.default_rng(0)
    for _ in range(2):  # gradients accumulate, running statistics move
        x = rng.standard_normal(shape)
        peer_x = torch.tensor(x, requires_grad=True)
        y, peer_y = layer(x), peer(peer_x)
        agree(y, peer_y)
        dy = rng.standard_normal(y.shape)
        peer_y.backward(torch.tensor(dy))
        agree(layer.backward(dy), peer_x.grad)
    for (_, parameter), peer_parameter in zip(layer.named_parameters(), peer.parameters(), strict=True):
        agree(parameter.grad, peer_parameter.grad)
    for key, values in peer.state_dict().items():
        agree(layer.state_dict()[key], values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy(label_smoothing, dtype):
    rng = np.random.default_rng(0)
    logits, labels = (rng.standard_normal((17, 10)) * 4).astype(dtype), rng.integers(0, 10, 17)
    peer = torch.tensor(logits, requires_grad=True)
    peer_loss = torch.nn.functional.cross_entropy(peer, torch.tensor(labels), label_smoothing=label_smoothing)
    peer_loss.backward()
    loss, gradient = nn.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    rtol = 20 * np.finfo(dtype).eps
    agree(np.array(loss), peer_loss, rtol)
    agree(gradient, peer.grad, rtol)


def test_mse_loss():
    y, target = np.random.default_rng(0).standard_normal((2, 5, 3))
    peer = torch.tensor(y, requires_grad=True)
    peer_loss = torch.nn.functional.mse_loss(peer, torch.tensor(target))
    peer_loss.backward()
    loss, gradient = nn.mse_loss(y, target)
    agree(np.array(loss), peer_loss)
    agree(gradient, peer.grad)


OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 1e-2, "weight_decay": 1e-2, "eps": 1e-4}),
    "adamw": ("AdamW", {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-4}),
}


def ten_steps(optimizer, sparsity, dtype):
    """Losses of ten steps of small_net, ours and PyTorch's in float64, and both nets after them.

    PyTorch's net is dense with its removed weights and their gradients held at zero.
    """
    name, settings = OPTIMIZERS[optimizer]
    st.manual_seed(1)
    net = small_net()
    if sparsity:
        st.sparsify(net, sparsity, method="random", exclude=["13"])
    net.to(dtype)
    twin = torch_twin(net)
    masks = {
        name: torch.tensor(parameter.mask) if hasattr(parameter, "mask") else 1
        for name, parameter in net.named_parameters()
    }
    optimizer = getattr(st.optim, name)(net.parameters(), **settings)
    peer = getattr(torch.optim, name)(twin.parameters(), **settings)
    losses = []
    for step in range(10):
        x, labels = images(n=17, seed=step)
        optimizer.zero_grad()
        loss, dy = nn.cross_entropy(net(x.astype(dtype)), labels, label_smoothing=0.1)
        net.backward(dy, input_gradient=False)
        optimizer.step()
        peer.zero_grad()
        peer_loss = torch.nn.functional.cross_entropy(
            twin(torch.tensor(x).double()), torch.tensor(labels), label_smoothing=0.1
        )
        peer_loss.backward()
        for name, parameter in twin.named_parameters():
            parameter.grad *= masks[name]
        peer.step()
        losses.append((loss, peer_loss.item()))
    return np.array(losses), net, twin


@pytest.mark.parametrize("sparsity", [0, 0.6], ids=["dense", "sparse"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ten_steps_of_a_net(optimizer, sparsity, isa):
    losses, net, twin = ten_steps(optimizer, sparsity, np.float64)
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-9)
    assert losses[0, 1] != losses[-1, 1]
    for key, values in twin.state_dict().items():
        agree(net.state_dict()[key], values, rtol=1e-7)
    x, _ = images(seed=99)
    agree(net.eval()(x.astype(np.float64)), twin.eval()(torch.tensor(x).double()), rtol=1e-7)


@pytest.mark.parametrize("sparsity", [0, 0.6], ids=["dense", "sparse"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_ten_steps_of_a_net_in_float32(optimizer, sparsity, isa):
    losses, *_ = ten_steps(optimizer, sparsity, np.float32)
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-4)
