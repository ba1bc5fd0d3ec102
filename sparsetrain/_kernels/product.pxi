# ---- products with stored weights; part of core.pyx

cdef class Plan:
    """How one product of stored weights with blocked arrays runs; ops.py builds it.

    offsets int32: elements from a position of x to what an entry reads, then STEPS zeros.
    places int32 or None: where the values of the entries lie in the first row of a dense layer, row_step before those of the
    next. segments int32 (n, 5): kernels.hh's Segment. chunks int32: where each chunk of rows begins in segments.
    first_value int32: where each chunk begins in the values (sddmm). columns, block: of a dense layer's sddmm, whose values are
    those of dense_gradient.hh, as in Product. strides: those of x and y in elements,
    (block, channel, row) each, that the offsets and the tiling were made for. group: channels of x in a segment.
    order: which of (block, pixel row, pixel column) the three tile axes are; extent and tile follow it.
    x_pixels, y_pixels: rows and columns of x and y from one position to the next; y_origin: the pixel of y of the
    first position; x_origin: the first pixel to fetch ahead for it; overlap: how many pixels more than x_pixels a
    position to fetch.
    run: 0, or how many tiles of 2 x 2 pixels winograd.hh meets at once; then positions are such tiles, `size` are the rows and
    columns of y in pixels, run_tile the tiles in registers, and the values are made of the parameter's: transform says at which
    steps the rows and columns of its 3x3 weights lie, and whether they are turned by half a turn.
    """
    cdef:
        readonly tuple tile, order
        readonly long rows_at_once, parts, group, n_chunks, run, run_tile, n_values
        const int32_t[::1] _offsets, _places, _chunks, _first_value
        const int32_t[:, ::1] _segments
        long rows, row_step, n_tiles
        long extent[3]
        long _tile[3]
        long x_step[3]
        long y_step[3]
        long x_strides[3]
        long y_strides[3]
        long pixels[3]
        long overlap[3]
        long pixel[3]
        long size[2]
        long weight_step[2]
        long columns
        long block[2]
        bint flip
        long x_origin, y_origin, channels
        double work

    def __init__(self, *, const int32_t[::1] offsets, const int32_t[::1] places, const int32_t[:, ::1] segments,
                 const int32_t[::1] chunks, const int32_t[::1] first_value, x_strides, y_strides, order, extent, tile, x_pixels, y_pixels,
                 overlap, x_origin, y_origin, long channels, long group, long rows, long row_step, long rows_at_once,
                 long n_values, long parts, double work, long run, long run_tile, size, transform,
                 long columns, block):
        cdef int i
        self.tile, self.order, self.group = tuple(tile), tuple(order), group
        self._offsets, self._segments, self._chunks, self._first_value = offsets, segments, chunks, first_value
        self._places, self.row_step = places, row_step
        self.rows, self.rows_at_once, self.n_values, self.parts = rows, rows_at_once, n_values, parts
        self.n_chunks, self.work = chunks.shape[0] - 1, work
        x_step = x_strides[0], x_strides[2] * x_pixels[0], 16 * x_pixels[1]
        y_step = y_strides[0], y_strides[2] * y_pixels[0], 16 * y_pixels[1]
        self.y_origin = y_strides[2] * y_origin[0] + 16 * y_origin[1]
        self.x_origin = x_strides[2] * x_origin[0] + 16 * x_origin[1]
        self.channels = channels
        pixels, overlap, pixel = (1, *x_pixels), (0, *overlap), (x_strides[0], x_strides[2], 16)
        self.run, self.run_tile = run, run_tile
        self.size[0], self.size[1] = size
        self.columns = columns
        self.block[0], self.block[1] = block
        self.weight_step[0], self.weight_step[1], self.flip = transform
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

    cdef long scratch_size(self):
        """Elements of scratch that a task of spmm() or sddmm() needs."""
        cdef long rows = self.rows + self.rows_at_once, positions = self._tile[1] * self._tile[2]
        if self._first_value is None:
            return 16 * (4 * (self.channels + self.rows) * (self.run | 1) + rows * self.run_tile if self.run else rows * positions)
        if self.rows_at_once == 1:
            return 0
        return 16 * (4 * self.run * (self.block[0] + 2 * self.block[1]) if self.run else positions * self.block[1])

    cdef long n_weights(self):
        """Values of the parameter."""
        if self.run:
            return 9 * self.rows * self.channels
        return self.rows * self.columns if self.columns else self.n_values


# An array of so many bytes has left L3 (32 MB) before it is read again: it is stored past the caches, whose lines need not be
# read first. A 1x1 convolution (256 to 128 channels, 28x28, batch 64) at 90 and 99 % takes 0.77 and 0.69 of the time so, a 3x3
# one (64 channels, 56x56) 0.93 and 0.97. Of the kept input of a residual block (bands.pxi; it is read again four maps later)
# a step of ResNet-20 with batch 128 and one of ResNet-18 with 64 take 0.97 and 0.96 at 99 %.
cdef enum:
    FAR = 8 << 20


cdef bint is_far(floating[:, :, :, :, :] a) noexcept:
    """Whether to store the array past the caches. It consists of whole lines of 64 bytes then."""
    cdef bint lines = not ((<size_t>&a[0, 0, 0, 0, 0] | a.strides[0] | a.strides[1] | a.strides[2] | a.strides[3]) % 64)
    return lines and a.shape[0] * a.strides[0] >= FAR


cdef Product[number] product_of(Plan p, number example) noexcept:
    """What the plan says; where x and y lie is still to be set."""
    cdef:
        Product[number] a
        int i
    a.y_channel = p.y_strides[1]
    a.offsets, a.segments, a.chunks = &p._offsets[0], <const Segment *>&p._segments[0, 0], &p._chunks[0]
    a.rows, a.rows_at_once, a.n_values, a.parts = p.rows, p.rows_at_once, p.n_values, p.parts
    a.places, a.row_step = &p._places[0] if p._places is not None else NULL, p.row_step
    a.first_value = &p._first_value[0] if p._first_value is not None else NULL
    a.accumulate = a.relu = a.far = False
    a.bias = NULL
    a.values = NULL
    for i in range(3):
        a.extent[i], a.tile[i], a.x_step[i], a.y_step[i] = p.extent[i], p._tile[i], p.x_step[i], p.y_step[i]
        a.pixels[i], a.overlap[i], a.pixel[i] = p.pixels[i], p.overlap[i], p.pixel[i]
    a.origin, a.x_channel, a.channels = p.x_origin, p.x_strides[1], p.channels
    a.run, a.run_tile, a.size[0], a.size[1] = p.run, p.run_tile, p.size[0], p.size[1]
    a.columns, a.block[0], a.block[1] = p.columns, p.block[0], p.block[1]
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


cdef const floating *values_of(Plan p, const floating[::1] values, list held) except? NULL:
    """The plan's values, of those given. Where they are made of these, winograd.hh's G w G^T (16, rows, channels), they lie in
    memory that is used again once `held` is gone."""
    cdef:
        long rows = p.rows, columns = p.channels, c
        int threads
        long chunks
        const floating *w
        floating *o
        Buffer buffer
    same_length("values", values.shape[0], p.n_weights())
    if p.n_values == 0:
        return NULL
    w = &values[0]
    if not p.run:
        return w
    buffer = Buffer("transformed weights", p.n_values * sizeof(floating))
    held.append(buffer)
    o = <floating *>buffer.data
    threads = team(rows, 10. * rows * columns)
    chunks = chunks_of(rows, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.winograd_weights(rows * c // chunks, rows * (c + 1) // chunks, rows, columns, p.weight_step[0], p.weight_step[1],
                                 p.flip, w, o)
    return o


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
        long each = plan.scratch_size()
        Buffer scratch = Buffer("scratch", each * threads * sizeof(floating))
        floating *s = <floating *>scratch.data
        list held = []
    if bias is not None:
        same_length("bias", bias.shape[0], plan.rows)
    a.values = values_of(plan, values, held)
    a.bias = &bias[0] if bias is not None else NULL
    a.accumulate, a.relu, a.far = accumulate, relu, is_far(y) and not accumulate and not plan.run
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic", chunksize=run):
        kernels.spmm(&a, i, s + each * threadid())


def sddmm(Plan plan, floating[:, :, :, :, :] x, floating[:, :, :, :, :] dy, floating[::1] grad, bint accumulate):
    """grad[e] = (grad[e] if accumulate) + the sum over positions p of dy[row(e), p] x[p + offsets[e]]."""
    cdef:
        Product[floating] a = product(plan, x, dy)
        long tasks = plan.n_chunks * plan.parts, n = plan.n_values, i
        int threads = team(tasks, plan.work / 8)
        bint direct = plan.parts == 1 and not accumulate and plan.rows_at_once == 1
        Buffer parts, scratch
        long each = plan.scratch_size()
        floating *s
    same_length("grad", grad.shape[0], plan.n_weights())
    if n == 0:
        return
    if not direct:
        parts = Buffer("parts", n * plan.parts * sizeof(floating))
    a.dvalues = &grad[0] if direct else <floating *>parts.data  # OUT
    scratch = Buffer("scratch", each * threads * sizeof(floating))
    s = <floating *>scratch.data
    for i in prange(tasks, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.sddmm(&a, i, s + each * threadid())
    if not direct:
        join_parts(plan, &a, grad, accumulate)  # OUT grad


cdef int join_parts(Plan plan, const Product[floating] *a, floating[::1] grad, bint accumulate) except -1:
    """grad = (grad if accumulate) + the sum of the partial gradients."""
    cdef:
        long n = plan.n_values, c
        int threads = team(2, <double>n * a.parts)
        long chunks
        floating *g
    if n == 0:
        return 0
    g = &grad[0]  # OUT
    if plan.rows_at_once > 1:
        n = (plan.rows + kernels.OUTPUTS - 1) // kernels.OUTPUTS
    chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.join_parts(a, n * c // chunks, n * (c + 1) // chunks, g, accumulate)
    return 0


def linear_gradient(floating[:, :, :, :, :] x, floating[:, :, :, :, :] dy, floating[:, ::1] grad, bint accumulate):
    """grad[row] = (grad[row] if accumulate) + the sum over images of dy[row, image] x[image]: the weight gradient of a dense
    linear layer. x and dy are 1x1 pixels; padding lanes are 0 in dy."""
    cdef:
        View[floating] xv = view(x), gv = view(dy)
        long blocks = x.shape[0], rows = grad.shape[0], features = grad.shape[1], n = (rows + 23) // 24, c
        long width = kernels.isas[<int>_ISAS[_isa]].build.features * 4 // sizeof(floating)
        long groups = (features + width - 1) // width
        long pieces = max(1, min(groups, 16 // n))  # of the features: a layer of few outputs has few chunks of rows
        int threads = team(n * pieces, <double>blocks * 2 * rows * features)
        Buffer buffer = Buffer("parts", groups * width * blocks * 16 * sizeof(floating))
        floating *p = <floating *>buffer.data
        floating *g = &grad[0, 0]  # OUT
    same_length("features of x", x.shape[1] * x.shape[2] * x.shape[3], features)
    same_length("features of dy", dy.shape[1] * dy.shape[2] * dy.shape[3], rows)
    same_length("blocks of dy", dy.shape[0], blocks)
    for c in prange(groups, nogil=True, num_threads=threads, schedule="static"):
        kernels.pack_features(c, c + 1, blocks, features, xv, p)
    for c in prange(n * pieces, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.linear_gradient(24 * (c // pieces), min(24 * (c // pieces) + 24, rows), groups * (c % pieces) // pieces,
                                groups * (c % pieces + 1) // pieces, blocks, features, p, gv, g, accumulate)


def transpose_weights(const floating[::1] weights, long outputs, long inputs, const int32_t[::1] used, floating[::1] transposed):
    """transposed (inputs, outputs, len(used)) = the taps `used` of the weights (outputs, inputs, taps)."""
    cdef long taps = weights.shape[0] // (outputs * inputs), n = used.shape[0], c
    cdef int threads = team(inputs, <double>transposed.shape[0])
    cdef long groups = (inputs + 15) // 16
    same_length("transposed", transposed.shape[0], inputs * outputs * n)
    for c in prange(groups, nogil=True, num_threads=threads, schedule="static"):
        kernels.transpose_weights(16 * c, min(16 * c + 16, inputs), outputs, inputs, taps, &used[0], n, &weights[0], &transposed[0])  # OUT transposed


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
