# ---- convolutions between batch norms; part of core.pyx

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
        self.tile_size = 0 if gradient is None else gradient.scratch_size()
        for p in self.input if forward is None else (forward,):
            self.tile_size = max(self.tile_size, p.scratch_size())


cdef bint _from_the_end = True


cdef bint turn() noexcept:
    """Whether a pass goes from its last task to its first. Every other one does: what the pass before it met last is still
    in L3. A step of ResNet-18 at 90 and 99 % takes 0.94 to 0.98 so, of ResNet-20 0.97 to 1.00."""
    global _from_the_end
    _from_the_end = not _from_the_end
    return _from_the_end


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
                           bint relu, tuple added, floating[:, :, :, :, :] formed,
                           const floating[::1] scale, const floating[::1] shift) except *:
    """x: as the batch norm before read it if scale is given, else as the convolution reads it."""
    cdef Bands[floating] a
    a.x_shape, a.y_shape = shape_of(x, images), shape_of(y, images)
    a.tasks = y.shape[0] * ((y.shape[2] + p.run - 1) // p.run)
    a.run, a.rows, a.stride, a.reach, a.relu = p.run, p.rows, p.stride, p.reach, relu
    a.padding[0], a.padding[1] = p.padding[0], p.padding[1]
    a.x_channel, a.x_row, a.x_size = p.x_channel, p.x_row, p.x_size
    a.raw, a.added, a.y, a.keep = view(x), added_of(added, x), view(y), nothing(<floating>0)
    a.formed = a.raw if scale is None else maybe(formed)
    a.keep_far = False
    a.scale = NULL
    a.shift = NULL
    if scale is not None:
        same_length("scale", scale.shape[0], x.shape[1])
        same_length("shift", shift.shape[0], x.shape[1])
        a.scale, a.shift = &scale[0], &shift[0]
    if formed is not None:
        same_shape(x, formed)
    return a


def conv_bands(BandPlan plan, long images, floating[:, :, :, :, :] x, const floating[::1] values,
               const floating[::1] bias, floating[:, :, :, :, :] y, floating[::1] mean, floating[::1] var,
               const floating[::1] scale=None, const floating[::1] shift=None, bint relu=False,
               tuple added=None, floating[:, :, :, :, :] formed=None, floating[:, :, :, :, :] keep=None):
    """y[:] = the convolution of x, or, if scale is given, of relu(x scale + shift + added), which is also kept in `keep`
    or lies already in `formed`. mean and var, unless None, become those of y, biased. added: see added_of().

    formed, and x without scale, have the halo that the plan was made for.
    """
    cdef:
        Bands[floating] a = bands(plan, images, x, y, relu, added, formed, scale, shift)  # OUT y
        long cuts = (y.shape[2] + plan.run - 1) // plan.run, n = y.shape[0] * cuts, i, c, channels = y.shape[1]
        bint back = turn()
        int threads = team(n, plan.forward.work * n * plan.run / plan.rows / 8)
        long each = plan.x_size + plan.tile_size
        Buffer scratch = Buffer("scratch", each * threads * sizeof(floating))
        floating *s = <floating *>scratch.data
        vector[double] moments, joined  # joined: means, then squares of the deviations from them
        double count, total = 0, share, away
        double *v
        list held = []
    a.forward = product_of(plan.forward, <floating>0)
    a.forward_axis = row_axis(plan.forward)
    a.forward.values = values_of(plan.forward, values, held)
    if bias is not None:
        same_length("bias", bias.shape[0], channels)
        a.forward.bias = &bias[0]
    if keep is not None:
        same_shape(x, keep)
        a.keep = view(keep)  # OUT
        a.keep_far = is_far(keep)
    a.moments = NULL
    if mean is not None:
        same_length("mean", mean.shape[0], channels)
        same_length("var", var.shape[0], channels)
        moments.resize(3 * n * channels)
        a.moments = moments.data()
    a.later = -threads if back else threads
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.conv_band(&a, n - 1 - i if back else i, s + each * threadid())
    if mean is None:
        return
    joined.resize(2 * channels)
    for i in range(n):  # Chan, Golub & LeVeque's way to join the bands, in their order
        count = min(16, images - i // cuts * 16) * min(plan.run, y.shape[2] - i % cuts * plan.run) * y.shape[3]
        share, v = count / (total + count), a.moments + i * channels * 3
        for c in range(channels):
            away = v[1] * (1 / count)
            joined[channels + c] += v[2] - v[1] * away
            away += v[0] - joined[c]
            joined[channels + c] += away * away * (total * share)
            joined[c] += away * share
            v += 3
        total += count
    for c in range(channels):
        mean[c], var[c] = <floating>joined[c], <floating>(joined[channels + c] / total)  # OUT


def conv_bands_backward(BandPlan plan, long images, floating[:, :, :, :, :] x, floating[:, :, :, :, :] y,
                        floating[:, :, :, :, :] g, const floating[::1] y_scale, const floating[::1] y_mean,
                        const double[:, :] y_sums, const double[::1] inverse, double pixels, floating[::1] grad,
                        bint accumulate, floating[:, :, :, :, :] dx, list values, bint add_to_dx, const floating[::1] scale=None,
                        const floating[::1] shift=None, const floating[::1] x_mean=None, bint relu=False,
                        tuple added=None, floating[:, :, :, :, :] formed=None, double[:, ::1] x_sums=None):
    """Gradients of conv_bands(): those of the weights to grad, and that of its input to dx (added if add_to_dx) unless None.

    g: that of the batch norm of y, zero where its ReLU is closed; y_sums, inverse: as of norm_parameter_gradients(); the
    gradient of y is y_scale (g - (y_sums[0] + (y - y_mean) y_sums[1] inverse^2) / pixels), or y_scale g if pixels is 0, as in
    evaluation. values: those for each Plan of plan.input. x_sums (2, channels): if scale is given, those of dx, which is
    made zero where the ReLU of x is closed, and of dx (x - x_mean).
    """
    cdef:
        Bands[floating] a = bands(plan, images, x, y, relu, added, formed, scale, shift)
        long parts = plan.parts, n = plan.gradient.n_values, i, c, each
        bint back = turn()
        int threads = team(parts, plan.gradient.work * parts)
        Buffer partial = Buffer("parts", n * parts * sizeof(floating)), scratch
        const floating[::1] v
        floating *s
        vector[double] sums
        vector[floating] mean_g, slope
        Plan step
        Product[floating] phase
        list held = []
    same_shape(y, g)
    a.g, a.parts, a.phases, a.phases_across = view(g), parts, 0, plan.phases_across
    same_length("y_scale", y_scale.shape[0], y.shape[1])
    same_length("y_mean", y_mean.shape[0], y.shape[1])
    same_length("y_sums", y_sums.shape[1], y.shape[1])
    same_length("inverse", inverse.shape[0], y.shape[1])
    mean_g.resize(y.shape[1])
    slope.resize(y.shape[1])
    for c in range(y.shape[1] if pixels else 0):
        mean_g[c] = <floating>(y_sums[0, c] / pixels)
        slope[c] = <floating>(y_sums[1, c] / pixels * (inverse[c] * inverse[c]))
    a.y_scale, a.y_mean, a.mean_g, a.slope = &y_scale[0], &y_mean[0], mean_g.data(), slope.data()
    a.dy_halo[0], a.dy_halo[1] = plan.dy_halo[0], plan.dy_halo[1]
    a.dy_channel, a.dy_row, a.dy_size = plan.dy_channel, plan.dy_row, plan.dy_size
    a.gradient, a.gradient_axis = product_of(plan.gradient, <floating>0), row_axis(plan.gradient)
    a.gradient.dvalues, a.gradient.parts, a.gradient_chunks = <floating *>partial.data, parts, plan.gradient.n_chunks
    same_length("grad", grad.shape[0], plan.gradient.n_weights())
    a.sums = NULL
    if dx is not None:
        same_shape(x, dx)
        a.dx = view(dx)  # OUT
        for i in range(len(plan.input)):
            step, v = plan.input[i], values[i]
            phase = product_of(step, <floating>0)
            phase.values, phase.accumulate = values_of(step, v, held), add_to_dx
            a.add_phase(phase, row_axis(step), step.y_origin)
        if scale is not None:
            same_length("x_mean", x_mean.shape[0], x.shape[1])
            sums.resize(parts * x.shape[1] * 2)
            a.sums, a.x_mean = sums.data(), &x_mean[0]
    each = plan.x_size + plan.dy_size + plan.tile_size
    scratch = Buffer("scratch", each * threads * sizeof(floating))
    s = <floating *>scratch.data
    a.later = -threads if back else threads
    for i in prange(parts, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.conv_band_backward(&a, parts - 1 - i if back else i, s + each * threadid())
    join_parts(plan.gradient, &a.gradient, grad, accumulate)  # OUT grad
    if a.sums != NULL:
        add_up(sums, x.shape[1], x_sums)


cdef int add_up(const vector[double] &sums, long channels, double[:, ::1] total) except -1:
    """total[:] (2, channels) = the total of sums (parts, channels, 2)."""
    cdef long i, c
    if total.shape[0] != 2 or total.shape[1] != channels:
        raise ValueError(f"sums have shape {tuple(total.shape)[:2]}, must be (2, {channels})")
    total[:, :] = 0  # OUT
    for i in range(0, <long>sums.size(), 2 * channels):
        for c in range(channels):
            total[0, c] += sums[i + 2 * c]
            total[1, c] += sums[i + 2 * c + 1]
    return 0


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
                       const floating[::1] shift, const floating[::1] mean, double[:, ::1] sums, bint relu,
                       floating[:, :, :, :, :] formed=None):
    """Makes dx zero, if relu, where x scale + shift, or what lies in `formed`, is not above 0. sums[:] (2, channels) = those
    of it and of it times x - mean."""
    cdef:
        Bands[floating] a
        vector[double] partial
        long parts = min(16, x.shape[0]), i
        bint back = turn()
        int threads = team(parts, size(shape_of(x, 16)))
    partial.resize(parts * x.shape[1] * 2)
    same_shape(x, dx)
    same_length("scale", scale.shape[0], x.shape[1])
    same_length("shift", shift.shape[0], x.shape[1])
    same_length("mean", mean.shape[0], x.shape[1])
    a.x_shape, a.raw, a.dx = shape_of(x, 16 * x.shape[0]), view(x), view(dx)
    a.relu, a.parts, a.sums = relu, parts, partial.data()
    a.scale, a.shift, a.x_mean, a.added.n, a.formed = &scale[0], &shift[0], &mean[0], 0, maybe(formed)
    if formed is not None:
        same_shape(x, formed)
    for i in prange(parts, nogil=True, num_threads=threads, schedule="static"):
        kernels.norm_gradient_sums(&a, parts - 1 - i if back else i)
    add_up(partial, x.shape[1], sums)
