"""Layers of SparseProp and SparseLab both ways, where they are installed."""

import numpy as np
import pytest

import sparsetrain as st
from sparsetrain import nn
from sparsetrain.interchange import peers

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def layer(kind, bias=True):
    st.manual_seed(0)
    made = nn.Linear(20, 12, bias=bias) if kind == "linear" else nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=bias)
    st.sparsify(nn.Sequential(made), 0.8, "random")
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_sparseprop_and_back(kind, bias):
    pytest.importorskip("sparseprop")
    ours = layer(kind, bias)
    theirs = peers.to_sparseprop(ours)
    again = peers.from_sparseprop(theirs)
    np.testing.assert_array_equal(again.weight.to_dense(), ours.weight.to_dense())
    assert again.weight.nnz == ours.weight.nnz and repr(again) == repr(ours)
    x = np.random.default_rng(1).standard_normal((8, 20) if kind == "linear" else (8, 6, 8, 8)).astype(np.float32)
    y = theirs(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(y, nn.Sequential(again)(x), rtol=1e-4, atol=1e-5)


def test_sparseprop_has_no_groups():
    pytest.importorskip("sparseprop")
    with pytest.raises(ValueError, match="groups"):
        peers.to_sparseprop(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="module is a Linear"):
        peers.from_sparseprop(torch.nn.Linear(3, 3))


def test_sparselab_and_back():
    pytest.importorskip("sparselab")
    weight = layer("linear").weight
    theirs = peers.to_padded_csr(weight)
    again = peers.from_padded_csr(theirs)
    np.testing.assert_array_equal(again.to_dense(), weight.to_dense())
    np.testing.assert_array_equal(np.asarray(theirs.to_dense()), weight.to_dense())
    assert again.nnz == weight.nnz


def test_what_the_peers_have_not():
    sequential, convolution = nn.Sequential(layer("linear")), layer("conv")
    for thing, name in ((nn.ReLU(), "ReLU"), (sequential, "Sequential"), (convolution.weight, "SparseParameter")):
        with pytest.raises(TypeError, match=f"layer is a {name}, must be a Linear or Conv2d"):
            peers.to_sparseprop(thing)
    for thing, name in ((nn.Linear(3, 3).weight, "Parameter"), (layer("linear"), "Linear")):
        with pytest.raises(TypeError, match=f"weight is a {name}, must be a SparseParameter"):
            peers.to_padded_csr(thing)
    with pytest.raises(ValueError, match=r"weight has shape \(8, 6, 3, 3\), must be \(out, in\)"):
        peers.to_padded_csr(convolution.weight)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_peers_have_no_float64(kind):
    double = layer(kind).to(np.float64)
    with pytest.raises(TypeError, match="layer has dtype float64, must be float32"):
        peers.to_sparseprop(double)
    if kind == "linear":
        with pytest.raises(TypeError, match="weight has dtype float64, must be float32"):
            peers.to_padded_csr(double.weight)
