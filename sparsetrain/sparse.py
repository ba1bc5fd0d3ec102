"""Parameters: dense ones, and sparse ones in which removed weights do not exist.

A sparse weight keeps its values in the order of a CSR matrix whose rows are output channels and whose
columns are (input channel, kernel row, kernel column). Gradient and optimiser slots have the same length.
"""

import copy
import math
import sys

import numpy as np
import scipy.sparse

from sparsetrain import arrays, checks
from sparsetrain._kernels import core


class Structure:
    """Which weights of a (out, in) or (out, in, height, width) array are stored; checked here and nowhere else.

    indptr int32 (out + 1): row o has the entries indptr[o] to indptr[o + 1]. indices int32 (nnz): their columns,
    ascending within a row. Both None: every weight is stored. Immutable, so `plans` can keep what was derived.
    """

    def __init__(self, shape, indptr=None, indices=None):
        self.shape = shape = tuple(checks.integer("shape", n, low=0) for n in shape)
        self.dense = indptr is None
        self.plans = {}
        if not self.dense and (len(shape) not in (2, 4) or min(shape) < 1):
            raise ValueError(f"shape is {shape}, must be (out, in) or (out, in, height, width), each at least 1")
        rows, columns = shape[0], math.prod(shape[1:])
        if rows * columns >= 2**31:
            raise ValueError(f"shape is {shape}: that is 2**31 weights or more")
        if self.dense:
            self.nnz = rows * columns
            return
        for name, index in (("indptr", indptr), ("indices", indices)):
            if not isinstance(index, np.ndarray) or index.dtype != np.int32 or index.ndim != 1:
                raise TypeError(f"{name} is {_described(index)}, must be a one-dimensional int32 array")
        if len(indptr) != rows + 1:
            raise ValueError(f"indptr has length {len(indptr)}, must have {rows + 1}, one more than rows")
        if indptr[0] != 0 or indptr[-1] != len(indices):
            raise ValueError(
                f"indptr goes from {indptr[0]} to {indptr[-1]}, must go from 0 to {len(indices)}, the length of indices"
            )
        if (np.diff(indptr) < 0).any():
            raise ValueError("indptr falls; it must ascend")
        if len(indices) and (indices.min() < 0 or indices.max() >= columns):
            raise ValueError(f"indices reach from {indices.min()} to {indices.max()}, must lie in [0, {columns})")
        rises = np.diff(indices) > 0
        first = indptr[(indptr > 0) & (indptr < len(indices))]
        rises[first - 1] = True
        if not rises.all():
            raise ValueError("indices must ascend within a row, without duplicates")
        self.nnz = len(indices)
        self.indptr, self.indices = indptr.copy(), indices.copy()
        self.indptr.flags.writeable = self.indices.flags.writeable = False

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __getstate__(self):
        return vars(self) | {"plans": {}}

    def csr(self):
        """(indptr, indices), also where every weight is stored."""
        if not self.dense:
            return self.indptr, self.indices
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        return np.arange(rows + 1, dtype=np.int32) * columns, np.tile(np.arange(columns, dtype=np.int32), rows)

    def rows(self):
        """The row of each stored weight."""
        indptr, _ = self.csr()
        return np.repeat(np.arange(self.shape[0], dtype=np.int32), np.diff(indptr))


def _described(value):
    """Dtype and shape of an array, the type of anything else."""
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def _check_values(name, values):
    if not isinstance(values, np.ndarray) or values.dtype not in arrays.DTYPES:
        raise TypeError(f"{name} is {_described(values)}, must be a float32 or float64 array")


def _check_flat(name, values, data):
    if values.shape != data.shape or values.dtype != data.dtype or not values.flags.c_contiguous:
        order = "" if values.flags.c_contiguous else ", not C-contiguous"
        wanted = f"{data.dtype} {data.shape}, C-contiguous (numpy.ascontiguousarray)"
        raise ValueError(f"{name} of a parameter is {_described(values)}{order}, must be {wanted}")


class Parameter:
    """A dense array that is trained: `data`, `grad` (None, or shaped as data) and optimiser `slots` (name -> array).

    data is a float32 or float64 array of any shape, else TypeError.
    """

    def __init__(self, data):
        _check_values("data", data)
        self.data = np.ascontiguousarray(data)
        self.structure = Structure(self.data.shape)
        self.grad, self.slots, self._buffer, self._full = None, {}, None, None

    @property
    def shape(self):
        """Shape of the weight as a dense array."""
        return self.structure.shape

    @property
    def nnz(self):
        """Number of stored weights."""
        return self.structure.nnz

    @property
    def sparsity(self):
        """Fraction of the weights that are not stored."""
        return 1 - self.nnz / max(1, math.prod(self.shape))

    def to_dense(self):
        """A copy as a dense array."""
        return self.data.copy()

    def check_dense(self, name, values):
        """ValueError if set_dense() could not take `values`."""

    def set_dense(self, values):
        """Take the values of a dense array of this shape and dtype."""
        self.data[...] = values

    def gradient(self):
        """(array, accumulate): where backward writes the gradient, and whether it adds to what is there. ValueError if
        data or grad cannot be written as one flat array."""
        _check_flat("data", self.data, self.data)
        accumulate = self.grad is not None
        if accumulate:
            _check_flat("grad", self.grad, self.data)
        if not accumulate:
            # The last gradient's memory again, unless somebody still holds that array: 2 references are the
            # attribute and getrefcount's own.
            old = self._buffer is not None and self._buffer.dtype == self.data.dtype
            if not old or sys.getrefcount(self._buffer) > 2:
                self._buffer = np.empty_like(self.data)
            self.grad = self._buffer
        return self.grad, accumulate

    def snapshot(self):
        """A parameter with the same structure and a copy of the values, without gradient and slots."""
        other = copy.copy(self)
        other.data, other.grad, other.slots, other._buffer, other._full = self.data.copy(), None, {}, None, None
        return other

    def keep(self, kept):
        """Remove the weights where the boolean array `kept` (of data's shape) is false; slots follow the others.

        The parameter becomes a SparseParameter, the same object: an optimiser that holds it goes on.
        """
        mask = kept.reshape(self.shape[0], -1)
        indptr = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
        self.structure = Structure(self.shape, indptr, np.nonzero(mask)[1].astype(np.int32))
        self.data = self.data[kept]
        self.slots = {name: slot[kept] for name, slot in self.slots.items()}
        self.grad = self._buffer = self._full = None
        self.__class__ = SparseParameter

    def to(self, dtype):
        """Convert values and slots to float32 or float64 in place; the gradient is dropped."""
        if np.dtype(dtype) not in arrays.DTYPES:
            raise TypeError(f"dtype is {dtype}, must be float32 or float64")
        self.data = self.data.astype(dtype)
        self.slots = {name: slot.astype(dtype) for name, slot in self.slots.items()}
        self.grad = None

    def __repr__(self):
        return f"{type(self).__name__}(shape={self.shape}, nnz={self.nnz}, dtype={self.data.dtype})"


class SparseParameter(Parameter):
    """A weight of which only `nnz` values exist: data, grad and slots are flat, in CSR order.

    shape (out, in) or (out, in, height, width); indptr, indices int32 and data as in a CSR matrix
    (out, in * height * width). ValueError or TypeError if they are no valid structure.
    """

    def __init__(self, shape, indptr, indices, data):
        self.structure = Structure(shape, indptr, indices)
        _check_values("data", data)
        if data.shape != (self.nnz,):
            raise ValueError(f"data has shape {data.shape}, must be ({self.nnz},), the length of indices")
        self.data = data.copy()
        self.grad, self.slots, self._buffer, self._full = None, {}, None, None

    @staticmethod
    def from_dense(weight, mask):
        """The weights of a dense array where the boolean array `mask` is true."""
        _check_values("weight", weight)
        if not isinstance(mask, np.ndarray) or mask.dtype != bool:
            raise TypeError(f"mask is {_described(mask)}, must be a bool array")
        if mask.shape != weight.shape:
            raise ValueError(f"mask has shape {mask.shape}, must be {weight.shape} as weight")
        parameter = Parameter(weight)
        parameter.keep(mask)
        return parameter

    @property
    def indptr(self):
        return self.structure.indptr

    @property
    def indices(self):
        return self.structure.indices

    @property
    def mask(self):
        """Boolean array of `shape`, true where a weight is stored."""
        return self._scatter(np.ones(self.nnz, bool))

    def to_dense(self):
        """A dense array of `shape`, zero where no weight is stored."""
        return self._scatter(self.data)

    def to_scipy(self):
        """A scipy CSR matrix (out, in * height * width)."""
        columns = math.prod(self.shape[1:])
        return scipy.sparse.csr_matrix((self.data.copy(), self.indices, self.indptr), (self.shape[0], columns))

    def check_dense(self, name, values):
        """ValueError if a weight of the dense array `values` is not zero but not stored here."""
        extra = int(np.count_nonzero(values[~self.mask]))
        if extra:
            raise ValueError(f"{name} has {extra} weights that are not zero where this model stores none")

    def set_dense(self, values):
        """Take the values of a dense array of this shape and dtype, where they are stored."""
        self.data[...] = values[self.mask]

    def full(self):
        """A Parameter with all weights, zero where none is stored: the same one each time, with the values of now.

        Where few weights are removed the dense kernels are faster. collect() takes back its gradient.
        """
        if self._full is None or self._full[0].data.dtype != self.data.dtype:
            columns = math.prod(self.shape[1:])
            place = self.structure.rows() * np.int32(columns) + self.indices
            self._full = Parameter(np.zeros(self.shape, self.data.dtype)), place
        full, place = self._full
        core.spread_values(self.data, place, full.data.reshape(-1))
        full.grad = None
        return full

    def collect(self):
        """Take the gradient of full(), where a weight is stored."""
        full, place = self._full
        grad, accumulate = self.gradient()
        core.collect_values(full.grad.reshape(-1), place, grad, accumulate)

    def keep(self, kept):
        """Remove the weights where the boolean array `kept` (nnz) is false; optimiser slots follow the others."""
        rows = self.structure.rows()[kept]
        indptr = np.searchsorted(rows, np.arange(self.shape[0] + 1)).astype(np.int32)
        self.structure = Structure(self.shape, indptr, self.indices[kept])
        self.data = self.data[kept]
        self.slots = {name: slot[kept] for name, slot in self.slots.items()}
        self.grad = self._buffer = self._full = None

    def rewire(self, kept, grown):
        """Remove the weights where the boolean array `kept` (nnz) is false, and then store those at the positions
        `grown` too: int64, ascending, in the weight as a flat dense array, not stored any more or never.

        New weights are zero, and so are their slots. The gradient is dropped.
        """
        places = self.places()[kept]
        every = np.concatenate([places, grown])
        order = np.argsort(every, kind="stable")
        every = every[order]
        if len(grown) and ((np.diff(every) == 0).any() or every[0] < 0 or every[-1] >= math.prod(self.shape)):
            raise ValueError("grown has a position that is stored, that comes twice or that the weight does not have")
        columns = math.prod(self.shape[1:])
        rows, indices = np.divmod(every, columns)
        indptr = np.searchsorted(rows, np.arange(self.shape[0] + 1)).astype(np.int32)

        def moved(values):
            return np.concatenate([values[kept], np.zeros(len(grown), values.dtype)])[order]

        self.structure = Structure(self.shape, indptr, indices.astype(np.int32))
        self.data, self.slots = moved(self.data), {name: moved(slot) for name, slot in self.slots.items()}
        self.grad = self._buffer = self._full = None

    def fill(self):
        """Store every weight: those that were not are zero, and so are their slots. The gradient is dropped.

        The parameter becomes a Parameter, the same object: an optimiser that holds it goes on.
        """
        data, slots = self.to_dense(), {name: self._scatter(slot) for name, slot in self.slots.items()}
        self.__class__ = Parameter
        self.data, self.slots, self.structure = data, slots, Structure(data.shape)
        self.grad = self._buffer = self._full = None

    def places(self):
        """Position of each stored weight in the weight as a flat dense array, int64, ascending."""
        return self.structure.rows() * np.int64(math.prod(self.shape[1:])) + self.indices

    def _scatter(self, values):
        dense = np.zeros((self.shape[0], math.prod(self.shape[1:])), values.dtype)
        dense[self.structure.rows(), self.indices] = values
        return dense.reshape(self.shape)
