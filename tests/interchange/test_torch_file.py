"""PyTorch's files: sound ones of both layouts, and those that lie about sizes or name code to run."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

import sparsetrain as st
from sparsetrain.interchange import read_state, torch_file
from strategies import quick
from torch_files import (
    STORAGES,
    Raw,
    built,
    call,
    dump,
    named,
    pickled,
    storage,
    tensor,
    tensors,
    write_archive,
    write_sequence,
    write_state,
)  # fmt: skip

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(st.__file__).parents[1])}
WRITES = {"zip": write_archive, "sequence": write_sequence}
layouts = pytest.mark.parametrize("old", [False, True], ids=["zip", "sequence"])


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "0.weight": rng.standard_normal((5, 3, 2, 2)).astype(np.float32),
        "0.bias": rng.standard_normal(5).astype(np.float32),
        "1.weight": rng.standard_normal((4, 6)).astype(np.float32).T,
        "1.num_batches_tracked": np.array(7, np.int64),
    }


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array)


# ---- sound files


@layouts
def test_a_state_dict(tmp_path, old):
    write_state(tmp_path / "a.pt", arrays(), old=old)
    assert_same(torch_file.read(tmp_path / "a.pt"), arrays())


@layouts
@pytest.mark.parametrize("dtype", STORAGES)
def test_every_type(tmp_path, dtype, old):
    wanted = {"a": np.array([[0, 1, 2], [3, 100, 0]]).astype(dtype)}
    write_state(tmp_path / "a.pt", wanted, old=old)
    assert_same(torch_file.read(tmp_path / "a.pt"), wanted)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_views(tmp_path, write):
    """Tensors that share a storage, begin in its middle, jump, repeat values, or have none."""
    values = np.arange(24, dtype=np.float32)
    shared = storage("FloatStorage", "0", 24)
    wanted = {
        "whole": (0, (2, 3, 4), (12, 4, 1), values.reshape(2, 3, 4)),
        "middle": (5, (2, 2), (2, 1), values[5:9].reshape(2, 2)),
        "transposed": (0, (4, 6), (1, 4), values.reshape(6, 4).T),
        "every third": (1, (8,), (3,), values[1::3]),
        "repeated": (3, (2, 4), (0, 1), np.stack([values[3:7]] * 2)),
        "scalar": (23, (), (), values[23]),
        "none": (24, (0, 5), (5, 1), np.zeros((0, 5), np.float32)),
    }
    write(tmp_path / "a.pt", {name: tensor(shared, *about[:3]) for name, about in wanted.items()}, {"0": values})
    assert_same(torch_file.read(tmp_path / "a.pt"), {name: about[3] for name, about in wanted.items()})


def test_other_makers_of_tensors(tmp_path):
    """nn.Parameter's, that of PyTorch 0.3, and an OrderedDict with the versions of its layers."""
    values = np.arange(6, dtype=np.float32)
    kept = storage("FloatStorage", "0", 6)
    old = call(named("torch._utils", "_rebuild_tensor"), kept, 0, (6,), (1,))
    parameter = call(named("torch._utils", "_rebuild_parameter"), old, True, call(named("collections", "OrderedDict")))
    state = call(named("collections", "OrderedDict"), [("a", old), ("b", parameter)])
    state = built(state, {"_metadata": {"": {"version": 1}}})
    write_archive(tmp_path / "a.pt", state, {"0": values})
    assert_same(read_state(tmp_path / "a.pt"), {"a": values, "b": values})


def test_other_marks_of_tensors(tmp_path):
    """A negated tensor is one whose values in the file have the other sign."""
    make, hooks = named("torch._utils", "_rebuild_tensor_v2"), call(named("collections", "OrderedDict"))
    for metadata in (None, {}, {"neg": True}, {"conj": True}):
        value = call(make, storage("FloatStorage", "0", 2), 0, (2,), (1,), False, hooks, metadata)
        write_archive(tmp_path / "a.pt", {"a": value}, {"0": np.ones(2, np.float32)})
        if not metadata:
            assert_same(read_state(tmp_path / "a.pt"), {"a": np.ones(2, np.float32)})
        else:
            with pytest.raises(ValueError, match=f"a.pt.*a tensor is marked {metadata}: only plain ones"):
                read_state(tmp_path / "a.pt")


@pytest.mark.parametrize("order", ["little", "big", "middle", ""])
def test_the_order_of_bytes(tmp_path, order):
    path = tmp_path / "a.pt"
    write_state(path, arrays())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", order)
    if order == "little":
        assert_same(torch_file.read(path), arrays())
    else:
        with pytest.raises(ValueError, match=f"a.pt.*its byteorder is b'{order}', must be b'little'"):
            torch_file.read(path)


def test_plain_values(tmp_path):
    plain = {"epoch": 3, "best": 0.5, "name": "net", "done": True, "none": None, "list": [1, (2, "x")]}
    write_archive(tmp_path / "a.pt", plain, {})
    assert torch_file.read(tmp_path / "a.pt") == plain


@pytest.mark.parametrize("old", [False, True], ids=["zip", "sequence"])
def test_what_torch_writes(tmp_path, old):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 2))
    state = model.state_dict() | {
        "transposed": torch.randn(70, 50).t(),
        "part": torch.arange(40)[3:30:4],
        "half": torch.randn(3).half(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "flag": torch.tensor([True, False]),
    }
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    assert_same(read_state(tmp_path / "a.pt"), {name: t.detach().numpy() for name, t in state.items()})
    torch.save({"epoch": 4, "state_dict": state}, tmp_path / "b.pt", _use_new_zipfile_serialization=not old)
    assert_same(read_state(tmp_path / "b.pt"), {name: t.detach().numpy() for name, t in state.items()})


@pytest.mark.parametrize("old", [False, True], ids=["zip", "sequence"])
def test_what_torch_writes_that_is_no_state_dict(tmp_path, old):
    torch = pytest.importorskip("torch")
    for thing, name in ((torch.nn.Linear(2, 3), "torch.nn.modules.linear.Linear"), (torch.Size([2]), "torch.Size")):
        torch.save({"a": thing}, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        with pytest.raises(ValueError, match=f"holds {name}, which is no tensor: only state dicts"):
            read_state(tmp_path / "a.pt")
    torch.save({"a": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match="BFloat16Storage"):
        read_state(tmp_path / "a.pt")


# ---- files that name code


def global_4(module, name):
    """A name as protocol 4 has it, from two strings."""
    return Raw(dump(module) + dump(name) + b"\x93")


MARK = "import pathlib; pathlib.Path({!r}).touch()"
CODE = {
    "os.system": lambda path: call(named("os", "system"), f"touch {path}"),
    "posix.system": lambda path: call(named("posix", "system"), f"touch {path}"),
    "builtins.eval": lambda path: call(named("builtins", "eval"), f"open({str(path)!r}, 'w')"),
    "builtins.exec": lambda path: call(named("builtins", "exec"), MARK.format(str(path))),
    "builtins.getattr": lambda path: call(named("builtins", "getattr"), named("os", "system"), "__call__"),
    "os.system by strings": lambda path: call(global_4("os", "system"), f"touch {path}"),
    "os.system by INST": lambda path: Raw(b"(" + dump(f"touch {path}") + b"ios\nsystem\n"),
    "pathlib.Path by NEWOBJ": lambda path: Raw(named("pathlib", "Path") + dump((str(path),)) + b"\x81"),
    "torch.load": lambda path: call(named("torch", "load"), str(path)),
    "numpy.fromfile": lambda path: call(named("numpy", "fromfile"), str(path)),
    "_codecs.encode": lambda path: call(named("_codecs", "encode"), "x", "latin1"),
    "a dotted name": lambda path: named("collections", "OrderedDict.__init__.__globals__"),
    "collections.abc": lambda path: named("collections.abc", "OrderedDict"),
    "an extension": lambda path: Raw(b"\x82\x01"),
}


@pytest.mark.parametrize("place", ["value", "storage", "first pickle", "keys"])
@pytest.mark.parametrize("what", CODE)
def test_code_is_not_run(tmp_path, what, place):
    mark, path = tmp_path / "ran", tmp_path / "a.pt"
    evil = CODE[what](mark)
    if place == "value":
        write_archive(path, {"a": evil}, {})
    elif place == "storage":
        write_archive(path, {"a": tensor(evil, 0, (1,), (1,))}, {})
    elif place == "first pickle":
        write_sequence(path, {}, {}, magic=evil)
    else:
        write_sequence(path, {}, {}, keys=[evil])
    with pytest.raises(ValueError, match="a.pt"):
        read_state(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: call(named("torch._utils", "_rebuild_tensor_v2"), [1, 2, 3], 0, (3,), (1,)),
        lambda: call(named("torch._utils", "_rebuild_tensor_v2"), "abc", 0, (3,), (1,)),
        lambda: call(named("torch._utils", "_rebuild_tensor_v2")),
        lambda: call(named("torch", "FloatStorage"), 3),
        lambda: Raw(b"NQ"),
        lambda: Raw(dump(()) + b"Q"),
        lambda: Raw(dump(("module", "x")) + b"Q"),
        lambda: Raw(dump(("storage", "FloatStorage", "0", "cpu", 3)) + b"Q"),
        lambda: Raw(dump(("storage", named("collections", "OrderedDict"), "0", "cpu", 3)) + b"Q"),
        lambda: Raw(b"Pstorage\n"),
        lambda: Raw(b"h\x05"),  # from the memo, which is empty
        lambda: call(Raw(b"K\x05"), 1),
    ],
)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_pickles_that_make_no_sense(tmp_path, write, make):
    write(tmp_path / "a.pt", {"a": make()}, {})
    with pytest.raises(ValueError, match="a.pt"):
        read_state(tmp_path / "a.pt")


# ---- sizes that cannot be


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (0, (10**12,), (0,)),  # one value, a million million times
        (0, (10**6, 10**6), (0, 0)),
        (0, (2**62, 2**62), (0, 0)),
        (0, (10**30,), (0,)),
        (0, (13,), (1,)),
        (0, (3, 4), (5, 1)),
        (0, (2,), (12,)),
        (0, (2,), (2**62,)),
        (1, (12,), (1,)),
        (12, (1,), (1,)),
        (12, (), ()),
        (10**20, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (-3, -4), (4, 1)),
        (11, (3,), (-1,)),
        (0, (3, 4), (1,)),
        (0, (3,), ()),
        (0, 5, 1),
        (0, None, None),
        (0.5, (1,), (1,)),
        (None, (1,), (1,)),
        ("0", (1,), (1,)),
        (0, ("many",), (1,)),
        (0, (1,) * 100, (1,) * 100),
    ],
    ids=str,
)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_tensors_that_do_not_lie_in_their_storage(tmp_path, write, offset, size, stride):
    kept = storage("FloatStorage", "0", 12)
    write(tmp_path / "a.pt", {"a": tensor(kept, offset, size, stride)}, {"0": np.zeros(12, np.float32)})
    with pytest.raises(ValueError, match="a.pt"):
        read_state(tmp_path / "a.pt")


@pytest.mark.parametrize("size", [13, 10**9, 10**13, 2**62, 10**30, -1, -(10**20), 1.5, "12", None, (1,)], ids=str)
@pytest.mark.parametrize("kind", ["FloatStorage", "ByteStorage"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_storages_of_other_sizes(tmp_path, write, kind, size):
    """A size that the file does not hold; 13 bytes fit into 12 floats, but old files say the size twice."""
    values = np.zeros(12, np.float32 if kind == "FloatStorage" else np.uint8)
    write(tmp_path / "a.pt", {"a": tensor(storage(kind, "0", size), 0, (1,), (1,))}, {"0": values})
    with pytest.raises(ValueError, match="a.pt"):
        read_state(tmp_path / "a.pt")


def test_a_storage_that_is_not_there(tmp_path):
    for key in ("1", "../data.pkl", "", 5, None, [1], ("x",)):
        value = {"a": tensor(storage("FloatStorage", key, 1), 0, (1,), (1,))}
        for write in WRITES.values():
            write(tmp_path / "a.pt", value, {"0": np.zeros(1, np.float32)})
            with pytest.raises(ValueError, match="a.pt"):
                read_state(tmp_path / "a.pt")


def test_a_view_of_a_storage(tmp_path):
    value = {"a": tensor(storage("FloatStorage", "0", 3, ("v", 0, 2)), 0, (2,), (1,))}
    write_sequence(tmp_path / "a.pt", value, {"0": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="views of storages"):
        read_state(tmp_path / "a.pt")


@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e", b"\x95", b"\x96"], ids=["str", "bytes", "frame", "bytearray"])
def test_lengths_that_the_file_has_not(tmp_path, opcode):
    """No memory is asked for what is not there."""
    (tmp_path / "a.pt").write_bytes(b"\x80\x05" + opcode + (1 << 62).to_bytes(8, "little") + b"xx.")
    with pytest.raises(ValueError, match="a.pt") as caught:
        read_state(tmp_path / "a.pt")
    assert "MemoryError" not in str(caught.value)


@pytest.mark.parametrize("opcodes", [b"\x96" + bytes(8), b"\x8f", b"(\x91"], ids=["bytearray", "set", "frozenset"])
def test_what_no_state_dict_holds(tmp_path, opcodes):
    write_archive(tmp_path / "a.pt", {"a": Raw(opcodes)}, {})
    with pytest.raises(ValueError, match="a.pt.*it holds a bytearray or a set"):
        read_state(tmp_path / "a.pt")


def test_archives_whose_parts_overlap(tmp_path):
    """Each entry of the archive's index names the same bytes of the file."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled({}))
        archive.writestr("archive/data/0", bytes(1 << 20))
        archive.filelist += archive.filelist[-1:] * 50
    with pytest.raises(ValueError, match="a.pt.*its parts overlap"):
        read_state(path)


# ---- files of another kind


@pytest.mark.parametrize(
    "settings",
    [
        {"magic": 5},
        {"magic": "PyTorch"},
        {"protocol": 1000},
        {"system": {"little_endian": False}},
        {"system": {}},
        {"system": 7},
        {"keys": ["0", "1"]},
        {"keys": []},
        {"keys": [["0"]]},
        {"keys": None},
    ],
    ids=str,
)
def test_sequences_that_begin_or_end_otherwise(tmp_path, settings):
    found, storages = tensors({"a": np.ones(3, np.float32)}, views=True)
    settings = {k: Raw(b"N") if v is None else v for k, v in settings.items()}
    write_sequence(tmp_path / "a.pt", found, storages, **settings)
    with pytest.raises(ValueError, match="a.pt"):
        read_state(tmp_path / "a.pt")


def test_archives_of_another_kind(tmp_path):
    found, storages = tensors({"a": np.ones(3, np.float32)})
    path = tmp_path / "a.pt"
    write_archive(path, found, storages, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="it is compressed"):
        read_state(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    with pytest.raises(ValueError, match="no data.pkl"):
        read_state(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one/data.pkl", pickled({}))
        archive.writestr("two/data.pkl", pickled({}))
    with pytest.raises(ValueError, match="a.pt"):
        read_state(path)
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(ValueError, match="a.pt"):
        read_state(path)


@pytest.mark.parametrize("contents", [b"", b"PK", b"\x80\x02", b"\x80\x02}.", b"hello\n", bytes(100), b"\x89HDF\r\n"])
def test_no_file_of_torch(tmp_path, contents):
    (tmp_path / "a.pt").write_bytes(contents)
    with pytest.raises(ValueError, match="a.pt"):
        read_state(tmp_path / "a.pt")


def test_deep_nesting(tmp_path):
    write_archive(tmp_path / "a.pt", Raw(b"]" * 100_000 + b"a" * 99_999), {})
    with pytest.raises(ValueError, match="a.pt"):
        read_state(tmp_path / "a.pt")


# ---- damaged files


def check(path):
    """read_state() gives arrays, or a ValueError or an OSError."""
    try:
        state = read_state(path)
    except (ValueError, OSError) as error:
        assert str(error)
    else:
        assert all(isinstance(array, np.ndarray) for array in state.values())


@quick
@given(hs.lists(hs.sampled_from([b"(", b".", b"0", b"1", b"2", b"]", b"}", b")", b"R", b"Q", b"b", b"s", b"u", b"a",
    b"t", b"d", b"l", b"\x81", b"\x85", b"\x86", b"\x87", b"\x93", b"N", b"K\x01", dump("x"), b"q\x01", b"h\x01",
    named("collections", "OrderedDict"), named("torch", "FloatStorage"),
    named("torch._utils", "_rebuild_tensor_v2"), storage("FloatStorage", "0", 2)]), max_size=20))  # fmt: skip
def test_any_opcodes(tmp_path_factory, opcodes):
    path = tmp_path_factory.getbasetemp() / "any.pt"
    for write in WRITES.values():
        write(path, Raw(b"".join(opcodes)), {"0": np.zeros(2, np.float32)})
        check(path)


# ---- known faults


def test_an_encrypted_archive(tmp_path):
    found, storages = tensors({"a": np.ones(3, np.float32)})
    write_archive(tmp_path / "a.pt", found, storages)
    contents = bytearray((tmp_path / "a.pt").read_bytes())
    contents[6] |= 1
    contents[contents.find(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.pt").write_bytes(contents)
    with pytest.raises(ValueError, match="a.pt"):
        read_state(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["get", "items"])
def test_a_dict_whose_methods_are_replaced(tmp_path, name):
    write_archive(tmp_path / "a.pt", built(call(named("collections", "OrderedDict")), {name: 1}), {})
    try:
        assert read_state(tmp_path / "a.pt") == {}
    except ValueError as error:
        assert "a.pt" in str(error)


def test_a_file_leaves_the_reader_as_it_was(tmp_path):
    function = named("torch._utils", "_rebuild_parameter")
    write_archive(tmp_path / "a.pt", [built(function, (None, {"__defaults__": (1, 2, 3)}))], {})
    before = torch_file._parameter.__defaults__
    try:
        with pytest.raises(ValueError):
            read_state(tmp_path / "a.pt")
        assert torch_file._parameter.__defaults__ == before
    finally:
        torch_file._parameter.__defaults__ = before


def peak(path):
    """Megabytes that a process takes at most which reads the file, and its exit code."""
    code = """
import sys
from sparsetrain.interchange import read_state
try:
    read_state(sys.argv[1])
except ValueError as error:
    print(error, file=sys.stderr)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) // 1024)  # of this program alone, unlike getrusage()
"""
    command = [sys.executable, "-c", code, str(path)]
    # Not in the checkout, whose package may have no built core
    done = subprocess.run(command, cwd=path.parent, env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, int(done.stdout or 0)


def memo(path):
    """A place in the memo far away, which the C unpickler fills up to there."""
    write_archive(path, Raw(b"}r" + (1 << 24).to_bytes(4, "little")), {})


def same_storage(path):
    """One storage of 1 MB, which 300 tensors use."""
    kept = Raw(storage("ByteStorage", "0", 1 << 20))
    write_archive(path, {str(i): tensor(kept, 0, (1 << 20,), (1,)) for i in range(300)}, {"0": bytes(1 << 20)})


def transposed(path):
    """A large tensor of an old file, not in the order of memory."""
    write_sequence(path, {"a": tensor(storage("ByteStorage", "0", 5000**2, None), 0, (5000, 5000), (1, 5000))},
                   {"0": bytes(5000**2)})  # fmt: skip


def a_bytearray(path):
    """Of half a gigabyte, it says; it has none of it."""
    path.write_bytes(b"\x80\x05\x96" + (1 << 29).to_bytes(8, "little") + b"xx.")


def the_same_pairs(path):
    """200 dicts of the same 50,000 pairs."""
    pairs = b"](" + b"".join(b"J%sN\x86" % i.to_bytes(4, "little") for i in range(50_000)) + b"e"
    again = named("collections", "OrderedDict") + b"q\x010](" + b"h\x01h\x00\x85R" * 200 + b"e"
    write_archive(path, Raw(pairs + b"q\x000" + again), {})


def a_name_of_lists(path):
    """Lists of the list before, twice: too long to be shown."""
    lists = b"]q\x00" + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(25))
    write_archive(path, Raw(b"(" + lists + dump("x") + b"tQ"), {})


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux for the memory of a process")
@pytest.mark.parametrize(
    "make",
    [
        memo,
        same_storage,
        transposed,
        a_bytearray,
        the_same_pairs,
        a_name_of_lists,
    ],
)
def test_memory_is_in_proportion_to_the_file(tmp_path, make):
    make(tmp_path / "a.pt")
    code, megabytes = peak(tmp_path / "a.pt")
    assert code == 0 and megabytes < 250
