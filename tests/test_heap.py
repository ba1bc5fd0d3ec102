"""The heap: pieces never share bytes, what comes back is used again, whole regions go back to the system."""

import gc
import threading
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as hs
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from sparsetrain import heap
from sparsetrain._kernels import memory
from sparsetrain.heap import Heap

KINDS = {None: 0, "a": 640, "b": 6400}


def place(piece):
    begin = piece.__array_interface__["data"][0]
    return begin, begin + len(piece)


@dataclass(eq=False)
class Held:
    """A piece and the byte that fills it; or what was withdrawn."""

    piece: np.ndarray | None = None
    byte: int = 0
    withdrawn: list | None = None

    def places(self):
        return [self.piece.base.place] if self.withdrawn is None else self.withdrawn


class Use(RuleBasedStateMachine):
    """Pieces are taken, let go, withdrawn and given back in whatever order."""

    taken, withdrawn = Bundle("taken"), Bundle("withdrawn")

    def __init__(self):
        super().__init__()
        self.heap, self.held, self.gone, self.number = Heap(), [], [], 0

    @rule(target=taken, size=hs.integers(1, 10_000), kind=hs.sampled_from(list(KINDS)))
    def take(self, size, kind):
        piece, again = self.heap.take(KINDS[kind] or size, kind)
        assert len(piece) >= (KINDS[kind] or size) and place(piece)[0] % heap.ALIGNED == 0
        if again:
            assert (piece == ord(kind)).all(), "somebody wrote to what was kept for its kind"
        self.number = (self.number + 1) % 90
        piece[:] = ord(kind) if kind else self.number
        self.held.append(Held(piece, piece[0]))
        return self.held[-1]

    @rule(held=consumes(taken))
    def let_go(self, held):
        self.gone += held.places()
        self.held.remove(held)
        held.piece = None

    @rule(target=withdrawn, choose=hs.randoms(use_true_random=False))
    def withdraw(self, choose):
        places = choose.sample(self.gone, min(3, len(self.gone)))
        before = self.heap.idle()
        found = self.heap.withdraw(set(places))
        if found is not None:
            union = set().union(*(range(begin, end, heap.ALIGNED) for _, begin, end, _ in places))
            assert before - self.heap.idle() == heap.ALIGNED * len(union)
        else:
            assert self.heap.idle() == before
        self.held.append(Held(withdrawn=found or []))
        return self.held[-1]

    @rule(held=consumes(withdrawn))
    def give_back(self, held):
        self.held.remove(held)
        self.heap.let_go.extend(held.withdrawn)

    @rule()
    def release(self):
        self.heap.release()

    @invariant()
    def no_byte_is_used_twice(self):
        assert all((held.piece == held.byte).all() for held in self.held if held.piece is not None)
        places = sorted(p[1:3] for held in self.held for p in held.places())
        assert all(one[1] <= other[0] for one, other in pairwise(places))


Use.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestUse = Use.TestCase


def test_what_was_of_two_kinds_is_not_withdrawn():
    """Who is given it again and again, in turns, would not find what it left."""
    shared, places = Heap(), set()
    for kind in (None, "a"):
        piece, again = shared.take(640, kind)
        places.add(piece.base.place)
        assert not again
        del piece
    assert len({place[1:3] for place in places}) == 1
    idle = shared.idle()
    assert shared.withdraw(places) is None and shared.idle() == idle
    for place in places:
        assert (shared.withdraw({place}) is None) == (place[-1] is None)


@pytest.mark.parametrize("kind", [None, "a"])
def test_what_went_back_to_the_system_is_not_withdrawn(kind):
    shared = Heap()
    piece, _ = shared.take(640, kind)
    places = {piece.base.place}
    del piece
    shared.release()
    assert shared.withdraw(places) is None and shared.idle() == 0


def test_a_stack_leaves_no_gap():
    """Activations forward, gradients in their place backward: nothing past the peak is taken, in any step."""
    shared = Heap()
    sizes = [8 << 10, 4 << 10, 4 << 10, 2 << 10, 1 << 10, 1 << 10]
    tops = []
    for _ in range(3):
        kept = [shared.take(size)[0] for size in sizes]
        low, top = place(kept[0])[0], place(kept[-1])[1]
        while kept:
            size = len(kept.pop())
            for gradient in (shared.take(size // 2)[0], shared.take(size // 2)[0]):
                top = max(top, place(gradient)[1])
            del gradient
        tops.append(top - low)
    assert tops == [sum(sizes)] * 3
    assert shared.idle() == heap.REGION


def test_regions_go_back_once_nothing_of_them_is_in_use():
    shared = Heap()
    small, large = shared.take(100)[0], shared.take(heap.REGION)[0]
    assert place(large)[1] - place(large)[0] == heap.REGION
    shared.release()
    assert shared.idle() == heap.REGION - 128
    del large
    shared.release()
    assert shared.idle() == heap.REGION - 128
    small[:] = 1
    del shared
    gc.collect()
    assert (small == 1).all()


def test_a_system_that_gives_no_whole_region(monkeypatch):
    really = memory.zeros

    def zeros(size):
        if size > 1000:
            raise OSError("no memory")
        return really(size)

    monkeypatch.setattr(memory, "zeros", zeros)
    shared = Heap()
    first, second = shared.take(500)[0], shared.take(600)[0]
    where = place(first)
    del first
    assert place(shared.take(64)[0])[0] == where[0] and len(second) == 640
    with pytest.raises(OSError, match="no memory"):
        shared.take(2000)


def test_threads_share_it():
    shared, wrong = Heap(), []

    def work(number):
        random = np.random.default_rng(number)
        held = []
        for _ in range(3000):
            if held and random.random() < 0.5:
                piece = held.pop(random.integers(len(held)))
                if not (piece == number).all():
                    wrong.append(number)
            else:
                piece, _ = shared.take(int(random.integers(1, 500)))
                piece[:] = number
                held.append(piece)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert shared.idle() == heap.REGION
