# ---- sparse output gradients; part of core.pyx

DITHER, THRESHOLD = kernels.DITHER, kernels.THRESHOLD  # as in kernels.hh


def vector_lanes(dtype):
    """Values of a dtype in a register of the instruction set in use."""
    return kernels.isas[<int>_ISAS[_isa]].build.vector_bytes // np.dtype(dtype).itemsize


cdef class SlabPlan:
    """How the products of a layer with a sparse output gradient run: kernels.hh's Slabs, and `parts`, into how many runs
    the slabs are cut for the weight gradient."""
    cdef:
        Slabs s
        readonly long parts, lists, planes, channel_groups, spans, taps
        readonly bint short

    def __init__(self, *, long blocks, long images, long channels, long height, long in_width, long out_channels,
                 long out_height, long out_width, kernel, stride, padding, dilation, long width, long lanes, long span,
                 long group, long bands, long row, long image, long parts, bint short):
        cdef int i
        self.s.blocks, self.s.images, self.s.channels, self.s.height, self.s.in_width = blocks, images, channels, height, in_width
        self.s.out_channels, self.s.out_height, self.s.out_width = out_channels, out_height, out_width
        for i in range(2):
            self.s.kernel[i], self.s.stride[i] = kernel[i], stride[i]
            self.s.padding[i], self.s.dilation[i] = padding[i], dilation[i]
        self.s.width, self.s.lanes, self.s.span, self.s.group = width, lanes, span, group
        self.s.bands, self.s.row, self.s.image = bands, row, image
        self.s.capacity = span * lanes * out_height * out_width
        self.short, self.parts, self.lists = short, parts, bands * (span * lanes // group)
        self.spans = (blocks + span - 1) // span
        self.planes, self.channel_groups = self.spans * out_channels, (channels + width - 1) // width
        self.taps = self.s.kernel[0] * self.s.kernel[1]

    width = property(lambda self: (<SlabPlan>self).s.width)
    span = property(lambda self: (<SlabPlan>self).s.span)
    group = property(lambda self: (<SlabPlan>self).s.group)
    bands = property(lambda self: (<SlabPlan>self).s.bands)
    positions = property(lambda self: (<SlabPlan>self).slab())
    list_values = property(lambda self: (<SlabPlan>self).s.capacity / (<SlabPlan>self).lists)  # used or not

    cdef tuple layer(self):
        """What plans of an image and of a batch must have in common to share packed weights."""
        cdef Slabs *s = &self.s
        return (s.width, s.channels, s.height, s.in_width, s.out_channels, s.out_height, s.out_width,
                s.kernel, s.stride, s.padding, s.dilation)

    cdef long slab(self):
        """Elements of a slab."""
        return self.s.span * self.s.lanes * self.s.image

    cdef long weights(self):
        """Elements of the packed weights."""
        return self.channel_groups * self.s.out_channels * self.taps * self.s.width

    cdef bint in_place(self):
        """Whether the weights are used as they lie: one tap, and whole groups of channels."""
        return self.taps == 1 and self.s.channels % self.s.width == 0

    cdef double work(self, double entries):
        """Multiply-adds / 8 of a product."""
        return entries * self.taps * self.s.channels / 8


cdef int fits(SlabPlan p, floating[:, :, :, :, :] x, floating[:, :, :, :, :] dy) except -1:
    """ValueError unless the plan was made for arrays of these shapes, each None or not."""
    if p.s.lanes != 16:
        raise ValueError("the plan is that of one image")
    if x is not None and (x.shape[0], x.shape[1], x.shape[2], x.shape[3]) != (
            p.s.blocks, p.s.channels, p.s.height, p.s.in_width):
        raise ValueError("the plan was made for another shape of x")
    if dy is not None and (dy.shape[0], dy.shape[1], dy.shape[2], dy.shape[3]) != (
            p.s.blocks, p.s.out_channels, p.s.out_height, p.s.out_width):
        raise ValueError("the plan was made for another shape of dy")
    return 0


cdef class Entries:
    """The values of an output gradient that are not zero, in lists as a SlabPlan says.

    nnz: how many they are; clipped: how many were too large for the limit; same_positions: whether pixels were chosen,
    all of which all channels have. dtype int8: stored are multiples of `unit`.
    """
    cdef:
        readonly SlabPlan plan
        readonly bint same_positions
        readonly long nnz, clipped
        readonly double unit
        readonly object dtype
        Buffer entries, starts

    cdef int make(self, SlabPlan plan, dtype, long bytes) except -1:
        """Memory for entries of so many bytes each."""
        self.plan, self.dtype, self.unit = plan, np.dtype(dtype), 1.0
        size = f"{plan.s.blocks} blocks of {plan.s.lanes}"
        self.entries = Buffer(f"entries of {size}", plan.planes * (plan.s.capacity + 16) * bytes)
        self.starts = Buffer(f"starts of {size}", plan.planes * (plan.lists + 1) * sizeof(int64_t))
        return 0

    cdef int count(self, const int64_t[::1] clipped) noexcept:
        """Take nnz from `starts`, and what was clipped."""
        cdef:
            long plane, c, channels = self.plan.s.out_channels, end = self.plan.lists * channels
            const int64_t *start = <const int64_t *>self.starts.data
        for plane in range(self.plan.planes):
            c = plane % channels
            self.nnz += start[end + c] - start[c]
            self.clipped += clipped[plane]
            if c + 1 == channels:
                start += end + channels
        return 0

    def to_lists(self):
        """[(span, output channel, list, positions, values)] of the lists that are not empty, for tests."""
        cdef:
            long plane, i
            int64_t[:, :, ::1] starts = np.frombuffer(
                self.starts.memory.raw, np.int64, self.plan.planes * (self.plan.lists + 1)
            ).reshape(self.plan.spans, -1, self.plan.s.out_channels)
        kind = np.dtype([("position", np.int32), ("value", self.dtype)], align=True)
        room = self.plan.planes * (self.plan.s.capacity + 16)
        if self.dtype == np.int8:
            bits = np.frombuffer(self.entries.memory.raw, np.int32, room)
            entries = np.empty(room, kind)
            entries["position"], entries["value"] = bits >> 8, bits.astype(np.int8)
        else:
            entries = np.frombuffer(self.entries.memory.raw, kind, room)
        found = []
        for plane in range(self.plan.planes):
            span, channel = divmod(plane, self.plan.s.out_channels)
            for i in range(self.plan.lists):
                if starts[span, i + 1, channel] > starts[span, i, channel]:
                    run = entries[starts[span, i, channel]:starts[span, i + 1, channel]]
                    found.append((span, channel, i, run["position"].copy(), run["value"].copy()))
        return found


cdef Sparsifier[floating] sparsifier(SlabPlan p, int kind, double step, long limit, uint64_t seed, const floating[:, :, ::1] base,
                                     const floating[:, :, :, ::1] chosen, const floating[:, ::1] thresholds) except *:
    cdef Sparsifier[floating] how
    how.kind, how.step, how.unit, how.limit, how.seed = kind, <floating>step, <floating>step, limit, seed
    how.base = NULL
    how.chosen = NULL
    how.thresholds = NULL
    if base is not None:
        if (base.shape[0], base.shape[1], base.shape[2]) != (p.s.out_channels, p.s.out_height, p.s.out_width):
            raise ValueError("base must have the shape of one image of dy")
        how.base = &base[0, 0, 0]
    if chosen is not None:
        if base is not None or thresholds is not None or kind == DITHER:
            raise ValueError("chosen goes without base, thresholds and dither")
        if (chosen.shape[0], chosen.shape[1], chosen.shape[2], chosen.shape[3]) != (
                p.s.blocks, p.s.out_height, p.s.out_width, 16):
            raise ValueError("chosen must have the shape (blocks, height, width, 16) of dy")
        how.chosen = &chosen[0, 0, 0, 0]
    if thresholds is not None:
        same_length("thresholds", thresholds.shape[0] * thresholds.shape[1], 16 * p.s.blocks)
        how.thresholds = &thresholds[0, 0]
    return how


cdef int gather(Entries out, View[floating] dy, const floating *chosen) except -1:
    """Fill the Entries with the values of dy at the chosen pixels."""
    cdef:
        SlabPlan p = out.plan
        Entry[floating] *e = <Entry[floating] *>out.entries.data
        int64_t *starts = <int64_t *>out.starts.data
        Buffer places = Buffer("places", p.spans * p.s.capacity * sizeof(Place))
        Buffer firsts = Buffer("starts of places", p.spans * (p.lists + 1) * sizeof(int64_t))
        Place *place = <Place *>places.data
        int64_t *first = <int64_t *>firsts.data
        long n = p.planes, c
        int threads = team(n, 2. * n * p.s.capacity)
        long spans = chunks_of(p.spans, threads), chunks = chunks_of(n, threads)
    out.same_positions = True
    for c in prange(spans, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.find_places(&p.s, dy, chosen, p.spans * c // spans, p.spans * (c + 1) // spans, place, first)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.gather_places(&p.s, dy, place, first, n * c // chunks, n * (c + 1) // chunks, e, starts)
    out.count(np.zeros(n, np.int64))
    return 0


def compress(SlabPlan plan, floating[:, :, :, :, :] dy, int kind, double step=0, long limit=0, uint64_t seed=0,
             const floating[:, :, ::1] base=None, const floating[:, :, :, ::1] chosen=None,
             const floating[:, ::1] thresholds=None):
    """The Entries of dy as kernels.hh's Sparsifier says."""
    fits[floating](plan, None, dy)
    cdef:
        Sparsifier[floating] how = sparsifier[floating](plan, kind, step, limit, seed, base, chosen, thresholds)
        View[floating] g = view(dy)
        Entries out = Entries()
        long n = plan.planes, c
        int threads = team(n, 2. * n * plan.s.capacity)
        long chunks = chunks_of(n, threads)
        long each = plan.s.capacity // plan.s.span + 16
        Buffer scratch
        Entry[floating] *s
        Entry[floating] *e
        int64_t *starts
        int64_t[::1] clipped = np.empty(n, np.int64)
        int64_t *clips = &clipped[0]
    out.make(plan, np.float32 if sizeof(floating) == 4 else np.float64, sizeof(Entry[floating]))
    if chosen is not None:
        gather[floating](out, g, how.chosen)
        return out
    scratch = Buffer("scratch", each * threads * sizeof(Entry[floating]))
    s = <Entry[floating] *>scratch.data
    e, starts = <Entry[floating] *>out.entries.data, <int64_t *>out.starts.data
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.compress(&plan.s, &how, g, n * c // chunks, n * (c + 1) // chunks, e, starts, clips,
                         s + each * threadid())
    out.count(clipped)
    return out


def sparsify(SlabPlan plan, floating[:, :, :, :, :] dy, floating[:, :, :, :, :] out, int kind, double step=0, long limit=0,
             uint64_t seed=0, const floating[:, :, ::1] base=None, const floating[:, :, :, ::1] chosen=None,
             const floating[:, ::1] thresholds=None):
    """out[:] = the gradient that is used, base and all; out may be dy. Returns (nnz, clipped) of compress()."""
    fits[floating](plan, None, dy)
    same_shape(dy, out)
    cdef:
        Sparsifier[floating] how = sparsifier[floating](plan, kind, step, limit, seed, base, chosen, thresholds)
        View[floating] g = view(dy), o = view(out)  # OUT out
        long n = plan.s.blocks * plan.s.out_channels, c
        int threads = team(n, size(shape_of(dy, 0)))
        long chunks = chunks_of(n, threads)
        int64_t[:, ::1] counts = np.empty((2, n), np.int64)
        int64_t *nnz = &counts[0, 0]
        int64_t *clips = &counts[1, 0]
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.sparsify(&plan.s, &how, g, o, n * c // chunks, n * (c + 1) // chunks, nnz, clips)
    return tuple(int(k) for k in np.asarray(counts).sum(1))


cdef enum:
    PARTS = 64  # that a sum is cut into, whatever the number of threads


def standard_deviation(floating[:, :, :, :, :] dy, long images, floating[::1] db=None, bint accumulate=False):
    """That of all values of the images, as a float; padding lanes are left out. NaN where a value is not finite.

    db: as of bias_grad(), done in the same pass.
    """
    cdef:
        Shape s = shape_of(dy, images)
        View[floating] g = view(dy)
        floating *p = NULL  # OUT
        long n = s.channels, c, parts = min(n, PARTS)
        int threads = team(parts, size(s))
        double sums[2 * PARTS]
        floating origin = dy[0, 0, 0, 0, 0]
        double count = <double>images * n * s.height * s.width, mean = 0, squares = 0
    if db is not None:
        same_length("db", db.shape[0], n)
        p = &db[0]
    for c in prange(parts, nogil=True, num_threads=threads, schedule="static"):
        kernels.deviations(s, g, origin, &sums[2 * c], p, accumulate, n * c // parts, n * (c + 1) // parts)
    for c in range(parts):
        mean += sums[2 * c] / count
        squares += sums[2 * c + 1] / count
    squares -= mean * mean
    return sqrt(squares) if not squares <= 0 else 0.


cdef class Base(Entries):
    """Entries of one image that stands for all, and the sum of what they read, a plain array. base() makes it."""
    cdef Buffer total

    cdef void *values(self, SlabPlan plan, long size) except NULL:
        """The sum, of values of so many bytes; ValueError unless the plan's packed weights can be shared."""
        check_dtype(self, size)
        if self.plan.layer() != plan.layer():
            raise ValueError("the plan of base was made for another layer")
        return self.total.data


cdef View[floating] plain(SlabPlan p, floating *data) noexcept:
    """An array (channels, height, width) as a block of one image."""
    cdef View[floating] v
    v.data, v.block, v.channel, v.row = data, 0, p.s.height * p.s.in_width, p.s.in_width
    return v


def base(SlabPlan plan, const floating[:, :, ::1] image, floating[:, :, :, :, :] x, long images):
    """The Base with the entries of an image of dy and the sum of x over its images."""
    cdef:
        Base out = Base()
        Shape s = shape_of(x, images)
        View[floating] xv = view(x)
        long rows = plan.s.out_channels, n = s.channels, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads), row_chunks = chunks_of(rows, threads)
        const floating *values = &image[0, 0, 0]
        floating *sums
        Entry[floating] *e
        int64_t *starts
    if plan.s.lanes != 1:
        raise ValueError("the plan is not that of one image")
    if (image.shape[0], image.shape[1], image.shape[2]) != (rows, plan.s.out_height, plan.s.out_width):
        raise ValueError("the plan was made for another shape of dy")
    if (x.shape[1], x.shape[2], x.shape[3]) != (plan.s.channels, plan.s.height, plan.s.in_width):
        raise ValueError("the plan was made for another shape of x")
    out.make(plan, np.float32 if sizeof(floating) == 4 else np.float64, sizeof(Entry[floating]))
    e, starts = <Entry[floating] *>out.entries.data, <int64_t *>out.starts.data
    out.total = Buffer("total", (n * s.height * s.width + 16) * sizeof(floating))  # read_row() reads past the end
    sums = <floating *>out.total.data
    for c in prange(row_chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.list_image(&plan.s, values, rows * c // row_chunks, rows * (c + 1) // row_chunks, e, starts)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.sum_images(s, xv, sums, n * c // chunks, n * (c + 1) // chunks)
    out.count(np.zeros(rows, np.int64))
    return out


def remember(floating[:, :, :, :, :] m, floating[:, :, :, :, :] x, double scale, const floating[:, :, :, ::1] keep,
             floating[:, :, :, ::1] norms):
    """m[:] = m keep + scale x; norms[:] += the sums over the channels of its squares.

    keep (None: 1) and norms are (blocks, height, width, 16). x may step over pixels.
    """
    cdef:
        Shape s = shape_of(m, 16 * m.shape[0])
        View[floating] mv = view(m), xv = view(x)  # OUT m
        long n = s.blocks * s.height, c, step = x.strides[3] // sizeof(floating)
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
        const floating *k = NULL
        floating *out = &norms[0, 0, 0, 0]  # OUT
    same_shape(m, x)
    same_length("norms", norms.shape[0] * norms.shape[1] * norms.shape[2], n * s.width)
    if keep is not None:
        same_length("keep", keep.shape[0] * keep.shape[1] * keep.shape[2], n * s.width)
        k = &keep[0, 0, 0, 0]
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.remember(s, mv, xv, step, <floating>scale, k, out, n * c // chunks, n * (c + 1) // chunks)


def square_norms(floating[:, :, :, :, :] x, floating[:, :, :, ::1] norms):
    """norms[:] (blocks, height, width, 16) += the sums over the channels of the squares of x."""
    cdef:
        Shape s = shape_of(x, 16 * x.shape[0])
        View[floating] xv = view(x)
        long n = s.blocks * s.height, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
        floating *out = &norms[0, 0, 0, 0]  # OUT
    same_length("norms", norms.shape[0] * norms.shape[1] * norms.shape[2], n * s.width)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.square_norms(s, xv, out, n * c // chunks, n * (c + 1) // chunks)


def slab_input_gradient(Entries entries, const floating[::1] weights, floating[:, :, :, :, :] dx, bint accumulate=False,
                        Base base=None):
    """dx[:] = (dx if accumulate) + the entries times the weights (out, channels, taps).

    What base gives times the weights is added to every image, and takes the place of the sum in base.
    """
    cdef:
        SlabPlan p = entries.plan, bp = p if base is None else base.plan
        View[floating] d, b, none
        const Entry[floating] *e = <const Entry[floating] *>entries.entries.data
        const Entry[floating] *be
        const int64_t *starts = <const int64_t *>entries.starts.data
        const int64_t *b_starts
        long n = p.spans * p.channel_groups, i, each = max(p.slab(), bp.slab()), rows = p.s.out_channels, c
        int threads = team(n, p.work(entries.nnz) + p.channel_groups * each)
        long chunks = chunks_of(rows, threads), row = p.s.channels if p.in_place() else 0
        Buffer packed, slabs = Buffer("slabs", each * threads * sizeof(floating))
        floating *s = <floating *>slabs.data
        const floating *w = &weights[0]
        floating *packing
        bint levels = are_levels(entries, sizeof(floating))
        double unit = entries.unit
    fits[floating](p, dx, None)
    same_length("weights", weights.shape[0], rows * p.s.channels * p.taps)
    d = view(dx)  # OUT
    none.data = NULL
    b = none
    if not row:
        packed = Buffer("parts", p.weights() * sizeof(floating))
        packing = <floating *>packed.data
        for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
            kernels.pack_slab_weights(rows * c // chunks, rows * (c + 1) // chunks, rows, p.s.channels, p.taps, p.s.width, w,
                                      packing)
        w = packing
    if base is not None:
        b = plain[floating](bp, <floating *>base.values(p, sizeof(floating)))
        be, b_starts = <const Entry[floating] *>base.entries.data, <const int64_t *>base.starts.data
        for i in prange(bp.channel_groups, nogil=True, num_threads=threads, schedule="dynamic"):
            kernels.slab_input_gradient(&bp.s, b, be, b_starts, i, w, row, none, False, s + each * threadid())
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic"):
        if floating is float and levels:
            kernels.int8_level_input_gradient(&p.s, d, <float>unit, <const PackedEntry *>e, starts, i, w, row, b, accumulate,
                                              s + each * threadid())
        else:
            kernels.slab_input_gradient(&p.s, d, e, starts, i, w, row, b, accumulate, s + each * threadid())


def slab_weight_gradient(Entries entries, floating[:, :, :, :, :] x, floating[::1] grad, bint accumulate, Base base=None):
    """grad[:] (out, channels, taps) = (grad if accumulate) + the entries times x + those of base times its sum."""
    cdef:
        SlabPlan p = entries.plan, bp = p if base is None else base.plan
        View[floating] xv, bv
        const Entry[floating] *e = <const Entry[floating] *>entries.entries.data
        const Entry[floating] *be = NULL
        const int64_t *starts = <const int64_t *>entries.starts.data
        const int64_t *b_starts = NULL
        long parts = p.parts, sums = parts + (base is not None), n = sums * p.channel_groups, i
        long each = max(p.slab(), bp.slab()), rows = p.s.out_channels, c
        int threads = team(n, p.work(entries.nnz) + p.channel_groups * each)
        long chunks = chunks_of(rows, threads)
        bint levels = are_levels(entries, sizeof(floating)), same_positions = entries.same_positions
        bint direct = p.in_place() and not accumulate and sums == 1 and not levels
        floating unit = <floating>entries.unit
        long row = p.s.channels if direct else 0, values = p.weights()
        Buffer packed, slabs = Buffer("slabs", each * threads * sizeof(floating))
        floating *s = <floating *>slabs.data
        floating *dw
        floating *out = &grad[0]  # OUT
    fits[floating](p, x, None)
    xv = bv = view(x)
    if base is not None:
        if levels:
            raise ValueError("entries of 8 bits have no base")
        bv = plain[floating](bp, <floating *>base.values(p, sizeof(floating)))
        be, b_starts = <const Entry[floating] *>base.entries.data, <const int64_t *>base.starts.data
    same_length("grad", grad.shape[0], rows * p.s.channels * p.taps)
    dw = out
    if not direct:
        packed = Buffer("parts", sums * values * sizeof(floating))
        dw = <floating *>packed.data
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic"):
        if floating is float and levels:
            kernels.int8_level_weight_gradient(&p.s, xv, <const PackedEntry *>e, starts, i, parts, dw + i % parts * values,
                                               s + each * threadid())
        elif i % sums < parts:
            kernels.slab_weight_gradient(&p.s, xv, e, starts, i // sums * parts + i % sums, parts, dw + i % sums * values, row,
                                         same_positions, s + each * threadid())
        else:
            kernels.slab_weight_gradient(&bp.s, bv, be, b_starts, i // sums, 1, dw + parts * values, row, False,
                                         s + each * threadid())
    if not direct:
        for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
            kernels.unpack_slab_weights(rows * c // chunks, rows * (c + 1) // chunks, rows, p.s.channels, p.taps, p.s.width, sums,
                                        values, dw, unit, out, accumulate)


cdef bint are_levels(Entries entries, long size) except -1:
    """Whether the entries are multiples of their unit; TypeError unless arrays with values of `size` bytes fit them."""
    if entries.dtype == np.int8 and size == 4:
        return True
    check_dtype(entries, size)
    return False


cdef int check_dtype(Entries entries, long size) except -1:
    if entries.dtype.itemsize != size:
        raise TypeError(f"the entries are {entries.dtype}, the arrays have values of {size} bytes")
    return 0
