"""Weights of other programs: files of every kind, damaged ones too, and putting weights into a model."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as hs

import nets
import torch_files
from sparsetrain import Trainer, data, manual_seed, nn, optim, sparsify
from sparsetrain.interchange import load_state, read_state, to_scipy, write_state, zeros_to_structure
from sparsetrain.sparse import Parameter, SparseParameter
from sparsetrain.train import checkpoint
from strategies import quick

KINDS = ("safetensors", "checkpoint", "npz", "pt", "pth", "th")


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "0.weight": rng.standard_normal((5, 3, 2, 2)).astype(np.float32),
        "0.bias": rng.standard_normal(5),
        "1.num_batches_tracked": np.array(7, np.int64),
    }


def write(kind, folder, state):
    """A file of a kind with these arrays; its path."""
    path = folder / f"a.{kind}"
    if kind == "safetensors":
        path.write_bytes(safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in state.items()}))
    elif kind == "npz":
        np.savez(path, **state)
    else:
        torch_files.write_state(path, state, old=kind == "th")
    return path


def trainer():
    """A net with sparse weights, buffers and slots, after a step."""
    manual_seed(0)
    model = sparsify(nets.small_net(), 0.8, exclude=["0"])
    run = Trainer(model, optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9))
    run.train_step(*nets.images())
    return run


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array)


def error(path):
    """What read_state() says of a file."""
    with pytest.raises(ValueError, match=path.name) as caught:
        read_state(path)
    return str(caught.value)


# ---- reading


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "checkpoint"])
def test_every_kind_of_file(tmp_path, kind):
    path = write(kind, tmp_path, arrays())
    assert_same(read_state(path), arrays())
    assert_same(read_state(str(path)), arrays())
    upper = path.with_name(f"B.{kind.upper()}")
    upper.write_bytes(path.read_bytes())
    assert_same(read_state(upper), arrays())


def test_our_own_checkpoint(tmp_path):
    run = trainer()
    run.save(tmp_path / "run.safetensors")
    state = read_state(tmp_path / "run.safetensors")
    assert_same(state, run.model.state_dict())
    other = nets.small_net()
    load_state(other, state)
    x, _ = nets.images()
    np.testing.assert_allclose(other.eval()(x), run.model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "checkpoint"])
def test_the_prefix_of_data_parallel_is_dropped(tmp_path, kind):
    state = {f"module.{name}": array for name, array in arrays().items()}
    assert_same(read_state(write(kind, tmp_path, state)), arrays())
    state["extra"] = np.zeros(2, np.float32)
    assert_same(read_state(write(kind, tmp_path, state)), state)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "sequence"])
@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_inside_another_dict(tmp_path, key, old):
    path = tmp_path / "a.pt"
    state = {f"module.{name}": array for name, array in arrays().items()}
    torch_files.write_state(path, state, lambda found: {"epoch": 3, key: found, "best": 0.5}, old)
    assert_same(read_state(path), arrays())


@pytest.mark.parametrize(
    "value, message",
    [
        ({"epoch": 3}, "holds 'epoch', a int"),
        ([1, 2], "holds a list, must be a state dict"),
        (5, "holds a int"),
        ({"state_dict": {"a": "text"}}, "holds 'a', a str"),
        ({"state_dict": [1]}, "holds 'state_dict', a list"),
        ({5: 6}, "holds 5"),
    ],
)
def test_what_is_no_state_dict(tmp_path, value, message):
    torch_files.write_archive(tmp_path / "a.pt", value, {})
    assert message in error(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.h5", "a", "a.npy", "a.safetensors.gz", "npz"])
def test_other_suffixes(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert "must end in .safetensors, .npz, .pt, .pth or .th" in error(tmp_path / name)


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt", "pth", "th"])
def test_files_that_are_not_there(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=f"a.{kind}"):
        read_state(tmp_path / f"a.{kind}")
    (tmp_path / f"a.{kind}").mkdir()
    with pytest.raises(OSError):
        read_state(tmp_path / f"a.{kind}")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt", "th"])
@pytest.mark.parametrize("contents", [b"", b"PK\x05\x06", b"hello", bytes(1000), b"\xff" * 1000])
def test_files_of_something_else(tmp_path, kind, contents):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(contents)
    error(path)


# ---- damaged and forged files


@pytest.fixture(scope="module", params=["safetensors", "checkpoint", "npz", "pt", "th"])
def whole(request, tmp_path_factory):
    """Path and bytes of a sound file."""
    folder = tmp_path_factory.mktemp("state")
    if request.param == "checkpoint":
        path = folder / "a.safetensors"
        trainer().save(path)
    else:
        path = write(request.param, folder, arrays())
    return path, path.read_bytes()


def check(path, contents):
    """read_state() gives arrays, or a ValueError or an OSError."""
    path = path.with_stem("changed")
    path.write_bytes(contents)
    try:
        state = read_state(path)
    except (ValueError, OSError) as caught:
        assert str(caught)
    else:
        assert all(isinstance(array, np.ndarray) for array in state.values())


@quick
@given(hs.data())
def test_changed_bytes(whole, draw):
    path, contents = whole
    changed = bytearray(contents)
    last = len(contents) - 1
    if path.suffix == ".safetensors":
        last = 7 + int.from_bytes(contents[:8], "little")
    for _ in range(draw.draw(hs.integers(1, 6))):
        changed[draw.draw(hs.integers(0, last))] = draw.draw(hs.integers(0, 255))
    check(path, bytes(changed))


@quick
@given(hs.data())
def test_cut_files(whole, draw):
    path, contents = whole
    check(path, contents[draw.draw(hs.sampled_from([0, 0, 1, 8])) : draw.draw(hs.integers(0, len(contents)))])


def npy(path, header, values=bytes(48), name="a.npy", compression=zipfile.ZIP_STORED, version=(1, 0)):
    """A .npz file of one array with this header."""
    header = header.encode("latin1")
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, b"\x93NUMPY" + bytes(version) + length + header + values)
    return path


HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': {}}}\n"


def test_npz_by_hand(tmp_path):
    path = npy(tmp_path / "a.npz", HEADER.format("<f4", "(3, 4)"))
    assert_same(read_state(path), {"a": np.zeros((3, 4), np.float32)})


@pytest.mark.parametrize(
    "header",
    [
        HEADER.format("<f4", "(5, 4)"),
        HEADER.format("<f4", "(1000000000000,)"),
        HEADER.format("<f4", "(9223372036854775807, 9223372036854775807)"),
        HEADER.format("<f4", "(1000000000000000000000000000000,)"),
        HEADER.format("<f4", "(-3,)"),
        HEADER.format("<f4", "('many',)"),
        HEADER.format("<f4", "(10**9,)"),
        HEADER.format("<f4", "12"),
        HEADER.format("|O", "(1,)"),
        HEADER.format("no type", "(3,)"),
        "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}\n",
        "__import__('os').system('true')\n",
        "{}\n",
        "[]\n",
        "\n",
        "",
        "x" * 20000,
    ],
    ids=lambda header: header[:70],
)
def test_npz_with_a_forged_header(tmp_path, header):
    path = npy(tmp_path / "a.npz", header)
    error(path)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npz_that_has_less_than_it_says(tmp_path, version):
    """Before memory is taken for it."""
    path = npy(tmp_path / "a.npz", HEADER.format("<f8", "(1500000000,)"), version=version)
    assert "a.npy says that it has 12000000000 bytes, and has 1" in error(path)
    path = npy(path, HEADER.format("<f4", "(3, 4)"), version=version)
    assert_same(read_state(path), {"a": np.zeros((3, 4), np.float32)})


def test_npz_that_holds_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.txt", b"hello")
    assert "holds 'a.txt', a bytes" in error(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", a=np.array([{}, None], object))
    assert "pickle" in error(tmp_path / "b.npz")


def test_npz_that_grows(tmp_path):
    """Zeros that are compressed to almost nothing are read up to a size, and not at all above it."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.zeros((1000, 1000), np.float32))
    assert read_state(path)["a"].shape == (1000, 1000)
    zeros = bytes(1 << 20)
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("a.npy", "w", force_zip64=True) as file:
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 80))
        file.write(HEADER.format("<f4", f"({257 << 18},)").encode().ljust(80))
        for _ in range(257):
            file.write(zeros)
    assert path.stat().st_size < 2 << 20
    assert "it would take" in error(path)


def safetensors_file(path, tensors, values=b"", metadata=None):
    """A safetensors file with this header: {name: (dtype, shape, begin, end)}."""
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for name, (dtype, shape, begin, end) in tensors.items()
    }
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return path


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": ("F32", [10**12], 0, 8)},
        {"a": ("F32", [2**62, 2**62], 0, 8)},
        {"a": ("F32", [2], 0, 4 * 10**12)},
        {"a": ("F32", [2], 4, 12)},
        {"a": ("F32", [2], 0, 8), "b": ("F32", [2], 0, 8)},
        {"a": ("F32", [-2], 0, 8)},
        {"a": ("F32", [1.5], 0, 8)},
        {"a": ("F33", [2], 0, 8)},
    ],
    ids=str,
)
def test_safetensors_with_a_forged_header(tmp_path, tensors):
    error(safetensors_file(tmp_path / "a.safetensors", tensors, bytes(8)))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "{}", '{"format": 99}', '{"format": 3}', '{"format": 3, "tensors": 5}',
             '{"format": 3, "tensors": ["x"]}', '{"format": 3, "tensors": ["x"], "shapes": 5}',
             '{"format": 3, "tensors": ["x"], "shapes": {"a": 5}}',
             '{"format": 3, "tensors": ["x"], "shapes": {"a": [2]}}', "[" * 100000],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_checkpoints_with_forged_metadata(tmp_path, text):
    path = safetensors_file(tmp_path / "a.safetensors", {"x": ("F32", [2], 0, 8)}, bytes(8), {"sparsetrain": text})
    error(path)


def test_a_checkpoint_with_a_huge_shape_and_few_weights(tmp_path):
    trainer().save(tmp_path / "run.safetensors")
    meta, found = checkpoint.read(tmp_path / "run.safetensors")
    name = "13.weight"
    rows = 46_000
    meta["shapes"][name] = [rows, rows]  # 8.5 GB
    meta["tensors"] += [f"parameter/{name}/{part}" for part in ("indices", "indptr")]
    found[f"parameter/{name}/data"] = np.ones(2, np.float32)
    found[f"parameter/{name}/indices"] = np.array([0, 7], np.int32)
    found[f"parameter/{name}/indptr"] = np.array([0] + [2] * rows, np.int32)
    path = tmp_path / "forged.safetensors"
    path.write_bytes(safetensors.numpy.save(found, {"sparsetrain": json.dumps(meta)}))
    message = error(path)
    assert "take 8464" in message and f"the largest is {name} with shape (46000, 46000)" in message
    for shape in ([2**40, 2**40], [-1, 5], [1.5, 2], ["a"], "ab", None):
        meta["shapes"][name] = shape
        path.write_bytes(safetensors.numpy.save(found, {"sparsetrain": json.dumps(meta)}))
        with pytest.raises(ValueError):
            read_state(path)


def few_weights(path, tensors, shape, nnz, dtype=np.float32):
    """A checkpoint of so many tensors of one row each, with nnz weights."""
    indices = np.linspace(0, shape[1] - 1, nnz).astype(np.int32)
    parts = {"data": np.ones(nnz, dtype), "indices": indices, "indptr": np.array([0, nnz], np.int32)}
    arrays = {f"parameter/{i}/{part}": array for i in range(tensors) for part, array in parts.items()}
    shapes = {str(i): shape for i in range(tensors)}
    meta = {"format": checkpoint.FORMAT, "tensors": list(arrays), "shapes": shapes}
    path.write_bytes(safetensors.numpy.save(arrays, {"sparsetrain": json.dumps(meta)}))
    return path


@pytest.mark.parametrize(
    "tensors, shape, nnz, dtype",
    [(100, (1, 1 << 26), 1, np.float32), (1, (1, (1 << 31) - 1), 214_749, np.float64)],
    ids=["many", "float64"],
)
def test_all_tensors_of_a_checkpoint_together_are_in_proportion_to_the_file(tmp_path, tensors, shape, nnz, dtype):
    assert "too many" in error(few_weights(tmp_path / "a.safetensors", tensors, shape, nnz, dtype))


def test_very_sparse_checkpoints_can_be_read(tmp_path, monkeypatch):
    """99.9 % removed, and a small one with a single weight."""
    monkeypatch.setattr(checkpoint, "SMALL", 1 << 20)
    for shape, nnz in (((1, 1 << 24), (1 << 24) // 1000), ((1, 1 << 18), 1)):
        state = read_state(few_weights(tmp_path / "a.safetensors", 1, shape, nnz))
        assert state["0"].shape == shape and np.count_nonzero(state["0"]) == nnz


# ---- into a model


def net(width=6):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 5),
    )  # fmt: skip


def random_state(model, seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.uniform(0.5, 1.5, v.shape).astype(v.dtype) for k, v in model.state_dict().items()}


THEIRS = {"0": "features.conv", "1": "features.norm", "5": "fc1", "7": "fc2"}


def renamed(state):
    return {f"{THEIRS[name.split('.')[0]]}.{name.split('.')[1]}": array for name, array in state.items()}


def test_by_names_in_any_order():
    model, state = net(), random_state(net())
    assert load_state(model, dict(reversed(state.items()))) is model
    assert_same(model.state_dict(), state)


def test_in_order():
    model, state = net(), random_state(net())
    load_state(model, renamed(state))
    assert_same(model.state_dict(), state)
    # weights and biases each for themselves: statistics may come last
    kinds = sorted(renamed(state).items(), key=lambda item: item[0].endswith("running_mean"))
    load_state(model, dict(kinds))
    assert_same(model.state_dict(), state)


def test_counts_of_batches_may_lack():
    model, state = net(), random_state(net())
    fewer = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    count = model.state_dict()["1.num_batches_tracked"]
    for given_state in (fewer, renamed(fewer)):
        load_state(model, given_state)
        assert_same(model.state_dict(), state | {"1.num_batches_tracked": count})
    load_state(nn.Sequential(nn.Linear(2, 3)), random_state(nn.Sequential(nn.Linear(2, 3))))


def test_by_a_map_of_names():
    model, state = net(), random_state(net())
    theirs = renamed(state)
    names = dict(zip(theirs, state, strict=True))
    shuffled = dict(sorted(theirs.items())) | {"optimizer.step": np.zeros(3)}
    load_state(model, shuffled, names)
    assert_same(model.state_dict(), state)
    with pytest.raises(ValueError, match="names has 'fc3.weight', which the state lacks"):
        load_state(model, theirs, names | {"fc3.weight": "7.weight"})
    with pytest.raises(ValueError, match="the state has 9.weight, which the model lacks"):
        load_state(model, theirs, names | {"fc2.weight": "9.weight"})
    del names["fc2.weight"]
    with pytest.raises(ValueError, match="the state lacks 7.weight, which the model has"):
        load_state(model, theirs, names)


@pytest.mark.parametrize("rename", [lambda state: state, renamed], ids=["names", "order"])
def test_a_new_head(rename):
    model, state = net(), random_state(net())
    state["7.weight"], state["7.bias"] = np.zeros((1000, 8), np.float32), np.zeros(1000, np.float32)
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"shape \(1000, 8\).*\(5, 8\)"):
        load_state(model, rename(state))
    assert_same(model.state_dict(), before)
    load_state(model, rename(state), head="new")
    head = {name: before[name] for name in ("7.weight", "7.bias")}
    assert_same(model.state_dict(), state | head)


def test_a_new_head_when_the_file_has_none():
    model, state = net(), random_state(net())
    before = model.state_dict()
    head = {name: before[name] for name in ("7.weight", "7.bias")}
    load_state(model, {k: v for k, v in state.items() if k not in head}, head="new")
    assert_same(model.state_dict(), state | head)


def test_a_new_head_when_the_file_has_none_and_no_counts():
    model, state = net(), random_state(net())
    lacks = ("7.weight", "7.bias", "1.num_batches_tracked")
    load_state(model, {k: v for k, v in state.items() if k not in lacks}, head="new")


@pytest.mark.parametrize("ours", [np.float32, np.float64])
@pytest.mark.parametrize("theirs", [np.float16, np.float32, np.float64, np.int8])
def test_arrays_become_the_models_dtype(ours, theirs):
    model, rng = nn.Sequential(nn.Linear(3, 4)).to(ours), np.random.default_rng(0)
    state = {"0.weight": rng.integers(-9, 9, (4, 3)).astype(theirs), "0.bias": rng.integers(-9, 9, 4).astype(theirs)}
    load_state(model, state)
    assert_same(model.state_dict(), {name: array.astype(ours) for name, array in state.items()})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update({"0.weight": np.zeros((6, 3, 5, 5), np.float32)}), r"0.weight has shape \(6, 3, 5, 5\)"),
        (lambda s: s.update({"0.bias": np.zeros((6, 1), np.float32)}), r"0.bias has shape \(6, 1\)"),
        (lambda s: s.update({"9.weight": np.zeros(3, np.float32)}), "the state has 5 arrays named weight"),
        (lambda s: s.pop("5.weight"), "the state has 3 arrays named weight, the model 4: give names="),
        (lambda s: s.pop("1.running_var"), "0 arrays named running_var"),
        (lambda s: s.clear(), "named weight"),
        (lambda s: s.update({"7.bias": np.array(["1"] * 5)}), "7.bias has dtype <U1, must be real numbers"),
        (lambda s: s.update({"7.bias": np.ones(5, complex)}), "7.bias has dtype complex128, must be real numbers"),
        (lambda s: s.update({"7.bias": np.full(5, 1e300)}), "7.bias has float64 numbers that float32 cannot"),
        (lambda s: s.update({"1.num_batches_tracked": np.array(np.inf)}), "numbers that int64 cannot hold"),
    ],
)
def test_errors_leave_the_model_as_it_was(change, message):
    model, state = net(), random_state(net())
    change(state)
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        load_state(model, state)
    assert_same(model.state_dict(), before)


def test_errors_in_order_name_both():
    state = renamed(random_state(net()))
    state["fc1.weight"] = np.zeros((9, 6), np.float32)
    with pytest.raises(ValueError, match=r"fc1.weight has shape \(9, 6\); in order it is 5.weight, which has \(8, 6\)"):
        load_state(net(), state)


def test_in_order_nothing_is_left_over():
    """But counts of batches, which a norm without statistics has not."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    state = {f"fc.{name}": array for name, array in random_state(model).items()}
    load_state(model, state | {"norm.num_batches_tracked": np.array(3)})
    assert_same(model.state_dict(), {name.removeprefix("fc."): array for name, array in state.items()})
    state |= {"prelu.slope": np.ones(3), "norm.running_mean": np.ones(3)}
    with pytest.raises(ValueError, match="the state has prelu.slope, norm.running_mean, and the model no arrays of"):
        load_state(model, state)


def test_infinite_numbers_stay():
    model = nn.Sequential(nn.Linear(1, 3, bias=False))
    load_state(model, {"0.weight": np.array([[np.inf], [-np.inf], [np.nan]])})
    np.testing.assert_array_equal(model[0].weight.data[:, 0], [np.inf, -np.inf, np.nan])


def test_other_heads():
    with pytest.raises(ValueError, match="head is 'auto', must be 'keep' or 'new'"):
        load_state(net(), random_state(net()), head="auto")


def test_sparse_models_take_what_they_store():
    model = sparsify(net(), 0.5)
    state = model.state_dict()
    load_state(model, {name: 2 * array for name, array in state.items()})
    np.testing.assert_array_equal(model[5].weight.to_dense(), 2 * state["5.weight"])
    with pytest.raises(ValueError, match="stores none"):
        load_state(model, random_state(net()))
    np.testing.assert_array_equal(model[5].weight.to_dense(), 2 * state["5.weight"])


# ---- out of a model


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_write_and_read(tmp_path, dtype):
    model = sparsify(nets.small_net(), 0.7).to(dtype)
    write_state(tmp_path / "a.safetensors", model)
    state = read_state(tmp_path / "a.safetensors")
    assert_same(state, model.state_dict())
    assert_same(load_state(nets.small_net().to(dtype), state).state_dict(), model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_torch_reads_what_we_write(tmp_path):
    pytest.importorskip("torch")
    reader = pytest.importorskip("safetensors.torch")
    model = sparsify(nets.small_net(), 0.7)
    write_state(tmp_path / "a.safetensors", model)
    found = reader.load_file(tmp_path / "a.safetensors")
    assert_same({name: tensor.numpy() for name, tensor in found.items()}, model.state_dict())


def test_a_write_that_fails_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_state(path, net())
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_state(path, net())
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def with_zeros(model, share=0.7, seed=0):
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        if len(parameter.shape) > 1:
            parameter.data[rng.random(parameter.shape) < share] = 0
    return model


def test_zeros_become_structure():
    model = with_zeros(nets.small_net())
    state, x = model.state_dict(), nets.images()[0]
    y = model.eval()(x)
    assert zeros_to_structure(model) is model
    for name, parameter in model.named_parameters():
        if len(parameter.shape) > 1:
            assert isinstance(parameter, SparseParameter)
            assert parameter.nnz == np.count_nonzero(state[name])
            assert (parameter.data != 0).all()
        else:
            assert type(parameter) is Parameter
    assert_same(model.state_dict(), state)
    np.testing.assert_allclose(model(x), y, rtol=1e-4, atol=1e-5)


def test_layers_that_stay_dense():
    model = with_zeros(net())
    model[7].weight.data[...] = 1
    zeros_to_structure(model, exclude=["0"])
    assert [type(model[i].weight) for i in (0, 5, 7)] == [Parameter, SparseParameter, Parameter]
    with pytest.raises(ValueError, match="matches none"):
        zeros_to_structure(model, exclude=["conv*"])


def test_zeros_of_sparse_weights_and_their_slots():
    model = sparsify(net(), 0.5)
    weight = model[5].weight
    weight.slots["momentum"] = np.arange(weight.nnz, dtype=np.float32)
    weight.data[::2] = 0
    left = weight.nnz - len(weight.data[::2])
    zeros_to_structure(model)
    assert model[5].weight is weight and weight.nnz == left
    np.testing.assert_array_equal(weight.slots["momentum"], np.arange(1, 2 * left, 2))
    model[7].weight.data[...] = 0
    zeros_to_structure(model)
    assert model[7].weight.nnz == 0
    assert np.isfinite(model(nets.images()[0])).all()


def test_to_scipy():
    model = sparsify(nets.small_net(), 0.8, exclude=["0", "13"])
    found = to_scipy(model)
    sparse = [name for name, p in model.named_parameters() if isinstance(p, SparseParameter)]
    assert [f"{name}.weight" for name in found] == sparse and sparse
    for name, matrix in found.items():
        dense = model.state_dict()[f"{name}.weight"]
        assert matrix.format == "csr" and matrix.has_sorted_indices
        np.testing.assert_array_equal(matrix.toarray(), dense.reshape(len(dense), -1))
        matrix.data[...] = 0  # a copy: the model has its own
        np.testing.assert_array_equal(model.state_dict()[f"{name}.weight"], dense)
    assert to_scipy(net()) == {}


# ---- published weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those the weights were trained with


def published(name):
    """The path of published weights; the test is skipped if they are not there."""
    folder = os.environ.get(data.sets.ENVIRONMENT)
    path = os.path.join(folder or "", "weights", name)
    if not folder or not os.path.isfile(path):
        pytest.skip(f"{name} is not in the weights folder of {data.sets.ENVIRONMENT}")
    return path


def test_resnet20_as_published():
    """He et al.'s net: 91.73 % of all test images; of the first 2,000 here."""
    state = read_state(published("resnet20-12fca82f.th"))
    other = read_state(published("resnet20_cifar10.npz"))
    assert set(other) <= set(state)
    assert {name for name in set(state) - set(other) if not name.endswith("num_batches_tracked")} == set()
    for name in other:
        np.testing.assert_array_equal(state[name], other[name])
    try:
        images, labels = data.load("cifar10", download=False).test
    except FileNotFoundError as reason:
        pytest.skip(str(reason))
    model = load_state(nn.models.resnet20_a(), state)
    run = Trainer(model, optim.SGD(model.named_parameters(), lr=0.1))
    batches = data.Batches(images[:2000], labels[:2000], 256, mean=MEAN, std=STD)
    assert run.evaluate(batches)["accuracy"] > 0.9
    assert_same(load_state(nn.models.resnet20_a(), other).state_dict(), model.state_dict())


def test_a_pruned_squeezenet():
    """The zeros of Deep Compression's weights become structure: its squeeze and expand layers, one after the other."""
    state = read_state(published("squeezenet_v1.0_pruned_deepcompression.npz"))
    assert len(state) == 52 and sum(array.size for array in state.values()) == 1_248_424
    names = {f"fire2/{theirs}.{kind}": f"{i}.{kind}" for i, theirs in enumerate(("conv1x1_1", "conv3x3_2"))
             for kind in ("weight", "bias")}  # fmt: skip
    model = nn.Sequential(nn.Conv2d(96, 16, 1), nn.Conv2d(16, 64, 3, padding=1))
    load_state(model, {name: state[name] for name in names}, names=names)
    zeros_to_structure(model)
    assert [model[i].weight.nnz for i in (0, 1)] == [np.count_nonzero(state[f"fire2/{n}.weight"])
                                                     for n in ("conv1x1_1", "conv3x3_2")]  # fmt: skip
    np.testing.assert_array_equal(model[1].weight.to_dense(), state["fire2/conv3x3_2.weight"])
    assert 0.66 < model[1].weight.sparsity < 0.68


# ---- known faults


@pytest.mark.parametrize(
    "header",
    ["{1: 2, 'a': 3}\n", "{[]: 1}\n", "{'descr': '<f4', 'shape': (\n", HEADER.format("<f4", f"({'-' * 5000}1,)")],
    ids=lambda header: header[:70],
)
def test_npz_headers_that_numpy_does_not_expect(tmp_path, header):
    error(npy(tmp_path / "a.npz", header))


def test_an_encrypted_npz(tmp_path):
    contents = bytearray(npy(tmp_path / "a.npz", HEADER.format("<f4", "(3, 4)")).read_bytes())
    contents[6] |= 1
    contents[contents.find(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(contents)
    error(tmp_path / "a.npz")


def test_a_damaged_npz_of_another_compression(tmp_path):
    path = npy(tmp_path / "a.npz", HEADER.format("<f4", "(3, 4)"), compression=zipfile.ZIP_LZMA)
    contents = bytearray(path.read_bytes())
    contents[30 + len("a.npy") + 4 + 9] ^= 0xFF
    path.write_bytes(contents)
    error(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_safetensors_of_8_bits(tmp_path, dtype):
    error(safetensors_file(tmp_path / "a.safetensors", {"a": (dtype, [8], 0, 8)}, bytes(8)))


def test_the_order_of_a_safetensors_file(tmp_path):
    """Weights of equal shapes go to the layers that they are of, or an error says that the order is not known."""
    rng, layers = np.random.default_rng(0), 11
    state = {f"block{i}.fc.weight": rng.standard_normal((3, 3)).astype(np.float32) for i in range(layers)}
    (tmp_path / "a.safetensors").write_bytes(safetensors.numpy.save(state))
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(layers)))
    try:
        load_state(model, read_state(tmp_path / "a.safetensors"))
    except ValueError:
        return
    for layer, array in zip(model, state.values(), strict=True):
        np.testing.assert_array_equal(layer.weight.data, array)
