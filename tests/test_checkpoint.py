"""Checkpoints: runs that are killed anywhere go on with the same bits, and files that are damaged or forged."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as hs

import sparsetrain as st
from sparsetrain import Trainer, backprop, data, nn, optim, rng, sparsity
from sparsetrain.files import replacing
from sparsetrain.train import Callback, Checkpoint, checkpoint
from strategies import quick

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(st.__file__).parents[1])}
STEPS = 4  # an epoch
SCHEDULE = {"start": 1, "stop": 9, "every": 2}
SPARSITY = {
    "none": lambda: None,
    "static": lambda: sparsity.Static(0.8),
    "magnitude": lambda: sparsity.Magnitude(0.8, 3, start=1, every=3),
    "gmp": lambda: sparsity.GMP(0.8, **SCHEDULE),
    "set": lambda: sparsity.SET(0.8, **SCHEDULE),
    "rigl": lambda: sparsity.RigL(0.8, **SCHEDULE),
    "rigl by epochs": lambda: sparsity.RigL(0.8, start=0, stop=2, every=1, unit="epochs"),
    "granet": lambda: sparsity.GraNet(0.8, **SCHEDULE),
    "ac/dc": lambda: sparsity.ACDC(0.8, **SCHEDULE),
    "n:m": lambda: sparsity.NM(2, 4, stop=7),
}
BACKPROP = {
    "exact": lambda: None,
    "dithered": lambda: backprop.Dithered(sparsity=0.8),
    "8 bits": lambda: backprop.Dithered(s=2.0, precision=8),
    "resprop": lambda: backprop.ReSprop(0.5),
    "mem-aop": lambda: backprop.MemAOP(0.5),
    "top-k": lambda: backprop.TopK(0.5),
}


def images():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((16 * STEPS, 4, 6, 6)).astype(np.float32), rng.integers(0, 4, 16 * STEPS)
    return data.Batches(x, y, 16, shuffle=True, crop=1, seed=5)


def network():
    layers = [nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(72, 4))


def trainer(weights="none", gradients="exact", callbacks=()):
    st.manual_seed(1)
    model = network()
    optimizer = optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9)
    methods = {"sparsity": SPARSITY[weights](), "backprop": BACKPROP[gradients]()}
    return Trainer(model, optimizer, callbacks=callbacks, **methods)


class Killed(Exception):
    """What a process does not survive."""


class KillAfter(Callback):
    """Saves after a step, then ends the run without any more ado."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_batch_end(self, trainer, mean):
        if trainer.step == self.step:
            trainer.save(self.path)
            raise Killed


def assert_same(one, other):
    left, right = one.model.state_dict(), other.model.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])
    slots = [t.optimizer.state_dict()["slots"] for t in (one, other)]
    for name, found in slots[0].items():
        assert found.keys() == slots[1][name].keys()
        for slot in found:
            np.testing.assert_array_equal(found[slot], slots[1][name][slot])
    timed = {"images_per_s", "time_s"}
    rows = [
        [
            {k: v for k, v in row.items() if k not in timed and k != "layers"}
            | {layer: {k: v for k, v in report.items() if k != "ms"} for layer, report in row["layers"].items()}
            for row in t.history
        ]
        for t in (one, other)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("weights, gradients", [(w, "exact") for w in SPARSITY] + [("rigl", g) for g in BACKPROP])
def test_a_run_that_stops_after_any_step_goes_on_with_the_same_bits(tmp_path, weights, gradients):
    whole = trainer(weights, gradients)
    whole.fit(images(), 3)
    for step in range(1, 3 * STEPS + 1):
        path = tmp_path / f"{step}.safetensors"
        with pytest.raises(Killed):
            trainer(weights, gradients, [KillAfter(path, step)]).fit(images(), 3)
        st.manual_seed(77)
        st.set_num_threads(1 + step % 3)
        half = Trainer.resume(path)
        assert (half.step, half.batch) == (step, (step - 1) % STEPS + 1)
        half.fit(images(), 3 - half.epoch)
        assert_same(half, whole)


class Interrupted:
    """Batches to validate with, in which a pass of this number is interrupted."""

    def __init__(self, number):
        self.passes, self.number = 0, number

    def __iter__(self):
        self.passes += 1
        for batch in images():
            if self.passes == self.number:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("weights, gradients", [("rigl", "dithered"), ("n:m", "mem-aop")])
def test_an_interrupted_validation_keeps_what_the_epoch_reports(tmp_path, weights, gradients):
    whole = trainer(weights, gradients)
    whole.fit(images(), 3, Interrupted(4))
    half = trainer(weights, gradients)
    assert half.fit(images(), 3, Interrupted(2)).interrupted and half.epoch == 1
    half.save(tmp_path / "run.safetensors")
    half.fit(images(), 2, Interrupted(3))
    assert_same(half, whole)
    half = Trainer.resume(tmp_path / "run.safetensors")
    half.fit(images(), 2, Interrupted(3))
    assert_same(half, whole)


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
@pytest.mark.parametrize("weights, gradients", [("none", "exact"), ("rigl", "dithered"), ("n:m", "exact")])
def test_a_float64_run_goes_on_with_the_same_bits(tmp_path, kind, weights, gradients):
    def double():
        st.manual_seed(1)
        model = network().to(np.float64)
        methods = {"sparsity": SPARSITY[weights](), "backprop": BACKPROP[gradients]()}
        return Trainer(model, kind(model.named_parameters(), lr=0.01), **methods)

    batches = [(x.astype(np.float64), y) for x, y in images()]
    whole = double()
    whole.fit(batches, 3)
    half = double()
    half.fit(batches, 1)
    half.save(tmp_path / "run.safetensors")
    st.manual_seed(77)
    half = Trainer.resume(tmp_path / "run.safetensors")
    half.fit(batches, 2)
    assert {array.dtype.name for array in half.model.state_dict().values()} == {"float64", "int64"}
    assert_same(half, whole)


SCRIPT = """
    import sys
    import numpy as np
    import sparsetrain as st
    sys.path.insert(0, {tests!r})
    import test_checkpoint as t
    from sparsetrain.train import Checkpoint
    run = t.trainer("rigl", "dithered", [Checkpoint({path!r}, steps=1, keep=2)])
    print("ready", flush=True)
    run.fit(t.images(), 200)
"""


def test_a_process_that_is_killed_anywhere_leaves_a_whole_file(tmp_path):
    """SIGKILL at random moments, most of them while a file is written, as one is after every step."""
    path, rng = tmp_path / "run.safetensors", np.random.default_rng(0)
    script = textwrap.dedent(SCRIPT).format(tests=os.path.dirname(__file__), path=str(path))
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], **options)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.02, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if not path.exists():
            continue
        half = Trainer.resume(path)
        half.fit(images(), 1)
        whole = trainer("rigl", "dithered")
        whole.fit(images(), half.epoch)
        assert_same(half, whole)
    for kept in (path, tmp_path / "run-1.safetensors"):
        whole.save(kept)  # it removes what the killed left
    assert {p.name for p in tmp_path.iterdir()} == {"run.safetensors", "run-1.safetensors"}


def test_what_killed_processes_left_is_removed(tmp_path):
    """Of the same target, and of processes that are gone, only."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    others = [".run.csv.1", f".other.csv.{gone.pid}", f".run.csv.more.{gone.pid}", ".run.csv.bak", "run.csv"]
    for name in (f".run.csv.{gone.pid}", *others):
        (tmp_path / name).write_text("some")
    with replacing(tmp_path / "run.csv") as file:
        file.write("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)


def test_the_last_k_are_kept(tmp_path):
    path = tmp_path / "run.safetensors"
    run = trainer(callbacks=[Checkpoint(path, keep=3)])
    run.fit(images(), 4)
    names = ["run.safetensors", "run-1.safetensors", "run-2.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert [checkpoint.read(tmp_path / name)[0]["epoch"] for name in names] == [4, 3, 2]


@pytest.mark.parametrize("weights, gradients", [("none", "exact"), ("rigl", "dithered"), ("n:m", "mem-aop")])
def test_the_last_k_are_of_different_states(tmp_path, weights, gradients):
    """A run that goes on, resumed or in another fit(), has its state in the file already."""
    path, older = tmp_path / "run.safetensors", tmp_path / "run-1.safetensors"

    def kept():
        return [checkpoint.read(p)[0]["step"] for p in (path, older)]

    run = trainer(weights, gradients, [Checkpoint(path, keep=2)])
    with pytest.raises(Killed):
        run.callbacks.append(KillAfter(tmp_path / "half.safetensors", STEPS + 2))
        run.fit(images(), 3)
    assert kept() == [STEPS, 0]
    for _ in range(2):
        st.manual_seed(77)
        run = Trainer.resume(path, callbacks=[Checkpoint(path, keep=2)])
        run._call("on_fit_begin", 1)
        assert kept() == [STEPS, 0]
    for epoch in (1, 2):
        run.fit(images(), 1)
        assert kept() == [(epoch + 1) * STEPS, epoch * STEPS]
    # One that was saved elsewhere has another state.
    Trainer.resume(tmp_path / "half.safetensors", callbacks=[Checkpoint(path, keep=2)])._call("on_fit_begin", 1)
    assert kept() == [STEPS + 2, 3 * STEPS]


def test_saves_that_fail_leave_the_last_k(tmp_path, monkeypatch):
    run = trainer(callbacks=[Checkpoint(tmp_path / "run.safetensors", keep=3)])
    run.fit(images(), 3)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                run.fit(images(), 1)
            assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    run.fit(images(), 1)
    steps = [checkpoint.read(tmp_path / name)[0]["step"] for name in sorted(before)]
    assert steps == [4 * STEPS, 3 * STEPS, 5 * STEPS]  # run-1, run-2, run


def test_checkpoints_are_kept_where_no_file_can_have_two_names(tmp_path, monkeypatch):
    def refused(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    trainer(callbacks=[Checkpoint(tmp_path / "run.safetensors", keep=2)]).fit(images(), 2)
    assert checkpoint.read(tmp_path / "run-1.safetensors")[0]["epoch"] == 1


def test_a_full_disk_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    run = trainer()
    run.save(path)
    before = path.read_bytes()
    run.fit(images(), 1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def size(path, share=0.0, method=None):
    """Of the file of a linear layer of 10^6 weights, after a step."""
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    if share:
        st.sparsify(model, share)
    run = Trainer(model, optim.SGD(model.named_parameters(), lr=0.1), sparsity=method)
    run.train_step(np.ones((1, 1000), np.float32), np.zeros(1, int))
    run.save(path)
    return path.stat().st_size


def test_size_is_in_proportion_to_the_stored_weights(tmp_path):
    sizes = [size(tmp_path / "run.safetensors", share) for share in (0.0, 0.9, 0.99)]
    assert sizes[0] > 4e6 and sizes[1] < 8.2 * 1e5 and sizes[2] < 8.9 * 1e4


@pytest.mark.parametrize("share", [0.9, 0.99, 0.995])
def test_what_a_method_has_explored_is_small(tmp_path, share):
    """Three bytes a weight that existed at some time, at most, and little where all did."""
    path = tmp_path / "run.safetensors"
    plain = size(path, share)
    for method in (sparsity.Static(share), sparsity.RigL(share, stop=9, every=3), sparsity.Magnitude(share)):
        assert size(path, method=method) < plain + 3e6 * (1 - share) + 2000


# Files that are damaged or forged


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Path and contents of a file, and what resume() gives of it."""
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    run = trainer("rigl", "dithered")
    run.fit(images(), 1)
    run.save(path)
    return path, path.read_bytes()


def packed(meta, arrays):
    """The contents of a file, with a list of tensors that agrees."""
    return safetensors.numpy.save(arrays, {"sparsetrain": json.dumps(meta | {"tensors": sorted(arrays)})})


def check(path, contents):
    """resume() either works or raises a ValueError."""
    path = path.with_name("changed.safetensors")
    path.write_bytes(contents)
    try:
        Trainer.resume(path)
    except ValueError as error:
        assert str(error)


@quick
@given(hs.data())
def test_changed_bytes(whole, draw):
    path, contents = whole
    changed = bytearray(contents)
    header = 8 + int.from_bytes(contents[:8], "little")
    for _ in range(draw.draw(hs.integers(1, 8))):
        changed[draw.draw(hs.integers(0, header))] = draw.draw(hs.integers(0, 255))
    check(path, bytes(changed[: draw.draw(hs.integers(0, len(changed)) | hs.just(len(changed)))]))


values = hs.recursive(
    hs.none() | hs.booleans() | hs.integers(-(2**70), 2**70) | hs.floats() | hs.text(max_size=4),
    lambda inner: hs.lists(inner, max_size=3) | hs.dictionaries(hs.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@quick
@given(hs.data())
def test_changed_metadata(whole, draw):
    """Anything at any place of the JSON."""
    path, _ = whole
    meta, arrays = checkpoint.read(path)
    inside, places = meta, []
    for _ in range(draw.draw(hs.integers(1, 5))):
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not keys:
            break
        key = draw.draw(hs.sampled_from(keys))
        places.append((inside, key))
        inside = inside[key]
        if not isinstance(inside, (dict, list)):
            break
    holder, key = places[-1]
    holder[key] = draw.draw(values)
    check(path, packed(meta, arrays))


@quick
@given(hs.data())
def test_changed_arrays(whole, draw):
    """Indices out of range or twice, other shapes and dtypes, arrays that lack."""
    path, _ = whole
    meta, arrays = checkpoint.read(path)
    name = draw.draw(hs.sampled_from(sorted(arrays)))
    array = arrays[name].copy()
    kind = draw.draw(hs.sampled_from(["lacks", "shorter", "dtype", "value", "shape"]))
    if kind == "lacks":
        del arrays[name]
    elif kind == "shorter" and array.ndim:
        arrays[name] = array[: len(array) // 2]
    elif kind == "dtype":
        arrays[name] = array.astype(draw.draw(hs.sampled_from([np.int64, np.float64, np.uint8, np.float16])))
    elif kind == "shape":
        arrays[name] = array.reshape(1, *array.shape)
    elif array.size:
        array.reshape(-1)[draw.draw(hs.integers(0, array.size - 1))] = draw.draw(hs.sampled_from([0, 1, 100]))
        arrays[name] = array
    check(path, packed(meta, arrays))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, a: m["model"].update({"class": "models"}), "names 'models'"),
        (lambda m, a: m["sparsity"].update({"class": "sparsify"}), "names 'sparsify'"),
        (lambda m, a: m["backprop"].update({"class": "__builtins__"}), "names '__builtins__'"),
        (lambda m, a: m["optimizer"].update({"class": "cosine"}), "names 'cosine'"),
        (lambda m, a: m.update({"loss": "Module.__init__"}), "names 'Module.__init__'"),
        (lambda m, a: m.update({"format": 99}), "format 99"),
        (lambda m, a: a["parameter/6.weight/indices"].__setitem__(0, 10**6), "parameter/6.weight: indices reach"),
        (lambda m, a: a["parameter/6.weight/indices"].__setitem__(1, a["parameter/6.weight/indices"][0]), "ascend"),
        (lambda m, a: a["parameter/6.weight/indptr"].__setitem__(1, 10**6), "6.weight: indptr"),
        (lambda m, a: m.update({"step": float("nan")}), "step is nan"),
        (lambda m, a: m.update({"epoch": 1.5}), "epoch is 1.5"),
        (lambda m, a: m.update({"batch": 10**30}), "batch is 1000"),
        (lambda m, a: m.update({"batch": 1, "paused": {"foo": 1}}), "paused is {'foo': 1}, must have images"),
        (lambda m, a: m.update({"batch": 1, "paused": None}), "paused is None"),
        (lambda m, a: m.update({"batch": 1}) or m["paused"].update({"images": "many"}), "paused images is 'many'"),
        (lambda m, a: m["history"].append({"epoch": 2}), "a row of its history lacks step"),
        (lambda m, a: m.update({"label_smoothing": "much"}), "label_smoothing is 'much'"),
        (lambda m, a: m["optimizer"]["steps"].append(1), "it has the steps of 8 parameters"),
        (lambda m, a: m["optimizer"]["steps"].__setitem__(0, 10**400), "steps is 1000"),
        (lambda m, a: a.update({"buffer/1.running_mean": np.zeros(8)}), "1.running_mean is float64"),
        (lambda m, a: a.update({"backprop/6/passes": np.array(np.nan)}), "6/passes is"),
        (lambda m, a: a.update({"backprop/6/density": np.array(np.nan)}), "6/density is nan"),
        (lambda m, a: a.update({"backprop/6/report": np.zeros(3)}), "6/report is"),
        (lambda m, a: a.update({"sparsity/step": np.array(-5)}), "step is -5"),
        (lambda m, a: a.update({"sparsity/0/explored": np.full(9, np.nan)}), "0/explored cannot be"),
        (lambda m, a: a.update({"sparsity/6/changed": np.zeros(3, int)}), r"6/changed has shape \(3,\)"),
    ],
)
def test_what_a_forged_file_is_told(whole, change, message):
    path, _ = whole
    meta, arrays = checkpoint.read(path)
    arrays = {name: array.copy() for name, array in arrays.items()}
    change(meta, arrays)
    forged = path.with_name("forged.safetensors")
    forged.write_bytes(packed(meta, arrays))
    model = network()
    before = model.state_dict()
    with pytest.raises(ValueError, match=f"forged.safetensors.*{message}"):
        Trainer.resume(forged)
    if change(meta, arrays) is None and "model" not in message:
        with pytest.raises(ValueError):
            Trainer.resume(forged, model, optim.SGD([model.parameters()[0]], lr=0.1))
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("slot/0.weight/momentum"), "lacks tensor slot/0.weight/momentum"),
        (lambda a: a.update({"junk/x": np.zeros(3)}), "has tensor junk/x"),
    ],
)
def test_tensors_that_come_or_go(whole, change, message):
    """An optimiser would take a slot that lacks for one that is new."""
    path, _ = whole
    with safetensors.safe_open(path, framework="np") as file:
        meta, arrays = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(arrays)
    forged = path.with_name("forged.safetensors")
    safetensors.numpy.save_file(arrays, forged, meta)
    for read in (Trainer.resume, checkpoint.read_state):
        with pytest.raises(ValueError, match=f"forged.safetensors: it {message}, which its list"):
            read(forged)


def test_a_method_that_cannot_begin_changes_nothing(tmp_path):
    """N:M chooses among all weights, and of these the file lacks some."""
    path = tmp_path / "run.safetensors"
    run = trainer()
    st.sparsify(run.model, 0.5)
    run.fit(images(), 1)
    run.save(path)
    model = network()
    optimizer = optim.SGD(model.named_parameters(), lr=0.1)
    before, parameters, random = model.state_dict(), model.parameters(), rng.generator().bit_generator.state
    with pytest.raises(ValueError, match="layer 0 is sparse already"):
        Trainer.resume(path, model, optimizer, sparsity=sparsity.NM(2, 4, stop=3))
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True)) and optimizer.params == parameters
    assert rng.generator().bit_generator.state == random
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("weights", [None, 0.5])
def test_a_method_that_begins_with_a_checkpoint_has_its_weights(tmp_path, weights):
    path = tmp_path / "run.safetensors"
    run = trainer()
    if weights is not None:
        st.sparsify(run.model, weights)
    run.save(path)
    run = Trainer.resume(path, sparsity=sparsity.Static(0.8, "magnitude", distribution="uniform"))
    kept = run.model[0].weight
    wanted = st.sparsify(Trainer.resume(path).model, 0.8)[0].weight
    np.testing.assert_array_equal(kept.to_dense(), wanted.to_dense())
    assert run.optimizer.params[0] is kept and run.fit(images(), 1)[0]["sparsity"] > 0.79


HUGE = [  # 4 GB each as float32, or more
    {"class": "Linear", "arguments": {"in_features": 40_000, "out_features": 40_000, "bias": False}},
    {"class": "Linear", "arguments": {"in_features": 1, "out_features": 10**9}},
    {"class": "Conv2d", "arguments": {"in_channels": 1, "out_channels": 10**9, "kernel_size": 1}},
    {"class": "Conv2d", "arguments": {"in_channels": 1, "out_channels": 1, "kernel_size": [30_000, 60_000]}},
    {"class": "BatchNorm1d", "arguments": {"num_features": 10**9}},
    {"class": "BatchNorm2d", "arguments": {"num_features": 10**9}},
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_small_file_does_not_ask_for_much_memory(whole, tmp_path, dtype):
    path, _ = whole
    meta, arrays = checkpoint.read(path)
    arrays = {name: array.astype(dtype) if array.dtype == np.float32 else array for name, array in arrays.items()}
    forged = [tmp_path / f"{i}.safetensors" for i in range(len(HUGE))]
    for layer, file in zip(HUGE, forged, strict=True):
        meta["model"] = {"class": "Sequential", "layers": [layer]}
        file.write_bytes(packed(meta, arrays))
    code = f"""
        from sparsetrain import Trainer
        for path in {[str(file) for file in forged]!r}:
            try:
                Trainer.resume(path)
            except ValueError as error:
                print(error)
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(status["VmHWM"].split()[0])  # of this program alone, unlike getrusage()
    """
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": ENVIRONMENT}
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], **options)
    *messages, kilobytes = out.stdout.splitlines()
    assert len(messages) == len(HUGE) and all("which the model" in message for message in messages)
    assert int(kilobytes) < 500_000
