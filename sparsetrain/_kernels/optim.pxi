# ---- optimisers; part of core.pyx

cdef enum:
    PIECE = 16384  # values of a row that a thread updates at once


cdef struct Piece:
    long row, begin, end


cdef class Rows:
    """The arrays of several parameters, which one pass goes over: `columns` of each, C-contiguous, writable but for the
    second, of one size and dtype, float32 or float64."""
    cdef:
        vector[Py_buffer] arrays
        vector[Piece] pieces
        long columns, size
        bint apart  # no two rows begin in the same place

    def __cinit__(self, list rows, long columns):
        cdef:
            Py_buffer b, first
            Piece piece
            long i, j, n
            tuple row
            set first_places = set()
        self.columns = columns
        for i, row in enumerate(rows):
            same_length("row", len(row), columns)
            for j in range(columns):
                PyObject_GetBuffer(row[j], &b, PyBUF_FORMAT if j == 1 else PyBUF_FORMAT | PyBUF_WRITABLE)
                self.arrays.push_back(b)
                first = self.arrays[i * columns]
                if b.len != first.len or b.format[0] != first.format[0] or b.format not in (b"f", b"d"):
                    raise ValueError(f"array {j} of row {i} has {b.len} bytes of {b.format.decode()!r}, must be of float32 or "
                                     f"float64, with {first.len} of {first.format.decode()!r} as the first of the row")
            first_places.add(<size_t>first.buf)
            n = b.len // b.itemsize
            self.size += n
            for j in range(0, n, PIECE):
                piece.row, piece.begin, piece.end = i, j, min(j + PIECE, n)
                self.pieces.push_back(piece)
        self.apart = len(first_places) == len(rows)

    cdef int team(self) noexcept:
        """How many threads share the pieces. Parameters that are one array move one after the other."""
        return team(self.pieces.size(), self.size) if self.apart else 1

    def __dealloc__(self):
        for i in range(<long>self.arrays.size()):
            PyBuffer_Release(&self.arrays[i])

    cdef bint single(self, long row) noexcept nogil:
        return self.arrays[row * self.columns].itemsize == sizeof(float)

    cdef void *array(self, long row, long column) noexcept nogil:
        return self.arrays[row * self.columns + column].buf if column < self.columns else NULL


cdef void sgd(floating example, Rows r, Piece p, double lr, double momentum, bint nesterov, double weight_decay) noexcept nogil:
    kernels.sgd(p.begin, p.end, <floating *>r.array(p.row, 0), <const floating *>r.array(p.row, 1),  # OUT the first, the third
                <floating *>r.array(p.row, 2), lr, momentum, nesterov, weight_decay)


def sgd_step(list rows, double lr, double momentum, bint nesterov, double weight_decay):
    """One step of SGD in place on rows (data, gradient, velocity), without momentum (data, gradient). Velocities begin as 0."""
    cdef:
        Rows r = Rows(rows, 3 if momentum else 2)
        long n = r.pieces.size(), i
        int threads = r.team()
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic", chunksize=4):
        if r.single(r.pieces[i].row):
            sgd(<float>0, r, r.pieces[i], lr, momentum, nesterov, weight_decay)
        else:
            sgd(<double>0, r, r.pieces[i], lr, momentum, nesterov, weight_decay)


cdef void adam(floating example, Rows r, Piece p, long step, double lr, double beta1, double beta2, double eps,
               double weight_decay, bint decoupled) noexcept nogil:
    kernels.adam(p.begin, p.end, <floating *>r.array(p.row, 0), <const floating *>r.array(p.row, 1),  # OUT all but the second
                 <floating *>r.array(p.row, 2), <floating *>r.array(p.row, 3), step, lr, beta1, beta2, eps, weight_decay, decoupled)


def adam_step(list rows, list steps, double lr, double beta1, double beta2, double eps, double weight_decay, bint decoupled):
    """One step of Adam (AdamW if decoupled) in place on rows (data, gradient, m, v); steps: of each, counted from 1."""
    cdef:
        Rows r = Rows(rows, 4)
        vector[long] step = steps
        long n = r.pieces.size(), i
        int threads = r.team()
    same_length("steps", len(steps), len(rows))
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic", chunksize=4):
        if r.single(r.pieces[i].row):
            adam(<float>0, r, r.pieces[i], step[r.pieces[i].row], lr, beta1, beta2, eps, weight_decay, decoupled)
        else:
            adam(<double>0, r, r.pieces[i], step[r.pieces[i].row], lr, beta1, beta2, eps, weight_decay, decoupled)
