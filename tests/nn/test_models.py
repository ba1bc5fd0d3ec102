"""The ready models: their shapes, sizes and names, and the summary."""

import numpy as np
import pytest

from sparsetrain import nn, sparsify
from sparsetrain.nn import models

# name: input, parameters. From the papers' layer tables, counted by hand below the name.
MODELS = {
    "lenet300": ((1, 28, 28), 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
    "lenet5": ((1, 28, 28), 25 * 20 + 20 + 500 * 50 + 50 + 800 * 500 + 500 + 500 * 10 + 10),
    "mlp": ((1, 28, 28), 784 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10),
    "small_cnn": (
        (1, 28, 28),
        9 * 32 + 64 + 9 * 32 * 64 + 128 + 9 * 64 * 128 + 256 + 128 * 10 + 10,
    ),
    "vgg11": ((3, 32, 32), 9_217_728 + 2 * 2752 + 5130),
    "resnet20": ((3, 32, 32), 272_474),  # 269,722 with option A, He et al. table 6
    "resnet18": ((3, 32, 32), 11_173_962),
}


@pytest.mark.parametrize("name", MODELS)
def test_size_and_output(name):
    shape, parameters = MODELS[name]
    model = getattr(models, name)()
    summary = model.summary(shape)
    assert summary.total.parameters == summary.total.nnz == parameters
    assert sum(row.parameters for row in summary.rows) == parameters
    assert summary.rows[-1].output == (10,)


@pytest.mark.parametrize("name", MODELS)
def test_classes_and_channels(name):
    channels = 2
    shape = (channels, *MODELS[name][0][1:])
    model = getattr(models, name)(num_classes=7, in_channels=channels)
    assert model.summary(shape).rows[-1].output == (7,)


@pytest.mark.parametrize("name", ["small_cnn", "vgg11", "resnet20"])
def test_both_usual_image_sizes(name):
    model = getattr(models, name)(in_channels=1)
    for size in (28, 32):
        assert model.summary((1, size, size)).rows[-1].output == (10,)


@pytest.mark.parametrize("name", ["lenet300", "lenet5"])
def test_image_size(name):
    model = getattr(models, name)(in_channels=3, image_size=32)
    assert model.summary((3, 32, 32)).rows[-1].output == (10,)


def test_mlp_widths():
    model = models.mlp(widths=(16, 8, 3), in_channels=2)
    x = np.zeros((4, 2, 4, 4), np.float32)
    assert model(x).shape == (4, 3)
    with pytest.raises(ValueError, match="widths has 1 number"):
        models.mlp(widths=(3,))
    with pytest.raises(ValueError, match=r"widths\[1\] is 0"):
        models.mlp(widths=(3, 0, 2))


def test_no_bias_before_batch_norm():
    for name in ("small_cnn", "vgg11", "resnet20"):
        layers = dict(getattr(models, name)().named_modules())
        assert all(m.bias is None for m in layers.values() if isinstance(m, nn.Conv2d))


def test_resnet_names_are_pytorchs():
    names = [name for name, _ in models.resnet20().named_parameters()]
    assert names[:4] == ["0.weight", "1.weight", "1.bias", "3.body.0.weight"]
    assert [n for n in names if "shortcut.0" in n] == [
        "9.shortcut.0.weight",
        "15.shortcut.0.weight",
    ]


@pytest.mark.parametrize("name", ["small_cnn", "resnet20"])
def test_a_step_changes_every_parameter(name):
    shape, _ = MODELS[name]
    model = getattr(models, name)()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((17, *shape)).astype(np.float32)
    _, dy = nn.cross_entropy(model(x), rng.integers(0, 10, 17))
    model.backward(dy)
    for key, parameter in model.named_parameters():
        assert parameter.grad.any(), key


def test_summary_counts_stored_weights():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3, bias=False))
    sparsify(model, 0.5)
    conv, flatten, linear = model.summary((2, 5, 5)).rows
    assert (conv.name, conv.type, conv.output) == ("0", "Conv2d", (4, 5, 5))
    assert (conv.parameters, conv.nnz, conv.sparsity) == (76, 40, 0.5)
    assert conv.flops == 2 * 36 * 25
    assert conv.size_bytes == 4 * (36 + 4) + 4 * (5 + 36)
    assert (flatten.parameters, flatten.sparsity, flatten.flops) == (0, None, 0)
    assert (flatten.output, linear.output, linear.flops) == ((100,), (3,), 2 * 150)
    total = model.summary((2, 5, 5)).total
    assert (total.parameters, total.nnz, total.sparsity) == (376, 190, 0.5)
    assert total.flops == conv.flops + linear.flops
    lines = str(model.summary((2, 5, 5))).splitlines()
    assert lines[2].split() == ["0", "Conv2d", "4x5x5", "76", "40", "0.5000", "1,800", "324"]
    assert lines[-1].startswith("total")


def test_summary_leaves_the_model_as_it_was():
    model = models.small_cnn()
    model.eval()
    list(dict(model.named_modules()).values())[1].train()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    modes = [m.training for _, m in model.named_modules()]
    model.summary((1, 28, 28))
    assert [m.training for _, m in model.named_modules()] == modes
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_summary_of_a_shape_that_does_not_fit():
    with pytest.raises(ValueError, match="input_shape"):
        models.small_cnn().summary((28, 28))
    with pytest.raises(ValueError):
        models.lenet5().summary((1, 32, 32))
