"""The operations of layers on blocked arrays: pure pairs, forward and backward, and the choice of their plans.

Each forward returns its output, with a halo as its consumer wants it; each backward takes dy and returns dx with
the halo that its consumer wants. Parameters' gradients are written through Parameter.gradient().
"""

import time
from functools import cache, partial, wraps

import numpy as np

from sparsetrain import arrays, bands, choices, plans
from sparsetrain._kernels import core
from sparsetrain.normed import Normed, NormedGradient
from sparsetrain.record import tell, told


def planned(weight, kind, geometry, build, *blocked):
    """The plan of this kind for arrays of these strides, made once for the weight's structure."""
    layout = tuple([(b.array.shape, b.array.strides) for b in blocked])
    key = (kind, geometry, layout, core.get_isa(), choices.edition())
    plan = weight.structure.plans.get(key)
    if plan is None:
        plan = weight.structure.plans[key] = build(weight.structure, geometry, *blocked)
    return plan


def _dense_if_faster(operation):
    """The operation, with all weights, zeros too, where so few are removed that the dense kernels are faster."""

    @wraps(operation)
    def run(x, weight, *arguments, **options):
        geometry = arguments[0] if isinstance(arguments[0], plans.Geometry) else arguments[1]
        if not plans.is_nearly_dense(weight.structure, x.shape[1], geometry):
            return operation(x, weight, *arguments, **options)
        full = weight.full()
        result = operation(x, full, *arguments, **options)
        if full.grad is not None:
            weight.collect()
        return result

    return run


@_dense_if_faster
def conv2d(x, weight, bias, geometry, halo=(0, 0), relu=False):
    """y = W * x + b, or max(y, 0) with relu.

    x Blocked (N, C, H, W); weight a Parameter (O, C / groups, KH, KW) or SparseParameter of that shape; bias a
    Parameter (O,) or None; geometry plans.Geometry. The output must not be empty.
    """
    kernel = (*weight.shape, 1, 1)[2:4]
    blocks, _, height, width, _ = x.array.shape
    x = x.with_halo(geometry.padding)
    oh, ow = geometry.output(kernel, height, width)
    y = arrays.empty(x.n, weight.shape[0], oh, ow, x.dtype, halo, x.ndim)
    start = time.perf_counter()
    step = planned(weight, "forward", geometry, plans.forward, x, y)
    values, b = step.values(weight.data.reshape(-1)), None if bias is None else bias.data
    core.spmm(step.plan, x.array, values, b, y.array, False, relu)
    tell("forward", start, [x], [y], weight=weight, output=y, plans=(step.plan,))
    return y


def bias_gradient(bias, dy):
    """Adds the gradient of a bias (a Parameter or None), the sum of dy over images and pixels."""
    if bias is not None:
        core.bias_grad(dy.array, *bias.gradient())


def weight_gradient(x, weight, geometry, dy):
    """Adds the gradient of the weight of conv2d()."""
    start = time.perf_counter()
    grad, accumulate = weight.gradient()
    used = ()
    if len(weight.shape) == 2 and weight.structure.dense:
        core.linear_gradient(x.array, dy.array, grad, accumulate)
    else:
        x = x.with_halo(geometry.padding)
        used = (planned(weight, "weight", geometry, plans.weight_gradient, x, dy),)
        core.sddmm(*used, x.array, dy.array, grad.reshape(-1), accumulate)
    tell("weight gradient", start, [x, dy], [], weight=weight, output=dy, plans=used)


def input_gradient(x, weight, geometry, dy, halo=(0, 0), into=None):
    """dx of conv2d(), added to the Blocked `into` if given."""
    start = time.perf_counter()
    dy = dy.with_halo(geometry.grad_halo((*weight.shape, 1, 1)[2:4]))
    dx = x.like(halo) if into is None else into
    steps = planned(weight, "input", geometry, plans.input_gradient, dy, dx)
    for step in steps:
        core.spmm(step.plan, dy.array, step.values(weight.data.reshape(-1)), None, dx.array, into is not None)
    used = tuple(step.plan for step in steps)
    tell("input gradient", start, [dy, into], [dx], weight=weight, output=dy, plans=used)
    return dx


@_dense_if_faster
def conv2d_backward(x, weight, bias, geometry, dy, halo=(0, 0), into=None):
    """dx of conv2d(), added to the Blocked `into` if given; adds the gradients of weight and bias too.

    No dx if halo is None.
    """
    bias_gradient(bias, dy)
    weight_gradient(x, weight, geometry, dy)
    return None if halo is None else input_gradient(x, weight, geometry, dy, halo, into)


def can_band(x, weight, geometry):
    """Whether conv2d_bands() is worth while for this x."""
    output = geometry.output(weight.shape[2:], *x.shape[2:])
    blocks = -(-x.n // arrays.IMAGES)
    return bands.can_band(weight.structure, geometry, (blocks, *x.shape[1:], arrays.IMAGES), output)


def _band_arguments(x, geometry):
    """(x or what it is normed from, what the bands read: that or x itself where it is formed already, whether they read
    x itself, what forms it for core's functions)."""
    if not isinstance(x, Normed):
        x = x.with_halo(geometry.padding)
        return x, x, True, {}
    if x.formed is None:
        return x.x, x.x, False, x.forming
    x.formed = x.with_halo(geometry.padding)
    return x.x, x.formed, True, _formed(x)


def _formed(x):
    """What tells core's functions that a Normed is formed already."""
    return {"scale": x.norm.scale, "shift": x.norm.shift, "relu": x.relu, "formed": x.formed.array}


@_dense_if_faster
def conv2d_bands(x, weight, geometry, moments):
    """conv2d() of a Blocked or Normed x, which is formed band by band. Writes mean and biased variance of y, (O,) each,
    to the pair `moments` unless None."""
    start = time.perf_counter()
    if isinstance(x, Normed) and x.keep is not None and not geometry.reads_in_step(weight.shape[2:]):
        x.with_halo(geometry.padding)  # the bands would not form all of what is to be kept
    source, lies, formed, forming = _band_arguments(x, geometry)
    read = [lies] if formed else x.sources()
    y = arrays.empty(x.n, weight.shape[0], *geometry.output(weight.shape[2:], *x.shape[2:]), x.dtype)
    build = partial(bands.forward, formed=formed)
    plan, step = planned(weight, ("forward bands", formed), geometry, build, lies, y)
    keep = None
    if not formed and x.keep is not None:
        keep = x.like(tuple(map(max, x.keep, geometry.padding)))
        forming["keep"] = keep.array
    mean, var = moments or (None, None)
    core.conv_bands(plan, x.n, source.array, step.values(weight.data.reshape(-1)), None, y.array, mean, var, **forming)
    if keep is not None:
        x.formed = keep
    tell(
        "forward", start, read, [y, keep], weight=weight, output=y, plans=(plan,),
        normed=x if isinstance(x, Normed) else None, forms=not formed, kept=keep is not None, sums=moments is not None,
    )  # fmt: skip
    return y


@_dense_if_faster
def conv2d_bands_backward(x, weight, geometry, y, norm, dy, halo=(0, 0), into=None):
    """dx of conv2d_bands(), added to the Blocked `into` if given; adds the gradient of weight too.

    No dx if halo is None. norm: the Norm of y; dy: the NormedGradient of its output. The dx of a Normed is a
    NormedGradient.
    """
    start = time.perf_counter()
    source, lies, formed, forming = _band_arguments(x, geometry)
    dx = None if halo is None else x.like(halo) if into is None else into
    build = partial(bands.backward, formed=formed)
    if dx is None:
        build = partial(build, dx=None)
    plan, steps = planned(weight, ("backward bands", formed), geometry, build, lies, y, *(() if dx is None else (dx,)))
    pixels = y.n * y.array.shape[2] * y.array.shape[3] if norm.training else 0
    grad, accumulate = weight.gradient()
    sums = None
    if isinstance(x, Normed) and dx is not None:
        sums = np.empty((2, x.shape[1]))
        forming |= {"x_mean": x.norm.mean, "x_sums": sums}
    values = [step.values(weight.data.reshape(-1)) for step in steps]
    core.conv_bands_backward(
        plan, x.n, source.array, y.array, dy.array, norm.scale, norm.mean, dy.sums, norm.inverse, pixels,
        grad.reshape(-1), accumulate, None if dx is None else dx.array, values, into is not None, **forming,
    )  # fmt: skip
    normed = x if isinstance(x, Normed) else None
    read = x.sources() if not formed else [lies] if sums is None else [lies, source]
    tell(
        "backward", start, [*read, y, dy, into], [dx], weight=weight, output=y, plans=(plan,),
        normed=normed, forms=not formed, sums=sums is not None,
    )  # fmt: skip
    return dx if sums is None else NormedGradient(dx, sums)


def norm_parameter_gradients(weight, bias, norm, dy):
    """Adds the gradients of a batch norm's weight and bias, for the NormedGradient of its output."""
    core.norm_parameter_gradients(dy.sums, norm.inverse, *weight.gradient(), *bias.gradient())


def normed_gradient(y, dy):
    """The NormedGradient of the Normed y from any gradient of it, which is changed."""
    start = time.perf_counter()
    sums = np.empty((2, y.shape[1]))
    formed = y.with_halo((0, 0)) if y.relu and y.add is not None else None
    core.norm_gradient_sums(
        y.x.array, dy.array, y.norm.scale, y.norm.shift, y.norm.mean, sums, y.relu,
        None if formed is None else formed.array,
    )  # fmt: skip
    tell("normed_gradient", start, [y.x, dy, formed], [dy] if y.relu else [])
    return NormedGradient(dy, sums)


@told
def relu(x, halo=(0, 0)):
    """y = max(x, 0)."""
    y = x.like(halo)
    core.relu(x.array, y.array)
    return y


@told
def relu_backward(y, dy, halo=(0, 0)):
    """dx of relu(), from its output; written into dy where that has the halo."""
    dx = dy if dy.has_halo(halo) else y.like(halo)
    core.relu_backward(y.array, dy.array, dx.array)
    return dx


def add(a, b, halo=(0, 0)):
    """a + b."""
    y = a.like(halo)
    core.add(a.array, b.array, y.array)
    return y


@told
def dropout(x, keep, seed, halo=(0, 0)):
    """x / keep at a random share `keep` of the elements, 0 elsewhere. It is its own backward, with the same seed."""
    y = x.like(halo)
    core.dropout(x.array, y.array, keep, seed)
    return y


@cache
def windows(size, kernel, stride, padding):
    """Begin, end and divisor (3, outputs) of the windows of one axis; the padding counts in the divisor."""
    begin = np.arange((size + 2 * padding - kernel) // stride + 1) * stride - padding
    end = np.minimum(begin + kernel, size + padding)
    return _fixed(np.maximum(begin, 0), np.minimum(end, size), end - begin)


@cache
def adaptive_windows(size, outputs):
    """Begin, end and divisor (3, outputs) of windows that cover the axis evenly."""
    i = np.arange(outputs)
    begin, end = i * size // outputs, -(-(i + 1) * size // outputs)
    return _fixed(begin, end, end - begin)


def _fixed(*rows):
    found = np.stack(rows).astype(np.int32)
    found.flags.writeable = False  # it is there for all who ask again
    return found


def _pooled(x, h, w, halo):
    return arrays.empty(x.n, x.shape[1], h.shape[1], w.shape[1], x.dtype, halo)


def _unformed(x):
    """(what is read of x, and what forms x of it for core's functions) of a Normed to which nothing is added and that
    nobody has written yet; else (x, nothing)."""
    if not isinstance(x, Normed) or x.formed is not None or x.add is not None:
        return x, {}
    return x.x, {"scale": x.norm.scale, "shift": x.norm.shift, "relu": x.relu}


def max_pool2d(x, h, w, halo=(0, 0)):
    """The maximum over each window; h and w from windows(). A Normed is formed on the way."""
    start = time.perf_counter()
    source, forming = _unformed(x)
    y = _pooled(x, h, w, halo)
    core.max_pool(source.array, y.array, h, w, **forming)
    more = {"normed": x, "forms": True} if forming else {}
    tell("max_pool2d", start, [source], [y], **more)
    return y


def max_pool2d_backward(x, y, h, w, dy, halo=(0, 0)):
    """dx of max_pool2d(): the first maximum of a window gets its gradient. The dx of a Normed is a NormedGradient."""
    start = time.perf_counter()
    source, forming = _unformed(x)
    dx, sums = x.like(halo), None
    if forming:
        sums = np.empty((2, x.shape[1]))
        forming |= {"mean": x.norm.mean, "sums": sums}
    core.max_pool_backward(source.array, y.array, dy.array, dx.array, h, w, **forming)
    more = {"normed": x, "forms": True, "sums": True} if forming else {}
    tell("max_pool2d_backward", start, [source, y, dy], [dx], **more)
    return dx if sums is None else NormedGradient(dx, sums)


@told
def avg_pool2d(x, h, w, halo=(0, 0)):
    """The mean over each window; h and w from windows() or adaptive_windows()."""
    y = _pooled(x, h, w, halo)
    core.avg_pool(x.array, y.array, h, w)
    return y


@told
def avg_pool2d_backward(size, h, w, dy, halo=(0, 0)):
    """dx of avg_pool2d() of an x with `size` (height, width)."""
    dx = arrays.empty(dy.n, dy.array.shape[1], *size, dy.dtype, halo)
    core.avg_pool_backward(dy.array, dx.array, h, w)
    return dx


def flatten(x, halo=(0, 0)):
    """(n, channels, height, width) to (n, channels * height * width), in the same memory where they lie so already."""
    blocks, c, h, w, _ = x.array.shape
    if tuple(halo) == (0, 0) and _lies_flat(x.array):
        return arrays.Blocked(x.array.reshape(blocks, c * h * w, 1, 1, arrays.IMAGES), x.n, (0, 0), 2)
    start = time.perf_counter()
    y = arrays.empty(x.n, c * h * w, 1, 1, x.dtype, halo, 2)
    core.copy(x.array, _unflattened(y, (c, h, w)))
    tell("flatten", start, [x], [y])
    return y


def flatten_backward(shape, dy, halo=(0, 0)):
    """dx of flatten() of an x with `shape` (channels, height, width), in the memory of dy where it needs no halo."""
    start = time.perf_counter()
    flat = arrays.Blocked(_unflattened(dy, shape), dy.n, (0, 0), 4)
    dx = flat.with_halo(halo)
    if dx is not flat:
        tell("flatten_backward", start, [dy], [dx])
    return dx


def _lies_flat(array):
    """Whether the pixels of all channels of an image block lie one after the other."""
    _, c, h, w, _ = array.shape
    pixel = array.strides[3]
    return (h == 1 or array.strides[2] == w * pixel) and (c == 1 or array.strides[1] == h * w * pixel)


def _unflattened(y, shape):
    """The features of y seen as (blocks, channels, height, width, 16), without a copy."""
    return y.array[:, :, 0, 0].reshape(len(y.array), *shape, arrays.IMAGES)  # an axis that is split needs no copy
