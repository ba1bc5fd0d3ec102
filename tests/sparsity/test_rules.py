"""What each method drops and grows, in examples small enough to be worked by hand."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

import sparsetrain as st
from sparsetrain import nn, optim
from sparsetrain.sparse import SparseParameter
from sparsetrain.sparsity import ACDC, GMP, NM, SET, GraNet, Magnitude, RigL, Static
from sparsetrain.sparsity.drop_grow import smallest
from sparsetrain.sparsity.gmp import cubic
from sparsetrain.sparsity.method import Layer
from sparsetrain.sparsity.set import random_places
from strategies import quick


def linear(values, mask=None):
    """A net of one Linear without bias that has these weights, of which those in `mask` are stored."""
    values = np.array(values, np.float64)
    model = nn.Sequential(nn.Linear(*values.shape[::-1], bias=False)).to(np.float64)
    model[0].weight.data[...] = values
    if mask is not None:
        model[0].weight.keep(np.array(mask, bool))
    return model


def step(method, model, gradient):
    """One step in which the gradient of all weights of the net of linear() is `gradient`. Whether layers changed."""
    gradient = np.array(gradient, np.float64)
    method.begin_step()
    model.zero_grad()
    model(np.eye(gradient.shape[1]))
    model.backward(np.ascontiguousarray(gradient.T), input_gradient=False)
    return method.end_step()


def steps(method, model, number):
    """Weights stored after each of so many steps without gradient."""
    stored = []
    for _ in range(number):
        step(method, model, np.zeros(model[0].weight.shape))
        stored.append(model[0].weight.nnz)
    return stored


# ---- drops


@pytest.mark.parametrize(
    ("data", "count", "kept"),
    [
        ([5, -4, 1, -1.5, 3, -0.5, 2, -6], 3, [5, -4, 3, 2, -6]),
        ([5, -4, 1, -1.5, 3, -0.5, 2, -6], 7, [-6]),
        ([1, 1, -1, 1, 1, -1, 1, 1], 5, [1, 1, -1]),  # of equal ones the last go
        ([0, 2, 0, 2, 0, 2, 0, 2], 2, [0, 2, 0, 2, 2, 2]),
    ],
)
def test_drop_of_the_smallest(data, count, kept):
    weight = linear([data], np.ones((1, 8)))[0].weight
    mask = smallest(weight, count)
    assert weight.data[mask].tolist() == kept
    np.testing.assert_array_equal(RigL(stop=200).drop(Layer("0", linear([data], np.ones((1, 8)))[0]), count), mask)


@pytest.mark.parametrize(
    ("data", "count", "kept"),
    [
        ([5, -4, 1, -1.5, 3, -0.5, 2, -6], 4, [5, -4, 3, -6]),  # two of four positive, two of four negative
        ([5, 4, 1, 1.5, 3, 0.5, -0.1, -6], 4, [5, 4, 3, -6]),  # three of six, one of two
        ([5, 4, 1, 1.5, 3, 0.5, -0.1, -6], 2, [5, 4, 1.5, 3, -0.1, -6]),  # 1.5 is rounded to 2
        ([5, 4, 1, 1.5, 3, 0.5, 2, 6], 3, [5, 4, 3, 2, 6]),  # none is negative
        ([-5, -4, -1, -2, -3, -0.5, -7, -6], 7, [-7]),
        ([5, 0, 1, -1.5, 3, 0, 2, -6], 4, [5, -1.5, 3, -6]),  # zeros count among the negative
    ],
)
def test_set_drops_the_same_share_of_either_sign(data, count, kept):
    layer = Layer("0", linear([data], np.ones((1, 8)))[0])
    mask = SET(stop=1).drop(layer, count)
    assert np.count_nonzero(~mask) == count
    assert layer.weight.data[mask].tolist() == kept


@quick
@given(hs.lists(hs.floats(-9, 9), min_size=2, max_size=20), hs.data())
def test_set_always_drops_the_number_wanted(data, draw):
    count = draw.draw(hs.integers(1, len(data) - 1))
    mask = SET(stop=1).drop(Layer("0", linear([data], np.ones((1, len(data))))[0]), count)
    assert np.count_nonzero(~mask) == count
    data = np.array(data)
    for sign in (data > 0, data <= 0):
        share = count * sign.sum() / len(data)
        assert abs(np.count_nonzero(sign & ~mask) - share) <= 0.5
        assert abs(data[sign & ~mask]).max(initial=0) <= abs(data[sign & mask]).min(initial=np.inf)


# ---- random growth


@quick
@given(hs.integers(1, 60), hs.data())
def test_random_places_are_free(size, draw):
    taken = np.array(sorted(draw.draw(hs.sets(hs.integers(0, size - 1)))), np.int64)
    count = draw.draw(hs.integers(0, size - len(taken)))
    places = random_places(taken, size, count)
    assert len(set(places.tolist())) == len(places) == count
    assert not set(places.tolist()) & set(taken.tolist())
    assert all(0 <= place < size for place in places)


def test_all_sets_of_random_places_are_equally_likely():
    """Chi-square of the 10 pairs of 5 free places: 99.99 % of draws lie below 33.7."""
    st.manual_seed(0)
    pairs = {pair: 0 for pair in combinations([0, 2, 3, 6, 7], 2)}
    draws = 4000
    for _ in range(draws):
        pairs[tuple(sorted(random_places(np.array([1, 4, 5]), 8, 2).tolist()))] += 1
    expected = draws / len(pairs)
    assert sum((n - expected) ** 2 / expected for n in pairs.values()) < 33.7


def test_set_grows_anywhere_that_is_free_after_the_drop():
    """The dropped weight's place is one of four, each with a quarter of the draws: chi-square below 21.1."""
    st.manual_seed(1)
    found = dict.fromkeys([2, 4, 6, 7], 0)
    for _ in range(800):
        model = linear([[4, -3, 0, 2], [0, 5, 0, 1]], [[1, 1, 0, 1], [0, 1, 0, 1]])
        method = SET(0.5, fraction=0.2, stop=9, every=1).attach(model, begin=False)
        step(method, model, np.zeros((2, 4)))
        assert step(method, model, np.ones((2, 4)))
        weight = model[0].weight
        grown = [place for place, value in zip(weight.places(), weight.data, strict=True) if value == 0]
        assert weight.nnz == 5 and len(grown) == 1
        found[int(grown[0])] += 1
    assert sum((n - 200) ** 2 / 200 for n in found.values()) < 21.1


# ---- RigL


def test_rigl_grows_where_gradients_are_largest():
    """Of five weights the two least go, 0.1 and 0.2; gradients are 7 1 2 -8 0.5 where none is stored then, so the
    weight that was 0.1 comes back as zero."""
    model = linear([[4, 0.1, -3, 0], [0, 0, 0.2, 5]], [[1, 1, 1, 0], [0, 0, 1, 1]])
    method = RigL(0.5, fraction=0.4, anneal=False, stop=9, every=1).attach(model, begin=False)
    optimizer = optim.SGD(model.named_parameters(), lr=0.5, momentum=0.9)
    gradient = [[9, 7, 9, 1], [2, -8, 0.5, 9]]
    assert not step(method, model, gradient)
    weight = model[0].weight
    weight.slots["momentum"] = weight.data * 10
    assert step(method, model, gradient)
    assert weight.places().tolist() == [0, 1, 2, 5, 7]
    assert weight.data.tolist() == [4, 0, -3, 0, 5]
    assert weight.slots["momentum"].tolist() == [40, 0, -30, 0, 50]
    row = method.report()["0"]
    assert (row["nnz"], row["dropped"], row["grown"]) == (5, 2, 2)
    optimizer.step()  # the layer has no gradient
    assert weight.data.tolist() == [4, 0, -3, 0, 5]


@pytest.mark.parametrize(
    ("gradient", "places"),
    [
        (np.ones((2, 4)), [0, 1, 2, 3, 7]),  # of equal gradients the first, dropped weights among them
        (np.zeros((2, 4)), [0, 1, 2, 3, 7]),
        ([[1, 2, 1, 3], [3, 3, 3, 1]], [0, 2, 3, 4, 7]),
        ([[0, 0, 0, 0], [0, 0, -1, 0]], [0, 1, 2, 6, 7]),  # a dropped weight has the largest, none has another
        ([[9, 5, 9, -2], [2, 2, -4, 9]], [0, 1, 2, 6, 7]),  # both come back
    ],
)
def test_rigl_ties(gradient, places):
    model = linear([[4, 0.1, -3, 0], [0, 0, 0.2, 5]], [[1, 1, 1, 0], [0, 0, 1, 1]])
    method = RigL(0.5, fraction=0.4, anneal=False, stop=9, every=1).attach(model, begin=False)
    step(method, model, gradient)
    step(method, model, gradient)
    assert model[0].weight.places().tolist() == places


def test_fraction_falls_as_half_a_cosine():
    """0.3 of 60 weights at first; after a quarter, a half, three quarters of the time 15.4, 9 and 2.6; at stop none."""

    def grown(method):
        model, numbers = linear(np.arange(1, 101).reshape(10, 10)), []
        method.attach(model)
        for _ in range(11):
            step(method, model, np.ones((10, 10)))
            row = method.report()["0"]
            assert row["nnz"] == 60
            numbers.append(row["grown"])
        return numbers

    assert grown(RigL(0.4, stop=8, every=2)) == [0, 0, 15, 0, 9, 0, 3, 0, 0, 0, 0]
    assert grown(SET(0.4, stop=8, every=2)) == [0, 0, 18, 0, 18, 0, 18, 0, 18, 0, 0]  # the same at each


@pytest.mark.parametrize(("nnz", "count"), [(1, 0), (2, 1), (3, 2), (9, 7), (10, 6), (15, 1), (16, 0)])
@pytest.mark.parametrize("kind", [SET, RigL])
def test_no_more_go_than_there_is_room_for(kind, nnz, count):
    """0.8 of the weights, but one at least stays, and no more come than there are free places."""
    model = linear(np.ones((4, 4)), (np.arange(16) < nnz).reshape(4, 4))
    method = kind(0.1, fraction=0.8, anneal=False, stop=5, every=1).attach(model, begin=False)
    assert method.count(method.layers[0]) == count
    assert steps(method, model, 3) == 3 * [nnz]
    row = method.report()["0"]
    assert row["dropped"] == row["grown"] == 2 * count


# ---- schedules of pruning


def test_cubic():
    assert [cubic(0, 0.8, t) for t in (0, 0.5, 1)] == pytest.approx([0, 0.7, 0.8])
    assert [cubic(0.05, 0.95, t) for t in (0, 1 / 7, 6 / 7, 1)] == pytest.approx(
        [0.05, 0.95 - 0.9 * 216 / 343, 0.95 - 0.9 / 343, 0.95]
    )


def test_gmp_follows_the_cubic():
    """Sparsities 0, 0.4625, 0.7, 0.7875, 0.8; the smallest go."""
    model = linear(np.arange(1, 101).reshape(10, 10))
    method = GMP(0.8, start=1, stop=9, every=2).attach(model)
    assert steps(method, model, 12) == [100, 100, 100, 54, 54, 30, 30, 21, 21, 20, 20, 20]
    assert model[0].weight.data.tolist() == list(range(81, 101))


def test_gmp_in_epochs_as_sparseprop():
    model = linear(np.arange(1, 1001).reshape(20, 50))
    method = GMP(0.95, initial=0.05, start=10, stop=80, every=10, unit="epochs").attach(model)
    stored = []
    for epoch in range(85):
        method.begin_epoch(epoch, 1)
        stored += steps(method, model, 1)
    wanted = [1000 - round(1000 * (0.95 - 0.9 * (1 - t / 7) ** 3)) for t in range(8)]
    assert stored == [1000] * 10 + [n for n in wanted[:7] for _ in range(10)] + [wanted[7]] * 5


def test_magnitude_in_rounds_of_equal_shares():
    model = linear(np.arange(1, 65).reshape(8, 8))
    method = Magnitude(0.875, 3, start=1, every=2).attach(model)
    assert method.stop == 5
    assert steps(method, model, 8) == [64, 32, 32, 16, 16, 8, 8, 8]
    assert model[0].weight.data.tolist() == list(range(57, 65))


def test_magnitude_at_once():
    model = linear([[1, 5, -2, 3], [-4, 0, 0.5, -3.5]])
    assert steps(Magnitude(0.5).attach(model), model, 3) == [4, 4, 4]
    assert model[0].weight.to_dense().tolist() == [[0, 5, 0, 3], [-4, 0, 0, -3.5]]


def test_static_by_magnitude():
    model = linear([[1, 5, -2, 3], [-4, 0, 0.5, -3.5]])
    method = Static(0.5, "magnitude").attach(model)
    assert model[0].weight.to_dense().tolist() == [[0, 5, 0, 3], [-4, 0, 0, -3.5]]
    assert steps(method, model, 3) == [4, 4, 4]
    assert method.step == 3


# ---- AC/DC


def test_acdc_phases_in_steps():
    model = linear([[1, 5, -2, 3], [-4, 0.1, 0.5, -3.5]])
    method = ACDC(0.5, start=2, every=3, stop=14).attach(model)
    assert steps(method, model, 20) == 2 * [8] + 2 * (3 * [4] + 3 * [8]) + 6 * [4]
    assert isinstance(model[0].weight, SparseParameter)


def test_acdc_phases_in_epochs():
    """Phases of two epochs of three steps; they begin after the first step of an epoch."""
    model = linear([[1, 5, -2, 3], [-4, 0.1, 0.5, -3.5]])
    method = ACDC(0.5, start=1, every=2, stop=5, unit="epochs").attach(model)
    stored = []
    for epoch in range(7):
        method.begin_epoch(epoch, 3)
        stored += steps(method, model, 3)
    assert stored == 3 * [8] + 6 * [4] + 6 * [8] + 6 * [4]


def test_acdc_stays_compressed_from_stop_on():
    """Stop falls within a dense phase, which ends there."""
    model = linear(np.arange(1, 9).reshape(2, 4))
    method = ACDC(0.5, start=0, every=4, stop=6).attach(model)
    assert steps(method, model, 14) == 4 * [4] + 2 * [8] + 8 * [4]


def test_acdc_brings_weights_back_from_zero():
    model = linear([[1, 5, -2, 3], [-4, 0.1, 0.5, -3.5]])
    weight = model[0].weight
    weight.slots["momentum"] = np.ones((2, 4))
    method = ACDC(0.5, start=0, every=1, stop=9).attach(model)
    step(method, model, np.ones((2, 4)))
    step(method, model, np.ones((2, 4)))
    assert weight.structure.dense and weight.grad is None
    assert weight.data.tolist() == [[0, 5, 0, 3], [-4, 0, 0, -3.5]]
    assert weight.slots["momentum"].tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]
    row = method.report()["0"]
    assert (row["nnz"], row["dropped"], row["grown"], row["explored"]) == (8, 4, 4, 1)


# ---- N:M


@pytest.mark.parametrize(
    ("n", "m", "mask"),
    [
        (2, 4, [1, 0, 0, 1, 0, 1, 1, 0]),
        (1, 4, [0, 0, 0, 1, 0, 0, 1, 0]),
        (3, 4, [1, 0, 1, 1, 1, 1, 1, 0]),
        (1, 2, [1, 0, 0, 1, 0, 1, 1, 0]),
        (4, 4, [1, 1, 1, 1, 1, 1, 1, 1]),
        (3, 8, [1, 0, 0, 1, 0, 0, 1, 0]),
    ],
)
def test_masks_of_eight_weights(n, m, mask):
    """Of 3 -1 2 -5 | 0.5 -0.7 4 0.5, whose 0.5 are equal: the first of them counts as larger."""
    values = np.array([[3, -1, 2, -5, 0.5, -0.7, 4, 0.5]])
    assert NM(n, m, stop=0).mask(values).astype(int).tolist() == [mask]
    model = linear(values)
    NM(n, m, stop=0).attach(model)
    assert model[0].weight.mask.astype(int).tolist() == [mask]
    assert model[0].weight.to_dense().tolist() == (values * mask).tolist()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_masks_of_convolutions_run_along_input_channels(n):
    values = np.random.default_rng(0).standard_normal((3, 8, 2, 3))
    mask = NM(n, 4, stop=0).mask(values)
    for o, block, row, column in np.ndindex(3, 2, 2, 3):
        group = slice(4 * block, 4 * block + 4)
        wanted = np.zeros(4, bool)
        wanted[np.argsort(-abs(values[o, group, row, column]))[:n]] = True
        np.testing.assert_array_equal(mask[o, group, row, column], wanted)


def test_sr_ste():
    """Of four weights two run; the gradient is that of all four, and 0.1 w more for the other two."""
    values, gradient = [[3, -1, 2, -0.5]], np.array([[0.25, 0.5, -1, 2]])
    model = linear(values)
    weight = model[0].weight
    optimizer = optim.SGD(model.named_parameters(), lr=0.5)
    method = NM(2, 4, stop=2, decay=0.1).attach(model)
    array = weight.data
    method.begin_step()
    assert weight.data.tolist() == [[3, 0, 2, 0]]
    assert model(np.eye(4)).tolist() == [[3], [0], [2], [0]]
    model.backward(gradient.T.copy(), input_gradient=False)
    assert not method.end_step()
    assert weight.data is array and weight.data.tolist() == values
    np.testing.assert_allclose(weight.grad, [[0.25, 0.5 - 0.1, -1, 2 - 0.05]], rtol=1e-12)
    optimizer.step()
    np.testing.assert_allclose(weight.data, [[2.875, -1.2, 2.5, -1.475]], rtol=1e-12)
    # A large gradient changes which ones run.
    step(method, model, [[0, -8, 0, 0]])
    optimizer.step()
    step(method, model, np.zeros((1, 4)))  # at stop
    np.testing.assert_array_equal(weight.mask, [[1, 1, 0, 0]])
    assert weight.to_dense()[0, 1] == pytest.approx(-1.2 + 0.5 * (8 + 0.1 * 1.2))
    assert steps(method, model, 3) == [2, 2, 2]


def test_sr_ste_without_decay_and_with_an_excluded_layer():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    x, dy = np.eye(4, dtype=np.float32), np.ones((4, 2), np.float32)
    model(x)
    model.backward(dy)
    exact = model[1].weight.grad.copy()
    method = NM(2, 4, stop=5, decay=0.0, include=["1"]).attach(model)
    model.zero_grad()
    method.begin_step()
    model(x)
    model.backward(dy)
    method.end_step()
    np.testing.assert_array_equal(model[1].weight.grad, exact)  # the layer before is as it was
    assert [layer.name for layer in method.layers] == ["1"]


# ---- GraNet


def test_granet_counts():
    """From 32 of 64 weights to 8 in four updates: the cubic's numbers after each, the annealed share of what there was
    before grows again."""
    st.manual_seed(0)
    model = linear(np.random.default_rng(0).standard_normal((8, 8)))
    method = GraNet(0.875, initial=0.5, stop=4, every=1, distribution="uniform").attach(model)
    assert model[0].weight.nnz == 32
    assert method.report()["0"]["dropped"] == 32
    nnz, rng = 32, np.random.default_rng(1)
    step(method, model, np.zeros((8, 8)))
    for t in (0.25, 0.5, 0.75, 1):
        wanted = 64 - round(64 * (0.875 - 0.375 * (1 - t) ** 3))
        share = min(round(0.25 * (1 + np.cos(np.pi * t)) * nnz), wanted - 1)
        assert step(method, model, rng.standard_normal((8, 8)))
        row = method.report()["0"]
        assert (row["nnz"], row["grown"], row["dropped"]) == (wanted, share, nnz - wanted + share)
        nnz = wanted
    assert nnz == 8


def test_granet_drops_before_it_grows():
    """Of four weights one is surplus and one more is exchanged: the least two go, the largest gradient comes."""
    model = linear([[4, 0.1, -3, 0], [0, 0, 0.2, 0]], [[1, 1, 1, 0], [0, 0, 1, 0]])
    method = GraNet(0.625, initial=0.5, fraction=0.25, anneal=False, stop=1, every=1, distribution="uniform")
    method.attach(model, begin=False)
    gradient = [[9, 7, 9, 1], [2, -8, 0.5, 9]]
    step(method, model, gradient)
    assert step(method, model, gradient)
    assert model[0].weight.places().tolist() == [0, 2, 7]
    assert model[0].weight.data.tolist() == [4, -3, 0]
