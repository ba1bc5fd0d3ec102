"""A layer of one's own, PReLU, in NumPy on blocked arrays, and a net that trains with it."""

import numpy as np

import sparsetrain as st
from sparsetrain import data, nn, optim
from sparsetrain.train import EpochLines


class PReLU(nn.Module):
    """y = x where x > 0, else slope * x, with a slope a channel. Source: arXiv 1502.01852."""

    def __init__(self, channels):
        self.slope = nn.Parameter(np.full(channels, 0.25, np.float32))

    def forward(self, x, halo):
        slope = self.slope.data.reshape(-1, 1, 1, 1)  # x.array is (blocks, C, H, W, 16)
        y = x.like(halo)
        y.array[...] = np.where(x.array > 0, x.array, slope * x.array)

        def backward(dy, halo):
            dslope = (dy.array * np.minimum(x.array, 0)).sum(axis=(0, 2, 3, 4))
            grad, accumulate = self.slope.gradient()
            grad[...] = grad + dslope if accumulate else dslope
            dx = x.like(halo or (0, 0))
            dx.array[...] = np.where(x.array > 0, dy.array, slope * dy.array)
            return dx

        return y, backward


if __name__ == "__main__":
    images = data.load("fashion-mini")
    train = data.Batches(*images.train, 64, shuffle=True, mean=images.mean, std=images.std)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), PReLU(16),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), PReLU(32),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip
    st.sparsify(model, sparsity=0.8, exclude=["0"])
    optimizer = optim.SGD(model.named_parameters(), lr=0.02, momentum=0.9)
    st.Trainer(model, optimizer, callbacks=[EpochLines()]).fit(train, epochs=1)
    print("slopes:", model[1].slope.data.round(2))
