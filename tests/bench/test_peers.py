"""The comparison with peers in the folder bench/ shares parts of the package, but not with its peers' processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsetrain
from sparsetrain import interchange, nn

SCRIPTS = Path(__file__).parents[2] / "bench"


def python(code):
    """What it prints, run in the scripts' folder: in the checkout's, its package would shadow the installed one."""
    variables = {**os.environ, "PYTHONPATH": str(Path(sparsetrain.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
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


def test_a_trained_net_is_the_same_for_all(tmp_path):
    """Its zeros are the removed weights, and layers without zeros stay dense."""
    path, model = tmp_path / "pruned.safetensors", nn.models.resnet20_a()
    sparsetrain.sparsify(model, 0.9, exclude=["0", "23"])
    interchange.write_state(path, model)
    case = f"import cases, pathlib; case = cases.trained_case(pathlib.Path({str(path)!r}))"
    assert float(python(f"{case}; print(case['sparsity'])")) == pytest.approx(0.895, abs=0.005)
    step = "subject = {}.net({!r}, case); print(*subject.about['dense_layers'], subject.sample()['loss'][0])"
    ours = python(f"{case}; import sparsetrain_peer; " + step.format("sparsetrain_peer", "sparsetrain")).split()
    assert ours[:-1] == ["0", "23"]
    pytest.importorskip("torch")
    theirs = python(f"{case}; import torch_peers; " + step.format("torch_peers", "torch")).split()
    assert theirs[:-1] == ours[:-1] and float(theirs[-1]) == pytest.approx(float(ours[-1]), rel=1e-4)
