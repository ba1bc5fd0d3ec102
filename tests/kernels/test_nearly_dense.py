"""Layers of which few weights are removed run on the dense kernels, and nobody can tell but by the time."""

import numpy as np
import pytest

from sparsetrain import arrays, ops, plans
from sparsetrain.sparse import Parameter, SparseParameter


def parameters(rng, shape, sparsity, dtype):
    """(sparse, the same values with zeros in a dense parameter)."""
    weight = rng.standard_normal(shape).astype(dtype)
    sparse = SparseParameter.from_dense(weight, rng.random(shape) >= sparsity)
    return sparse, Parameter(sparse.to_dense())


@pytest.mark.parametrize(
    "shape, sparsity",
    [((20, 33), 0.3), ((20, 33), 0.0), ((6, 5, 3, 3), 0.2), ((32, 40, 3, 3), 0.4), ((6, 5, 1, 1), 0.1)],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_are_those_of_the_dense_layer_at_the_stored_weights(shape, sparsity, dtype):
    rng = np.random.default_rng(0)
    sparse, dense = parameters(rng, shape, sparsity, dtype)
    linear = len(shape) == 2
    geometry = plans.Geometry() if linear else plans.Geometry(padding=(1, 1))
    assert plans.is_nearly_dense(sparse.structure, shape[1], geometry)
    assert not plans.is_nearly_dense(dense.structure, shape[1], geometry)
    x = arrays.pack(rng.standard_normal((19, shape[1]) if linear else (19, shape[1], 7, 8)).astype(dtype))
    results = []
    for weight in (sparse, dense):
        y = ops.conv2d(x, weight, None, geometry)
        for _ in range(2):  # the second adds to the gradient of the first
            dx = ops.conv2d_backward(x, weight, None, geometry, y)
        results.append((arrays.unpack(y), arrays.unpack(dx), weight.grad))
    (y, dx, grad), (dense_y, dense_dx, dense_grad) = results
    np.testing.assert_array_equal(y, dense_y)
    np.testing.assert_array_equal(dx, dense_dx)
    np.testing.assert_array_equal(grad, dense_grad[sparse.mask])


def test_new_values_and_another_structure_are_seen():
    rng = np.random.default_rng(1)
    sparse, _ = parameters(rng, (8, 40), 0.2, np.float32)
    x = rng.standard_normal((16, 40)).astype(np.float32)

    def run():
        return arrays.unpack(ops.conv2d(arrays.pack(x), sparse, None, plans.Geometry()))

    run()
    sparse.data *= 2
    np.testing.assert_allclose(run(), x @ sparse.to_dense().T, rtol=1e-5, atol=1e-5)
    sparse.keep(rng.random(sparse.nnz) >= 0.1)
    assert plans.is_nearly_dense(sparse.structure, 40)
    np.testing.assert_allclose(run(), x @ sparse.to_dense().T, rtol=1e-5, atol=1e-5)
    sparse.to(np.float64)
    x = x.astype(np.float64)
    np.testing.assert_allclose(run(), x @ sparse.to_dense().T, rtol=1e-12, atol=1e-12)


def test_groups_and_sparser_layers_do_not():
    rng = np.random.default_rng(2)
    grouped, _ = parameters(rng, (6, 5, 3, 3), 0.1, np.float32)
    assert not plans.is_nearly_dense(grouped.structure, 10)
    assert not plans.is_nearly_dense(parameters(rng, (6, 50, 3, 3), 0.35, np.float32)[0].structure, 50)
    assert not plans.is_nearly_dense(parameters(rng, (60, 50), 0.5, np.float32)[0].structure, 50)
    wide = parameters(rng, (60, 50, 3, 3), 0.35, np.float32)[0].structure  # whose dense kernels have a transform
    assert plans.is_nearly_dense(wide, 50, plans.Geometry())
    assert not plans.is_nearly_dense(wide, 50, plans.Geometry(stride=(2, 2))) and not plans.is_nearly_dense(wide, 50)
