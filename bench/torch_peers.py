"""The peers that run on PyTorch: PyTorch itself, SparseProp and SparseLab.

The nets are plain torch.nn with the structure and the parameter names of sparsetrain.nn.models;
train.py stops if names or shapes differ. ReLU and the residual sum work in place and SGD is
the fused one: PyTorch at its best.
"""

import importlib.metadata
import itertools
import os
import statistics
import warnings

import cases
import torch
from subject import Subject, Unsupported, sampled, timed_parts
from torch import nn

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# SparseProp and SparseLab use beta features and old NumPy protocols, which is theirs to mend.
warnings.simplefilter("ignore")

# SparseProp's README: a layer that is less sparse than this stays dense.
SPARSEPROP_FROM = 0.8


def versions(peer):
    found = {"torch": torch.__version__, "isa": torch.backends.cpu.get_cpu_capability()}
    package = peer.split("-")[0]
    if package != "torch":
        found[package] = importlib.metadata.version(package)
    return found | {"threads": torch.get_num_threads()}


def layer(peer, case):
    """A single layer: forward, then the gradients of input, weight and bias."""
    weight, mask, bias, x, dy = (torch.from_numpy(array) for array in cases.layer_arrays(case))
    if peer == "torch-csr":
        return _csr_product(case, weight, bias, x)
    module = _dense_layer(case, weight, bias)
    if peer == "torch-channels-last":
        if case["kind"] != "conv":
            raise Unsupported("channels_last is for convolutions")
        module = module.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        dy = dy.to(memory_format=torch.channels_last)
    elif peer != "torch":
        module = _sparse_layer(peer, case, module)
    inputs = [x.requires_grad_(), *module.parameters()]

    def one_pass():
        return timed_parts(
            forward=lambda _: module(x),
            backward=lambda y: torch.autograd.grad(y, inputs, dy),
        )

    def sample():
        y = module(x)
        dx, *gradients = torch.autograd.grad(y, inputs, dy)
        # Their parameters come in another order: weights are more than biases are.
        dw = max(gradients, key=torch.numel)
        if peer == "sparselab":
            dw = dw[torch.from_numpy(module._csr.col_indices) >= 0]
        dw = dw[mask] if dw.shape == mask.shape else dw
        return {"y": sampled(y.detach()), "dx": sampled(dx), "dw": sampled(dw)}

    return Subject([one_pass], sample)


def net(peer, case):
    """A whole training step with SGD, from a batch to updated weights."""
    if peer not in ("torch", "torch-channels-last", "sparseprop"):
        raise Unsupported(f"{peer} is for layers")
    model = NETS[case["net"]](case["image"][0])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    values, dense = cases.net_weights(shapes, case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(values[name]))
    x, labels = (torch.from_numpy(array) for array in cases.net_arrays(case))
    about = {"parameters": shapes, "dense_layers": dense}
    if peer == "torch-channels-last":
        if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
            raise Unsupported("channels_last is for convolutions")
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    elif peer == "sparseprop":
        if case["sparsity"] < SPARSEPROP_FROM:
            raise Unsupported("SparseProp leaves layers below 80 % dense")
        about["sparse_layers"] = _swap_in_sparseprop(model, x, dense)
        for before, after in itertools.pairwise(model):
            # SparseProp's linear layers return views, which autograd lets nobody change in place.
            if isinstance(after, nn.ReLU) and not isinstance(before, nn.BatchNorm2d):
                after.inplace = isinstance(before, Residual)
    optimizer = torch.optim.SGD(model.parameters(), **cases.SGD, fused=True)
    first_bias = next(p for name, p in model.named_parameters() if name.endswith("bias"))

    def loss_and_gradients():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        return loss.item()

    def step(_):
        loss_and_gradients()
        optimizer.step()

    def sample():
        return {"loss": [loss_and_gradients()], "first bias gradient": sampled(first_bias.grad)}

    return Subject([lambda: timed_parts(step=step)], sample, about)


def _dense_layer(case, weight, bias):
    if case["kind"] == "linear":
        module = nn.Linear(case["in"], case["out"])
    else:
        module = nn.Conv2d(case["in"], case["out"], case["kernel"], stride=case["stride"], padding=case["padding"])
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module


def _sparse_layer(peer, case, module):
    """The peer's sparse version of a torch layer whose removed weights are zero."""
    if peer == "sparselab":
        return _sparselab_layer(case, module)
    if case["sparsity"] < SPARSEPROP_FROM:
        raise Unsupported("SparseProp leaves layers below 80 % dense")
    candidates = dict(_sparseprop_candidates(module))
    over = {"sparseprop-batch": "over batch", "sparseprop-on": "over width"}.get(peer)
    if over not in candidates:
        raise Unsupported(f"{case['kind']} has no {peer} kernel")
    if over == "over batch" and case["kind"] == "conv" and case["batch"] % 8:
        raise Unsupported("SparseProp 0.1.14 computes a wrong output for this batch, not of 8s")
    return candidates[over]


def _sparseprop_candidates(module):
    """SparseProp's versions of a torch layer: pairs (which, module)."""
    from sparseprop.modules import SparseConv2d, SparseLinear

    if isinstance(module, nn.Linear):
        yield "over batch", SparseLinear.from_dense(module)
    else:
        yield "over batch", SparseConv2d.from_dense(module, vectorizing_over_on=False)
        yield "over width", SparseConv2d.from_dense(module, vectorizing_over_on=True)


def _sparselab_layer(case, module):
    import sparselab
    from sparselab import layout

    if case["kind"] != "linear" or case["sparsity"] == 0:
        raise Unsupported("SparseLab has sparse linear layers only")
    sparse = sparselab.SparseLinear(case["in"], case["out"], sparsity=case["sparsity"])
    # It draws its own random mask, and has no way in for another: these are its two fields.
    sparse._csr = layout.from_dense(module.weight.data)
    sparse._values = nn.Parameter(torch.from_numpy(sparse._csr.values))
    with torch.no_grad():
        sparse.bias.copy_(module.bias)
    return sparse


def _csr_product(case, weight, bias, x):
    """PyTorch's own sparse product, which has no backward for a CSR weight."""
    if case["kind"] != "linear" or case["sparsity"] == 0:
        raise Unsupported("PyTorch's CSR product is for sparse linear layers")
    weight = weight.to_sparse_csr()

    def forward(_=None):
        return torch.mm(weight, x.t()).t() + bias

    return Subject([lambda: timed_parts(forward=forward)], lambda: {"y": sampled(forward())})


def _swap_in_sparseprop(model, x, dense):
    """Replaces layers by SparseProp's where these are faster: {layer: which}.

    Source: SparseProp's swap_modules_with_sparse. Differs: it times one cold pass of each
    candidate; here each has a warm-up and the median of three, so that noise does not choose.
    """
    inputs = _layer_inputs(model, x)
    chosen = {}
    for name, example in inputs.items():
        if name in dense:
            continue
        module = model.get_submodule(name)
        candidates = {"dense": module, **dict(_sparseprop_candidates(module))}
        seconds = {which: _trial(m, example) for which, m in candidates.items()}
        chosen[name] = min(seconds, key=seconds.get)
        model.set_submodule(name, candidates[chosen[name]])
    return chosen


def _layer_inputs(model, x):
    """The input of each convolution and linear layer in a forward pass, by name, in order."""
    inputs, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            keep = _keeper(inputs, name)
            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return inputs


def _keeper(inputs, name):
    def keep(module, arguments):
        inputs[name] = arguments[0].clone()

    return keep


def _trial(module, x):
    """Median seconds of forward and backward, over three passes after one."""
    inputs = [x.requires_grad_(), *module.parameters()]
    dy = torch.ones_like(module(x), memory_format=torch.contiguous_format)
    runs = [
        timed_parts(forward=lambda _: module(x), backward=lambda y: torch.autograd.grad(y, inputs, dy))
        for _ in range(4)
    ]
    return statistics.median(sum(run.values()) for run in runs[1:])


class Residual(nn.Module):
    """body(x) + shortcut(x), or + x."""

    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x):
        y = self.body(x)
        y += x if self.shortcut is None else self.shortcut(x)
        return y


def _relu():
    return nn.ReLU(inplace=True)


def _conv_bn_relu(inputs, outputs, stride=1):
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), _relu()]


def _mlp(channels):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784 * channels, 1024),
        _relu(),
        nn.Linear(1024, 1024),
        _relu(),
        nn.Linear(1024, 10),
    )


def _lenet5(channels):
    return nn.Sequential(
        nn.Conv2d(channels, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        _relu(),
        nn.Linear(500, 10),
    )


def _small_cnn(channels, width=32):
    pooled = [*_conv_bn_relu(channels, width), nn.MaxPool2d(2), *_conv_bn_relu(width, 2 * width), nn.MaxPool2d(2)]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(*pooled, *_conv_bn_relu(2 * width, 4 * width), *last)


def _vgg11(channels):
    layers = []
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for width in stage:
            layers += _conv_bn_relu(channels, width)
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


class PadChannels(nn.Module):
    """Every second pixel, and zero in as many channels again, half of them before."""

    def forward(self, x):
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))


def _projection(channels, width, stride):
    conv = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


def _resnet(channels, blocks, widths, shortcut=_projection):
    layers = _conv_bn_relu(channels, widths[0])
    channels = widths[0]
    for width in widths:
        for block in range(blocks):
            stride = 2 if block == 0 and width != widths[0] else 1
            body = [*_conv_bn_relu(channels, width, stride), *_conv_bn_relu(width, width)[:2]]
            around = shortcut(channels, width, stride) if channels != width else None
            layers += [Residual(nn.Sequential(*body), around), _relu()]
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def _resnet20(channels):
    return _resnet(channels, blocks=3, widths=(16, 32, 64))


def _resnet20_a(channels):
    return _resnet(channels, blocks=3, widths=(16, 32, 64), shortcut=lambda *_: PadChannels())


def _resnet18(channels):
    return _resnet(channels, blocks=2, widths=(64, 128, 256, 512))


NETS = {
    "resnet20": _resnet20,
    "resnet20_a": _resnet20_a,
    "resnet18": _resnet18,
    "vgg11": _vgg11,
    "lenet5": _lenet5,
    "small-cnn": _small_cnn,
    "mlp": _mlp,
}
