"""ReSprop: output gradients of the last step are used again where they changed little."""

from dataclasses import dataclass

import numpy as np

from sparsetrain import arrays, checks, sparse_gradient
from sparsetrain._kernels import core
from sparsetrain.backprop.method import Method

FIRST_THRESHOLD = 1e-7
LEAST_THRESHOLD = 1e-13  # or a threshold halved in many steps without a gradient would not come back
MARGIN = 0.05  # more values than 1 - reuse are computed
SAMPLE = 1 << 10  # places, of 16 images each, that a quantile is taken of: 10 % is met to about 0.3 points


@dataclass
class ReSprop(Method):
    """The gradient of one random image of the last step stands for that of all images, except where it differs by
    more than a threshold.

    What all images share is multiplied once for the batch; only the differences are multiplied one by one. reuse in
    [0, 1): the share of values to take from the last step, of which a margin of 5 points is computed all the same.
    The bias's gradient is exact. The first and the last step of an epoch are exact, and so is one whose batch has
    another size than the last one's.

    control: "paper" halves or doubles a layer's threshold, from 1e-7 on, after each step that used too few or too many
    values; it swings around the target. "quantile" takes the threshold that the target needs from a sample of each
    gradient. warmup (W-ReSprop): nothing is reused in epochs 0 and 1, and 10 % more in each from 2 on.

    The code leaves linear layers exact, and so should you (`exclude`): with them LeNet-5 on MNIST at reuse 0.9
    collapsed under quantile control (docs/papers.md).

    Source: Goli & Aamodt, Resprop, CVPR 2020, and its code (negargoli/ReSprop): the target has a margin of 5 %.
    Deviation: the image is any of the batch, where the code draws from as many as there are layers.
    """

    reuse: float = 0.9
    warmup: bool = False
    control: str = "paper"

    def check(self):
        checks.fraction("reuse", self.reuse)
        checks.flag("warmup", self.warmup)
        checks.one_of("control", self.control, ("paper", "quantile"))

    def target(self, epoch):
        """The share of values to compute in an epoch, counted from 0."""
        least = min(1.0, 1 - self.reuse + MARGIN)
        if not self.warmup or epoch > 8:
            return least
        return 1.0 if epoch < 2 else max(1 - epoch / 10, least)

    def select(self, layer, x, geometry, dy):
        base = layer.state.get("base")
        last = layer.steps is not None and layer.step == layer.steps - 1
        fits = base is not None and layer.state["images"] == dy.n and base.shape == dy.array.shape[1:4]
        if layer.step == 0 or last or not fits or self.target(layer.epoch) >= 1:
            return None
        if self.control == "quantile":
            threshold = self._quantile(layer, dy, base)
            if not np.isfinite(threshold):  # what is not finite must show
                return None
        else:
            threshold = float(layer.state.setdefault("threshold", FIRST_THRESHOLD))
        return sparse_gradient.above(threshold, base)

    def _quantile(self, layer, dy, base):
        """The threshold that the target needs, from the values of all images of some blocks at some places."""
        random, (blocks, *image) = layer.random(), dy.array.shape[:4]
        b, (c, h, w) = random.integers(0, blocks, SAMPLE), (random.integers(0, n, SAMPLE) for n in image)
        real = b[:, None] * arrays.IMAGES + np.arange(arrays.IMAGES) < dy.n
        differences = np.abs(dy.array[b, c, h, w] - base[c, h, w][:, None])[real]
        place = int((1 - self.target(layer.epoch)) * len(differences))
        return float(np.partition(differences, place)[place])

    def after(self, layer, dy, used):
        if used is not None and self.control == "paper":
            target = self.target(layer.epoch)
            factor = 0.5 if used.density < target else 2.0 if used.density > target else 1.0
            layer.state["threshold"] = max(LEAST_THRESHOLD, float(layer.state["threshold"]) * factor)
        block, lane = divmod(int(layer.random().integers(dy.n)), arrays.IMAGES)
        base = layer.state["base"] = np.empty(dy.array.shape[1:4], dy.dtype)
        core.from_blocked(dy.array[block : block + 1, ..., lane:], base[None])
        layer.state["images"] = dy.n
