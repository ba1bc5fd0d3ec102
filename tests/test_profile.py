"""st.profile and `sparsetrain profile`: what is in the rows, and that nothing of the model is changed."""

import json
import math

import numpy as np
import pytest

import bench_runs
import sparsetrain as st
from nets import images, small_net
from sparsetrain import backprop, cli, nn, rng
from sparsetrain.bench import machine
from sparsetrain.nn.fusing import run_with
from sparsetrain.profile import PASSES, Profile, Row


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    monkeypatch.setattr(machine, "limits", lambda threads: {**bench_runs.LIMITS, "threads": threads})
    monkeypatch.setattr(machine, "settle", lambda limits: True)


def conv_net():
    """Three convolutions between batch norms that run by bands, a residual add, pooling, a linear layer."""
    st.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
    )
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Residual(body),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


X = np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32)
A = 20 * 4 * 64 * 4  # bytes of an activation of 4 channels
W = {"0": 4 * 3 * 9 * 4, "3": 4 * 4 * 9 * 4, "7": 5 * 4 * 4}  # and of weights


def by_pass(profile):
    return {(row.layer, row.part): row for row in profile.rows}


def test_rows_of_a_fused_net():
    rows = by_pass(st.profile(conv_net(), X, repeats=2))
    assert list(rows) == [
        *[(name, part) for name in ("0", "1") for part in ("forward", "backward")],
        *[(f"3.body.{i}", part) for i in (0, 1, 3, 4) for part in ("forward", "backward")],
        *[(name, part) for name in ("5", "6") for part in ("forward", "backward")],
        *[("7", part) for part in ("forward", "weight gradient", "input gradient")],
    ]
    operations = {key: row.operations for key, row in rows.items() if row.operations}
    first, second, last = (2 * 20 * n for n in (4 * 3 * 9 * 64, 4 * 4 * 9 * 64, 5 * 4))
    assert operations == {
        ("0", "forward"): first,
        ("0", "backward"): first,  # of the weights alone: nobody wants the gradient of the images
        ("3.body.0", "forward"): second,
        ("3.body.0", "backward"): 2 * second,
        ("3.body.3", "forward"): second,
        ("3.body.3", "backward"): 2 * second,
        ("7", "forward"): last,
        ("7", "weight gradient"): last,
        ("7", "input gradient"): last,
    }
    sizes = {key: row.bytes for key, row in rows.items()}
    pooled = 20 * 4 * 4
    assert sizes == {
        ("0", "forward"): X.nbytes + A + W["0"],
        ("0", "backward"): X.nbytes + 2 * A + W["0"],  # x, y and the gradient of its norm; writes dW
        ("1", "forward"): 0,
        ("1", "backward"): 0,
        # Forms x from the first convolution's output, and writes y.
        ("3.body.0", "forward"): 2 * A + W["3"],
        # Forms x again, reads y, the gradient of its norm, and the one that came around, to which it adds.
        ("3.body.0", "backward"): 5 * A + 2 * W["3"],
        ("3.body.1", "forward"): 0,
        ("3.body.1", "backward"): 0,
        # Reads the first one's output, which it forms x of both times, y and the gradient of its norm.
        ("3.body.3", "forward"): 2 * A + W["3"],
        ("3.body.3", "backward"): 4 * A + 2 * W["3"],
        # Reads y and what the sum's other term is formed of, and writes what the pooling reads.
        ("3.body.4", "forward"): 3 * A,
        ("3.body.4", "backward"): 4 * A,  # reads y, what was written and the gradient, which it changes
        ("5", "forward"): A + pooled,
        ("5", "backward"): A + pooled,
        ("6", "forward"): 0,
        ("6", "backward"): 0,
        ("7", "forward"): pooled + 20 * 5 * 4 + W["7"],
        ("7", "weight gradient"): pooled + 20 * 5 * 4 + W["7"],
        ("7", "input gradient"): pooled + 20 * 5 * 4 + W["7"],
    }
    assert {key: row.fused for key, row in rows.items() if row.fused} == {
        ("0", "forward"): "sums for 1",
        ("0", "backward"): "gradient of 1",
        ("1", "forward"): "2; runs in the layers around it",
        ("1", "backward"): "2; runs in the layers around it",
        ("3.body.0", "forward"): "forms 1 + 2; sums for 3.body.1",
        ("3.body.0", "backward"): "gradient of 3.body.1; forms 1 + 2; sums for 1",
        ("3.body.1", "forward"): "3.body.2; runs in the layers around it",
        ("3.body.1", "backward"): "3.body.2; runs in the layers around it",
        ("3.body.3", "forward"): "forms 3.body.1 + 3.body.2; sums for 3.body.4",
        ("3.body.3", "backward"): "gradient of 3.body.4; forms 3.body.1 + 3.body.2; sums for 3.body.1",
        ("3.body.4", "forward"): "add of 3; 4",
        ("3.body.4", "backward"): "add of 3; 4",
    }
    banded = rows["3.body.0", "backward"]
    assert banded.kernel.startswith("bands dense") and banded.bands.keys() == {"run", "rows", "tasks"}
    assert [plan["product"] for plan in banded.plans] == ["weight gradient", "input gradient"]
    assert rows["7", "weight gradient"].kernel == "dense, features at once"
    assert rows["7", "forward"].kernel.startswith("dense, ") and rows["7", "forward"].bands is None


def test_blocks_in_a_row():
    """Their inputs are formed where they are read of up to three arrays; then one is written."""

    def conv_norm(channels):
        return nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    blocks = [layer for _ in range(3) for layer in (nn.Residual(nn.Sequential(*conv_norm(4))), nn.ReLU())]
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    rows = by_pass(st.profile(nn.Sequential(*conv_norm(3), nn.ReLU(), *blocks, *end), X, repeats=1))
    about = [(rows[f"{i}.body.0", "forward"].fused, rows[f"{i}.body.0", "forward"].bytes) for i in (3, 5, 7)]
    assert about == [
        ("forms 1 + 2; sums for 3.body.1", 2 * A + W["3"]),
        ("forms 3.body.1 + add of 3 + 4; sums for 5.body.1", 3 * A + W["3"]),
        ("forms and keeps 5.body.1 + add of 5 + 6; sums for 7.body.1", 5 * A + W["3"]),
    ]


def test_a_max_pool_forms_the_norm_that_it_reads():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(392, 4)
    )
    x = np.random.default_rng(0).standard_normal((20, 3, 16, 16)).astype(np.float32)
    rows = by_pass(st.profile(model, x, repeats=1))
    size, pooled = 4 * 20 * 8 * 14 * 14, 4 * 20 * 8 * 7 * 7
    forward, backward = rows["3", "forward"], rows["3", "backward"]
    assert (forward.bytes, forward.fused) == (size + pooled, "forms 1 + 2")
    assert (backward.bytes, backward.fused) == (2 * size + 2 * pooled, "forms 1 + 2; sums for 1")
    assert rows["1", "forward"].bytes == rows["1", "backward"].bytes == 0


def test_winograd_needs_fewer_operations():
    st.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(32, 64, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, 32, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    x = np.random.default_rng(0).standard_normal((16, 32, 16, 16)).astype(np.float32)
    profile = st.profile(model, x, repeats=1)
    rows = by_pass(profile)
    peak = 1e9 * bench_runs.LIMITS["fma_gflops"]
    for layer, part in (("0", "forward"), *(("2", part) for part in ("forward", "weight gradient", "input gradient"))):
        row = rows[layer, part]
        assert row.kernel.endswith("Winograd")
        assert row.least_seconds == pytest.approx(row.operations / 2.25 / peak)
    assert "8 of 2x2 64c" in str(profile)


def test_rows_of_the_same_net_unfused():
    profile = st.profile(conv_net(), X, repeats=1, unfused=True)
    rows = by_pass(profile)
    assert {layer for layer, _ in rows} == {*"0124567", *(f"3.body.{i}" for i in range(5))}
    assert ("0", "input gradient") not in rows
    assert not any(row.fused or row.bands for row in rows.values())
    sizes = {key: row.bytes / A for key, row in rows.items() if key[0] in "124"}
    assert sizes == {(layer, part): 2 if part == "forward" else 3 for layer in "124" for part in PASSES[:2]}
    assert rows["3.body.0", "input gradient"].bytes == 2 * A + W["3"]
    assert rows["3.body.0", "weight gradient"].operations == 2 * 20 * 4 * 4 * 9 * 64
    assert "layers one by one" in str(profile)


def test_sparse_weights_count_as_they_are_stored():
    net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    st.sparsify(net, 0.75, "random", exclude=["2"])
    x = np.zeros((8, 32), np.float32)
    rows = by_pass(st.profile(net, x, np.zeros(8, np.int64), repeats=1))
    first, gradient, last = rows["0", "forward"], rows["0", "weight gradient"], rows["2", "input gradient"]
    assert (first.kernel, first.operations, first.bytes) == ("sparse", 2 * 8 * 128, 4 * (8 * 48 + 2 * 128))
    assert (last.kernel[:5], last.operations, last.bytes) == ("dense", 2 * 8 * 48, 4 * (8 * 19 + 48))
    relu = 3 * 4 * 8 * 16  # its gradient is formed where the layer's backward begins
    assert (gradient.operations, gradient.bytes) == (2 * 8 * 128, 4 * (8 * 48 + 2 * 128) + relu)
    assert (first.fused, gradient.fused, last.fused) == ("1", "1", "")
    (plan,) = first.plans
    assert plan["rows_at_once"] == 1 and sorted(plan["order"]) == [0, 1, 2] and 1 <= plan["group"] <= 32
    assert plan["tasks"] >= plan["chunks"] >= 1


def test_the_roofline():
    """On a machine of 100 GFLOP/s and 500 GB/s in its first cache."""
    net = nn.Sequential(nn.Linear(16, 8, bias=False))
    profile = st.profile(net, np.zeros((16, 16), np.float32), repeats=1)
    row = by_pass(profile)["0", "forward"]
    size, operations = 4 * (16 * 16 + 16 * 8 + 16 * 8), 2 * 16 * 16 * 8
    assert (row.bytes, row.operations, row.level) == (size, operations, "L1d")
    assert row.least_seconds == pytest.approx(max(operations / 100e9, size / 500e9))
    assert row.share == row.least_seconds / row.seconds and row.gflops == operations / row.seconds / 1e9
    assert st.profile(net.to(np.float64), np.zeros((16, 16)), repeats=1).rows[0].least_seconds == pytest.approx(
        operations / 50e9
    )


def test_every_layer_comes_and_times_add_up():
    net = small_net()
    x, labels = images(20)
    profile = st.profile(net, x, labels, repeats=3)
    also, _ = run_with(net)
    inside = {name for names in also.values() for name in names}
    seen = {row.layer for row in profile.rows}
    leaves = {name for name, module in net.named_modules() if not module.children()}
    assert seen | inside >= leaves and not seen & inside
    assert all(row.seconds > 0 and math.isfinite(row.seconds) for row in profile.rows)
    assert profile.seconds > 0
    lines = profile.table().splitlines()
    assert lines[-3].startswith("outside layers") and lines[-1].startswith("sum")
    assert len(lines) == len(profile.rows) + 5


@pytest.mark.parametrize("unfused", [False, True])
def test_the_model_is_as_it_was(unfused):
    net = nn.Sequential(small_net(), nn.Dropout(0.5))
    net[0][1].eval()
    x, labels = images(20)
    y = net(x)
    _, dy = nn.cross_entropy(y, labels)
    net.backward(dy)
    expected = net(x)  # its backward is still to come
    state, gradients = net.state_dict(), [p.grad.copy() for p in net.parameters()]
    held = [p.grad for p in net.parameters()]
    random = rng.generator().bit_generator.state
    st.profile(net, x, labels, repeats=2, unfused=unfused)
    assert rng.generator().bit_generator.state == random
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    for parameter, gradient, same in zip(net.parameters(), gradients, held, strict=True):
        assert parameter.grad is same
        np.testing.assert_array_equal(parameter.grad, gradient)
    assert [m.training for _, m in net.named_modules()].count(False) == 1
    net.backward(np.zeros_like(expected))


def test_methods_of_backprop_are_as_they_were():
    net = small_net()
    x, labels = images(20)
    method = backprop.MemAOP(0.2, exclude=("4.body.3",)).attach(net)

    net.backward(nn.cross_entropy(net(x), labels)[1])
    state = method.state_dict()
    st.profile(net, x, labels, repeats=2)
    for name, value in method.state_dict().items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


def test_the_model_is_as_it_was_after_an_error():
    net = small_net()
    net.eval()
    with pytest.raises(ValueError, match=r"layer '0' \(Conv2d\): x has shape \(2, 4, 8, 8\)"):
        st.profile(net, np.zeros((2, 4, 8, 8), np.float32))
    assert not any(module.training for _, module in net.named_modules())
    assert all(p.grad is None for p in net.parameters())


def test_a_layer_of_ones_own_has_no_bytes():
    class Twice(nn.Module):
        def forward(self, x, halo):
            y = x.like(halo)
            y.array[...] = 2 * x.array
            return y, lambda dy, halo: dy.with_halo(halo or (0, 0))

    profile = st.profile(nn.Sequential(Twice(), nn.Linear(6, 3)), np.zeros((4, 6), np.float32), repeats=1)
    row = profile.rows[0]
    assert (row.type, row.bytes, row.least_seconds, row.share) == ("Twice", None, None, None)


def test_a_layer_used_twice_has_its_rows_once():
    layer = nn.Linear(6, 6)
    profile = st.profile(nn.Sequential(layer, nn.ReLU(), layer), np.zeros((4, 6), np.float32), repeats=1)
    assert by_pass(profile)["0", "forward"].operations == 2 * 2 * 4 * 36


def test_bad_arguments():
    net, x = nn.Sequential(nn.Linear(6, 3)), np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match="repeats is 0"):
        st.profile(net, x, repeats=0)
    with pytest.raises(ValueError, match=r"labels have shape \(3,\), must be \(4,\)"):
        st.profile(net, x, np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"the model gives shape \(2, 3, 4, 4\), must be \(N, classes\)"):
        st.profile(nn.Sequential(nn.ReLU()), np.zeros((2, 3, 4, 4), np.float32))


def test_a_saved_profile_comes_back(tmp_path):
    profile = st.profile(conv_net(), X, repeats=1)
    path = tmp_path / "profile.json"
    profile.save(path)
    again = Profile.load(path)
    assert again == profile and str(again) == str(profile)
    assert isinstance(again.rows[0], Row)
    for change, words in (
        ({"format": "x"}, "has no sparsetrain profile"),
        ({"schema": 2}, "schema 2 of sparsetrain profile, this version reads 1"),
        ({"rows": [{"layer": "0"}]}, "no whole profile"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=words):
            Profile.load(path)
        profile.save(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not whole JSON"):
        Profile.load(path)


# ---- the command


SMALL = ["profile", "--model", "lenet300", "--image", "1,8,8", "--batch-size", "16", "--repeats", "2"]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = [
        "--sparsity",
        "0.8",
        "--distribution",
        "erk",
        "--exclude",
        "5",
        "--threads",
        "1",
        "--isa",
        "base",
        "--unfused",
    ]
    assert cli.main([*SMALL, *more, "--json", "p.json", "--save-plans", "plans.json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in (
        "lenet300, sparsity 0.8 (erk)",
        "1 thread, base",
        "layers one by one",
        "wrote p.json",
        "outside layers",
    ):
        assert words in out
    profile = Profile.load("p.json")
    assert str(profile) in out
    ran = profile.about["ran_with"]
    assert (ran["x"], ran["repeats"], ran["unfused"]) == ([16, 1, 8, 8], 2, True)
    kernels = {row.layer: row.kernel for row in profile.rows if row.part == "forward"}
    assert kernels["1"] == kernels["3"] == "sparse" and kernels["5"].startswith("dense")
    assert cli.main([*SMALL, "--plans", "plans.json", "--isa", "base"]) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "resnet"], "--model is 'resnet', must be one of"),
        (["--sparsity", "1"], "--sparsity is 1.0, must be in [0, 1)"),
        (["--distribution", "even"], "--distribution is 'even'"),
        (["--image", "3,32"], "--image is '3,32', must be channels, height and width"),
        (["--image", "1,8,0"], "--image is '1,8,0'"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--isa", "sse9"], "--isa is 'sse9'"),
        (["--exclude", "nothing"], "nothing"),
        (["--sparsity", "0", "--exclude", "nothing"], "nothing"),
        (["--plans", "none.json"], "none.json"),
        (["--json", "no/p.json"], "--json is no/p.json, whose folder is not there"),
        (["--save-plans", "no/p.json"], "--save-plans is no/p.json, whose folder is not there"),
        (["--model", "lenet5", "--image", "1,8,8"], "image_size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_refuses(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" or "--exclude" in arguments
    assert words in err and err.startswith("sparsetrain: error: ") and len(err.splitlines()) == 1


def test_help_explains_every_option(capsys):
    from sparsetrain.commands import profile

    assert cli.main(["profile", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name}" in text for name in profile.OPTIONS)
    assert text.count("(default: ") == len(profile.OPTIONS)
