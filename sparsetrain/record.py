"""Operations tell what they have run; a profile listens. Costs next to nothing where nobody does."""

import functools
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

from sparsetrain.tape import eager

_listener = None


@dataclass(frozen=True)
class Run:
    """One operation: a product with stored weights, or a pass over blocked arrays.

    start, end: time.perf_counter(). read, written: the Blocked or Normed that it passes over. A product also has its
    weight (a Parameter), its output (or the gradient of that) and its plans: core.Plan, one core.BandPlan, or none.
    normed: the Normed that it reads; forms: whether it forms it, and kept: also writes it; sums: whether it takes sums
    that a batch norm needs, forward that of its output, backward that of `normed`. entries: the core.Entries of the
    output gradient that it multiplies, where it skips the others.
    """

    kind: str
    start: float
    end: float
    read: tuple
    written: tuple
    weight: object = None
    output: object = None
    plans: tuple = field(default=())
    normed: object = None
    forms: bool = False
    kept: bool = False
    sums: bool = False
    entries: object = None


@contextmanager
def record(callback):
    """Within it, callback(Run) follows every operation. A Run holds arrays: whoever keeps it keeps their memory."""
    global _listener
    before, _listener = _listener, callback
    try:
        with eager():
            yield
    finally:
        _listener = before


def tell(kind, start, read, written, **more):
    """Tell who listens of an operation that began at `start` and ends now; arrays may be None or come twice."""
    if _listener is not None:
        end = time.perf_counter()
        read, written = (tuple({id(a): a for a in arrays if a is not None}.values()) for arrays in (read, written))
        _listener(Run(kind, start, end, read, written, **more))


def told(function):
    """An operation that reads the arrays among its arguments and writes the one it returns, and tells so."""

    @functools.wraps(function)
    def run(*arguments, **options):
        if _listener is None:
            return function(*arguments, **options)
        start = time.perf_counter()
        result = function(*arguments, **options)
        tell(function.__name__, start, [a for a in arguments if hasattr(a, "has_halo")], [result])
        return result

    return run
