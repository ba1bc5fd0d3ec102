"""SparseParameter.rewire(), fill() and places(): which weights are stored, and what becomes of values and slots."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

from sparsetrain import nn, optim
from sparsetrain.sparse import Parameter, SparseParameter, Structure
from strategies import masked_weights, quick

SLOTS = {"none": (), "sgd": ("momentum",), "adam": ("m", "v")}


def parameter(values, mask, slots=()):
    """A SparseParameter with a gradient and slots, each slot a number times its weight, so that they can be matched."""
    weight = SparseParameter.from_dense(values, mask)
    weight.gradient()[0][...] = 1
    for i, name in enumerate(slots):
        weight.slots[name] = weight.data * values.dtype.type(i + 2)
    return weight


def state(weight):
    """Copies of all that a parameter holds."""
    arrays = {"data": weight.data, "grad": weight.grad, **weight.slots}
    return type(weight), weight.structure, {k: None if a is None else a.copy() for k, a in arrays.items()}


def assert_untouched(weight, before):
    kind, structure, arrays = before
    assert type(weight) is kind and weight.structure is structure
    for name, array in state(weight)[2].items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


def assert_valid(weight):
    """The structure passes its own checks again, and everything has its length."""
    again = Structure(weight.shape, weight.indptr.copy(), weight.indices.copy())
    assert again.nnz == weight.nnz == len(weight.data) == len(weight.indices)
    assert weight.indptr.dtype == weight.indices.dtype == np.int32
    assert weight.data.flags.c_contiguous
    for slot in weight.slots.values():
        assert slot.shape == weight.data.shape and slot.dtype == weight.data.dtype and slot.flags.c_contiguous


@hs.composite
def rewirings(draw):
    """(weight, kept, grown): any weight with slots, any part of it kept, any free positions grown."""
    values, mask = draw(masked_weights())
    weight = parameter(values, mask, SLOTS[draw(hs.sampled_from(sorted(SLOTS)))])
    rng = np.random.default_rng(draw(hs.integers(0, 2**16)))
    kept = rng.random(weight.nnz) < draw(hs.sampled_from([0.0, 0.5, 0.9, 1.0]))
    free = np.setdiff1d(np.arange(values.size), weight.places()[kept])
    grown = np.sort(rng.permutation(free)[: round(draw(hs.sampled_from([0.0, 0.3, 1.0])) * len(free))])
    return weight, kept, grown.astype(np.int64)


@quick
@given(rewirings())
def test_kept_weights_stay_and_new_ones_are_zero(case):
    weight, kept, grown = case
    shape, dtype, slots = weight.shape, weight.data.dtype, sorted(weight.slots)
    places = weight.places()
    dense = {name: np.zeros(math.prod(shape), dtype) for name in ("data", *slots)}
    for name in dense:
        dense[name][places[kept]] = (weight.data if name == "data" else weight.slots[name])[kept]
    wanted = np.sort(np.concatenate([places[kept], grown]))

    weight.rewire(kept, grown)
    assert type(weight) is SparseParameter and weight.shape == shape and weight.data.dtype == dtype
    assert_valid(weight)
    assert weight.nnz == int(kept.sum()) + len(grown)
    np.testing.assert_array_equal(weight.places(), wanted)
    assert weight.grad is None and sorted(weight.slots) == slots
    for name, values in dense.items():
        np.testing.assert_array_equal(weight.data if name == "data" else weight.slots[name], values[wanted])
    np.testing.assert_array_equal(weight.to_dense().reshape(-1), dense["data"])


@quick
@given(rewirings(), hs.sampled_from(["stored", "twice", "below", "beyond"]))
def test_wrong_positions_change_nothing(case, wrong):
    weight, kept, grown = case
    stored = weight.places()[kept]
    extra = {"stored": stored[:1], "twice": grown[:1], "below": [-1], "beyond": [math.prod(weight.shape)]}[wrong]
    if not len(extra):
        return
    before = state(weight)
    with pytest.raises(ValueError, match="grown has a position"):
        weight.rewire(kept, np.sort(np.concatenate([grown, extra])).astype(np.int64))
    assert_untouched(weight, before)


@quick
@given(rewirings())
def test_fill_stores_every_weight(case):
    weight, _, _ = case
    dense, mask = weight.to_dense(), weight.mask
    slots = {name: np.zeros(weight.shape, weight.data.dtype) for name in weight.slots}
    for name, slot in weight.slots.items():
        slots[name][mask] = slot

    weight.fill()
    assert type(weight) is Parameter and weight.structure.dense and weight.grad is None
    assert weight.nnz == dense.size and weight.sparsity == 0
    np.testing.assert_array_equal(weight.data, dense)
    assert weight.data.dtype == dense.dtype and weight.data.flags.c_contiguous
    assert sorted(weight.slots) == sorted(slots)
    for name, slot in slots.items():
        np.testing.assert_array_equal(weight.slots[name], slot)

    weight.keep(mask)
    assert type(weight) is SparseParameter
    assert_valid(weight)
    np.testing.assert_array_equal(weight.to_dense(), dense)
    for name, slot in slots.items():
        np.testing.assert_array_equal(weight.slots[name], slot[mask])
    weight.rewire(np.zeros(weight.nnz, bool), np.array([0]))
    assert weight.places().tolist() == [0]


@quick
@given(masked_weights())
def test_places_are_those_of_the_flat_weight(case):
    values, mask = case
    places = SparseParameter.from_dense(values, mask).places()
    assert places.dtype == np.int64
    np.testing.assert_array_equal(places, np.flatnonzero(mask))


def test_worked_example():
    """Of eight weights five are stored; two of them go, and three others come."""
    values = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    mask = np.array([[1, 0, 1, 0], [1, 1, 0, 1]], bool)
    weight = parameter(values, mask, ("momentum",))
    weight.rewire(np.array([1, 0, 1, 1, 0], bool), np.array([1, 2, 6]))
    assert weight.indptr.tolist() == [0, 3, 6]
    assert weight.indices.tolist() == [0, 1, 2, 0, 1, 2]
    assert weight.to_dense().tolist() == [[1, 0, 0, 0], [5, 6, 0, 0]]
    assert weight.data.tolist() == [1, 0, 0, 5, 6, 0]
    assert weight.slots["momentum"].tolist() == [2, 0, 0, 10, 12, 0]


def test_nothing_grown_and_nothing_kept():
    weight = parameter(np.ones((3, 2, 2, 2)), np.ones((3, 2, 2, 2), bool), ("m", "v"))
    weight.rewire(np.arange(24) % 2 == 0, np.zeros(0, np.int64))
    assert weight.nnz == 12 and (weight.data == 1).all()
    weight.rewire(np.zeros(12, bool), np.arange(24))
    assert weight.nnz == 24 and not weight.data.any() and not weight.slots["v"].any()
    weight.rewire(np.zeros(24, bool), np.zeros(0, np.int64))
    assert weight.nnz == 0 and weight.indptr.tolist() == [0, 0, 0, 0]
    assert_valid(weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(2, 4, 3, padding=1)])
def test_the_optimiser_goes_on(layer, kind, dtype):
    """It holds the same parameter through keep, rewire, fill and keep, and its slots have the parameter's length."""
    model = nn.Sequential(layer()).to(dtype)
    weight = model[0].weight
    rng = np.random.default_rng(0)
    optimizer = kind(model.named_parameters(), lr=0.1, **({"momentum": 0.9} if kind is optim.SGD else {}))
    x = rng.standard_normal((5, 6) if len(weight.shape) == 2 else (5, 2, 4, 4)).astype(dtype)

    def step():
        optimizer.zero_grad()
        y = model(x)
        model.backward(y, input_gradient=False)
        optimizer.step()
        assert weight.data.shape == weight.grad.shape
        assert all(slot.shape == weight.data.shape for slot in weight.slots.values())
        assert np.isfinite(weight.data).all()

    step()
    weight.keep(rng.random(weight.shape) < 0.5)
    step()
    half = rng.random(weight.nnz) < 0.5
    free = np.setdiff1d(np.arange(weight.to_dense().size), weight.places()[half])[:3]
    weight.rewire(half, free)
    before = weight.data.copy()
    optimizer.step()  # the gradient is gone, so the weights stay
    np.testing.assert_array_equal(weight.data, before)
    step()
    grown = np.isin(weight.places(), free)
    assert (weight.data[grown] != 0).all()
    weight.fill()
    step()
    assert (weight.data != 0).all()
    weight.keep(np.abs(weight.data) > np.median(np.abs(weight.data)))
    step()
    assert optimizer.params[0] is weight and model[0].weight is weight


def test_a_plan_of_the_old_structure_is_not_used():
    """Forward and backward agree with the dense layer after each change, nearly dense weights included."""
    rng = np.random.default_rng(0)
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False).to(np.float64)
    model, weight = nn.Sequential(layer), layer.weight
    x = rng.standard_normal((4, 3, 6, 6))

    def assert_right():
        other = nn.Conv2d(3, 5, 3, padding=1, bias=False).to(np.float64)
        other.weight.data[...] = weight.to_dense()
        y, wanted = model(x), other(x)
        np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
        model.zero_grad()
        np.testing.assert_allclose(model.backward(y), other.backward(y), rtol=1e-10, atol=1e-10)
        mask = ... if weight.structure.dense else weight.mask
        np.testing.assert_allclose(weight.grad, other.weight.grad[mask], rtol=1e-10, atol=1e-10)

    assert_right()
    for density in (0.9, 0.3, 0.8):
        if weight.structure.dense:
            weight.keep(rng.random(weight.shape) < density)
        assert_right()
        kept = rng.random(weight.nnz) < 0.7
        free = rng.permutation(np.setdiff1d(np.arange(135), weight.places()[kept]))
        weight.rewire(kept, np.sort(free[: np.count_nonzero(~kept)]))
        weight.data += rng.standard_normal(weight.nnz)
        assert_right()
        weight.fill()
        assert_right()
