"""What a worker times: a layer or net that one peer has built, and how a repetition is measured."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

# Passes follow each other until this much time is measured, for one repetition.
MIN_SECONDS = 0.05
# Passes are run untimed for as long: the pause between turns has put the threads to sleep, and the other peers have
# emptied the caches. With one such pass and 0.02 s measured, steps below a millisecond took up to 1.8 times as long as
# in a row (the MLP at 99 %).
WARM_SECONDS = 0.1


class Unsupported(Exception):
    """What the peer cannot run, in a few words."""


@dataclass
class Subject:
    """A layer or net that is built and can be timed.

    passes: functions that run once and return {part: seconds}. sample() returns {what: numbers}
    on which all peers should agree. about: what a reader of the results should know.
    """

    passes: list[Callable]
    sample: Callable
    about: dict = field(default_factory=dict)

    def repetition(self):
        """Mean seconds of each part, over as many passes as MIN_SECONDS needs."""
        means = {}
        for one_pass in self.passes:
            spent = seconds = sum(one_pass().values())
            while spent < WARM_SECONDS:
                seconds = sum(one_pass().values())
                spent += seconds
            count = max(1, math.ceil(MIN_SECONDS / seconds))
            runs = [one_pass() for _ in range(count)]
            means |= {part: sum(run[part] for run in runs) / count for part in runs[0]}
        return means

    def peak_memory(self, steps=3):
        """Bytes that training steps add, at their peak, to a process that holds net and batch."""
        base = _status("VmRSS")
        # "5" resets the peak (man 5 proc), which building the net may have raised.
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        for _ in range(steps):
            self.passes[0]()
        peak = _status("VmHWM")
        return {"base": base, "peak": peak, "step": peak - base}


def timed_parts(**calls):
    """{part: seconds} of calls made in turn, each with the result of the one before (or None)."""
    seconds, result = {}, None
    for part, call in calls.items():
        start = time.perf_counter()
        result = call(result)
        seconds[part] = time.perf_counter() - start
    return seconds


def sampled(array):
    """64 numbers spread over an array, as a list for JSON."""
    flat = np.asarray(array).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, 64).astype(int)].tolist()


def _status(name):
    """A size in /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
