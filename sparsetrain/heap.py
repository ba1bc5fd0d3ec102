"""Memory that the arrays of training steps share.

What one array lets go of serves the next ones, whatever their shapes: the first place that is large enough is taken,
and free neighbours join. Steps take and let go nearly as a stack does, forward and back: that leaves hardly a gap.
"""

import threading
from bisect import bisect, insort

import numpy as np

from sparsetrain._kernels import memory

REGION = 512 << 20  # bytes asked of the system at a time; what is never written to takes no memory
ALIGNED = 64


class _Region:
    """Bytes that the system gave. free: (begin, end) of places in them, by address; no two of them touch."""

    def __init__(self, size):
        self.bytes = memory.zeros(size)
        self.begin = self.bytes.ctypes.data
        self.free = [(self.begin, self.begin + size)]

    def idle(self):
        return sum(end - begin for begin, end in self.free)

    def put(self, begin, end):
        i = bisect(self.free, (begin,))
        if i < len(self.free) and self.free[i][0] == end:
            end = self.free.pop(i)[1]
        if i and self.free[i - 1][1] == begin:
            begin = self.free.pop(i - 1)[0]
        insort(self.free, (begin, end))

    def cut(self, begin, end):
        """Take a part of a free place; False if it is not all free."""
        i = bisect(self.free, (begin, float("inf"))) - 1
        if i < 0 or self.free[i][1] < end:
            return False
        first, last = self.free.pop(i)
        self.free[i:i] = [(a, b) for a, b in ((first, begin), (end, last)) if a < b]
        return True

    def first(self, size):
        """(begin, end) of the first free place of so many bytes, taken; None if there is none."""
        for begin, end in self.free:
            if end - begin >= size:
                self.cut(begin, begin + size)
                return begin, begin + size
        return None


class _Piece:
    """The bytes [begin, end) of a region, the heap's again once nobody uses the array that np.asarray() makes of it.

    place: (region, begin, end, kind).
    """

    def __init__(self, heap, region, begin, end, kind):
        self._heap, self.place = heap, (region, begin, end, kind)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (end - begin,), "data": (begin, False)}

    def __del__(self):
        self._heap.let_go.append(self.place)


class Heap:
    """Memory, handed out by pieces.

    let_go: places of the pieces that came back since it was last asked for one: the garbage collector may let go of one
    at any time, also in the middle of a call.
    """

    def __init__(self):
        self.let_go = []
        self._lock = threading.Lock()
        self._regions = []  # the oldest first
        self._kinds = {}  # kind: [(region, begin, end)]

    def take(self, size, kind=None):
        """(an array of at least `size` bytes, its base a piece; whether that is one of its kind that was let go).

        A piece of a kind, but None, stays as it is left until one of this kind is taken again: all have one size.
        """
        size += -size % ALIGNED
        with self._lock:
            self._come_back()
            again = bool(self._kinds.get(kind))
            place = self._kinds[kind].pop() if again else self._first(size)
            return np.asarray(_Piece(self, *place, kind)), again

    def withdraw(self, places):
        """Takes these places of pieces, which may overlap: what to add to let_go once they may be used again.

        None, and nothing is taken, if some are in use or went back to the system, or were of two kinds: who came later
        would not find its own.
        """
        taken = []
        with self._lock:
            self._come_back()
            for place in _joined(places):
                if not self._take_out(*place):
                    self.let_go += taken
                    return None
                taken.append(place)
        return taken

    def idle(self):
        """Bytes that are not in use, of which the system may not have given all yet."""
        with self._lock:
            self._come_back()
            kept = sum(end - begin for places in self._kinds.values() for _, begin, end in places)
            return kept + sum(region.idle() for region in self._regions)

    def release(self):
        """Give regions that are not in use back to the system."""
        with self._lock:
            self._come_back()
            for places in self._kinds.values():
                for region, begin, end in places:
                    region.put(begin, end)
            self._kinds.clear()
            self._regions = [region for region in self._regions if region.idle() < region.bytes.nbytes]

    def _come_back(self):
        while self.let_go:
            region, begin, end, kind = self.let_go.pop()
            if kind is None:
                region.put(begin, end)
            else:
                self._kinds.setdefault(kind, []).append((region, begin, end))

    def _take_out(self, region, begin, end, kind):
        """Whether the place was there to be taken."""
        if kind is None:
            return region in self._regions and region.cut(begin, end)
        there = (region, begin, end) in self._kinds.get(kind, ())
        if there:
            self._kinds[kind].remove((region, begin, end))
        return there

    def _first(self, size):
        """(region, begin, end) of the first place of so many bytes."""
        for region in self._regions:
            place = region.first(size)
            if place:
                return region, *place
        try:
            region = _Region(max(size, REGION))
        except (OSError, MemoryError):  # the process may not have so much
            region = _Region(size)
        self._regions.append(region)
        return region, *region.first(size)


def _joined(places):
    """The places, those of no kind that overlap or touch as one. Regions do not touch."""
    joined = []
    for region, begin, end, kind in sorted(places, key=lambda place: (place[3] is not None, place[1])):
        if kind is None and joined and begin <= joined[-1][2]:
            _, begin, last, _ = joined.pop()
            end = max(end, last)
        joined.append((region, begin, end, kind))
    return joined
