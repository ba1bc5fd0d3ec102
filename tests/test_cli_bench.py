"""`sparsetrain bench` from the command line."""

import json
import sys

import pytest

import bench_runs
import sparsetrain as st
from sparsetrain import cli
from sparsetrain.bench import load, machine, results
from sparsetrain.commands import bench as command

PNG = b"\x89PNG"
FIGURES = {"roofline.png", "sparsity.png", "weights.png", "scaling.png"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with a file of small layers; the machine is not measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "limits", lambda threads: {**bench_runs.LIMITS, "threads": threads})
    monkeypatch.setattr(machine, "settle", lambda limits: True)
    monkeypatch.setattr(load, "idle", lambda seconds: None)
    (tmp_path / "small.txt").write_text("conv 4 4 3 1 1 6 16\nlinear 32 32 16\n")
    return tmp_path


SMALL = ["bench", "--shapes", "small.txt", "--budget", "0.01", "--repeats", "2", "--out", "out"]


def test_tables_json_and_figures(folder, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--nets", "lenet5", "--sparsity", "0.9", "0", "0.5", "0.8", "--threads", "2", "--isa", "base"]
    assert cli.main([*SMALL, *arguments]) == 0
    out, err = capsys.readouterr()
    assert {path.name for path in (folder / "out").iterdir()} == {"bench.json", *FIGURES}
    assert all((folder / "out" / name).read_bytes().startswith(PNG) for name in FIGURES)
    found = results.read(folder / "out/bench.json")
    assert found["schema"] == 1 and found["sparsetrain"] == st.__version__
    assert found["ran_with"] == {"threads": 2, "isa": "base", "repeats": 2, "budget": 0.01}
    assert [at["threads"] for at in found["limits"]] == [1, 2]
    kinds = [case["what"] for case in found["cases"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"layer": 8, "net": 4, "threads": 4, "batch": 5}
    assert found["repetitions"] == {"least": 1, "most": 1, "restless": 0}
    assert all(len(times) == 1 for case in found["cases"] for times in case["seconds"].values())
    at = [case["sparsity"] for case in found["cases"] if case["what"] == "net"]
    assert at == [0, 0.5, 0.8, 0.9]
    for words in (
        "The machine at its best",
        "conv3x3-4-4-6-b16",
        "linear-32-32-b16",
        "lenet5",
        "break-even sparsity",
        "times one thread",
        "repetitions: 1 of 2, as the budget of 0.01 s was used up",
        "load of the machine: unknown",
        "wrote out/scaling.png",
    ):
        assert words in out
    assert st.get_num_threads() == 2
    assert cli.main(["bench", "--compare", "out/bench.json", "out/bench.json"]) == 0
    assert "geometric mean of B / A: 1.000" in capsys.readouterr().out


def test_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main([*SMALL, "--nets", "none", "--sparsity", "0.9"]) == 0
    assert "pip install 'sparsetrain[plot]'" in capsys.readouterr().out
    assert [path.name for path in (folder / "out").iterdir()] == ["bench.json"]


def test_all_repetitions_within_the_budget(folder, capsys):
    assert cli.main([*SMALL, "--budget", "60", "--nets", "none", "--sparsity", "0.9", "--layers", "lin*"]) == 0
    assert "repetitions: 2 of 2; medians" in capsys.readouterr().out
    found = json.loads((folder / "out/bench.json").read_text())
    assert {case["name"] for case in found["cases"] if case["what"] == "layer"} == {"linear-32-32-b16"}
    assert found["break_even"] == [
        {"name": "linear-32-32-b16", "part": part, "sparsity": None} for part in ("forward", "both", "backward")
    ]


def test_the_machine_alone(folder, capsys):
    assert cli.main(["bench", "--layers", "none", "--nets", "none", "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "FMA GFLOP/s" in out and "Layers" not in out and "Nets" not in out
    assert [path.name for path in (folder / "out").iterdir()] == ["bench.json"]


def test_quick_measures_less(folder):
    (folder / "small.txt").write_text("".join(f"linear {n} 8 16\n" for n in range(8, 16)))
    assert cli.main(["bench", "--quick", "--shapes", "small.txt", "--out", "out", "--repeats", "1"]) == 0
    found = results.read(folder / "out/bench.json")
    names = {case["name"] for case in found["cases"] if case["what"] in ("layer", "net")}
    assert names == {"linear-10-8-b16", "linear-15-8-b16", "lenet5"}
    assert found["ran_with"]["repeats"] == 1
    assert sorted({case["sparsity"] for case in found["cases"]}) == list(command.NET_SPARSITIES)


def test_a_busy_machine_is_said(folder, capsys, monkeypatch):
    taken = {"others": 0.5, "stolen": 0.0, "seconds": 1.0, "load_average": 2.0}
    monkeypatch.setattr(load, "idle", lambda seconds: taken)
    assert cli.main(["bench", "--layers", "none", "--nets", "none", "--out", "out"]) == 0
    assert "WARNING, not to be trusted: before the run others took 50% of a core" in capsys.readouterr().out
    assert results.read(folder / "out/bench.json")["load"]["before"] == taken


def test_threads_that_do_not_settle_are_said(folder, capsys, monkeypatch):
    monkeypatch.setattr(machine, "settle", lambda limits: False)
    assert cli.main([*SMALL, "--nets", "none", "--sparsity", "0.9", "--layers", "lin*", "--threads", "1"]) == 0
    assert "6 repetitions began while the threads did not reach their speed together" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--layers", "conv9*"], "--layers: 'conv9*' matches none of the layers conv3x3-64"),
        (["--layers", "none", "--shapes", "small.txt"], "--shapes cannot be given with --layers none"),
        (["--shapes", "absent.txt"], "absent.txt"),
        (["--shapes", "bad.txt"], "bad.txt, line 1"),
        (["--nets", "lenet"], "--nets is 'lenet'"),
        (["--nets", "lenet5", "none"], "--nets none cannot be given with other nets"),
        (["--sparsity", "1"], "--sparsity is 1, must be in [0, 1)"),
        (["--sparsity", "0.5", "nan"], "--sparsity is nan"),
        (["--sparsity", "half"], "--sparsity"),
        (["--budget", "0"], "--budget is 0, must be more than 0"),
        (["--budget", "inf"], "--budget is inf"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--isa", "avx3"], "--isa is 'avx3'"),
        (["--out", "."], "--out is ., which is there already"),
        (["--compare", "absent.json", "absent.json"], "absent.json"),
        (["--compare", "bad.txt", "bad.txt"], "bad.txt is not whole JSON"),
        (["--compare", "one.json"], "--compare"),
        (["--compare", "a.json", "b.json", "--repeats", "3"], "--repeats cannot be given with --compare"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_line_and_write_nothing(folder, capsys, arguments, wanted):
    (folder / "bad.txt").write_text("layer\n")
    before = st.get_num_threads(), st.get_isa()
    assert cli.main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("sparsetrain: error: ") and err.count("\n") == 1, err
    assert wanted in err and out == ""
    assert (st.get_num_threads(), st.get_isa()) == before
    assert {path.name for path in folder.iterdir()} == {"small.txt", "bad.txt"}


def test_help_explains_every_option(capsys):
    assert cli.main(["bench", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name}" in text for name in command.OPTIONS)
    assert text.count("(default: ") == len(command.OPTIONS)


def test_ctrl_c_puts_the_threads_back(folder, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        st.set_num_threads(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(command.measure, "run", interrupted)
    assert cli.main([*SMALL, "--threads", "2"]) == 130
    assert st.get_num_threads() == 2
    assert not (folder / "out").exists()
