"""Calls of kernels, recorded to be made again.

Between two kernels Python walks through layers and operations, mostly code and data that the kernels have driven out of
the caches: 4.1 of the 31 ms of a step of ResNet-20 (90 % sparse, batch 128, 2 threads). What comes of it are some 150
calls of `core`, with the same arguments in every step. A Tape keeps them.
"""

import threading
from contextlib import contextmanager

import numpy as np

from sparsetrain import arrays
from sparsetrain._kernels import core

# Functions of core whose work depends on nothing but their arguments, which are the same in every step.
_AGAIN = frozenset((
    "add", "avg_pool", "avg_pool_backward", "batch_norm", "batch_norm_backward", "batch_norm_line", "bias_grad",
    "collect_values", "conv_bands", "conv_bands_backward", "copy", "linear_gradient", "max_pool", "max_pool_backward",
    "norm_gradient_sums", "norm_parameter_gradients", "relu", "relu_backward", "sddmm", "spmm", "spread_values",
    "track_moments", "transpose_weights",
))  # fmt: skip
_ASKS = frozenset((
    "available_isas", "get_isa", "get_num_threads", "get_vnni", "looked_at", "tile_limits", "vector_lanes",
))  # fmt: skip

_FUNCTIONS = {
    name: f for name, f in vars(core).items()
    if type(f).__name__.endswith(("_function", "_method")) and name[0] != "_" and name not in _ASKS
}  # fmt: skip

_lock = threading.RLock()  # one thread at a time puts others in the place of core's functions
_eager = False


@contextmanager
def eager():
    """Within it, every call of a module runs its layers, and none is recorded or replayed; a backward pass goes as its
    call went."""
    global _eager
    before, _eager = _eager, True
    try:
        yield
    finally:
        _eager = before


def allowed():
    """Whether steps may be recorded and replayed."""
    return not _eager


class Tape:
    """Calls of core. They keep every array among their arguments but blocked ones, whose memory goes from one to the
    next within a step: of these `memory` holds which they are, for arrays.Taken. What is taken serves this tape alone.

    whole: whether all that was called can be called again.
    """

    def __init__(self):
        self.calls, self.memory, self.whole = [], set(), True

    @contextmanager
    def recording(self):
        """Within it, what this thread calls of core is also recorded."""
        with _lock:
            try:
                vars(core).update({name: self._recorded(name, f) for name, f in _FUNCTIONS.items()})
                yield
            finally:
                vars(core).update(_FUNCTIONS)

    def _recorded(self, name, function):
        thread = threading.get_ident()

        def run(*arguments, **options):
            if threading.get_ident() == thread:
                if name in _AGAIN:
                    self._add(function, arguments, options)
                else:
                    self.whole = False
            return function(*arguments, **options)

        return run

    def _add(self, function, arguments, options):
        # The function for the dtype: core would look at the arguments to find it. Some are float64 in any case.
        single = any(getattr(a, "dtype", None) == np.float32 for a in (*arguments, *options.values()))
        function = function.__signatures__["float" if single else "double"]
        arguments = [self._kept(a) for a in arguments]
        options = {name: self._kept(a) for name, a in options.items()}
        self.calls.append((function, arguments, options))

    def _kept(self, value):
        """The value as a call keeps it."""
        if isinstance(value, np.ndarray) and value.ndim == 5:
            return core.looked_at(self._unowned(value))
        return tuple(map(self._kept, value)) if type(value) is tuple else value

    def _unowned(self, array):
        self.memory.add(arrays.memory_of(array))
        return arrays.unowned(array)

    def blocked(self, x):
        """The Blocked without its memory."""
        return arrays.Blocked(self._unowned(x.array), x.n, x.halo, x.ndim)

    def play(self):
        """Make the calls again."""
        for function, arguments, options in self.calls:
            function(*arguments, **options)
