"""Every layer, loss and whole net: backward against numerical derivatives in float64."""

import numpy as np
import pytest

import sparsetrain as st
from gradcheck import derivative, gradcheck
from nets import images, small_net
from sparsetrain import nn
from sparsetrain.sparse import SparseParameter


def spread(*shape):
    """Values at least 0.01 apart and from 0: no small step crosses a kink of ReLU or maximum."""
    values = np.arange(1, np.prod(shape) + 1) * 0.01
    rng = np.random.default_rng(0)
    return (rng.permutation(values) * rng.choice([-1, 1], values.size)).reshape(shape)


def twice(layer):
    return nn.Sequential(layer, nn.ReLU(), layer)


LAYERS = {
    "conv": (lambda: nn.Conv2d(2, 3, 3, padding=1), (3, 2, 5, 4)),
    "conv strided": (lambda: nn.Conv2d(2, 3, (2, 3), (3, 2), (1, 2)), (2, 2, 6, 5)),
    "conv dilated": (lambda: nn.Conv2d(2, 3, 3, 1, (2, 3), (2, 3)), (2, 2, 6, 7)),
    "conv strided, dilated": (lambda: nn.Conv2d(1, 2, 3, (2, 3), 3, (3, 2)), (2, 1, 7, 7)),
    "conv grouped": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 5, 5)),
    "conv depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (2, 3, 4, 5)),
    "conv 1x1": (lambda: nn.Conv2d(3, 4, 1, bias=False), (17, 3, 2, 2)),
    "linear": (lambda: nn.Linear(5, 4), (17, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (1, 5)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3), (3, 3, 2, 2)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (17, 4)),
    "batch norm 2d, evaluation": (lambda: nn.BatchNorm2d(3).eval(), (3, 3, 2, 2)),
    "batch norm 1d, evaluation": (lambda: nn.BatchNorm1d(4).eval(), (17, 4)),
    "relu": (lambda: nn.ReLU(), (3, 2, 4, 4)),
    "max pool": (lambda: nn.MaxPool2d(3, 2, 1), (2, 2, 7, 6)),
    "avg pool": (lambda: nn.AvgPool2d((2, 3), (1, 2), (1, 0)), (2, 2, 7, 6)),
    "adaptive avg pool": (lambda: nn.AdaptiveAvgPool2d((3, 2)), (2, 2, 7, 5)),
    "global avg pool": (lambda: nn.AdaptiveAvgPool2d(1), (17, 2, 3, 5)),
    "flatten": (lambda: nn.Flatten(), (2, 3, 4, 2)),
    "dropout": (lambda: nn.Dropout(0.4), (3, 20)),
    "residual": (lambda: nn.Residual(nn.Linear(5, 5)), (3, 5)),
    "residual, shortcut": (lambda: nn.Residual(nn.Linear(5, 4), nn.Linear(5, 4)), (3, 5)),
    # Flatten of one pixel may share its input's memory, which must live as long
    "pool, flatten, linear, linear": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3), nn.Linear(3, 3)),
        (17, 3, 2, 2),
    ),
    "residual of nothing": (lambda: nn.Residual(nn.Sequential()), (3, 2, 3, 3)),
    "residual of a batch norm, relu": (
        lambda: nn.Sequential(nn.Residual(nn.BatchNorm2d(2)), nn.ReLU()),
        (3, 2, 3, 3),
    ),
    "residual in a residual": (
        lambda: nn.Residual(nn.Residual(nn.Conv2d(2, 2, 3, padding=1)), nn.Conv2d(2, 2, 1)),
        (3, 2, 4, 4),
    ),
    "residual of two convs and batch norms, relu": (
        lambda: nn.Sequential(
            nn.Residual(
                nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)),
                nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)),
            ),
            nn.ReLU(),
        ),
        (3, 2, 4, 4),
    ),
    "conv, conv of another padding": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Conv2d(3, 2, (5, 1), padding=(4, 0), dilation=(2, 1)),
        ),
        (3, 2, 4, 4),
    ),
    "linear twice": (lambda: twice(nn.Linear(4, 4)), (3, 4)),
    "batch norm, relu": (lambda: nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), (3, 2, 3, 3)),
}


def make_sparse(model, sparsity=0.5):
    """Leaves random weights of every convolution and linear layer, some rows empty."""
    rng = np.random.default_rng(0)
    layers = [m for _, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for module in dict.fromkeys(layers):  # each once
        dense = module.weight.data
        mask = rng.random(dense.shape) >= sparsity
        mask[len(mask) // 2] = False
        module.weight = SparseParameter.from_dense(dense, mask)
    return model


@pytest.fixture(autouse=True)
def seed():
    st.manual_seed(0)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    make, shape = LAYERS[name]
    gradcheck(make(), spread(*shape))


# Not those where a batch norm and a ReLU follow an empty row: its output stands on the kink.
@pytest.mark.parametrize("name", [n for n in LAYERS if ("conv" in n or "linear" in n) and "relu" not in n])
@pytest.mark.parametrize("sparsity", [0.5, 1.0])
def test_sparse_layer(name, sparsity):
    make, shape = LAYERS[name]
    gradcheck(make_sparse(make(), sparsity), spread(*shape))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
def test_net(pool, sparse, mode):
    net = small_net(pool)
    if sparse:
        make_sparse(net)
    net.train(mode == "train")
    x, _ = images(dtype=np.float64)
    gradcheck(net, x, h=1e-5, at_most=12)


def test_gradcheck_finds_a_wrong_gradient():
    class Wrong(nn.Linear):
        def backward(self, dy, input_gradient=True):
            dx = super().backward(dy, input_gradient)
            self.weight.grad[0, 0] *= 1.001
            return dx

    with pytest.raises(AssertionError, match="weight"):
        gradcheck(Wrong(3, 2), spread(4, 3))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cross_entropy(label_smoothing):
    logits, labels = spread(17, 5), np.arange(17) % 5

    def loss():
        return nn.cross_entropy(logits, labels, label_smoothing=label_smoothing)[0]

    _, gradient = nn.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    expected = [derivative(loss, logits, at, 1e-3) for at in np.ndindex(logits.shape)]
    np.testing.assert_allclose(gradient.ravel(), expected, rtol=1e-6, atol=1e-10)


def test_mse_loss():
    y, target = spread(3, 5), spread(3, 5)[::-1].copy()
    _, gradient = nn.mse_loss(y, target)
    expected = [derivative(lambda: nn.mse_loss(y, target)[0], y, at, 1e-3) for at in np.ndindex(y.shape)]
    np.testing.assert_allclose(gradient.ravel(), expected, rtol=1e-6, atol=1e-10)
