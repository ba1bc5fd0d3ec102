"""The choice of instruction set, and the number of threads to start with."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sparsetrain as st
from sparsetrain import nn
from sparsetrain._kernels import core, threads

BEST_FIRST = ["avx512", "avx2", "base"]
PACKAGE = Path(st.__file__).parent
OBJECTS = sorted(Path(__file__).parents[2].glob("build/temp.*/*/sparsetrain/_kernels/*.o"))


def python(code, folder, **environment):
    """Run code in a new process that imports this package; None removes a variable."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(PACKAGE.parent),
        "SPARSETRAIN_ISA": None,
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", f"import sparsetrain as st; {code}"],
        env={k: v for k, v in variables.items() if v is not None},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_available_best_first():
    names = st.available_isas()
    assert names == [name for name in BEST_FIRST if name in names] and names[-1] == "base"


def test_set_isa(isa):
    assert st.get_isa() == isa
    spmm, sddmm, dense = core.tile_limits()
    assert 1 <= dense <= sddmm <= spmm <= 28


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", None])
def test_an_unknown_name_lists_those_that_run(name):
    before = st.get_isa()
    with pytest.raises(ValueError) as error:
        st.set_isa(name)
    assert all(text in str(error.value) for text in [repr(name), *st.available_isas()])
    assert st.get_isa() == before


def test_builds_agree_within_rounding():
    """And are not one and the same: the sums have another order."""
    st.manual_seed(0)
    layer = nn.Linear(1000, 40)
    x = np.random.default_rng(0).standard_normal((16, 1000)).astype(np.float32)
    results = []
    for name in st.available_isas():
        st.set_isa(name)
        y = layer(x)
        layer.zero_grad()
        layer.backward(y)
        results.append((y, layer.weight.grad.copy()))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_best_is_the_default(tmp_path):
    assert python("print(st.get_isa())", tmp_path).stdout.split() == st.available_isas()[:1]


@pytest.mark.parametrize("name", st.available_isas())
def test_the_environment_chooses(name, tmp_path):
    done = python("print(st.get_isa())", tmp_path, SPARSETRAIN_ISA=name)
    assert done.stdout.split() == [name]


def test_a_wrong_name_in_the_environment(tmp_path):
    done = python("print(st.get_isa())", tmp_path, SPARSETRAIN_ISA="sse9")
    assert done.returncode != 0 and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert all(text in last for text in ["sse9", *st.available_isas()]), last


@pytest.mark.parametrize("n", [1, 2, 7, np.int64(3)])
def test_set_num_threads(n):
    st.set_num_threads(n)
    assert st.get_num_threads() == n


@pytest.mark.parametrize(
    ("n", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (1025, ValueError),
        (10**12, ValueError),
        (True, TypeError),
        (1.5, TypeError),
        ("2", TypeError),
        (None, TypeError),
    ],
)
def test_a_wrong_number_of_threads(n, error):
    before = st.get_num_threads()
    with pytest.raises(error, match=re.escape(f"{n!r}") + r".*int in \[1, 1024\]"):
        st.set_num_threads(n)
    assert st.get_num_threads() == before


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("2,4", 2), (" 5 ", 5)])
def test_omp_num_threads(value, expected, tmp_path):
    done = python("print(st.get_num_threads())", tmp_path, OMP_NUM_THREADS=value)
    assert done.stdout.split() == [str(expected)]


@pytest.mark.parametrize("value", ["", "0", "many", None])
def test_omp_num_threads_that_says_nothing(value, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    monkeypatch.setattr(threads, "container_limit", lambda: 2.5)
    if value is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert threads.default() == 3


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, None),
        ({}, None),
    ],
)
def test_container_limit(files, limit, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.container_limit(tmp_path) == limit


@pytest.mark.skipif(not OBJECTS, reason="no object files: the kernels were not built here")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.parametrize("file", OBJECTS, ids=lambda file: f"{file.parts[-4]} {file.name}")
def test_no_weak_symbols(file):
    """Of a symbol that is weak in several builds the linker keeps one, perhaps for an instruction
    set that this machine lacks. The pointer to C++'s exception routine is the same in all."""
    symbols = subprocess.run(["nm", "-C", file], capture_output=True, text=True, check=True).stdout
    weak = re.findall(r" [WwVvu] (.*)", symbols)
    assert [name for name in weak if name != "DW.ref.__gxx_personality_v0"] == []
