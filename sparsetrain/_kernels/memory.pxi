# ---- memory that is used again and again; part of core.pyx

cdef class Memory:
    """Aligned memory."""
    cdef:
        object raw
        char *data

    def __cinit__(self, long size):
        cdef char[::1] raw = memory.zeros(size).view(np.int8)
        self.raw, self.data = raw, &raw[0]


cdef dict _idle = {}  # Memory by what it is for; taken out while in use, since another thread may call


@no_gc  # else the collector, clearing a cycle that holds one, would empty it before __dealloc__ puts its memory back
cdef class Buffer:
    """Memory of at least `size` bytes. The next Buffer for the same purpose gets it when this one is let go."""
    cdef:
        str purpose
        Memory memory
        char *data

    def __cinit__(self, str purpose, long size):
        self.purpose, self.memory = purpose, _idle.pop(purpose, None)
        if self.memory is None or len(self.memory.raw) < size:
            self.memory = Memory(size + 1)
        self.data = self.memory.data

    @property
    def __array_interface__(self):
        """np.asarray(buffer) is its bytes and keeps it alive."""
        return {"version": 3, "typestr": "|u1", "shape": (len(self.memory.raw),), "data": (<size_t>self.data, False)}

    def __dealloc__(self):
        _idle[self.purpose] = self.memory
