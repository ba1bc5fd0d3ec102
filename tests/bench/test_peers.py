"""The comparison with peers in the folder bench/ shares parts of the package, but not with its peers' processes."""

import os
import subprocess
import sys
from pathlib import Path

import sparsetrain

SCRIPTS = Path(__file__).parents[2] / "bench"


def python(code):
    """What it prints, run in the scripts' folder: in the checkout's, its package would shadow the installed one."""
    variables = {**os.environ, "PYTHONPATH": str(Path(sparsetrain.__file__).parents[1])}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        variables.pop(name, None)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=SCRIPTS, env=variables, capture_output=True, text=True, check=True).stdout


def test_peers_do_not_inherit_how_our_threads_wait():
    ask = "common.worker_environment(types.SimpleNamespace(threads=2, isa=None))"
    code = f"import common, os, types; print('GOMP_SPINCOUNT' in os.environ, 'GOMP_SPINCOUNT' in {ask})"
    assert python(code) == "True False\n"


def test_workers_import_nothing_of_ours():
    assert python("import cases, peers, sys; print('sparsetrain' in sys.modules)") == "False\n"
