"""Sparse layers of SparseProp and SparseLab, which live in PyTorch, and ours."""

import numpy as np

from sparsetrain import nn
from sparsetrain.sparse import Parameter, SparseParameter


def from_sparseprop(module):
    """A Linear or Conv2d like SparseProp's SparseLinear or SparseConv2d.

    Its convolutions are read by their own to_dense(), so that a stored weight of zero is not stored here. ValueError
    for another module.
    """
    kind = type(module).__name__
    if kind == "SparseLinear" and hasattr(module, "W_val"):
        (indptr, indices), values = (_array(a) for a in module.W_idx), _array(module.W_val)
        layer = nn.Linear(module.M, module.N, bias=module.bias is not None)
        layer.weight = _sorted((module.N, module.M), indptr, indices, values)
    elif kind == "SparseConv2d" and hasattr(module, "W_val"):
        weight = _array(module.to_dense().weight)
        bias = module.bias is not None
        layer = nn.Conv2d(module.IC, module.OC, module.K, module.stride, module.padding, bias=bias)
        layer.weight = SparseParameter.from_dense(weight, weight != 0)
    else:
        raise ValueError(f"module is a {kind}, must be a SparseLinear or SparseConv2d of sparseprop")
    if module.bias is not None:
        layer.bias = Parameter(_array(module.bias).copy())
    return layer


def to_sparseprop(layer):
    """SparseProp's SparseLinear or SparseConv2d like a Linear or Conv2d, which must have no groups or dilation and the
    same stride and padding both ways, as theirs have, and be float32. Needs sparseprop."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise TypeError(f"layer is a {type(layer).__name__}, must be a Linear or Conv2d")
    _check_float32("layer", layer.weight)
    import torch
    from sparseprop.modules import SparseConv2d, SparseLinear

    weight = torch.from_numpy(layer.weight.to_dense())
    bias = None if layer.bias is None else torch.nn.Parameter(torch.from_numpy(layer.bias.data.copy()))
    if isinstance(layer, nn.Linear):
        return SparseLinear(weight, bias)
    pairs = layer.kernel_size, layer.stride, layer.padding
    if layer.groups > 1 or layer.dilation != (1, 1) or any(a != b for a, b in pairs):
        raise ValueError(f"{layer!r} has groups, dilation or uneven sizes, which SparseConv2d has not")
    return SparseConv2d(weight, bias, padding=layer.padding[0], stride=layer.stride[0])


def from_padded_csr(matrix):
    """The SparseParameter (out, in) with the weights of a PaddedCSR of SparseLab."""
    values, columns = _array(matrix.values), _array(matrix.col_indices)
    starts, counts = _array(matrix.row_start), _array(matrix.row_nnz)
    taken = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]).astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return _sorted((matrix.nrows, matrix.ncols), indptr, columns[taken], values[taken])


def to_padded_csr(weight, padding_ratio=0.2):
    """SparseLab's PaddedCSR with the weights of a sparse (out, in) parameter of float32. Needs sparselab."""
    if not isinstance(weight, SparseParameter):
        raise TypeError(f"weight is a {type(weight).__name__}, must be a SparseParameter")
    if len(weight.shape) != 2:
        raise ValueError(f"weight has shape {weight.shape}, must be (out, in)")
    _check_float32("weight", weight)
    import torch
    from sparselab import layout

    arrays = (torch.from_numpy(a.copy()) for a in (weight.indptr, weight.indices, weight.data))
    return layout.from_torch_sparse_csr(torch.sparse_csr_tensor(*arrays, weight.shape), padding_ratio=padding_ratio)


def _check_float32(argument, weight):
    """TypeError for float64, which SparseProp and SparseLab would round."""
    if weight.data.dtype != np.float32:
        raise TypeError(f"{argument} has dtype {weight.data.dtype}, must be float32")


def _array(tensor):
    return np.asarray(tensor.detach() if hasattr(tensor, "detach") else tensor)


def _sorted(shape, indptr, indices, values):
    """The SparseParameter of a CSR matrix whose rows may be in any order."""
    rows = np.repeat(np.arange(shape[0]), np.diff(indptr))
    order = np.lexsort((indices, rows))
    return SparseParameter(shape, indptr.astype(np.int32), indices[order].astype(np.int32), values[order].copy())
