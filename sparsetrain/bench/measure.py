"""Times layers and nets: what a case is, how one repetition is timed, and in which order repetitions are taken."""

import math
import statistics
import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sparsetrain import arrays, nn, optim, rng
from sparsetrain._kernels import core
from sparsetrain.bench import shapes
from sparsetrain.sparsity import sparsify
from sparsetrain.train import Trainer

# Passes follow each other until this much time is measured, for one repetition.
MIN_SECONDS = 0.02
# A pass shorter than this runs once more untimed: other cases have emptied the caches.
WARM_SECONDS = 0.1
# Images and batch of the nets, as in the papers that use them.
NETS = {
    "lenet5": ((1, 28, 28), 64),
    "mlp": ((1, 28, 28), 128),
    "resnet20": ((3, 32, 32), 128),
    "resnet18": ((3, 32, 32), 64),
    "vgg11": ((3, 32, 32), 64),
    "small-cnn": ((1, 28, 28), 64),
    "lenet300": ((1, 28, 28), 64),
}
BATCHES = (16, 32, 64, 128, 256)


@dataclass
class Case:
    """Something to time. what: "layer" or "net", or which scaling it is part of, "threads" or "batch".

    build(about) makes it, adds what it learns (the stored weights) to `about` and returns a function that runs it once
    and returns {part: seconds}. about: name, batch, sparsity and, of a layer, its shape.
    """

    what: str
    about: dict
    threads: int
    build: callable
    repetitions: list = field(default_factory=list)  # {part: mean seconds of a pass}

    @cached_property
    def one_pass(self):
        return self.build(self.about)

    def repeat(self, settle):
        """Measure one repetition more. settle(threads) is called before, when nothing is left to build."""
        core.set_num_threads(self.threads)
        if not self.repetitions:
            self.one_pass()  # makes plans and meets memory for the first time
        settle(self.threads)
        seconds = sum(self.one_pass().values())
        if seconds < WARM_SECONDS:
            seconds = sum(self.one_pass().values())
        runs = [self.one_pass() for _ in range(max(1, math.ceil(MIN_SECONDS / seconds)))]
        self.repetitions.append({part: statistics.fmean(run[part] for run in runs) for part in runs[0]})

    def result(self):
        """What goes into the results: about, and all repetitions by part."""
        parts = {part: [r[part] for r in self.repetitions] for part in self.repetitions[0]}
        return {"what": self.what, **self.about, "threads": self.threads, "seconds": parts}


def run(cases, repeats, budget, settle, clock=time.perf_counter, done=lambda: None):
    """Repeat every case once, then all in turn until each has `repeats` or `budget` seconds are over.

    settle(threads) is called before every repetition, done() after it.
    """
    start = clock()
    for number in range(repeats):
        for case in cases:
            if number > 0 and clock() - start >= budget:
                return
            case.repeat(settle)
            done()


def layer_cases(layers, sparsities, threads):
    """A case for each layer and sparsity."""
    return [_layer(layer, inputs, s, threads) for layer in layers for inputs in [Inputs(layer)] for s in sparsities]


def net_cases(names, sparsities, threads):
    """A case for each net, by its name in NETS, and sparsity: a training step with SGD."""
    return [_net(name, s, threads) for name in names for s in sparsities]


def scaling_cases(layers, nets, sparsity, threads):
    """One layer and the last net with 1, 2, 4, ... and all threads, and the layer over BATCHES.

    The layer is the convolution, else linear layer, with the most work an image, among those of which 256 images are
    at most 64 MB.
    """
    cases = []
    counts = thread_counts(threads)
    layer = max(layers, key=_fitness, default=None)
    if layer and len(counts) > 1:
        inputs = Inputs(layer)
        cases += [_layer(layer, inputs, sparsity, n, "threads") for n in counts]
    if nets and len(counts) > 1:
        cases += [_net(nets[-1], sparsity, n, "threads") for n in counts]
    if layer:
        sizes = [shapes.with_batch(layer, batch) for batch in BATCHES]
        cases += [_layer(size, Inputs(size), sparsity, threads, "batch") for size in sizes]
    return cases


def _fitness(layer):
    one = shapes.with_batch(layer, 1)
    operations, _ = shapes.work(one, math.prod(shapes.module(layer).weight.shape), dense=True)["forward"]
    return 256 * 4 * math.prod(shapes.input_shape(one)) <= 64 << 20, layer["kind"] == "conv", operations


def thread_counts(threads):
    """1, 2, 4, ... and `threads`."""
    return sorted({*(1 << i for i in range(threads.bit_length())), threads})


class Inputs:
    """Random x and dy of a layer as they lie inside a net, made when they are first needed."""

    def __init__(self, layer):
        self.layer = layer

    @cached_property
    def x(self):
        return self._random(shapes.input_shape(self.layer), shapes.module(self.layer).halo)

    @cached_property
    def dy(self):
        return self._random(shapes.output_shape(self.layer), shapes.module(self.layer).grad_halo)

    @staticmethod
    def _random(shape, halo):
        return arrays.pack(np.random.default_rng(0).standard_normal(shape, np.float32), halo)


def _layer(layer, inputs, sparsity, threads, what="layer"):
    def build(about):
        rng.manual_seed(0)
        module = shapes.module(layer)
        if sparsity:
            sparsify(nn.Sequential(module), sparsity, method="random")
        about["stored"] = module.weight.nnz
        x, dy = inputs.x, inputs.dy

        def one_pass():
            module.zero_grad()
            start = time.perf_counter()
            _, backward = module.forward(x, (0, 0))
            middle = time.perf_counter()
            backward(dy, (0, 0))
            return {"forward": middle - start, "backward": time.perf_counter() - middle}

        return one_pass

    return Case(what, {"sparsity": sparsity, **layer}, threads, build)


def _net(name, sparsity, threads, what="net"):
    image, batch = NETS[name]

    def build(about):
        rng.manual_seed(0)
        model = getattr(nn.models, name.replace("-", "_"))(in_channels=image[0])
        if sparsity:
            sparsify(model, sparsity, method="random", exclude=_kept_dense(model))
        about["stored"] = sum(p.nnz for p in model.parameters() if len(p.shape) > 1)
        # A small rate, so that many steps on one batch stay tame.
        trainer = Trainer(model, optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
        random = np.random.default_rng(0)
        x, labels = random.standard_normal((batch, *image), np.float32), random.integers(10, size=batch)

        def one_pass():
            start = time.perf_counter()
            trainer.train_step(x, labels)
            return {"step": time.perf_counter() - start}

        return one_pass

    return Case(what, {"name": name, "batch": batch, "sparsity": sparsity}, threads, build)


def _kept_dense(model):
    """Names of the last layer and, where it is a convolution, the first: SparseProp's choice, arXiv 2302.04852."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    (first, layer), (last, _) = layers[0], layers[-1]
    return [first, last] if isinstance(layer, nn.Conv2d) else [last]
