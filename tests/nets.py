"""Small whole nets, with every kind of layer, for the tests of whole nets."""

import numpy as np

from sparsetrain import nn, rng


def small_net(pool=nn.MaxPool2d, width=4):
    """(N, 3, 8, 8) to (N, 5), by one layer at least of every kind but dropout.

    Batch norms start with random parameters: with a bias of 0, a channel without weights would
    stand on the kink of the ReLU, where there is no derivative.
    """
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        pool(2),
        nn.Residual(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False),
                nn.BatchNorm2d(width),
            )
        ),
        nn.ReLU(),
        nn.Residual(
            nn.Sequential(nn.Conv2d(width, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)),
            shortcut=nn.Conv2d(width, 6, 1, stride=2),
        ),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(12, 7),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 5),
    )
    for _, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.weight.data[...] = rng.generator().uniform(0.5, 1.5, module.num_features)
            module.bias.data[...] = rng.generator().uniform(-0.5, 0.5, module.num_features)
    return net


def images(n=6, dtype=np.float32, seed=0):
    """x (n, 3, 8, 8) and labels (n,) for small_net."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, 3, 8, 8)).astype(dtype)
    return x, generator.integers(0, 5, n)
