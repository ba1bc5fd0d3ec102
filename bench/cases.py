"""What the benchmarks compute: the nets, and the same numbers for all.

Both the scripts and the worker processes import this file, so that every peer gets the same
weights, the same mask and the same inputs: they depend on the case alone. It imports nothing of
sparsetrain, which would set up the threads of the peers' processes too.
"""

import math
import zlib

import numpy as np
from safetensors.numpy import load_file

# dense: places, among the layers with weights, that stay dense on every side. SparseProp's paper
# (section 4.2) keeps the first convolution and the last linear layer so; the first layer of the
# MLP holds 42 % of its weights and is sparse.
NETS = {
    "resnet20": {"image": (3, 32, 32), "batch": 128, "dense": (0, -1), "memory": True},
    "resnet18": {"image": (3, 32, 32), "batch": 64, "dense": (0, -1), "memory": True},
    "vgg11": {"image": (3, 32, 32), "batch": 64, "dense": (0, -1), "memory": False},
    "lenet5": {"image": (1, 28, 28), "batch": 64, "dense": (0, -1), "memory": False},
    "mlp": {"image": (1, 28, 28), "batch": 128, "dense": (-1,), "memory": False},
}

# Of every peer's optimiser. The rate is small, so that hundreds of steps on one batch stay tame.
SGD = {"lr": 1e-3, "momentum": 0.9}


def net_cases(all_sparse=False):
    """Cases of whole training steps, one for each net of NETS; all_sparse: no layer stays dense."""
    everywhere = {"dense": ()} if all_sparse else {}
    return [{"name": name, "net": name, **net, **everywhere} for name, net in NETS.items()]


def trained_case(path):
    """The case of a training step of the ResNet-20 with shortcut option A whose dense state is in that safetensors file
    (sparsetrain.interchange.write_state() writes it). Its zeros are the removed weights."""
    case = {"name": f"resnet20_a, {path.name}", "net": "resnet20_a", **NETS["resnet20"], "weights": str(path)}
    weights = [array for array in load_file(path).values() if array.ndim > 1]
    zeros = sum(int((array == 0).sum()) for array in weights)
    return {**case, "sparsity": zeros / sum(array.size for array in weights)}


def weight_sparsity(case):
    """Share of the weights that are removed: none where the case is about zeros in the gradient."""
    return 0.0 if case.get("zeros") == "gradient" else case["sparsity"]


def weight_shape(case):
    """Shape of a layer's dense weight: OIHW or (out, in)."""
    if case["kind"] == "linear":
        return case["out"], case["in"]
    return case["out"], case["in"], case["kernel"], case["kernel"]


def input_shape(case):
    if case["kind"] == "linear":
        return case["batch"], case["in"]
    return case["batch"], case["in"], case["size"], case["size"]


def output_shape(case):
    if case["kind"] == "linear":
        return case["batch"], case["out"]
    size = (case["size"] + 2 * case["padding"] - case["kernel"]) // case["stride"] + 1
    return case["batch"], case["out"], size, size


def forward_flops(case):
    """Multiplications and additions of stored weights in a forward pass; backward has twice these.

    Taps that fall on the padding count: every peer's kernels are judged by the same number.
    """
    stored = stored_weights(math.prod(weight_shape(case)), weight_sparsity(case))
    pixels = math.prod(output_shape(case)) // case["out"]
    return 2 * stored * pixels


def stored_weights(size, sparsity):
    return size - round(sparsity * size)


def layer_arrays(case):
    """(weight, mask, bias, x, dy) of a layer, float32, mask bool; weight is zero where mask is."""
    rng = np.random.default_rng(0)
    weight, mask = _sparse_weight(weight_shape(case), weight_sparsity(case), rng)
    bias = rng.standard_normal(case["out"], dtype=np.float32)
    x = rng.standard_normal(input_shape(case), dtype=np.float32)
    dy = rng.standard_normal(output_shape(case), dtype=np.float32)
    return weight, mask, bias, x, dy


def net_arrays(case):
    """A batch: images (N, C, H, W) float32 and labels (N,) int64 below 10."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((case["batch"], *case["image"]), dtype=np.float32)
    return x, rng.integers(10, size=case["batch"])


def net_weights(shapes, case):
    """Initial parameters of a net by name, for {name: shape} in the net's order.

    Returns (parameters, dense): the names of the layers that stay dense, without ".weight".
    """
    if "weights" in case:
        state = load_file(case["weights"])
        weights = [name for name, shape in shapes.items() if len(shape) > 1]
        return {name: state[name] for name in shapes}, [n.removesuffix(".weight") for n in weights if state[n].all()]
    layers = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1]
    dense = [layers[place] for place in case["dense"]]
    parameters = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            fill = np.ones if name.endswith("weight") else np.zeros
            parameters[name] = fill(shape, np.float32)
        else:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            sparsity = 0.0 if name.removesuffix(".weight") in dense else weight_sparsity(case)
            parameters[name] = _sparse_weight(shape, sparsity, rng)[0]
    return parameters, dense


def _sparse_weight(shape, sparsity, rng):
    """A weight with He's scale for the inputs that are left, and its random mask."""
    size = math.prod(shape)
    stored = stored_weights(size, sparsity)
    mask = np.zeros(size, bool)
    mask[rng.permutation(size)[:stored]] = True
    scale = math.sqrt(2 * shape[0] / stored)
    weight = rng.standard_normal(size, dtype=np.float32) * np.float32(scale) * mask
    return weight.reshape(shape), mask.reshape(shape)
