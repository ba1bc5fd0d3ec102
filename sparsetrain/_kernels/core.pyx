"""The compiled kernels over NumPy arrays: checks, threads and the choice of instruction set.

Blocked arrays are (blocks, channels, height, width, 16) with any strides of the first three axes and
pixels 16 elements apart. All arrays of a call have one dtype, float32 or float64. Outputs are marked
# OUT; nothing else is written. Threads are started here and nowhere else.
"""
import os

import numpy as np

from cython cimport floating, no_gc
from cython.parallel cimport prange, threadid
from libc.math cimport sqrt
from libc.stdint cimport int8_t, int32_t, int64_t, uint64_t

from sparsetrain._kernels import memory
from sparsetrain._kernels import threads as _threads

cdef extern from "placement.hh":
    cppclass Placement:
        void settle() nogil
    double seconds() nogil

from sparsetrain._kernels cimport kernels
from sparsetrain._kernels.kernels cimport (
    Bands, BatchNorm, Build, Entry, PackedEntry, Place, Product, Segment, Shape, Slabs, Sparsifier, View, Windows,
)


ctypedef fused number:
    float
    double
    int32_t

# As in kernels.hh.
FIRST, LAST, ROWS_AT_ONCE, MAX_PHASES = kernels.FIRST, kernels.LAST, kernels.ROWS_AT_ONCE, kernels.MAX_PHASES


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
    """Use n threads from now on. No result depends on it. ValueError if n < 1."""
    global _n_threads
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n is {n!r}, must be an int >= 1")
    if n < 1:
        raise ValueError(f"n is {n}, must be an int >= 1")
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


# ---- batch norm, bias

def batch_norm(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y, long images,
               const floating[::1] gamma, const floating[::1] beta, floating[::1] mean, floating[::1] var,
               double eps, bint training, bint relu, floating[:, :, :, :, :] add=None):
    """y[:] = gamma (x - mean) / sqrt(var + eps) + beta + add, then ReLU if `relu`.

    training: mean and var are those of the batch, biased, and are written; else they are read.
    """
    same_shape(x, y)
    cdef:
        BatchNorm[floating] a
        long n = x.shape[1], c
        int threads
        long chunks
    same_length("gamma", gamma.shape[0], n)
    same_length("beta", beta.shape[0], n)
    same_length("mean", mean.shape[0], n)
    same_length("var", var.shape[0], n)
    a.shape = shape_of(x, images)
    a.x, a.y = view(x), view(y)  # OUT y
    a.add.data = NULL
    if add is not None:
        same_shape(x, add)
        a.add = view(add)
    a.gamma, a.beta, a.eps, a.training, a.relu = &gamma[0], &beta[0], eps, training, relu
    a.mean, a.var = &mean[0], &var[0]  # OUT if training
    threads = team(n, size(a.shape))
    chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.batch_norm(&a, n * c // chunks, n * (c + 1) // chunks)


def batch_norm_backward(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y, floating[:, :, :, :, :] dy,
                        floating[:, :, :, :, :] dx, long images, const floating[::1] gamma, const floating[::1] beta,
                        floating[::1] mean, floating[::1] var, floating[::1] dgamma, floating[::1] dbeta,
                        double eps, bint training, bint relu, floating[:, :, :, :, :] dadd=None):
    """Gradients of batch_norm(): writes dx, and dadd if given; adds to dgamma and dbeta.

    dx may be dy. With `relu`, y says where it let pass; y None: nothing was added, and it is formed again from x.
    """
    same_shape(x, dy)
    same_shape(x, dx)
    cdef:
        BatchNorm[floating] a
        long n = x.shape[1], c
        int threads
        long chunks
    same_length("gamma", gamma.shape[0], n)
    same_length("mean", mean.shape[0], n)
    same_length("var", var.shape[0], n)
    same_length("beta", beta.shape[0], n)
    same_length("dgamma", dgamma.shape[0], n)
    same_length("dbeta", dbeta.shape[0], n)
    a.shape = shape_of(x, images)
    a.x, a.dy, a.dx = view(x), view(dy), view(dx)  # OUT dx
    a.y.data = NULL
    if y is not None:
        same_shape(x, y)
        a.y = view(y)
    a.dadd.data = NULL
    if dadd is not None:
        same_shape(x, dadd)
        a.dadd = view(dadd)  # OUT
    a.gamma, a.beta, a.eps, a.training, a.relu = &gamma[0], &beta[0], eps, training, relu
    a.mean, a.var = &mean[0], &var[0]
    a.dgamma, a.dbeta = &dgamma[0], &dbeta[0]  # OUT
    threads = team(n, size(a.shape))
    chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.batch_norm_backward(&a, n * c // chunks, n * (c + 1) // chunks)


def batch_norm_line(const floating[::1] gamma, const floating[::1] beta, const floating[::1] mean,
                    const floating[::1] var, double eps, double[::1] inverse, floating[::1] scale, floating[::1] shift):
    """inverse[:], scale[:] and shift[:] = 1 / sqrt(var + eps), gamma inverse and beta - mean scale: y = x scale + shift."""
    cdef long n = gamma.shape[0], c
    same_length("beta", beta.shape[0], n)
    same_length("mean", mean.shape[0], n)
    same_length("var", var.shape[0], n)
    same_length("inverse", inverse.shape[0], n)
    same_length("scale", scale.shape[0], n)
    same_length("shift", shift.shape[0], n)
    for c in range(n):  # OUT inverse, scale, shift
        inverse[c] = 1 / sqrt(var[c] + eps)
        scale[c] = <floating>(gamma[c] * inverse[c])
        shift[c] = beta[c] - mean[c] * scale[c]


def move_towards(floating[::1] values, const floating[::1] target, double factor, double share):
    """values[:] += share (factor target - values)."""
    cdef long c
    same_length("target", target.shape[0], values.shape[0])
    for c in range(values.shape[0]):
        values[c] += <floating>share * (<floating>factor * target[c] - values[c])  # OUT


def bias_grad(floating[:, :, :, :, :] dy, floating[::1] db, bint accumulate):
    """db[c] = (db[c] if accumulate) + the sum of dy over channel c."""
    cdef:
        Shape s = shape_of(dy, 16 * dy.shape[0])
        View[floating] g = view(dy)
        floating *p = &db[0]  # OUT
        long n = s.channels, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
    same_length("db", db.shape[0], n)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.bias_grad(s, g, p, accumulate, n * c // chunks, n * (c + 1) // chunks)


# ---- pooling

cdef Windows windows(const int32_t[:, ::1] w, long outputs) except *:
    if w.shape[0] != 3 or w.shape[1] != outputs:
        raise ValueError(f"windows have shape {tuple(w.shape)[:2]}, must be (3, {outputs})")
    cdef Windows v
    v.begin, v.end, v.divisor = &w[0, 0], &w[1, 0], &w[2, 0]
    return v


def max_pool(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y,
             const int32_t[:, ::1] h, const int32_t[:, ::1] w):
    """y[:] = the maximum of x over each window; rows of h and w: begin, end, divisor."""
    cdef:
        Shape xs = shape_of(x, 16 * x.shape[0]), ys = shape_of(y, 16 * x.shape[0])
        View[floating] xv = view(x), yv = view(y)  # OUT y
        Windows hw = windows(h, ys.height), ww = windows(w, ys.width)
        long n = xs.blocks * xs.channels, c
        int threads = team(n, size(xs))
        long chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.max_pool(xs, ys, xv, yv, hw, ww, n * c // chunks, n * (c + 1) // chunks)


def max_pool_backward(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y, floating[:, :, :, :, :] dy,
                      floating[:, :, :, :, :] dx, const int32_t[:, ::1] h, const int32_t[:, ::1] w):
    """dx[:] = the gradients of the windows at their first maximum."""
    same_shape(x, dx)
    same_shape(y, dy)
    cdef:
        Shape xs = shape_of(x, 16 * x.shape[0]), ys = shape_of(y, 16 * x.shape[0])
        View[floating] xv = view(x), yv = view(y), gv = view(dy), dv = view(dx)  # OUT dx
        Windows hw = windows(h, ys.height), ww = windows(w, ys.width)
        long n = xs.blocks * xs.channels, c
        int threads = team(n, size(xs))
        long chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.max_pool_backward(xs, ys, xv, yv, gv, dv, hw, ww, n * c // chunks, n * (c + 1) // chunks)


def avg_pool(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y,
             const int32_t[:, ::1] h, const int32_t[:, ::1] w):
    """y[:] = the sum of x over each window, divided by both its divisors."""
    cdef:
        Shape s = shape_of(y, 16 * y.shape[0])
        View[floating] xv = view(x), yv = view(y)  # OUT y
        Windows hw = windows(h, s.height), ww = windows(w, s.width)
        long n = s.blocks * s.channels, c
        int threads = team(n, <double>n * x.shape[2] * x.shape[3] * 16)
        long chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.avg_pool(s, xv, yv, hw, ww, n * c // chunks, n * (c + 1) // chunks)


def avg_pool_backward(floating[:, :, :, :, :] dy, floating[:, :, :, :, :] dx,
                      const int32_t[:, ::1] h, const int32_t[:, ::1] w):
    """dx[:] = the gradients of the windows, divided by both their divisors."""
    cdef:
        Shape xs = shape_of(dx, 16 * dx.shape[0]), ys = shape_of(dy, 16 * dx.shape[0])
        View[floating] gv = view(dy), dv = view(dx)  # OUT dx
        Windows hw = windows(h, ys.height), ww = windows(w, ys.width)
        long n = xs.blocks * xs.channels, c
        int threads = team(n, size(xs))
        long chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.avg_pool_backward(xs, ys, gv, dv, hw, ww, n * c // chunks, n * (c + 1) // chunks)


# ---- products with stored weights

cdef class Plan:
    """How one product of stored weights with blocked arrays runs; ops.py builds it.

    offsets int32: elements from a position of x to what an entry reads, then 3 numbers of padding.
    segments int32 (n, 5): kernels.hh's Segment. chunks int32: where each chunk of rows begins in segments.
    first_value int32: where each chunk begins in the values (sddmm). strides: those of x and y in elements,
    (block, channel, row) each, that the offsets and the tiling were made for. group: channels of x in a segment.
    order: which of (block, pixel row, pixel column) the three tile axes are; extent and tile follow it.
    x_pixels, y_pixels: rows and columns of x and y from one position to the next; y_origin: the pixel of y of the
    first position; x_origin: the first pixel to fetch ahead for it; overlap: how many pixels more than x_pixels a
    position to fetch.
    """
    cdef:
        readonly tuple tile, order
        readonly long rows_at_once, parts, group, n_chunks
        const int32_t[::1] _offsets, _chunks, _first_value
        const int32_t[:, ::1] _segments
        long rows, n_values, n_tiles
        long extent[3]
        long _tile[3]
        long x_step[3]
        long y_step[3]
        long x_strides[3]
        long y_strides[3]
        long pixels[3]
        long overlap[3]
        long pixel[3]
        long x_origin, y_origin, channels
        double work

    def __init__(self, *, const int32_t[::1] offsets, const int32_t[:, ::1] segments, const int32_t[::1] chunks,
                 const int32_t[::1] first_value, x_strides, y_strides, order, extent, tile, x_pixels, y_pixels,
                 overlap, x_origin, y_origin, long channels, long group, long rows, long rows_at_once, long n_values,
                 long parts, double work):
        cdef int i
        self.tile, self.order, self.group = tuple(tile), tuple(order), group
        self._offsets, self._segments, self._chunks, self._first_value = offsets, segments, chunks, first_value
        self.rows, self.rows_at_once, self.n_values, self.parts = rows, rows_at_once, n_values, parts
        self.n_chunks, self.work = chunks.shape[0] - 1, work
        x_step = x_strides[0], x_strides[2] * x_pixels[0], 16 * x_pixels[1]
        y_step = y_strides[0], y_strides[2] * y_pixels[0], 16 * y_pixels[1]
        self.y_origin = y_strides[2] * y_origin[0] + 16 * y_origin[1]
        self.x_origin = x_strides[2] * x_origin[0] + 16 * x_origin[1]
        self.channels = channels
        pixels, overlap, pixel = (1, *x_pixels), (0, *overlap), (x_strides[0], x_strides[2], 16)
        self.n_tiles = 1
        for i in range(3):
            self.x_strides[i], self.y_strides[i] = x_strides[i], y_strides[i]
            self.extent[i], self._tile[i] = extent[i], tile[i]
            self.x_step[i], self.y_step[i] = x_step[order[i]], y_step[order[i]]
            self.pixels[i], self.overlap[i], self.pixel[i] = pixels[order[i]], overlap[order[i]], pixel[order[i]]
            self.n_tiles *= (self.extent[i] + self._tile[i] - 1) // self._tile[i]

    @property
    def n_tasks(self):
        """Tasks that the product is cut into, the same for any number of threads."""
        return self.n_tiles * self.n_chunks


cdef Product[number] product_of(Plan p, number example) noexcept:
    """What the plan says; where x and y lie is still to be set."""
    cdef:
        Product[number] a
        int i
    a.y_channel = p.y_strides[1]
    a.offsets, a.segments, a.chunks = &p._offsets[0], <const Segment *>&p._segments[0, 0], &p._chunks[0]
    a.rows, a.rows_at_once, a.n_values, a.parts = p.rows, p.rows_at_once, p.n_values, p.parts
    a.first_value = &p._first_value[0] if p._first_value is not None else NULL
    a.accumulate = a.relu = False
    a.bias = NULL
    a.values = NULL
    for i in range(3):
        a.extent[i], a.tile[i], a.x_step[i], a.y_step[i] = p.extent[i], p._tile[i], p.x_step[i], p.y_step[i]
        a.pixels[i], a.overlap[i], a.pixel[i] = p.pixels[i], p.overlap[i], p.pixel[i]
    a.origin, a.x_channel, a.channels = p.x_origin, p.x_strides[1], p.channels
    return a


cdef Product[floating] product(Plan p, floating[:, :, :, :, :] x, floating[:, :, :, :, :] y) except *:
    cdef:
        Product[floating] a = product_of(p, <floating>0)
        View[floating] xv = view(x), yv = view(y)
        int i
    for i in range(3):  # NumPy exports any stride for an axis of length 1
        if (x.shape[i] > 1 and x.strides[i] != p.x_strides[i] * <long>sizeof(floating)
                or y.shape[i] > 1 and y.strides[i] != p.y_strides[i] * <long>sizeof(floating)):
            raise ValueError("the plan was made for arrays with other strides")
    a.x, a.y, a.y_channel = xv.data, yv.data + p.y_origin, yv.channel
    return a


@no_gc  # else the collector would empty one that something in a cycle holds before that gives it back
cdef class Buffer:
    """Aligned memory."""
    cdef:
        object raw
        char *data

    def __init__(self, long size):
        cdef char[::1] raw = memory.zeros(size).view(np.int8)
        self.raw, self.data = raw, &raw[0]


# By what they are for; kept for the next call, and taken out while in use, since another thread may call.
_buffers = {}


cdef Buffer borrow(str purpose, long size):
    """At least `size` bytes. give_back() them."""
    cdef Buffer buffer = _buffers.pop(purpose, None)
    if buffer is None or len(buffer.raw) < size:
        buffer = Buffer(size + 1)
    return buffer


cdef int give_back(str purpose, Buffer buffer) except -1:
    _buffers[purpose] = buffer
    return 0


def spmm(Plan plan, floating[:, :, :, :, :] x, const floating[::1] values, const floating[::1] bias,
         floating[:, :, :, :, :] y, bint accumulate=False, bint relu=False):
    """y[row, p] = bias[row] + the sum over the row's entries e of values[e] x[p + offsets[e]].

    bias may be None; accumulate: add to y; relu: what is below zero becomes zero.
    """
    cdef:
        Product[floating] a = product(plan, x, y)  # OUT y
        long n = plan.n_tiles * plan.n_chunks, i
        int threads = team(n, plan.work / 8)
        # Neighbouring tiles share rows of x: a thread takes a run of them.
        long run = max(1, n // (8 * threads))
        long each = (plan.rows + plan.rows_at_once) * plan._tile[1] * plan._tile[2] * 16
        Buffer scratch = borrow("scratch", each * threads * sizeof(floating))
        floating *s = <floating *>scratch.data
    same_length("values", values.shape[0], plan.n_values)
    if bias is not None:
        same_length("bias", bias.shape[0], plan.rows)
    a.values = &values[0] if plan.n_values else NULL
    a.bias = &bias[0] if bias is not None else NULL
    a.accumulate, a.relu = accumulate, relu
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic", chunksize=run):
        kernels.spmm(&a, i, s + each * threadid())
    give_back("scratch", scratch)


def sddmm(Plan plan, floating[:, :, :, :, :] x, floating[:, :, :, :, :] dy, floating[::1] grad, bint accumulate):
    """grad[e] = (grad[e] if accumulate) + the sum over positions p of dy[row(e), p] x[p + offsets[e]]."""
    cdef:
        Product[floating] a = product(plan, x, dy)
        long tasks = plan.n_chunks * plan.parts, n = plan.n_values, i, c
        int threads = team(tasks, plan.work / 8)
        bint direct = plan.parts == 1 and not accumulate
        Buffer parts
        floating *p
        floating *g
        long chunks
    same_length("grad", grad.shape[0], n)
    if n == 0:
        return
    g = &grad[0]  # OUT
    if not direct:
        parts = borrow("parts", n * plan.parts * sizeof(floating))
    p = g if direct else <floating *>parts.data
    a.dvalues = p
    for i in prange(tasks, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.sddmm(&a, i)
    if not direct:
        threads = team(2, <double>n * plan.parts)
        chunks = chunks_of(n, threads)
        for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
            kernels.add_parts(n * c // chunks, n * (c + 1) // chunks, n, a.parts, p, g, accumulate)
        give_back("parts", parts)


def linear_gradient(floating[:, :, :, :, :] x, floating[:, :, :, :, :] dy, floating[:, ::1] grad, bint accumulate):
    """grad[row] = (grad[row] if accumulate) + the sum over images of dy[row, image] x[image]: the weight gradient of a dense
    linear layer. x and dy are 1x1 pixels; padding lanes are 0 in dy."""
    cdef:
        View[floating] xv = view(x), gv = view(dy)
        long blocks = x.shape[0], rows = grad.shape[0], features = grad.shape[1], n = (rows + 23) // 24, c
        long width = kernels.isas[<int>_ISAS[_isa]].build.features * 4 // sizeof(floating)
        long groups = (features + width - 1) // width
        int threads = team(n, <double>blocks * 2 * rows * features)
        Buffer buffer = borrow("parts", groups * width * blocks * 16 * sizeof(floating))
        floating *p = <floating *>buffer.data
        floating *g = &grad[0, 0]  # OUT
    same_length("features of x", x.shape[1] * x.shape[2] * x.shape[3], features)
    same_length("features of dy", dy.shape[1] * dy.shape[2] * dy.shape[3], rows)
    same_length("blocks of dy", dy.shape[0], blocks)
    for c in prange(groups, nogil=True, num_threads=threads, schedule="static"):
        kernels.pack_features(c, c + 1, blocks, features, xv, p)
    for c in prange(n, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.linear_gradient(24 * c, min(24 * c + 24, rows), blocks, features, p, gv, g, accumulate)
    give_back("parts", buffer)


def pack_values(const floating[::1] weights, const int32_t[::1] source, long rows, long n_rows, long row_step,
                floating[::1] values):
    """values[(b * entries + e) * rows + r] = weights[source[e] + (b * rows + r) * row_step], 0 past n_rows."""
    cdef:
        long entries = source.shape[0], n = entries * ((n_rows + rows - 1) // rows), c
        int threads = team(2, <double>n * rows)
        long chunks = chunks_of(n, threads)
        const floating *w
        const int32_t *from_
        floating *v
    same_length("values", values.shape[0], n * rows)
    if n == 0:
        return
    w, from_, v = &weights[0], &source[0], &values[0]  # OUT values
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.pack_values(n * c // chunks, n * (c + 1) // chunks, entries, rows, n_rows, row_step, from_, w, v)


def spread_values(const floating[::1] values, const int32_t[::1] place, floating[::1] dense):
    """dense[place] = values."""
    cdef long n = place.shape[0], c
    cdef int threads = team(n, <double>n)
    cdef long chunks = chunks_of(n, threads)
    same_length("values", values.shape[0], n)
    for c in prange(chunks if n else 0, nogil=True, num_threads=threads, schedule="static"):
        kernels.spread_values(n * c // chunks, n * (c + 1) // chunks, &place[0], &values[0], &dense[0])  # OUT dense


def collect_values(const floating[::1] dense, const int32_t[::1] place, floating[::1] values, bint accumulate):
    """values[:] = (values if accumulate) + dense[place]."""
    cdef long n = place.shape[0], c
    cdef int threads = team(n, <double>n)
    cdef long chunks = chunks_of(n, threads)
    same_length("values", values.shape[0], n)
    for c in prange(chunks if n else 0, nogil=True, num_threads=threads, schedule="static"):
        kernels.collect_values(n * c // chunks, n * (c + 1) // chunks, &place[0], &dense[0], &values[0], accumulate)  # OUT values


# ---- convolutions between batch norms

cdef class BandPlan:
    """How a convolution runs band by band; bands.py builds it.

    run: output rows of a task; rows: those of a band of it. forward, or gradient and input: the Plans of a band of one
    image block; input: those of the phases of its dx,
    phases_across of them side by side. x_size, dy_size: elements of the scratch that the input (0: it lies in memory) and
    the output's gradient are formed in. parts: into how many the tasks are cut for the weight gradient.
    """
    cdef:
        readonly Plan forward, gradient
        readonly tuple input
        readonly long run, rows, parts
        long stride, reach, phases_across, x_channel, x_row, x_size, dy_channel, dy_row, dy_size, tile_size
        long padding[2]
        long dy_halo[2]

    def __init__(self, *, long run, long rows, long parts, long stride, padding, long reach, Plan forward, Plan gradient, input,
                 long phases_across, long x_size, long dy_size, dy_halo):
        cdef Plan p
        self.run, self.rows, self.parts, self.stride, self.reach = run, rows, parts, stride, reach
        self.phases_across = phases_across
        self.forward, self.gradient, self.input = forward, gradient, tuple(input)
        self.padding[0], self.padding[1] = padding
        self.dy_halo[0], self.dy_halo[1] = dy_halo
        p = gradient if forward is None else forward
        self.x_channel, self.x_row, self.x_size, self.dy_size = p.x_strides[1], p.x_strides[2], x_size, dy_size
        if gradient is not None:
            self.dy_channel, self.dy_row = gradient.y_strides[1], gradient.y_strides[2]
        self.tile_size = 0
        for p in self.input if forward is None else (forward,):
            self.tile_size = max(self.tile_size, (p.rows + p.rows_at_once) * p._tile[1] * p._tile[2] * 16)


cdef int row_axis(Plan p) except -1:
    return p.order.index(1)


cdef View[floating] nothing(floating example) noexcept:
    cdef View[floating] v
    v.data = NULL
    v.block = v.channel = v.row = 0
    return v


cdef View[floating] maybe(floating[:, :, :, :, :] a) noexcept:
    return nothing(<floating>0) if a is None else view(a)


cdef Bands[floating] bands(BandPlan p, long images, floating[:, :, :, :, :] x, floating[:, :, :, :, :] y,
                           bint relu, floating[:, :, :, :, :] add, floating[:, :, :, :, :] formed,
                           const floating[::1] scale, const floating[::1] shift) except *:
    """x: as the batch norm before read it if scale is given, else as the convolution reads it."""
    cdef Bands[floating] a
    a.x_shape, a.y_shape = shape_of(x, images), shape_of(y, images)
    a.tasks = y.shape[0] * ((y.shape[2] + p.run - 1) // p.run)
    a.run, a.rows, a.stride, a.reach, a.relu = p.run, p.rows, p.stride, p.reach, relu
    a.padding[0], a.padding[1] = p.padding[0], p.padding[1]
    a.x_channel, a.x_row, a.x_size = p.x_channel, p.x_row, p.x_size
    a.raw, a.add, a.y, a.keep = view(x), maybe(add), view(y), nothing(<floating>0)
    a.formed = a.raw if scale is None else maybe(formed)
    a.scale = NULL
    a.shift = NULL
    if scale is not None:
        same_length("scale", scale.shape[0], x.shape[1])
        same_length("shift", shift.shape[0], x.shape[1])
        a.scale, a.shift = &scale[0], &shift[0]
    if add is not None:
        same_shape(x, add)
    if formed is not None:
        same_shape(x, formed)
    return a


def conv_bands(BandPlan plan, long images, floating[:, :, :, :, :] x, const floating[::1] values,
               const floating[::1] bias, floating[:, :, :, :, :] y, floating[::1] mean, floating[::1] var,
               const floating[::1] scale=None, const floating[::1] shift=None, bint relu=False,
               floating[:, :, :, :, :] add=None, floating[:, :, :, :, :] formed=None,
               floating[:, :, :, :, :] keep=None):
    """y[:] = the convolution of x, or, if scale is given, of relu(x scale + shift + add), which is also kept in `keep`
    or lies already in `formed`. mean and var, unless None, become those of y, biased.

    formed, and x without scale, have the halo that the plan was made for.
    """
    cdef:
        Bands[floating] a = bands(plan, images, x, y, relu, add, formed, scale, shift)  # OUT y
        long cuts = (y.shape[2] + plan.run - 1) // plan.run, n = y.shape[0] * cuts, i, c, channels = y.shape[1]
        int threads = team(n, plan.forward.work * n * plan.run / plan.rows / 8)
        long each = plan.x_size + plan.tile_size
        Buffer scratch = borrow("scratch", each * threads * sizeof(floating))
        floating *s = <floating *>scratch.data
        double[::1] moments
        double count, total, m, squares, here
        double *v
    same_length("values", values.shape[0], plan.forward.n_values)
    a.forward = product_of(plan.forward, <floating>0)
    a.forward_axis = row_axis(plan.forward)
    a.forward.values = &values[0] if values.shape[0] else NULL
    if bias is not None:
        same_length("bias", bias.shape[0], channels)
        a.forward.bias = &bias[0]
    if keep is not None:
        same_shape(x, keep)
        a.keep = view(keep)  # OUT
    a.moments = NULL
    if mean is not None:
        same_length("mean", mean.shape[0], channels)
        same_length("var", var.shape[0], channels)
        moments = np.empty(3 * n * channels)
        a.moments = &moments[0]
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.conv_band(&a, i, s + each * threadid())
    give_back("scratch", scratch)
    if mean is None:
        return
    for c in range(channels):  # Chan, Golub & LeVeque's way to join the bands, in their order
        total = m = squares = 0
        for i in range(n):
            v = a.moments + (i * channels + c) * 3
            count = min(16, images - i // cuts * 16) * min(plan.run, y.shape[2] - i % cuts * plan.run) * y.shape[3]
            here = v[0] + v[1] / count
            squares += v[2] - v[1] * v[1] / count + (here - m) * (here - m) * total * count / (total + count)
            m += (here - m) * count / (total + count)
            total += count
        mean[c], var[c] = <floating>m, <floating>(squares / total)  # OUT


def conv_bands_backward(BandPlan plan, long images, floating[:, :, :, :, :] x, floating[:, :, :, :, :] y,
                        floating[:, :, :, :, :] g, const floating[::1] y_scale, const floating[::1] y_mean,
                        const double[:, :] y_sums, const double[::1] inverse, double pixels, floating[::1] grad,
                        bint accumulate, floating[:, :, :, :, :] dx, list values, bint add_to_dx, const floating[::1] scale=None,
                        const floating[::1] shift=None, const floating[::1] x_mean=None, bint relu=False,
                        floating[:, :, :, :, :] add=None, floating[:, :, :, :, :] formed=None):
    """Gradients of conv_bands(): those of the weights to grad, and that of its input to dx (added if add_to_dx) unless None.

    g: that of the batch norm of y, zero where its ReLU is closed; y_sums, inverse: as of norm_parameter_gradients(); the
    gradient of y is y_scale (g - (y_sums[0] + (y - y_mean) y_sums[1] inverse^2) / pixels), or y_scale g if pixels is 0, as in
    evaluation. values: those of each Plan of plan.input. Returns, if scale is given, the sums (2, channels) of dx, which is
    made zero where the ReLU of x is closed, and of dx (x - x_mean).
    """
    cdef:
        Bands[floating] a = bands(plan, images, x, y, relu, add, formed, scale, shift)
        long parts = plan.parts, n = plan.gradient.n_values, i, c, chunks, each
        int threads = team(parts, plan.gradient.work * parts)
        Buffer partial = borrow("parts", n * parts * sizeof(floating)), scratch
        const floating[::1] v
        floating *s
        floating *p = <floating *>partial.data
        floating *gp
        double[:, :, ::1] sums
        floating[:, ::1] lines = np.empty((2, y.shape[1]), np.float32 if sizeof(floating) == 4 else np.float64)
        Plan step
        Product[floating] phase
    same_shape(y, g)
    a.g, a.parts, a.phases, a.phases_across = view(g), parts, 0, plan.phases_across
    same_length("y_scale", y_scale.shape[0], y.shape[1])
    same_length("y_mean", y_mean.shape[0], y.shape[1])
    same_length("y_sums", y_sums.shape[1], y.shape[1])
    same_length("inverse", inverse.shape[0], y.shape[1])
    for c in range(y.shape[1]):
        lines[0, c] = <floating>(y_sums[0, c] / pixels) if pixels else 0
        lines[1, c] = <floating>(y_sums[1, c] / pixels * (inverse[c] * inverse[c])) if pixels else 0
    a.y_scale, a.y_mean, a.mean_g, a.slope = &y_scale[0], &y_mean[0], &lines[0, 0], &lines[1, 0]
    a.dy_halo[0], a.dy_halo[1] = plan.dy_halo[0], plan.dy_halo[1]
    a.dy_channel, a.dy_row, a.dy_size = plan.dy_channel, plan.dy_row, plan.dy_size
    a.gradient, a.gradient_axis = product_of(plan.gradient, <floating>0), row_axis(plan.gradient)
    a.gradient.dvalues = p
    same_length("grad", grad.shape[0], n)
    a.sums = NULL
    if dx is not None:
        same_shape(x, dx)
        a.dx = view(dx)  # OUT
        for i in range(len(plan.input)):
            step, v = plan.input[i], values[i]
            same_length("values", v.shape[0], step.n_values)
            phase = product_of(step, <floating>0)
            phase.values, phase.accumulate = &v[0] if v.shape[0] else NULL, add_to_dx
            a.add_phase(phase, row_axis(step), step.y_origin)
        if scale is not None:
            same_length("x_mean", x_mean.shape[0], x.shape[1])
            sums = np.empty((parts, x.shape[1], 2))
            a.sums, a.x_mean = &sums[0, 0, 0], &x_mean[0]
    each = plan.x_size + plan.dy_size + plan.tile_size
    scratch = borrow("scratch", each * threads * sizeof(floating))
    s = <floating *>scratch.data
    for i in prange(parts, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.conv_band_backward(&a, i, s + each * threadid())
    if n:
        gp = &grad[0]  # OUT
        threads = team(2, <double>n * parts)
        chunks = chunks_of(n, threads)
        for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
            kernels.add_parts(n * c // chunks, n * (c + 1) // chunks, n, parts, p, gp, accumulate)
    give_back("parts", partial)
    give_back("scratch", scratch)
    if a.sums != NULL:
        return np.asarray(sums).sum(0).T


def norm_parameter_gradients(const double[:, :] sums, const double[::1] inverse, floating[::1] dw, bint add_to_dw,
                             floating[::1] db, bint add_to_db):
    """dw[:] (+)= sums[1] inverse, db[:] (+)= sums[0]: a batch norm's gradients.

    sums (2, channels): of the gradient of its output, and of that times x - mean; inverse: 1 / sqrt(var + eps).
    """
    cdef long c, channels = inverse.shape[0]
    same_length("dw", dw.shape[0], channels)
    same_length("db", db.shape[0], channels)
    same_length("sums", sums.shape[1], channels)
    for c in range(channels):
        dw[c] = <floating>((dw[c] if add_to_dw else 0) + sums[1, c] * inverse[c])  # OUT
        db[c] = <floating>((db[c] if add_to_db else 0) + sums[0, c])  # OUT


def norm_gradient_sums(floating[:, :, :, :, :] x, floating[:, :, :, :, :] dx, const floating[::1] scale,
                       const floating[::1] shift, const floating[::1] mean, bint relu,
                       floating[:, :, :, :, :] add=None):
    """Makes dx, the gradient of relu(x scale + shift + add), zero where the ReLU is closed. Returns the sums (2, channels)
    of it and of it times x - mean."""
    cdef:
        Bands[floating] a
        double[:, :, ::1] sums = np.empty((min(16, x.shape[0]), x.shape[1], 2))
        long parts = sums.shape[0], i
        int threads = team(parts, size(shape_of(x, 16)))
    same_shape(x, dx)
    same_length("scale", scale.shape[0], x.shape[1])
    same_length("shift", shift.shape[0], x.shape[1])
    same_length("mean", mean.shape[0], x.shape[1])
    a.x_shape, a.raw, a.dx = shape_of(x, 16 * x.shape[0]), view(x), view(dx)
    a.relu, a.parts, a.sums = relu, parts, &sums[0, 0, 0]
    a.scale, a.shift, a.x_mean, a.add = &scale[0], &shift[0], &mean[0], maybe(add)
    if add is not None:
        same_shape(x, add)
    for i in prange(parts, nogil=True, num_threads=threads, schedule="static"):
        kernels.norm_gradient_sums(&a, i)
    return np.asarray(sums).sum(0).T


include "sparse_gradient.pxi"
include "int8.pxi"


# ---- loss and optimisers

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


def sgd_step(floating[::1] data, const floating[::1] grad, floating[::1] buffer, double lr, double momentum,
             bint nesterov, double weight_decay, bint first):
    """One step of SGD in place on data and buffer (None without momentum); first: buffer = grad."""
    cdef:
        long n = data.shape[0], c
        int threads = team(n, n)
        long chunks = chunks_of(n, threads)
        floating *d
        const floating *g
        floating *b = NULL
    same_length("grad", grad.shape[0], n)
    if n == 0:
        return
    d, g = &data[0], &grad[0]  # OUT data
    if buffer is not None:
        same_length("buffer", buffer.shape[0], n)
        b = &buffer[0]  # OUT
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.sgd(n * c // chunks, n * (c + 1) // chunks, d, g, b, lr, momentum, nesterov, weight_decay, first)


def adam_step(floating[::1] data, const floating[::1] grad, floating[::1] m, floating[::1] v, long step, double lr,
              double beta1, double beta2, double eps, double weight_decay, bint decoupled):
    """One step of Adam (AdamW if decoupled) in place on data, m and v; step counts from 1."""
    cdef:
        long n = data.shape[0], c
        int threads = team(n, n)
        long chunks = chunks_of(n, threads)
        floating *d
        const floating *g
        floating *mp
        floating *vp
    same_length("grad", grad.shape[0], n)
    same_length("m", m.shape[0], n)
    same_length("v", v.shape[0], n)
    if n == 0:
        return
    d, g, mp, vp = &data[0], &grad[0], &m[0], &v[0]  # OUT data, m, v
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.adam(n * c // chunks, n * (c + 1) // chunks, d, g, mp, vp, step, lr, beta1, beta2, eps, weight_decay,
                     decoupled)


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
