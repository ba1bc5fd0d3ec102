"""The CIFAR reader: folder and archive, both sets, and what must be refused."""

import gzip
import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.data import CIFAR10, CIFAR100, cifar, read_cifar

LAYOUTS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def small_set(layout, records=2):
    """The files of a set with few records, as bytes, and the images and labels of each."""
    rng = np.random.default_rng(0)
    files, arrays = {}, {}
    for name in (*layout.train, *layout.test):
        images = rng.integers(0, 256, (records, 3, 32, 32), dtype=np.uint8)
        labels = np.stack([rng.integers(0, n, records) for n in layout.labels], axis=1)
        rows = np.concatenate([labels.astype(np.uint8), images.reshape(records, -1)], axis=1)
        files[name], arrays[name] = rows.tobytes(), (images, labels[:, -1])
    names = "".join(f"class {i}\n" for i in range(layout.labels[-1])) + "\n"  # the real ones end so
    files[layout.names] = names.encode()
    return files, arrays


def write_folder(path, files):
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def write_archive(path, layout, files, prefix=""):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{prefix}{layout.folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    return request.param


@pytest.mark.parametrize("form", ["folder", "archive", "archive with ./"])
def test_reads_every_record_in_order(tmp_path, layout, form):
    files, arrays = small_set(layout)
    if form == "folder":
        path = write_folder(tmp_path / layout.folder, files)
    else:
        prefix = "./" if "./" in form else ""
        path = write_archive(tmp_path / layout.archive, layout, files, prefix)
    before = sorted(tmp_path.rglob("*"))
    train, test, classes = read_cifar(path, layout)
    assert sorted(tmp_path.rglob("*")) == before, "reading must not extract"
    for (images, labels), names in ((train, layout.train), (test, layout.test)):
        assert images.dtype == np.uint8 and images.flags.c_contiguous
        assert labels.dtype == np.int64
        assert np.array_equal(images, np.concatenate([arrays[name][0] for name in names]))
        assert np.array_equal(labels, np.concatenate([arrays[name][1] for name in names]))
    assert classes == tuple(f"class {i}" for i in range(layout.labels[-1]))


def test_pixels_are_planes_of_rows_from_the_top(tmp_path):
    files, _ = small_set(CIFAR10, records=1)
    record = bytearray(3073)
    record[0] = 7
    record[1 + 1024 + 3 * 32 + 5] = 200  # green, row 3, column 5
    files["test_batch.bin"] = bytes(record)
    _, (images, labels), _ = read_cifar(write_folder(tmp_path / "c", files), CIFAR10)
    assert labels[0] == 7
    assert images[0, 1, 3, 5] == 200 and images.sum() == 200


@pytest.mark.parametrize("form", ["folder", "archive"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.update({"test.bin": b""}), "test.bin has 0 bytes"),
        (lambda files: files.update({"test.bin": files["test.bin"][:-1]}), "has 6147 bytes"),
        (lambda files: files.update({"test.bin": files["test.bin"] + b"1"}), "has 6149 bytes"),
        (
            lambda files: files.update({"train.bin": files["train.bin"][:3075] + b"\x64" * 3073}),
            "train.bin has label 100 in record 1, must be 0 to 99",
        ),
        (
            lambda files: files.update({"train.bin": b"\x14" + files["train.bin"][1:]}),
            "train.bin has label 20 in record 0, must be 0 to 19",
        ),
        (
            lambda files: files.update({"fine_label_names.txt": b"cat\ndog\n"}),
            "fine_label_names.txt has 2 class names, must have 100",
        ),
        (
            lambda files: files.update({"fine_label_names.txt": b"a\n" * 40_000}),
            "has 80000 bytes, must be 1 to 65536 bytes of class names",
        ),
    ],
)
def test_bad_content_is_named(tmp_path, form, change, message):
    files, _ = small_set(CIFAR100)
    if "label 100" in message:  # the second record: coarse 19, fine 100
        files["train.bin"] = files["train.bin"][:3074] + b"\x13" + files["train.bin"][3075:]
    change(files)
    if form == "folder":
        path = write_folder(tmp_path / "c", files)
    else:
        path = write_archive(tmp_path / "c.tar.gz", CIFAR100, files)
    with pytest.raises(ValueError, match=message) as error:
        read_cifar(path, CIFAR100)
    assert str(path) in str(error.value)


def test_a_file_of_too_many_records_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "MAX_RECORDS", 1)
    path = write_archive(tmp_path / "c.tar.gz", CIFAR10, small_set(CIFAR10)[0])
    with pytest.raises(ValueError, match="has 6146 bytes, must be 1 to 1 records of 3073 bytes"):
        read_cifar(path, CIFAR10)


def test_missing_files(tmp_path):
    files, _ = small_set(CIFAR10)
    del files["data_batch_3.bin"]
    with pytest.raises(FileNotFoundError, match="data_batch_3.bin"):
        read_cifar(write_folder(tmp_path / "c", files), CIFAR10)
    with pytest.raises(ValueError, match="does not contain data_batch_3.bin"):
        read_cifar(write_archive(tmp_path / "c.tar.gz", CIFAR10, files), CIFAR10)


def test_the_other_set_is_refused(tmp_path):
    path = write_archive(tmp_path / "c.tar.gz", CIFAR100, small_set(CIFAR100)[0])
    with pytest.raises(ValueError, match="does not contain data_batch_1.bin"):
        read_cifar(path, CIFAR10)


def test_links_in_an_archive_are_not_followed(tmp_path):
    files, _ = small_set(CIFAR10)
    (tmp_path / "secret").write_bytes(files.pop("test_batch.bin"))
    path = tmp_path / "c.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo(f"{CIFAR10.folder}/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    with pytest.raises(ValueError, match="does not contain test_batch.bin"):
        read_cifar(path, CIFAR10)


def test_a_flipped_pixel_in_an_archive_is_noticed(tmp_path):
    path = write_archive(tmp_path / "c.tar.gz", CIFAR10, small_set(CIFAR10)[0])
    tar = bytearray(gzip.decompress(path.read_bytes()))
    packed = path.read_bytes()
    tar[tar.index(b"data_batch_1.bin") + 1000] ^= 1  # inside the record, away from any header
    path.write_bytes(gzip.compress(bytes(tar))[:-8] + packed[-8:])  # with the old checksum
    with pytest.raises(ValueError, match="damaged or truncated .tar.gz.*CRC"):
        read_cifar(path, CIFAR10)


def test_a_huge_size_in_a_header_neither_hangs_nor_fills_memory(tmp_path, monkeypatch):
    member = tarfile.TarInfo("other")
    member.size = 1 << 70
    header = member.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "c.tar.gz"
    path.write_bytes(gzip.compress(header + bytes(100_000)))
    with pytest.raises(ValueError, match="damaged or truncated .tar.gz file: unexpected end"):
        read_cifar(path, CIFAR10)
    monkeypatch.setattr(cifar, "MAX_UNPACKED_BYTES", 50_000)
    with pytest.raises(ValueError, match="damaged or truncated .tar.gz file: over 50000 bytes"):
        read_cifar(path, CIFAR10)


class Archive(NamedTuple):
    packed: bytes
    mutated: Path

    def __repr__(self):  # Hypothesis prints arguments
        return "archive"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A small archive, and where mutated ones go."""
    folder = tmp_path_factory.mktemp("cifar")
    path = write_archive(folder / "c.tar.gz", CIFAR10, small_set(CIFAR10, records=1)[0])
    return Archive(path.read_bytes(), folder / "mutated.tar.gz")


@settings(max_examples=150, deadline=None)
@given(
    inside=st.booleans(),
    where=st.floats(0, 1),
    removed=st.integers(0, 600),
    inserted=st.binary(max_size=12),
    truncate=st.booleans(),
)
def test_any_mutated_archive_loads_or_raises_value_error(archive, inside, where, removed, inserted, truncate):
    packed, path = archive
    whole = gzip.decompress(packed) if inside else packed
    start = int(where * len(whole))
    mutated = whole[:start] + inserted + (b"" if truncate else whole[start + removed :])
    path.write_bytes(gzip.compress(mutated, 1) if inside else mutated)
    try:
        read_cifar(path, CIFAR10)
    except ValueError as error:
        assert str(path) in str(error)
