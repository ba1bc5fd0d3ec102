"""The compiled kernels over NumPy arrays: checks, threads and the choice of instruction set.

Blocked arrays are (blocks, channels, height, width, 16) with any strides of the first three axes and
pixels 16 elements apart. All arrays of a call have one dtype, float32 or float64. Outputs are marked
# OUT; nothing else is written. Threads are started here and nowhere else.
"""
import os

import numpy as np

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cython cimport floating, no_gc
from cython.parallel cimport prange, threadid
from libc.math cimport sqrt
from libc.stdint cimport int8_t, int32_t, int64_t, uint64_t
from libcpp.vector cimport vector

from sparsetrain._kernels import memory
from sparsetrain._kernels import threads as _threads

cdef extern from "placement.hh":
    cppclass Placement:
        void settle() nogil
    double seconds() nogil

from sparsetrain._kernels cimport kernels
from sparsetrain._kernels.kernels cimport (
    Added, Bands, BatchNorm, Build, Entry, MaxPool, PackedEntry, Place, Product, Segment, Shape, Slabs, Sparsifier, View,
    Windows,
)


ctypedef fused number:
    float
    double
    int32_t

# As in kernels.hh.
FIRST, LAST, ROWS_AT_ONCE, MAX_PHASES = kernels.FIRST, kernels.LAST, kernels.ROWS_AT_ONCE, kernels.MAX_PHASES
STEPS, MAX_RUN, MAX_ADDED, OUTPUTS = kernels.STEPS, kernels.MAX_RUN, kernels.MAX_ADDED, kernels.OUTPUTS


# ---- instruction sets and threads

_ISAS = {kernels.isas[i].name.decode(): i for i in range(kernels.n_isas) if kernels.isas[i].supported}
_isa = None
_vnni = kernels.vnni != NULL
cdef int _n_threads = _threads.default()


def available_isas():
    """Names of the instruction sets that this machine can run, best first."""
    return list(_ISAS)


def get_isa():
    """Name of the instruction set in use."""
    return _isa


def set_isa(name):
    """Use the kernels built for instruction set `name` from now on; ValueError if this machine cannot run it."""
    global _isa
    if name not in _ISAS:
        raise ValueError(f"instruction set is {name!r}, this machine runs {', '.join(_ISAS)}")
    cdef const kernels.Isa *isa = &kernels.isas[<int>_ISAS[name]]
    kernels.use(isa.build, kernels.vnni if _vnni and name == "avx512" else isa.int8)
    _isa = name


def get_vnni():
    """Whether 8-bit products use AVX-512 VNNI where the instruction set in use is avx512."""
    return _vnni


def set_vnni(on):
    """Use AVX-512 VNNI or other instructions, which give the same results; ValueError if this machine does not have it."""
    global _vnni
    if on and kernels.vnni == NULL:
        raise ValueError("this machine does not have AVX-512 VNNI")
    _vnni = bool(on)
    set_isa(_isa)


def tile_limits(isa=None):
    """How many positions a tile may have on an instruction set, that in use if None: (spmm, sddmm, dense spmm)."""
    cdef const Build *b = kernels.isas[<int>_ISAS[_isa if isa is None else isa]].build
    return b.max_tile, b.max_gradient_tile, b.max_dense_tile


def get_num_threads():
    """Number of threads that the kernels use."""
    return _n_threads


def set_num_threads(n):
    """Use n threads from now on. No result depends on it. ValueError if n is not in [1, 1024]."""
    global _n_threads
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n is {n!r}, must be an int in [1, 1024]")
    if not 1 <= n <= 1024:
        raise ValueError(f"n is {n}, must be an int in [1, 1024]")
    _n_threads = n


set_isa(os.environ.get("SPARSETRAIN_ISA") or available_isas()[0])


# A parallel region costs about 2 us here: below this much work (elements, or multiply-adds / 8) one thread is faster.
cdef enum:
    SERIAL = 8192

# Where threads are is looked at after pauses in which workers sleep (see __init__.py), and now and then; it takes 2 to 5 us.
cdef double PAUSE = 200e-6, NOW_AND_THEN = 20e-3
cdef double _last_team = 0, _last_look = 0


cdef int team(long tasks, double work) noexcept:
    """How many threads should share so many tasks, each of which is then on a CPU of its own."""
    global _last_team, _last_look
    cdef:
        int threads = 1 if work < <double>SERIAL or tasks < 2 else min(_n_threads, tasks), t
        double now
        Placement placement
    if threads > 1:
        now = seconds()
        if now - _last_team > PAUSE or now - _last_look > NOW_AND_THEN:
            _last_look = now
            for t in prange(threads, nogil=True, num_threads=threads, schedule="static", chunksize=1):
                placement.settle()
        _last_team = now
    return threads


cdef long chunks_of(long n, int threads) noexcept:
    """Into how many ranges n planes, channels or elements are cut: a few a thread, so that a slow one can be made up for."""
    return 1 if threads == 1 else min(n, 4 * threads)


# ---- blocked arrays

cdef View[number] view(number[:, :, :, :, :] a) noexcept:
    cdef View[number] v
    v.data = &a[0, 0, 0, 0, 0]
    v.block = a.strides[0] // sizeof(number)
    v.channel = a.strides[1] // sizeof(number)
    v.row = a.strides[2] // sizeof(number)
    return v


cdef Shape shape_of(floating[:, :, :, :, :] a, long images) noexcept:
    cdef Shape s
    s.blocks, s.channels, s.height, s.width, s.images = a.shape[0], a.shape[1], a.shape[2], a.shape[3], images
    return s


cdef int same_shape(floating[:, :, :, :, :] a, floating[:, :, :, :, :] b) except -1:
    cdef int i
    for i in range(5):
        if a.shape[i] != b.shape[i]:
            raise ValueError(f"blocked shapes differ: {tuple(a.shape)[:5]} and {tuple(b.shape)[:5]}")
    return 0


cdef int same_length(const char *name, long n, long wanted) except -1:
    if n != wanted:
        raise ValueError(f"{name.decode()} has {n} values, must have {wanted}")
    return 0


cdef double size(Shape s) noexcept:
    return <double>s.blocks * s.channels * s.height * s.width * 16


def to_blocked(const floating[:, :, :, ::1] x, floating[:, :, :, :, :] y):
    """y[:] = x (images, channels, height, width) in blocks of 16 images, padding lanes 0."""
    cdef:
        Shape s = shape_of(y, x.shape[0])
        View[floating] out = view(y)  # OUT
        const floating *p = &x[0, 0, 0, 0]
        long n = s.blocks * s.channels, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
    same_length("x", x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3], s.images * s.channels * s.height * s.width)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.to_blocked(s, p, out, n * c // chunks, n * (c + 1) // chunks)


def from_blocked(floating[:, :, :, :, :] x, floating[:, :, :, ::1] y):
    """y[:] = the images of x as (images, channels, height, width)."""
    cdef:
        Shape s = shape_of(x, y.shape[0])
        View[floating] source = view(x)
        floating *p = &y[0, 0, 0, 0]  # OUT
        long n = s.blocks * s.channels, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
    same_length("y", y.shape[0] * y.shape[1] * y.shape[2] * y.shape[3], s.images * s.channels * s.height * s.width)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.from_blocked(s, source, p, n * c // chunks, n * (c + 1) // chunks)


def copy(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y):
    """y[:] = x."""
    same_shape(x, y)
    cdef:
        Shape s = shape_of(x, 16 * x.shape[0])
        View[floating] xv = view(x), yv = view(y)  # OUT y
        long n = s.blocks * s.channels, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.copy(s, xv, yv, n * c // chunks, n * (c + 1) // chunks)


def looked_at(floating[:, :, :, :, :] a):
    """The array as the functions here see it: given this instead, they need not ask it for shape and strides again."""
    return a


# ---- elementwise layers

def relu(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y):
    """y[:] = max(x, 0)."""
    same_shape(x, y)
    cdef:
        Shape s = shape_of(x, 16 * x.shape[0])
        View[floating] xv = view(x), yv = view(y)  # OUT y
        long n = s.blocks * s.channels, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.relu(s, xv, yv, n * c // chunks, n * (c + 1) // chunks)


def relu_backward(floating[:, :, :, :, :] y, floating[:, :, :, :, :] dy, floating[:, :, :, :, :] dx):
    """dx[:] = 0 where y <= 0, else dy; dx may be dy."""
    same_shape(y, dy)
    same_shape(y, dx)
    cdef:
        Shape s = shape_of(y, 16 * y.shape[0])
        View[floating] yv = view(y), gv = view(dy), dv = view(dx)  # OUT dx
        long n = s.blocks * s.channels, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.relu_backward(s, yv, gv, dv, n * c // chunks, n * (c + 1) // chunks)


def add(floating[:, :, :, :, :] a, floating[:, :, :, :, :] b, floating[:, :, :, :, :] y):
    """y[:] = a + b; y may be a or b."""
    same_shape(a, b)
    same_shape(a, y)
    cdef:
        Shape s = shape_of(a, 16 * a.shape[0])
        View[floating] av = view(a), bv = view(b), yv = view(y)  # OUT y
        long n = s.blocks * s.channels, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.add(s, av, bv, yv, n * c // chunks, n * (c + 1) // chunks)


def dropout(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y, double keep, uint64_t seed):
    """y[:] = x / keep where the element's random number, a hash of its place and the seed, is below keep, else 0."""
    same_shape(x, y)
    cdef:
        Shape s = shape_of(x, 16 * x.shape[0])
        View[floating] xv = view(x), yv = view(y)  # OUT y
        long n = s.blocks * s.channels, c
        int threads = team(n, 4 * size(s))
        long chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.dropout(s, xv, yv, keep, seed, n * c // chunks, n * (c + 1) // chunks)


include "memory.pxi"
include "norm.pxi"
include "pool.pxi"
include "product.pxi"
include "bands.pxi"
include "sparse_gradient.pxi"
include "int8.pxi"
include "optim.pxi"


# ---- loss

def cross_entropy(const floating[:, ::1] logits, const int64_t[::1] labels, double smoothing,
                  double[::1] loss, floating[:, ::1] gradient):
    """loss[i] of row i of logits (n, classes), and the gradient of the mean loss. Labels are trusted."""
    cdef:
        long n = logits.shape[0], classes = logits.shape[1], c
        int threads = team(n, <double>n * classes * 8)
        long chunks = chunks_of(n, threads)
        const floating *z = &logits[0, 0]
        const int64_t *k = &labels[0]
        double *out = &loss[0]  # OUT
        floating *g = &gradient[0, 0]  # OUT
    same_length("labels", labels.shape[0], n)
    same_length("loss", loss.shape[0], n)
    same_length("gradient", gradient.shape[0] * gradient.shape[1], n * classes)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.cross_entropy(n * c // chunks, n * (c + 1) // chunks, n, classes, smoothing, z, k, out, g)


# ---- what the machine can do at best: row t of an array (threads, n) is for thread t alone

CHAINED_VALUES = kernels.CHAINED_VALUES  # of a row of multiply_add()


cdef int rows_of(floating[:, :] a, long rows, long n) except -1:
    if a.shape[0] != rows or a.shape[1] != n or n < 1 or a.strides[1] != sizeof(floating):
        raise ValueError(f"array has shape {tuple(a.shape)[:2]}, must be ({rows}, {n}) with contiguous rows")
    return rows


def multiply_add(floating[:, :] x, double a, double b, long repeats):
    """x[:] = a * x + b, `repeats` times in registers; x is (threads, CHAINED_VALUES)."""
    cdef int threads = rows_of(x, x.shape[0], kernels.CHAINED_VALUES), t
    for t in prange(threads, nogil=True, num_threads=threads, schedule="static"):
        kernels.multiply_add(repeats, <floating>a, <floating>b, &x[t, 0])  # OUT x


def read_sum(floating[:, :] x, floating[:] totals, long repeats):
    """totals[t] = the sum of row t, `repeats` times over."""
    cdef int threads = rows_of(x, x.shape[0], x.shape[1]), t
    same_length("totals", totals.shape[0], threads)
    for t in prange(threads, nogil=True, num_threads=threads, schedule="static"):
        kernels.read_sum(x.shape[1], repeats, <const floating *>&x[t, 0], &totals[t])  # OUT totals


def axpy(double a, floating[:, :] x, floating[:, :] y, long repeats):
    """y[:] += a * x, `repeats` times; y may be x."""
    cdef int threads = rows_of(x, x.shape[0], x.shape[1]), t
    rows_of(y, threads, x.shape[1])
    for t in prange(threads, nogil=True, num_threads=threads, schedule="static"):
        kernels.axpy(x.shape[1], repeats, <floating>a, <const floating *>&x[t, 0], &y[t, 0])  # OUT y
