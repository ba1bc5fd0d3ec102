"""SGD, and what all optimisers share."""

import numpy as np
import pytest

from optimiser_steps import parameters, steps_agree_with_torch
from sparsetrain import optim
from sparsetrain.sparse import Parameter, SparseParameter

SETTINGS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_agrees_with_torch(settings, dtype):
    torch = pytest.importorskip("torch")
    steps_agree_with_torch(
        np.random.default_rng(0),
        lambda params: optim.SGD(params, lr=0.1, **settings),
        lambda params: torch.optim.SGD(params, lr=0.1, **settings),
        dtype,
        skip=lambda step, i: i == 1 and step in (0, 4),
    )


def test_one_step_by_hand():
    p = Parameter(np.array([1.0, -2.0], np.float32))
    optimizer = optim.SGD([p], lr=0.5, momentum=0.5, weight_decay=1.0)
    p.grad = np.array([1.0, 1.0], np.float32)
    optimizer.step()  # d = [2, -1], v = d, w = [1, -2] - 0.5 v
    np.testing.assert_array_equal(p.data, [0.0, -1.5])
    optimizer.step()  # d = [1, -0.5], v = [2, -1]
    np.testing.assert_array_equal(p.data, [-1.0, -1.0])
    np.testing.assert_array_equal(p.slots["momentum"], [2.0, -1.0])


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW])
def test_a_sparse_parameter_moves_as_its_dense_twin(kind):
    rng = np.random.default_rng(1)
    dense = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    mask = rng.random(dense.shape) < 0.3
    sparse, twin = SparseParameter.from_dense(dense, mask), Parameter(np.where(mask, dense, 0))
    settings = {"momentum": 0.9} if kind is optim.SGD else {}
    ours, theirs = (kind([p], lr=0.1, weight_decay=0.1, **settings) for p in (sparse, twin))
    for _ in range(3):
        grad = rng.standard_normal(dense.shape).astype(np.float32)
        sparse.grad, twin.grad = grad[mask], np.where(mask, grad, 0)
        ours.step()
        theirs.step()
    np.testing.assert_allclose(sparse.to_dense(), twin.data, rtol=1e-6)
    assert {a.shape for a in sparse.slots.values()} == {(mask.sum(),)}


def test_zero_grad_and_skipping():
    p, q = parameters(np.random.default_rng(0))
    before = q.data.copy()
    optimizer = optim.SGD([p, q], lr=1.0, weight_decay=0.1)
    p.grad = np.ones_like(p.data)
    optimizer.step()
    np.testing.assert_array_equal(q.data, before)
    optimizer.zero_grad()
    assert p.grad is None


def test_state_goes_over_to_another_optimiser():
    rng = np.random.default_rng(0)
    params = parameters(rng)
    copies = [Parameter(p.data.copy()) for p in params]
    first = optim.SGD(params, lr=0.1, momentum=0.9)
    for p in params:
        p.grad = np.ones_like(p.data)
    first.step()
    second = optim.SGD(copies, lr=1.0, momentum=0.1)
    second.load_state_dict(first.state_dict())
    assert (second.lr, second.momentum, second.steps) == (0.1, 0.9, [1, 1])
    for p, q in zip(params, copies, strict=True):
        np.testing.assert_array_equal(p.slots["momentum"], q.slots["momentum"])
        assert p.slots["momentum"] is not q.slots["momentum"]


def test_a_state_that_does_not_fit_changes_nothing():
    rng = np.random.default_rng(0)
    optimizer = optim.SGD(parameters(rng), lr=0.1, momentum=0.9)
    state = optim.SGD(parameters(rng), lr=0.5, momentum=0.9).state_dict()
    state["slots"]["1"]["momentum"] = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"state of 1: slot 'momentum' has shape \(4,\)"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="has the settings"):
        optimizer.load_state_dict(optim.Adam(parameters(rng)).state_dict())
    for wrong in ({"lr": -1}, {"momentum": 7}, {"nesterov": "no"}, {"weight_decay": -0.5}):
        state = optimizer.state_dict()
        state["settings"] |= {"momentum": 0.5} | wrong
        with pytest.raises((ValueError, TypeError), match=f"{next(iter(wrong))} is"):
            optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="state has the steps of 1 parameters, wanted those of 2"):
        optimizer.load_state_dict(optimizer.state_dict() | {"steps": [1]})
    assert (optimizer.lr, optimizer.momentum) == (0.1, 0.9)


def test_bad_arguments():
    p, q = parameters(np.random.default_rng(0))
    cases = [
        (lambda: optim.SGD([p], lr=-1), ValueError, "lr is -1"),
        (lambda: optim.SGD([p], lr=float("nan")), ValueError, "lr is nan"),
        (lambda: optim.SGD([p], lr=0.1, momentum=1.0), ValueError, "momentum is 1.0"),
        (lambda: optim.SGD([p], lr=0.1, momentum=-0.1), ValueError, "momentum is -0.1"),
        (lambda: optim.SGD([p], lr=0.1, weight_decay=-1), ValueError, "weight_decay is -1"),
        (lambda: optim.SGD([p], lr=0.1, nesterov=True), ValueError, "nesterov is True"),
        (lambda: optim.SGD([], lr=0.1), ValueError, "params is empty"),
        (lambda: optim.SGD([p, q, p], lr=0.1), ValueError, "one Parameter twice, as 0 and 2"),
        (lambda: optim.SGD([("a", p), ("a", q)], lr=0.1), ValueError, "two Parameters named a"),
        (lambda: optim.SGD(p, lr=0.1), TypeError, "params is one Parameter"),
        (lambda: optim.SGD([p.data], lr=0.1), TypeError, "is a ndarray, not a Parameter"),
        (lambda: optim.Adam([p], betas=(0.9, 1.0)), ValueError, r"betas\[1\] is 1.0"),
        (lambda: optim.Adam([p], betas=0.9), ValueError, "betas is 0.9"),
        (lambda: optim.AdamW([p], eps=-1e-8), ValueError, "eps is -1e-08"),
    ]
    for make, error, message in cases:
        with pytest.raises(error, match=message):
            make()


def test_a_gradient_that_does_not_fit():
    p, q = parameters(np.random.default_rng(0))
    optimizer = optim.SGD([("a", p), ("b", q)], lr=0.1)
    q.grad = np.zeros(3)
    with pytest.raises(ValueError, match=r"gradient of b is float64 \(3,\), must be float32"):
        optimizer.step()


def test_lr_can_be_set():
    optimizer = optim.SGD(parameters(np.random.default_rng(0)), lr=0.1)
    optimizer.lr = 0.01
    assert optimizer.lr == 0.01
    with pytest.raises(ValueError, match="lr is -0.1"):
        optimizer.lr = -0.1


def test_gradients_of_any_layout():
    """Somebody's own: by columns, read-only, broadcast."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    fixed = values.copy()
    fixed.flags.writeable = False
    for grad in (np.asfortranarray(values), fixed, np.broadcast_to(np.float32(2), (3, 4))):
        parameter = Parameter(np.ones((3, 4), np.float32))
        parameter.grad = grad
        optim.SGD([parameter], 0.5).step()
        np.testing.assert_array_equal(parameter.data, 1 - 0.5 * grad)


def test_a_slot_that_does_not_fit_changes_nothing():
    first, second = (Parameter(np.ones(5, np.float32)) for _ in range(2))
    first.grad = second.grad = np.ones(5, np.float32)
    second.slots["momentum"] = np.zeros(4, np.float32)
    optimizer = optim.SGD([first, second], 0.5, momentum=0.9)
    with pytest.raises(ValueError, match="array 2 of row 1 has 16 bytes of 'f', must be .* 20"):
        optimizer.step()
    assert (first.data == 1).all() and optimizer.steps == [0, 0]


def test_parameters_that_are_one_array_move_one_after_the_other():
    shared = np.zeros(1 << 18, np.float32)
    parameters = [Parameter(shared) for _ in range(8)]
    for i, parameter in enumerate(parameters):
        parameter.grad = np.full(1 << 18, i + 1, np.float32)
    optim.SGD(parameters, 1.0).step()
    assert (shared == -36).all()
