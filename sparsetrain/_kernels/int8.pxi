# ---- products of numbers of 8 bits; part of core.pyx. Quads, scale and zero are as in kernels.hh's Int8Kernels

def find_range(float[:, :, :, :, :] x, long images):
    """(least, largest) of all values of the images and 0; NaN twice if a value is not finite."""
    cdef:
        Shape s = shape_of(x, images)
        View[float] xv = view(x)
        long n = s.blocks * s.channels, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
        float[:, ::1] ranges = np.empty((chunks, 3), np.float32)
        float *r = &ranges[0, 0]
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.int8_find_range(s, xv, r + 3 * c, n * c // chunks, n * (c + 1) // chunks)
    found = np.asarray(ranges)
    nan = found[:, 2].sum()
    return float(found[:, 0].min() + nan), float(found[:, 1].max() + nan)


def to_quads(float[:, :, :, :, :] x, int32_t[:, :, :, :, :] quads, halo, double scale, int zero):
    """quads[:], and so many rows and columns around it, = x / scale + zero, rounded to whole numbers from 0 to 255."""
    cdef:
        Shape s = shape_of(x, 16 * x.shape[0])
        View[float] xv = view(x)
        View[int32_t] q = view(quads)  # OUT
        long n = s.blocks * quads.shape[1], c, rows = halo[0], columns = halo[1]
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
        float inverse = 1 / scale
    quads_of(x, quads)
    q.row = (s.width + 2 * columns) * 16  # NumPy exports any stride for an axis of length 1
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.int8_to_quads(s, xv, q, rows, columns, inverse, zero, n * c // chunks, n * (c + 1) // chunks)


def from_quads(int32_t[:, :, :, :, :] quads, float[:, :, :, :, :] x, double scale, int zero):
    """x[:] = (quads - zero) scale."""
    cdef:
        Shape s = shape_of(x, 16 * x.shape[0])
        View[float] xv = view(x)  # OUT
        View[int32_t] q = view(quads)
        long n = s.blocks * s.channels, c
        int threads = team(n, size(s))
        long chunks = chunks_of(n, threads)
    quads_of(x, quads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.int8_from_quads(s, q, xv, scale, zero, n * c // chunks, n * (c + 1) // chunks)


cdef int quads_of(float[:, :, :, :, :] x, int32_t[:, :, :, :, :] quads) except -1:
    if (quads.shape[0], quads.shape[1], quads.shape[2], quads.shape[3]) != (
            x.shape[0], (x.shape[1] + 3) // 4, x.shape[2], x.shape[3]):
        raise ValueError(f"the quads have shape {tuple(quads.shape)[:5]}, must have a quarter of the channels of {tuple(x.shape)[:5]}")
    return 0


def round_weights(const float[::1] weights, const int32_t[::1] indptr, const int32_t[::1] place, double scale,
                  int8_t[::1] levels, int8_t[::1] quads, int32_t[::1] sums):
    """levels[:] = weights / scale rounded, quads[place] = levels unless place is None, sums[:] = the sum of each row's
    (indptr) levels."""
    cdef:
        long n = sums.shape[0], c
        int threads = team(n, <double>weights.shape[0])
        long chunks = chunks_of(n, threads)
        float inverse = 1 / scale
    same_length("indptr", indptr.shape[0], n + 1)
    if place is not None:
        same_length("place", place.shape[0], weights.shape[0])
    same_length("levels", levels.shape[0], weights.shape[0])
    if weights.shape[0] == 0:
        sums[:] = 0
        return
    cdef:
        const int32_t *first = &indptr[0]
        const int32_t *p = &place[0] if place is not None else NULL
        const float *w = &weights[0]
        int8_t *l = &levels[0]  # OUT
        int8_t *q = &quads[0] if place is not None else NULL  # OUT
        int32_t *s = &sums[0]  # OUT
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.int8_round_weights(n * c // chunks, n * (c + 1) // chunks, first, p, w, inverse, l, q, s)


def int8_spmm(Plan plan, int32_t[:, :, :, :, :] quads, const int32_t[::1] values, const int32_t[::1] start, double scale,
              const float[::1] shift, float[:, :, :, :, :] y, bint relu):
    """y = (start + the sum of quads times quads of weights) scale + shift, start and shift for each row; then ReLU."""
    cdef:
        Product[int32_t] a = product_of(plan, <int32_t>0)
        View[int32_t] xv = view(quads)
        View[float] yv = view(y)  # OUT
        long n = plan.n_tiles * plan.n_chunks, i
        int threads = team(n, plan.work / 8)
        long run = max(1, n // (8 * threads))  # as in spmm()
        long each = plan.scratch_size()
        Buffer scratch
        int32_t *s
        int k
    for k in range(3):
        if (quads.shape[k] > 1 and quads.strides[k] != 4 * plan.x_strides[k]
                or y.shape[k] > 1 and y.strides[k] != 4 * plan.y_strides[k]):
            raise ValueError("the plan was made for arrays with other strides")
    same_length("values", values.shape[0], plan.n_values)
    same_length("start", start.shape[0], plan.rows)
    same_length("shift", shift.shape[0], plan.rows)
    a.x, a.y, a.y_channel = xv.data, <int32_t *>yv.data + plan.y_origin, yv.channel
    a.values = &values[0] if plan.n_values else NULL
    a.bias, a.shift, a.scale, a.relu = &start[0], &shift[0], scale, relu
    scratch = Buffer("scratch", each * threads * sizeof(int32_t))
    s = <int32_t *>scratch.data
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic", chunksize=run):
        kernels.int8_spmm(&a, i, s + each * threadid())


def int8_compress(SlabPlan plan, float[:, :, :, :, :] dy, double step, long limit, uint64_t seed):
    """The Entries of dy, dithered, in multiples of the step from -limit to limit."""
    fits[float](plan, None, dy)
    if not 1 <= limit <= 127:
        raise ValueError(f"limit is {limit}, must be in [1, 127]")
    cdef:
        Sparsifier[float] how = sparsifier[float](plan, DITHER, step, limit, seed, None, None, None)
        View[float] g = view(dy)
        Entries out = Entries()
        long n = plan.planes, c
        int threads = team(n, 2. * n * plan.s.capacity)
        long chunks = chunks_of(n, threads)
        long each = plan.s.capacity // plan.s.span + 16
        Buffer scratch = Buffer("scratch", each * threads * sizeof(Entry[float]))
        Entry[float] *s = <Entry[float] *>scratch.data
        PackedEntry *e
        int64_t *starts
        int64_t[::1] clipped = np.empty(n, np.int64)
        int64_t *clips = &clipped[0]
    if plan.slab() > 1 << 23:
        raise ValueError(f"the plan has {plan.slab()} positions, at most 2^23 fit beside a value")
    how.unit = 1
    out.make(plan, np.int8, sizeof(PackedEntry))
    out.unit = step
    e, starts = <PackedEntry *>out.entries.data, <int64_t *>out.starts.data
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.int8_compress(&plan.s, &how, g, n * c // chunks, n * (c + 1) // chunks, e, starts, clips, s + each * threadid())
    out.count(clipped)
    return out


def int8_input_gradient(Entries entries, const int8_t[::1] weights, double scale, float[:, :, :, :, :] dx, bint accumulate=False):
    """dx[:] = (dx if accumulate) + scale times the entries times the weights (out, channels, taps)."""
    cdef:
        SlabPlan p = entries.plan
        View[float] d = view(dx), none  # OUT d
        const PackedEntry *e = <const PackedEntry *>entries.entries.data
        const int64_t *starts = <const int64_t *>entries.starts.data
        long n = p.spans * p.channel_groups, i, each = p.slab(), rows = p.s.out_channels, c
        int threads = team(n, p.work(entries.nnz) + p.channel_groups * each)
        long chunks = chunks_of(rows, threads)
        Buffer packed = Buffer("parts", p.weights() * sizeof(int32_t)), slabs = Buffer("slabs", each * threads * sizeof(int32_t))
        int32_t *s = <int32_t *>slabs.data
        int32_t *w = <int32_t *>packed.data
        const int8_t *levels = &weights[0]
    none.data = NULL
    fits[float](p, dx, None)
    check_dtype(entries, 1)
    same_length("weights", weights.shape[0], rows * p.s.channels * p.taps)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.int8_pack_weights(rows * c // chunks, rows * (c + 1) // chunks, rows, p.s.channels, p.taps, p.s.width, levels, w)
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.int8_input_gradient(&p.s, d, scale, e, starts, i, w, 0, none, accumulate, s + each * threadid())


def int8_weight_gradient(Entries entries, int32_t[:, :, :, :, :] quads, int zero, double scale, float[::1] grad, bint accumulate):
    """grad[:] (out, channels, taps) = (grad if accumulate) + scale times the entries times (quads - zero)."""
    cdef:
        SlabPlan p = entries.plan
        View[int32_t] xv = view(quads)
        const PackedEntry *e = <const PackedEntry *>entries.entries.data
        const int64_t *starts = <const int64_t *>entries.starts.data
        long parts = p.parts, n = parts * p.channel_groups, i, each = p.slab(), rows = p.s.out_channels, c
        int threads = team(n, p.work(entries.nnz) + p.channel_groups * each)
        long chunks = chunks_of(rows, threads), values = p.weights()
        Buffer packed = Buffer("parts", parts * values * sizeof(int32_t)), slabs = Buffer("slabs", each * threads * sizeof(int32_t))
        int32_t *s = <int32_t *>slabs.data
        int32_t *dw = <int32_t *>packed.data
        float *out = &grad[0]  # OUT
    check_dtype(entries, 1)
    if (quads.shape[0], quads.shape[1], quads.shape[2], quads.shape[3]) != (
            p.s.blocks, (p.s.channels + 3) // 4, p.s.height, p.s.in_width):
        raise ValueError("the plan was made for another shape of x")
    same_length("grad", grad.shape[0], rows * p.s.channels * p.taps)
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.int8_weight_gradient(&p.s, xv, zero, e, starts, i, parts, dw + i % parts * values, 0, s + each * threadid())
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.int8_unpack_weights(rows * c // chunks, rows * (c + 1) // chunks, rows, p.s.channels, p.taps, p.s.width, parts,
                                    values, dw, scale, out, accumulate)
