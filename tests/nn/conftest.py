"""Fixtures of the layers' tests."""

import numpy as np
import pytest

import sparsetrain as st


@pytest.fixture
def same_bits(put_back):
    """A function that fails unless run() returns the same bits on 1, 2 and 3 threads, one seed."""

    def check(run):
        results = []
        for threads in (1, 2, 3):
            st.set_num_threads(threads)
            st.manual_seed(0)
            results.append([np.ascontiguousarray(a) for a in run()])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                np.testing.assert_array_equal(b, a)
                assert b.tobytes() == a.tobytes()

    return check
