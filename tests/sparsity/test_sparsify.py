"""st.sparsify: how many weights stay in each layer, which ones, and its errors."""

import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as hs

import sparsetrain as st
from nets import images, small_net
from sparsetrain import interchange, nn
from sparsetrain.sparse import SparseParameter
from sparsetrain.sparsity.sparsify import best
from strategies import quick

LAYERS = ["0", "4.body.0", "4.body.3", "6.body.0", "6.shortcut", "10", "13"]


def weights(model):
    """The weight of each convolution and linear layer, by layer name."""
    kinds = nn.Conv2d | nn.Linear
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, kinds)}


def total(model, names=LAYERS):
    """Weights kept, and weights of the dense layers, of the layers named."""
    chosen = [weights(model)[name] for name in names]
    return sum(w.nnz for w in chosen), sum(int(np.prod(w.shape)) for w in chosen)


def linear(values):
    """A net of one Linear with these weights."""
    values = np.array(values, np.float32)
    model = nn.Sequential(nn.Linear(*values.shape[::-1]))
    weights(model)["0"].data[...] = values
    return model


@pytest.fixture
def net():
    st.manual_seed(0)
    return small_net(width=6)


def test_worked_example():
    """Half of eight weights: 5, -4, 3 and -3.5 are the largest four."""
    model = st.sparsify(linear([[1, 5, -2, 3], [-4, 0, 0.5, -3.5]]), 0.5)
    weight = weights(model)["0"]
    assert weight.to_dense().tolist() == [[0, 5, 0, 3], [-4, 0, 0, -3.5]]
    assert weight.mask.tolist() == [[False, True, False, True], [True, False, False, True]]


def test_global_takes_the_largest_of_all_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.load_state_dict(
        model.state_dict()
        | {
            "0.weight": np.array([[1, 2], [3, 4]], np.float32),
            "1.weight": np.array([[5, 6], [-7, 0.5]], np.float32),
        }
    )
    st.sparsify(model, 0.5, distribution="global")
    assert [w.to_dense().tolist() for w in weights(model).values()] == [
        [[0, 0], [0, 4]],
        [[5, 6], [-7, 0]],
    ]


def test_works_in_place_and_returns_the_model(net):
    assert st.sparsify(net, 0.9) is net
    assert list(weights(net)) == LAYERS
    for name, parameter in net.named_parameters():
        is_weight = name.removesuffix(".weight") in LAYERS
        assert isinstance(parameter, SparseParameter) == is_weight, name
    x, labels = images()
    net.backward(nn.cross_entropy(net(x), labels)[1])
    for weight in weights(net).values():
        assert weight.data.shape == weight.grad.shape == (weight.nnz,)


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9, 0.95])
def test_uniform_gives_every_layer_its_share(net, method, sparsity):
    st.sparsify(net, sparsity, method=method)
    for name, weight in weights(net).items():
        assert abs(weight.nnz - (1 - sparsity) * np.prod(weight.shape)) <= 1, name


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("distribution", ["erk", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.9, 0.99])
def test_erk_and_global_keep_the_total(net, distribution, method, sparsity):
    st.sparsify(net, sparsity, method, distribution)
    kept, size = total(net)
    assert abs(kept - (1 - sparsity) * size) <= 1


def sparsify_if_possible(model, *arguments, **options):
    before = {name: weight.nnz for name, weight in weights(model).items()}
    try:
        st.sparsify(model, *arguments, **options)
    except ValueError as error:
        assert re.search("would leave none: exclude it|leaves none of", str(error))
        assert before == {name: weight.nnz for name, weight in weights(model).items()}
        assume(False)
    assert options.get("distribution", arguments[-1]) == "global" or all(w.nnz for w in weights(model).values())


def test_a_layer_that_would_keep_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 400))
    with pytest.raises(ValueError, match="layer 0 has 4 weights, of which sparsity 0.99 would leave none: exclude it"):
        st.sparsify(model, 0.99)
    assert [layer.weight.nnz for layer in model] == [4, 800]


def test_a_net_that_would_keep_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="sparsity is 0.99, which leaves none of 24 weights"):
        st.sparsify(model, 0.99, distribution="global")
    assert [layer.weight.nnz for layer in model] == [16, 8]


@quick
@given(
    sparsity=hs.floats(0, 0.999),
    distribution=hs.sampled_from(["uniform", "erk", "global"]),
    method=hs.sampled_from(["magnitude", "random"]),
    features=hs.lists(hs.integers(1, 30), min_size=2, max_size=5),
)
def test_total_of_any_net(sparsity, distribution, method, features):
    model = nn.Sequential(*(nn.Linear(*f) for f in zip(features, features[1:], strict=False)))
    sparsify_if_possible(model, sparsity, method, distribution)
    kept, size = total(model, weights(model))
    slack = len(features) - 1 if distribution == "uniform" else 1
    assert abs(kept - (1 - sparsity) * size) <= slack


@quick
@given(
    shares=hs.lists(hs.floats(0, 0.99), min_size=2, max_size=8),
    features=hs.lists(hs.integers(1, 30), min_size=2, max_size=6),
)
def test_total_of_a_net_that_loses_weights_by_erk_again_and_again(shares, features):
    """A layer's rounded share may rise from one sparsity to the next; what is removed does not come back."""
    model = nn.Sequential(*(nn.Linear(*f) for f in zip(features, features[1:], strict=False)))
    for sparsity in sorted(shares):
        sparsify_if_possible(model, sparsity, distribution="erk")
        kept, size = total(model, weights(model))
        assert abs(kept - (1 - sparsity) * size) <= 1


def test_erk_densities(net):
    """Density in proportion to the sum of a weight's sides over their product, but at most 1.

    Source: Evci et al., Rigging the Lottery, ICML 2020, section 3(1).
    """
    sparsity = 0.5
    st.sparsify(net, sparsity, distribution="erk")
    shapes = {name: w.shape for name, w in weights(net).items()}
    raw = {name: sum(s) / np.prod(s) for name, s in shapes.items()}
    dense = set()
    while True:
        free = [name for name in shapes if name not in dense]
        budget = (1 - sparsity) * sum(np.prod(s) for s in shapes.values())
        budget -= sum(np.prod(shapes[name]) for name in dense)
        scale = budget / sum(raw[name] * np.prod(shapes[name]) for name in free)
        over = {name for name in free if scale * raw[name] > 1}
        if not over:
            break
        dense |= over
    assert free and dense, "the net is to show both cases"
    for name, weight in weights(net).items():
        density = 1 if name in dense else scale * raw[name]
        assert abs(weight.nnz - density * np.prod(weight.shape)) <= 1, name


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_magnitude_keeps_the_largest_with_their_values(net, distribution):
    before = {name: w.to_dense() for name, w in weights(net).items()}
    st.sparsify(net, 0.7, distribution=distribution)
    for name, weight in weights(net).items():
        mask = weight.mask
        np.testing.assert_array_equal(weight.to_dense(), np.where(mask, before[name], 0))
        kept, removed = abs(before[name])[mask], abs(before[name])[~mask]
        assert kept.min(initial=np.inf) >= removed.max(initial=0), name


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_equal_magnitudes_still_give_the_exact_number(distribution):
    model = linear(np.ones((7, 9)))
    st.sparsify(model, 0.5, distribution=distribution)
    assert weights(model)["0"].nnz in (31, 32)


def test_random_repeats_with_the_seed_and_only_then(net):
    masks = []
    for seed in (3, 3, 4):
        st.manual_seed(0)
        model = small_net(width=6)
        before = {name: w.to_dense() for name, w in weights(model).items()}
        st.manual_seed(seed)
        st.sparsify(model, 0.5, method="random")
        for name, weight in weights(model).items():
            np.testing.assert_array_equal(weight.to_dense(), np.where(weight.mask, before[name], 0))
        masks.append({name: w.mask for name, w in weights(model).items()})
    for name in LAYERS:
        np.testing.assert_array_equal(masks[0][name], masks[1][name])
        assert (masks[0][name] != masks[2][name]).any()


def test_random_does_not_look_at_values():
    st.manual_seed(0)
    model = linear(np.arange(1, 10001).reshape(100, 100))
    st.sparsify(model, 0.5, method="random")
    assert 2300 < weights(model)["0"].mask[:50].sum() < 2700  # the smaller half; 2500 expected


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["0"], ["0"]),
        (("0", "13"), ["0", "13"]),
        (["4.body.0"], ["4.body.0"]),
        (["4.*"], ["4.body.0", "4.body.3"]),
        (["*.body.*"], ["4.body.0", "4.body.3", "6.body.0"]),
        (["1?"], ["10", "13"]),
        (["[0-5]"], ["0"]),
        (["0", "4.body.[!0]", "*shortcut"], ["0", "4.body.3", "6.shortcut"]),
    ],
)
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_exclude(net, exclude, left, distribution):
    before = net.state_dict()
    st.sparsify(net, 0.5, distribution=distribution, exclude=exclude)
    for name, weight in weights(net).items():
        if name in left:
            assert not isinstance(weight, SparseParameter)
            np.testing.assert_array_equal(weight.data, before[name + ".weight"])
        else:
            assert isinstance(weight, SparseParameter)
    kept, size = total(net, [name for name in LAYERS if name not in left])
    assert abs(kept - size / 2) <= (len(LAYERS) if distribution == "uniform" else 1)


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_a_sparse_model_only_loses_weights(net, method, distribution):
    st.sparsify(net, 0.5, method, distribution)
    before = {name: (w.mask, w.to_dense()) for name, w in weights(net).items()}
    st.sparsify(net, 0.8, method, distribution)
    kept, size = total(net)
    assert abs(kept - 0.2 * size) <= (len(LAYERS) if distribution == "uniform" else 1)
    for name, weight in weights(net).items():
        mask, dense = before[name]
        assert not (weight.mask & ~mask).any(), name
        np.testing.assert_array_equal(weight.to_dense(), np.where(weight.mask, dense, 0))


@pytest.mark.parametrize("settings", [("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {})])
def test_optimiser_slots_follow_the_kept_weights(net, settings):
    """And the optimiser made before goes on with what is left."""
    name, arguments = settings
    optimizer = getattr(st.optim, name)(net.parameters(), **arguments)
    x, labels = images()

    def step():
        optimizer.zero_grad()
        net.backward(nn.cross_entropy(net(x), labels)[1])
        optimizer.step()

    step()
    for sparsity in (0.5, 0.8):
        before = {}
        for layer, weight in weights(net).items():
            old = weight.mask if isinstance(weight, SparseParameter) else ...
            for slot, values in weight.slots.items():
                dense = np.zeros(weight.shape, np.float32)
                dense[old] = values
                before[layer, slot] = dense
        st.sparsify(net, sparsity)
        assert before
        for (layer, slot), dense in before.items():
            weight = weights(net)[layer]
            np.testing.assert_array_equal(weight.slots[slot], dense[weight.mask])
        at_start = {layer: w.data.copy() for layer, w in weights(net).items()}
        step()
        for layer, weight in weights(net).items():
            assert (weight.data != at_start[layer]).any(), layer


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 90, np.nan])
def test_sparsity_outside(net, sparsity):
    before = net.state_dict()
    with pytest.raises(ValueError, match=f"sparsity.*{sparsity}"):
        st.sparsify(net, sparsity)
    assert not any(isinstance(w, SparseParameter) for w in weights(net).values())
    assert list(net.state_dict()) == list(before)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "magnitud"}, "(?=.*method)(?=.*magnitud)(?=.*magnitude)(?=.*random)"),
        ({"distribution": "unifrom"}, "(?=.*distribution)(?=.*unifrom)(?=.*uniform)(?=.*erk)"),
        ({"exclude": ["99"]}, "exclude.*99"),
        ({"exclude": ["0", "3.boddy.*"]}, r"exclude.*3\.boddy"),
    ],
)
def test_unknown_names(net, arguments, match):
    with pytest.raises(ValueError, match="(?s)" + match):
        st.sparsify(net, 0.5, **arguments)
    assert not any(isinstance(w, SparseParameter) for w in weights(net).values())


@pytest.mark.parametrize("sparsity", ["0.9", None])
def test_sparsity_of_another_type(net, sparsity):
    with pytest.raises((TypeError, ValueError), match="sparsity"):
        st.sparsify(net, sparsity)


def test_exclude_is_a_collection_not_a_string(net):
    with pytest.raises(TypeError, match="exclude is '13'"):
        st.sparsify(net, 0.5, exclude="13")


def test_nothing_to_make_sparse():
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        st.sparsify(nn.Sequential(nn.ReLU(), nn.Flatten()), 0.5)


def test_layers_that_share_a_weight():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model.set_parameter("2.weight", model[0].weight)
    with pytest.raises(ValueError, match="layers 0 and 2 share a weight: exclude one of them"):
        st.sparsify(model, 0.5)
    with pytest.raises(ValueError, match="layers 0 and 2 share a weight"):
        st.sparsity.RigL(0.5, stop=4, every=1).attach(model)
    st.sparsify(model, 0.5, exclude=["2"])
    assert model[2].weight is model[0].weight
    assert model[0].weight.nnz == 32
    assert set(interchange.to_scipy(model)) == {"0", "2"}


@quick
@given(hs.lists(hs.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, np.inf, np.nan]), max_size=12), hs.integers(0, 14))
def test_best(worth, number):
    """The first of those that a stable sort puts first."""
    worth = np.array(worth)
    first = np.argsort(-worth, kind="stable")[:number]
    assert set(np.flatnonzero(best(worth, number))) == set(first)
