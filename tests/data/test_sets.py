"""The named sets: where they are found, what is said when they are not, and the embedded set."""

import dataclasses
import gzip
import hashlib
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from sparsetrain.data import CIFAR10, NAMES, load, sets, where
from sparsetrain.data.fashion_mini import make

REAL = os.environ.get("SPARSETRAIN_DATA")
EMBEDDED = Path(sets.__file__).parent / "fashion_mini"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Three empty places of search, small sets, and no way out to the network."""
    folders = {name: tmp_path / name for name in ("data_dir", "environment", "xdg")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setenv("SPARSETRAIN_DATA", str(folders["environment"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders["xdg"]))
    monkeypatch.setitem(sys.modules, "pooch", None)
    for name in ("mnist", "cifar10"):
        small = dataclasses.replace(sets._SETS[name], train=10, test=4)
        monkeypatch.setitem(sets._SETS, name, small)
    return {**folders, "cache": folders["xdg"] / "sparsetrain"}


def write_mnist(root, value, counts=(10, 4), suffix=".gz"):
    """MNIST's four files with few images, all pixels of value."""
    (root / "mnist").mkdir(parents=True)
    for part, count in zip(("train", "t10k"), counts, strict=True):
        for kind, array in (
            ("images-idx3", np.full((count, 28, 28), value, np.uint8)),
            ("labels-idx1", np.arange(count, dtype=np.uint8) % 10),
        ):
            shape = struct.pack(f">{array.ndim}I", *array.shape)
            content = bytes((0, 0, 8, array.ndim)) + shape + array.tobytes()
            packed = gzip.compress(content) if suffix else content
            (root / "mnist" / f"{part}-{kind}-ubyte{suffix}").write_bytes(packed)


def write_cifar10(root, records=2):
    folder = root / CIFAR10.folder
    folder.mkdir(parents=True)
    for name in CIFAR10.train:
        (folder / name).write_bytes(bytes(3073 * records))
    (folder / CIFAR10.test[0]).write_bytes(bytes(3073 * 4))
    (folder / CIFAR10.names).write_text("\n".join("abcdefghij"))


def test_data_dir_comes_before_the_environment_before_the_cache(places):
    write_mnist(places["cache"], 3)
    assert load("mnist").train[0].max() == 3
    write_mnist(places["environment"], 2)
    assert load("mnist").train[0].max() == 2
    write_mnist(places["data_dir"], 1)
    assert load("mnist", places["data_dir"]).train[0].max() == 1
    assert load("mnist", str(places["data_dir"])).train[0].max() == 1
    assert [place.named_by for place in where("mnist", places["data_dir"])] == [
        "data_dir",
        "SPARSETRAIN_DATA",
        "cache",
    ]


def test_without_xdg_the_cache_is_in_the_home(places, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("SPARSETRAIN_DATA")
    monkeypatch.setenv("HOME", "/home/nobody")
    (place,) = where("mnist")
    assert place.folder == Path("/home/nobody/.cache/sparsetrain")
    assert not place.found


def test_plain_idx_files_do_as_well(places):
    write_mnist(places["environment"], 5, suffix="")
    dataset = load("mnist")
    assert dataset.train[0].shape == (10, 1, 28, 28) and dataset.train[0].dtype == np.uint8
    assert dataset.test[1].tolist() == [0, 1, 2, 3] and dataset.test[1].dtype == np.int64
    assert dataset.classes == tuple("0123456789")
    assert dataset.mean == (5 / 255,)


def test_cifar_folder_is_found_by_its_name(places):
    write_cifar10(places["environment"])
    assert where("cifar10")[0].found
    assert load("cifar10").train[0].shape == (10, 3, 32, 32)


def test_an_incomplete_place_is_passed_over(places):
    write_mnist(places["environment"], 2)
    (places["environment"] / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert where("mnist")[0].missing == ("mnist/t10k-labels-idx1-ubyte.gz",)
    with pytest.raises(FileNotFoundError, match=r"\(SPARSETRAIN_DATA\) lacks mnist/t10k-labels"):
        load("mnist")
    write_mnist(places["cache"], 3)
    assert load("mnist").train[0].max() == 3


def test_an_incomplete_cifar_folder_names_what_it_lacks(places):
    write_cifar10(places["environment"])
    (places["environment"] / CIFAR10.folder / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match="lacks cifar-10-batches-bin/data_batch_4.bin,"):
        load("cifar10")


def test_a_set_that_is_not_whole_is_refused(places):
    write_mnist(places["environment"], 2, counts=(9, 4))
    with pytest.raises(ValueError, match=r"mnist in .*environment: train images have shape \(9,"):
        load("mnist")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "mnist/t10k-labels-idx1-ubyte.gz"),
        ("fashion-mnist", "fashion-mnist/train-images-idx3-ubyte.gz"),
        ("cifar10", "cifar-10-binary.tar.gz"),
        ("cifar100", "cifar-100-binary"),
    ],
)
@pytest.mark.parametrize("download", [True, False])
def test_not_found_says_in_one_line_where_to_put_which_file(places, name, file, download):
    with pytest.raises(FileNotFoundError) as error:
        load(name, places["data_dir"], download)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{name} not found: put ")
    assert file in message
    assert f"into {places['data_dir']}, or name their folder with data_dir" in message
    for place in ("data_dir", "environment", "cache"):
        assert str(places[place]) in message
    assert ("pooch is not installed" if download else "download is False") in message


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="cifar10"):
        load("cifar")
    with pytest.raises(ValueError, match="name"):
        where("imagenet")
    with pytest.raises(NotADirectoryError, match="data_dir is .*absent'"):
        load("fashion-mini", tmp_path / "absent")


@pytest.fixture
def pooch(monkeypatch):
    monkeypatch.delitem(sys.modules, "pooch")
    return pytest.importorskip("pooch")


def test_download_goes_to_the_cache_mirror_by_mirror(places, pooch, tmp_path, monkeypatch):
    write_mnist(tmp_path / "server", 7)
    calls = []

    def retrieve(url, known_hash, fname, path, downloader):
        calls.append((url, known_hash))
        if "ossci" in url:
            raise ConnectionError("this mirror is down")
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes((tmp_path / "server" / "mnist" / fname).read_bytes())

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert load("mnist").train[0].max() == 7
    assert len(calls) == 8
    assert calls[1] == (
        "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz",
        "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    )
    assert where("mnist")[-1].found
    load("mnist")
    assert len(calls) == 8


@pytest.mark.parametrize(
    ("failure", "said"),
    [(ConnectionError("no\nnetwork"), "gave ConnectionError"), (ValueError("md5"), "checksum")],
)
def test_failed_download_is_one_line(places, pooch, monkeypatch, failure, said):
    def retrieve(*args, **kwargs):
        raise failure

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(FileNotFoundError, match=f"cifar-10-binary.tar.gz .*{said}") as error:
        load("cifar10")
    assert "\n" not in str(error.value)


def test_downloads_are_https_with_a_checksum():
    sizes = {"sha256": 64, "md5": 32}
    for name in NAMES:
        downloads = list(sets._SETS[name].downloads)
        assert len(downloads) == (0 if name == "fashion-mini" else len(sets._SETS[name].files))
        for _, checksum, urls in downloads:
            kind, digits = checksum.split(":")
            assert len(digits) == sizes[kind]
            assert urls and all(url.startswith("https://") for url in urls)


def test_embedded_set_is_balanced(places):
    dataset = load("fashion-mini")
    assert dataset.train[0].shape == (10_000, 1, 28, 28)
    assert dataset.test[0].shape == (2_000, 1, 28, 28)
    assert np.bincount(dataset.train[1]).tolist() == [1000] * 10
    assert np.bincount(dataset.test[1]).tolist() == [200] * 10
    assert len(dataset.classes) == 10
    assert where("fashion-mini")[0].named_by == "package"


def test_embedded_files_are_those_that_were_made():
    checksums = {
        "train-images-idx3-ubyte.gz": "4c5a98d8217bb13daf6c67aa749119ad",
        "train-labels-idx1-ubyte.gz": "4cc57b2814542612de157ac954fec39e",
        "t10k-images-idx3-ubyte.gz": "96e154d187e1cf82145056c4d894e8d4",
        "t10k-labels-idx1-ubyte.gz": "09f5dc909c8586184bae0fbde44202a1",
    }
    for name, start in checksums.items():
        assert hashlib.sha256((EMBEDDED / name).read_bytes()).hexdigest().startswith(start)
    assert sum((EMBEDDED / name).stat().st_size for name in checksums) <= 6_000_000
    assert "Copyright (c) 2017 Zalando SE" in (EMBEDDED / "LICENSE").read_text()


def real(*paths):
    missing = [path for path in paths if REAL is None or not Path(REAL, path).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"SPARSETRAIN_DATA has no {', '.join(missing)}")


@real("fashion-mnist")
def test_make_gives_the_embedded_files(tmp_path):
    make.make(Path(REAL, "fashion-mnist"), tmp_path)
    for name in sets.IDX_FILES:
        made, embedded = (tmp_path / name).read_bytes(), (EMBEDDED / name).read_bytes()
        assert gzip.decompress(made) == gzip.decompress(embedded)
        if "ng" not in zlib.ZLIB_RUNTIME_VERSION:  # zlib-ng packs the same content differently
            assert made == embedded


@real("fashion-mnist", "mnist")
@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_checksums_are_those_of_the_publishers_files(name):
    for file, checksum, _ in sets._SETS[name].downloads:
        content = Path(REAL, file).read_bytes()
        assert checksum == f"sha256:{hashlib.sha256(content).hexdigest()}"


# The published or widely used constants: mnist .1307 .3081, fashion-mnist .2860 .3530,
# cifar10 .4914 .4822 .4465 and .2470 .2435 .2616
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        pytest.param("mnist", [0.1307], [0.3081], marks=real("mnist")),
        pytest.param("fashion-mnist", [0.2860], [0.3530], marks=real("fashion-mnist")),
        pytest.param(
            "cifar10",
            [0.4914, 0.4822, 0.4465],
            [0.2470, 0.2435, 0.2616],
            marks=real("cifar-10-batches-bin"),
        ),
    ],
)
def test_real_sets(monkeypatch, name, mean, std):
    counts = {"mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000}
    monkeypatch.setitem(sets._SETS, name, dataclasses.replace(sets._SETS[name], train=counts[name], test=10_000))
    dataset = load(name, REAL)
    np.testing.assert_allclose(dataset.mean, mean, atol=6e-5)
    np.testing.assert_allclose(dataset.std, std, atol=6e-5)
    assert len(np.bincount(dataset.train[1])) == len(dataset.classes) == 10
    if name != "mnist":  # MNIST's digits are not equally many
        assert set(np.bincount(dataset.test[1])) == {1000}
