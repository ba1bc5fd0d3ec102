"""Adam and AdamW."""

import numpy as np
import pytest

from optimiser_steps import steps_agree_with_torch
from sparsetrain import optim
from sparsetrain.sparse import Parameter


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9), "eps": 1e-3}], ids=str)
def test_agrees_with_torch(name, settings, dtype):
    torch = pytest.importorskip("torch")
    steps_agree_with_torch(
        np.random.default_rng(0),
        lambda params: getattr(optim, name)(params, lr=0.01, **settings),
        lambda params: getattr(torch.optim, name)(params, lr=0.01, **settings),
        dtype,
        skip=lambda step, i: i == 1 and step in (0, 4),  # its own count of steps lags behind
    )


@pytest.mark.parametrize("kind, decayed", [(optim.Adam, 1.0), (optim.AdamW, 0.9)])
def test_first_step_has_the_size_of_lr(kind, decayed):
    p = Parameter(np.array([1.0, 1.0]))
    optimizer = kind([p], lr=0.1, eps=0.0, weight_decay=1.0)
    p.grad = np.array([5.0, -3.0])  # Adam adds the weight, 1: the signs stay + and -
    optimizer.step()
    np.testing.assert_allclose(p.data, [decayed - 0.1, decayed + 0.1])


def test_default_weight_decay():
    p = Parameter(np.ones(1))
    assert (optim.Adam([p]).weight_decay, optim.AdamW([p]).weight_decay) == (0.0, 0.01)
