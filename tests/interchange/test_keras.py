"""Weights in Keras's layout: kernels, names, dense layers that read a flattened image."""

import numpy as np
import pytest

import reference as ref
from sparsetrain import manual_seed, nn
from sparsetrain.interchange import from_keras, load_state


def rand(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def test_names_and_axes():
    state = {
        "conv2d/kernel": rand(3, 5, 2, 7),
        "conv2d/bias:0": rand(7),
        "block.norm.gamma": rand(7),
        "block/norm/beta": rand(7),
        "block/norm/moving_mean:0": rand(7),
        "block/norm/moving_variance:0": rand(7),
        "dense/kernel:0": rand(4, 6, dtype=np.float64),
    }
    found = from_keras(state)
    assert list(found) == [
        "conv2d.weight", "conv2d.bias", "block.norm.weight", "block.norm.bias", "block.norm.running_mean",
        "block.norm.running_var", "dense.weight",
    ]  # fmt: skip
    assert found["conv2d.weight"].shape == (7, 2, 3, 5) and found["dense.weight"].shape == (6, 4)
    for (out, channel, row, column), value in np.ndenumerate(found["conv2d.weight"]):
        assert value == state["conv2d/kernel"][row, column, channel, out]
    np.testing.assert_array_equal(found["dense.weight"], state["dense/kernel:0"].T)
    np.testing.assert_array_equal(found["block.norm.bias"], state["block/norm/beta"])
    assert all(array.flags.c_contiguous for array in found.values())
    assert found["dense.weight"].dtype == np.float64


def keras_net(x, state):
    """Convolution, ReLU, flatten and two dense layers of Keras, for x (N, height, width, channels)."""
    kernel = state["conv/kernel"]
    height, width = kernel.shape[:2]
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    y = np.zeros((len(x), rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i : i + height, j : j + width]
            y[:, i, j] = np.tensordot(window, kernel, 3) + state["conv/bias"]
    y = ref.relu(y).reshape(len(x), -1)  # in the order (height, width, channel)
    y = ref.relu(y @ state["first/kernel"] + state["first/bias"])
    return y @ state["second/kernel"] + state["second/bias"]


@pytest.mark.parametrize("flattened", [{"first": (4, 5, 6)}, {"first": [4, 5, 6]}])
def test_the_same_outputs(flattened):
    state = {
        "conv/kernel": rand(3, 2, 2, 6), "conv/bias": rand(6), "first/kernel": rand(4 * 5 * 6, 8, seed=1),
        "first/bias": rand(8), "second/kernel": rand(8, 3), "second/bias": rand(3),
    }  # fmt: skip
    manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, (3, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 6, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    x = rand(5, 6, 6, 2, seed=2)
    ours = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    load_state(model, from_keras(state, flattened))
    np.testing.assert_allclose(model(ours), keras_net(x, state), rtol=1e-4, atol=1e-4)
    load_state(model, from_keras(state))
    assert abs(model(ours) - keras_net(x, state)).max() > 1  # features in the wrong order


def test_what_is_not_known():
    for name in ("lstm/recurrent_kernel", "conv/depthwise_kernel:0", "kernelx", "dense/kernel:1", ""):
        with pytest.raises(ValueError, match=r"is of kind .*, must be one of kernel, bias, gamma"):
            from_keras({name: rand(2, 3)})
    for shape in ((3,), (3, 2, 4), (3, 3, 3, 2, 4)):
        with pytest.raises(ValueError, match=r"conv/kernel has shape .*, must have 2 or 4 axes"):
            from_keras({"conv/kernel": rand(*shape)})
    assert from_keras({}) == {}


@pytest.mark.parametrize("image", [(2, 2, 2), (2, 2, 6), (12,), (3, 4), (1, 3, 2, 2), (1, 12, 0), (-1, -3, 4)])
def test_images_that_a_dense_layer_does_not_read(image):
    with pytest.raises(ValueError, match=r"flattened\['block.dense'\] is"):
        from_keras({"block/dense/kernel": rand(12, 3)}, {"block.dense": image})


@pytest.mark.parametrize("layer", ["dens", "dense/kernel", "block/dense", "conv"])
def test_flattened_layers_that_are_not_there(layer):
    state = {"conv/kernel": rand(2, 2, 3, 1), "block/dense/kernel": rand(12, 3)}
    with pytest.raises(ValueError, match=f"flattened has '{layer}', which is no dense layer of the state"):
        from_keras(state, {"block.dense": (2, 2, 3), layer: (2, 2, 3)})
