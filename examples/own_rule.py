"""A rule of one's own for which weights exist: a net trains with 10 % of its weights, and changes which."""

from dataclasses import dataclass

import numpy as np

import sparsetrain as st
from sparsetrain import data, nn, optim, rng, sparsity
from sparsetrain.train import EpochLines


@dataclass
class RandomRigL(sparsity.DropGrow):
    """Weights go at random, and come where the gradients are largest."""

    def prepare(self):
        for layer in self.layers:
            if self.count(layer):
                layer.probe(self.count(layer))

    def drop(self, layer, count):
        kept = np.ones(layer.weight.nnz, bool)
        kept[rng.generator().choice(layer.weight.nnz, count, replace=False)] = False
        return kept

    def grow(self, layer, kept, count):
        return sparsity.largest_gradients(layer, kept, count)


if __name__ == "__main__":
    images = data.load("fashion-mini")
    train = data.Batches(*images.train, 64, shuffle=True, mean=images.mean, std=images.std)
    st.manual_seed(0)
    model = nn.models.small_cnn()
    optimizer = optim.SGD(model.named_parameters(), lr=0.02, momentum=0.9)
    method = RandomRigL(0.9, stop=3 * len(train) // 4, every=max(1, len(train) // 8), exclude=("0",))
    history = st.Trainer(model, optimizer, sparsity=method, callbacks=[EpochLines()]).fit(train, epochs=1)
    for name, row in history[-1]["weights"].items():
        print(f"layer {name}: {row['nnz']:,} of {row['weights']:,} weights, {row['explored']:.1%} existed at some time")
