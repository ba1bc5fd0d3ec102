"""Roofline, break-even and straight lines on known numbers."""

import pytest

from bench_runs import LIMITS
from sparsetrain.bench import analysis


@pytest.mark.parametrize(
    "operations, size, wanted",
    [
        (100, 100, (100.0, "L1d")),  # 1 operation a byte would allow 500
        (10_000, 100_000, (20.0, "L2")),  # 0.1 operations a byte at 200 GB/s
        (1 << 20, 1 << 20, (100.0, "L2")),  # just fits
        (1 << 21, 1 << 21, (20.0, "memory")),
        (1 << 26, 1 << 21, (100.0, "memory")),
    ],
)
def test_attainable(operations, size, wanted):
    gflops, level = analysis.attainable(LIMITS, operations, size)
    assert (pytest.approx(gflops), level) == wanted


@pytest.mark.parametrize(
    "times, wanted",
    [
        ({0: 10, 0.5: 12, 0.9: 4}, 0.6),  # a quarter of the way down from 12 to 4
        ({0.9: 4, 0.5: 12, 0: 10}, 0.6),
        ({0: 10, 0.5: 10, 0.9: 4}, 0.5),
        ({0: 10, 0.4: 8, 0.5: 12, 0.9: 4}, 0.6),  # faster from 0.6 on, not from 0.4
        ({0: 10, 0.5: 9}, "always"),
        ({0: 10, 0.5: 9, 0.9: 10}, "none"),
        ({0: 10, 0.5: 11}, "none"),
        ({0.5: 11, 0.9: 1}, None),
        ({0: 10}, None),
    ],
)
def test_break_even(times, wanted):
    found = analysis.break_even(times)
    assert found == (pytest.approx(wanted) if isinstance(wanted, float) else wanted)


def test_a_straight_line_is_found():
    line = analysis.straight_line([10, 20, 40, 1000], [3 + 2 * x for x in (10, 20, 40, 1000)])
    assert line == {"start": pytest.approx(3), "slope": pytest.approx(2), "worst": pytest.approx(0, abs=1e-9)}


def test_deviations_count_as_shares_of_the_time():
    """A time that is 10 % off weighs the same at 1 ms as at 1 s: both ends of the line stay close."""
    times = {1: 1.1e-3, 10: 10e-3, 100: 100e-3, 1000: 1.1}
    line = analysis.straight_line(list(times), list(times.values()))
    off = [(line["start"] + line["slope"] * x) / seconds - 1 for x, seconds in times.items()]
    assert line["worst"] == pytest.approx(max(map(abs, off)))
    assert line["worst"] < 0.1


def test_two_points_are_no_evidence_of_a_line():
    assert analysis.straight_line([1, 2], [1.0, 2.0]) is None
    assert analysis.straight_line([1, 1, 2], [1.0, 1.1, 2.0]) is None
