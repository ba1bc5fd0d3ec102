"""Threads of a team move apart, and nobody's CPUs change by it."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

import sparsetrain as st
from sparsetrain import arrays, ops

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the threads' CPUs")


def allowed():
    """The CPUs that each thread of this process may use."""
    return {int(task.name): os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()}


@pytest.mark.parametrize("n", [2, 5])  # 5: more than some machines have CPUs
def test_threads_may_use_the_same_cpus_as_before(n):
    x = arrays.pack(np.ones((64, 32, 16, 16), np.float32))
    threads = st.get_num_threads()
    st.set_num_threads(n)
    try:
        ops.relu(x)
        before = allowed()
        for _ in range(50):
            time.sleep(0.002)  # so long that the workers sleep, and the next team looks where they woke
            ops.relu(x)
        assert {task: cpus for task, cpus in allowed().items() if task in before} == before
    finally:
        st.set_num_threads(threads)
