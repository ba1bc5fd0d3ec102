"""Which layers of a model run in the pass of another one."""

from sparsetrain.nn.containers import Residual, Sequential
from sparsetrain.nn.convnorm import ConvNorm


def run_with(model):
    """({batch norm: names of what runs in its pass}, {convolution: the batch norm whose sums it takes}), by id().

    As long as nothing changes the model or what containers fuse.
    """
    names = {id(module): name for name, module in model.named_modules()}
    passes, norms = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Residual) and module.fuses_relu:
            passes.setdefault(id(_last(module)), []).insert(0, f"add of {name}")
        if not isinstance(module, Sequential):
            continue
        layers = iter(module.layers)
        for step, relu in module.steps():
            next(layers)
            if isinstance(step, ConvNorm):
                norms[id(step.conv)] = next(layers)
            if relu:
                passes.setdefault(id(_last(step)), []).append(names[id(next(layers))])
    return passes, norms


def _last(step):
    """The layer that takes what is fused into a step of a Sequential."""
    if isinstance(step, ConvNorm):
        return step.norm
    if isinstance(step, Residual):
        return _last(step.body)
    if isinstance(step, Sequential):
        return _last(step.layers[-1])
    return step
