# ---- batch norm, bias; part of core.pyx

cdef Added[floating] added_of(tuple added, floating[:, :, :, :, :] x) except *:
    """What is added to x: (array, None, None, False) as it lies, or (array, scale, shift, relu) for relu(array scale + shift +
    what the next one comes to)."""
    cdef:
        Added[floating] a
        floating[:, :, :, :, :] array
        const floating[::1] scale, shift
        const floating *factor
        const floating *offset
        bint relu
    added = added or ()
    if len(added) > kernels.MAX_ADDED:
        raise ValueError(f"{len(added)} arrays are added, must be at most {kernels.MAX_ADDED}")
    a.n = 0
    for term in added:
        array, scale, shift, relu = term
        same_shape(x, array)
        factor = offset = NULL
        if scale is not None:
            same_length("scale", scale.shape[0], x.shape[1])
            same_length("shift", shift.shape[0], x.shape[1])
            factor, offset = &scale[0], &shift[0]
        a.add(view(array), factor, offset, relu)
    return a


def batch_norm(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y, long images,
               const floating[::1] gamma, const floating[::1] beta, floating[::1] mean, floating[::1] var,
               double eps, bint training, bint relu, tuple added=None):
    """y[:] = gamma (x - mean) / sqrt(var + eps) + beta + added, then ReLU if `relu`.

    training: mean and var are those of the batch, biased, and are written; else they are read. added: see added_of().
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
    a.added = added_of(added, x)
    a.gamma, a.beta, a.eps, a.training, a.relu = &gamma[0], &beta[0], eps, training, relu
    a.mean, a.var = &mean[0], &var[0]  # OUT if training
    threads = team(n, size(a.shape))
    chunks = chunks_of(n, threads)
    for c in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.batch_norm(&a, n * c // chunks, n * (c + 1) // chunks)


def batch_norm_backward(floating[:, :, :, :, :] x, floating[:, :, :, :, :] y, floating[:, :, :, :, :] dy,
                        floating[:, :, :, :, :] dx, long images, const floating[::1] gamma, const floating[::1] beta,
                        floating[::1] mean, floating[::1] var, floating[::1] dgamma, bint add_to_dgamma,
                        floating[::1] dbeta, bint add_to_dbeta, double eps, bint training, bint relu,
                        floating[:, :, :, :, :] dadd=None):
    """Gradients of batch_norm(): writes dx, and dadd if given, and dgamma and dbeta or adds to them.

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
    if not add_to_dgamma:
        dgamma[:] = 0
    if not add_to_dbeta:
        dbeta[:] = 0
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


def track_moments(floating[::1] running_mean, const floating[::1] mean, floating[::1] running_var,
                  const floating[::1] var, double factor, double share, int64_t[::1] batches):
    """running_mean[:] = (1 - share) running_mean + share mean, the same of running_var and factor var, batches[0] += 1."""
    cdef long n = mean.shape[0], c
    cdef floating rest = <floating>(1 - share), of_var = <floating>(share * factor)
    same_length("running_mean", running_mean.shape[0], n)
    same_length("running_var", running_var.shape[0], n)
    same_length("var", var.shape[0], n)
    same_length("batches", batches.shape[0], 1)
    batches[0] += 1  # OUT
    for c in range(n):  # OUT running_mean, running_var
        running_mean[c] = rest * running_mean[c] + <floating>share * mean[c]
        running_var[c] = rest * running_var[c] + of_var * var[c]


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
