"""SparseParameter: round trips, what it stores, and structures that it refuses."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given

from sparsetrain import nn
from sparsetrain.sparse import Parameter, SparseParameter
from strategies import masked_weights, quick

# A 3 x 4 matrix with an empty row in the middle: [[1 0 2 0], [0 0 0 0], [0 3 4 5]].
INDPTR = np.array([0, 2, 2, 5], np.int32)
INDICES = np.array([0, 2, 1, 2, 3], np.int32)
DATA = np.array([1, 2, 3, 4, 5], np.float32)
DENSE = np.array([[1, 0, 2, 0], [0, 0, 0, 0], [0, 3, 4, 5]], np.float32)


def test_worked_example():
    w = SparseParameter((3, 4), INDPTR, INDICES, DATA)
    assert w.shape == (3, 4) and w.nnz == 5 and w.sparsity == pytest.approx(7 / 12)
    np.testing.assert_array_equal(w.to_dense(), DENSE)
    np.testing.assert_array_equal(w.mask, DENSE != 0)
    assert w.grad is None and w.slots == {}


def test_kernel_positions_follow_the_channel():
    """Indices are those of the flattened (ic, kh, kw): 7 is ic 1, kh 0, kw 1 of 2x3 kernels."""
    w = SparseParameter((1, 2, 2, 3), np.array([0, 1], np.int32), np.array([7], np.int32), DATA[:1])
    assert w.shape == (1, 2, 2, 3) and w.to_scipy().shape == (1, 12)
    assert np.argwhere(w.mask).tolist() == [[0, 1, 0, 1]]


@quick
@given(masked_weights())
def test_round_trips(case):
    dense, mask = case
    w = SparseParameter.from_dense(dense, mask)
    assert w.shape == dense.shape and w.nnz == mask.sum() and w.data.shape == (w.nnz,)
    assert w.sparsity == pytest.approx(1 - mask.mean())
    assert w.data.dtype == dense.dtype
    assert w.indptr.dtype == w.indices.dtype == np.int32
    np.testing.assert_array_equal(w.to_dense(), np.where(mask, dense, 0))
    np.testing.assert_array_equal(w.mask, mask)
    assert w.mask.dtype == bool and w.to_dense().dtype == dense.dtype
    np.testing.assert_array_equal(w.data, dense[mask])

    matrix = w.to_scipy()
    assert scipy.sparse.issparse(matrix) and matrix.format == "csr"
    assert matrix.shape == (len(dense), dense[0].size)
    assert matrix.has_sorted_indices and matrix.nnz == w.nnz
    np.testing.assert_array_equal(matrix.toarray().reshape(dense.shape), w.to_dense())

    again = SparseParameter(w.shape, w.indptr, w.indices, w.data)
    np.testing.assert_array_equal(again.to_dense(), w.to_dense())
    np.testing.assert_array_equal(again.mask, mask)


def test_a_stored_zero_stays_stored():
    w = SparseParameter.from_dense(np.zeros((2, 3), np.float32), np.ones((2, 3), bool))
    assert w.nnz == 6 and w.sparsity == 0 and w.mask.all() and w.to_scipy().nnz == 6


def test_copies():
    """Dense forms are copies: changing them changes nothing here."""
    w = SparseParameter.from_dense(DENSE.copy(), DENSE != 0)
    w.to_dense()[...] = 9
    w.mask[...] = False
    w.to_scipy().data[...] = 9
    dense = DENSE.copy()
    other = SparseParameter.from_dense(dense, DENSE != 0)
    dense[...] = 9
    for parameter in (w, other):
        np.testing.assert_array_equal(parameter.to_dense(), DENSE)


def test_a_dense_parameter():
    w = Parameter(DENSE.copy())
    assert w.shape == (3, 4) and w.nnz == 12 and w.sparsity == 0
    assert w.grad is None and w.slots == {}
    w.to_dense()[...] = 9
    np.testing.assert_array_equal(w.data, DENSE)
    assert isinstance(SparseParameter.from_dense(DENSE, DENSE != 0), Parameter)


def int32(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"indptr": int32(0, 3, 2, 5)}, "indptr"),  # falls at row 1
        ({"indptr": int32(1, 2, 2, 5)}, "indptr.*(1|0)"),  # starts after 0
        ({"indptr": int32(0, 2, 2, 4)}, "indptr.*4.*5|indptr.*5.*4"),  # ends before nnz
        ({"indptr": int32(0, 2, 2, 6)}, "indptr.*6.*5|indptr.*5.*6"),
        ({"indptr": int32(0, -2, 2, 5)}, "indptr"),
        ({"indptr": int32(0, 2, 5)}, "indptr.*(3|4)"),  # a row too few
        ({"indptr": int32(0, 2, 2, 2, 5)}, "indptr.*(5|4)"),
        ({"indptr": INDPTR[None]}, "indptr"),
        ({"indptr": INDPTR.astype(np.int64)}, "indptr.*int64"),
        ({"indptr": INDPTR.tolist()}, "indptr.*list"),
        ({"indices": int32(0, 2, 1, 2, 4)}, "indices.*4"),  # 4 of 0..3
        ({"indices": int32(-1, 2, 1, 2, 3)}, "indices.*-1"),
        ({"indices": int32(2, 0, 1, 2, 3)}, "indices"),  # row 0 descends
        ({"indices": int32(0, 2, 1, 3, 2)}, "indices"),  # row 2 does
        ({"indices": int32(0, 2, 1, 2, 2)}, "indices"),  # a duplicate
        ({"indices": int32(0, 0, 1, 2, 3)}, "indices"),
        ({"indices": int32(0, 2, 1, 2)}, "(?=.*indptr|.*data)(?=.*4)(?=.*5)"),
        ({"indices": INDICES.astype(np.int64)}, "indices.*int64"),
        ({"indices": INDICES.astype(np.float32)}, "indices.*float32"),
        ({"data": DATA[:4]}, "(?=.*4)(?=.*5)"),
        ({"data": DATA[:, None]}, "data"),
        ({"data": DATA.astype(np.int32)}, "data.*int32"),
        ({"data": DATA.astype(np.float16)}, "data.*float16"),
        ({"data": DATA.tolist()}, "data.*list"),
        ({"shape": (3, 3)}, "indices.*3"),
        ({"shape": (4, 4)}, "indptr"),
        ({"shape": (3, 2, 2)}, "shape.*3, 2, 2"),
        ({"shape": (0, 4)}, "shape.*0"),
    ],
)
def test_bad_structure(change, match):
    good = {"shape": (3, 4), "indptr": INDPTR, "indices": INDICES, "data": DATA}
    SparseParameter(**good)
    with pytest.raises((TypeError, ValueError), match="(?s)" + match):
        SparseParameter(**(good | change))


@pytest.mark.parametrize(
    ("dense", "mask", "match"),
    [
        (DENSE, np.ones((4, 3), bool), "mask.*4, 3"),
        (DENSE, np.ones((3, 4), np.uint8), "mask.*uint8"),
        (DENSE, np.ones((3, 4)).tolist(), "mask.*list"),
        (DENSE.astype(np.int64), DENSE != 0, "int64"),
        (DENSE[0], DENSE[0] != 0, r"\(4,\)"),
    ],
)
def test_bad_dense(dense, mask, match):
    with pytest.raises((TypeError, ValueError), match=match):
        SparseParameter.from_dense(dense, mask)


@pytest.mark.parametrize("which", ["data", "grad"])
@pytest.mark.parametrize("make", [nn.Linear, lambda *sizes: nn.Conv2d(*sizes, 1)], ids=["linear", "conv"])
def test_arrays_in_another_order_are_refused(make, which):
    layer = make(4, 3)
    setattr(layer.weight, which, np.asfortranarray(np.ones(layer.weight.shape, np.float32)))
    y = layer(np.ones((2, 4, 1, 1) if layer.weight.data.ndim == 4 else (2, 4), np.float32))
    with pytest.raises(ValueError, match=f"{which} of a parameter is float32 .*not C-contiguous, must be"):
        layer.backward(np.ones_like(y))
