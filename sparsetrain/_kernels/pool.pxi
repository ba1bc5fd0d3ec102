# ---- pooling; part of core.pyx

cdef Windows windows(const int32_t[:, ::1] w, long outputs) except *:
    if w.shape[0] != 3 or w.shape[1] != outputs:
        raise ValueError(f"windows have shape {tuple(w.shape)[:2]}, must be (3, {outputs})")
    cdef Windows v
    v.begin, v.end, v.divisor = &w[0, 0], &w[1, 0], &w[2, 0]
    return v


cdef MaxPool[floating] max_pool_of(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y, const int32_t[:, ::1] h,
                                   const int32_t[:, ::1] w, const floating[::1] scale, const floating[::1] shift,
                                   bint relu) except *:
    cdef MaxPool[floating] a
    a.x_shape, a.y_shape = shape_of(x, 16 * x.shape[0]), shape_of(y, 16 * x.shape[0])
    a.x, a.y, a.relu = view(x), view(y), relu
    a.h, a.w = windows(h, a.y_shape.height), windows(w, a.y_shape.width)
    a.scale = NULL
    a.shift = NULL
    if scale is not None:
        same_length("scale", scale.shape[0], x.shape[1])
        same_length("shift", shift.shape[0], x.shape[1])
        a.scale, a.shift = &scale[0], &shift[0]
    return a


def max_pool(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y, const int32_t[:, ::1] h, const int32_t[:, ::1] w,
             const floating[::1] scale=None, const floating[::1] shift=None, bint relu=False):
    """y[:] = the maximum over each window of x, or, if scale is given, of relu(x scale + shift).

    Rows of h and w: begin, end, divisor.
    """
    cdef:
        MaxPool[floating] a = max_pool_of(x, y, h, w, scale, shift, relu)  # OUT y
        long n = a.x_shape.blocks * a.x_shape.channels, c
        int threads = team(n, size(a.x_shape))
        long chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.max_pool(&a, n * c // chunks, n * (c + 1) // chunks)


def max_pool_backward(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y, floating[:, :, :, :, :] dy,
                      floating[:, :, :, :, :] dx, const int32_t[:, ::1] h, const int32_t[:, ::1] w,
                      const floating[::1] scale=None, const floating[::1] shift=None, bint relu=False,
                      const floating[::1] mean=None, double[:, ::1] sums=None):
    """dx[:] = the gradients of the windows at their first maximum.

    If scale is given, dx is zero where the ReLU is closed and sums (2, channels) are set, as by norm_gradient_sums().
    """
    same_shape(x, dx)
    same_shape(y, dy)
    cdef:
        MaxPool[floating] a = max_pool_of(x, y, h, w, scale, shift, relu)
        long n = a.x_shape.blocks * a.x_shape.channels, c
        int threads = team(n, size(a.x_shape))
        long chunks = chunks_of(n, threads)
        vector[double] partial
    a.dy, a.dx = view(dy), view(dx)  # OUT dx
    if scale is not None:
        same_length("mean", mean.shape[0], x.shape[1])
        partial.resize(x.shape[0] * x.shape[1] * 2)
        a.mean, a.sums = &mean[0], partial.data()
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="static"):
        kernels.max_pool_backward(&a, n * c // chunks, n * (c + 1) // chunks)
    if scale is not None:
        add_up(partial, x.shape[1], sums)


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
