"""A method of backprop of one's own: values of the output gradients are kept at random, and a net trains with it."""

from dataclasses import dataclass

import numpy as np

import sparsetrain as st
from sparsetrain import backprop, data, nn, optim
from sparsetrain.train import EpochLines


@dataclass
class RandomKeep(backprop.Method):
    """A value is kept with a chance of `keep`, in (0, 1], and then divided by it: its mean stays."""

    keep: float = 0.2

    def check(self):
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}, must be in (0, 1]")

    def select(self, layer, x, geometry, dy):
        used = dy.like()  # dy.array is (blocks, C, H, W, 16)
        kept = layer.random().random(dy.array.shape) < self.keep
        np.multiply(dy.array, kept / self.keep, out=used.array, casting="same_kind")
        return used


if __name__ == "__main__":
    images = data.load("fashion-mini")
    train = data.Batches(*images.train, 64, shuffle=True, mean=images.mean, std=images.std)
    model = nn.models.small_cnn()
    optimizer = optim.SGD(model.named_parameters(), lr=0.02, momentum=0.9)
    method = RandomKeep(keep=0.2, exclude=("0",), layers={"13": {"keep": 0.5}})
    history = st.Trainer(model, optimizer, backprop=method, callbacks=[EpochLines()]).fit(train, epochs=1)
    for name, row in history[-1]["layers"].items():
        print(
            f"layer {name}: {row['gradient_sparsity']:.2f} of the gradient not used, {row['ms']:.1f} ms a backward pass"
        )
