"""The data sets that are known by name: where they are looked for, read from and downloaded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsetrain.checks import one_of
from sparsetrain.data.cifar import CIFAR10, CIFAR100, Layout, read_cifar
from sparsetrain.data.dataset import Dataset
from sparsetrain.data.idx import read_idx

ENVIRONMENT = "SPARSETRAIN_DATA"
IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class Place(NamedTuple):
    """A folder in which a set is looked for, who named it, and which files it lacks."""

    named_by: str  # "data_dir", "SPARSETRAIN_DATA", "cache" or "package"
    folder: Path
    missing: tuple[str, ...]

    @property
    def found(self):
        """True if every file of the set is there."""
        return not self.missing


@dataclass(frozen=True)
class _IdxSet:
    """A set of four IDX files in a folder of its own, each plain or .gz."""

    folder: str
    classes: tuple[str, ...]
    train: int  # how many images the publisher's set has
    test: int
    mirrors: tuple[str, ...] = ()
    checksums: tuple[str, ...] = ()  # of IDX_FILES
    shape = (1, 28, 28)

    @property
    def files(self):
        return tuple(f"{self.folder}/{name}" for name in IDX_FILES)

    @property
    def wanted(self):
        return f"{' '.join(self.files)} (each plain or .gz)"

    def missing(self, root):
        return tuple(name for name in self.files if not _plain_or_gz(root / name).is_file())

    def read(self, root):
        parts = [read_idx(_plain_or_gz(root / name), ndim) for name, ndim in zip(self.files, (3, 1, 3, 1), strict=True)]
        train_x, train_y, test_x, test_y = parts
        train = train_x[:, np.newaxis], train_y.astype(np.int64)
        test = test_x[:, np.newaxis], test_y.astype(np.int64)
        return train, test, self.classes

    @property
    def downloads(self):
        # strict=False: the embedded set has no downloads
        for name, checksum in zip(IDX_FILES, self.checksums, strict=False):
            yield f"{self.folder}/{name}", checksum, [f"{mirror}/{name}" for mirror in self.mirrors]


@dataclass(frozen=True)
class _CifarSet:
    """A set in CIFAR's binary version: the publisher's folder, or the archive of it."""

    layout: Layout
    checksum: str
    mirror: str = "https://www.cs.toronto.edu/~kriz"
    train: int = 50_000
    test: int = 10_000
    shape = (3, 32, 32)

    @property
    def files(self):
        return (self.layout.archive,)

    @property
    def wanted(self):
        return f"{self.layout.archive} (or what is in it, the folder {self.layout.folder})"

    def missing(self, root):
        folder = root / self.layout.folder
        if (root / self.layout.archive).is_file():
            return ()
        if not folder.is_dir():
            return self.files
        names = (f"{self.layout.folder}/{name}" for name in self.layout.files)
        return tuple(name for name in names if not (root / name).is_file())

    def read(self, root):
        folder = root / self.layout.folder
        complete = all((folder / name).is_file() for name in self.layout.files)
        return read_cifar(folder if complete else root / self.layout.archive, self.layout)

    @property
    def downloads(self):
        archive = self.layout.archive
        yield archive, self.checksum, [f"{self.mirror}/{archive}"]


_SETS = {
    "fashion-mini": _IdxSet("fashion_mini", FASHION_CLASSES, train=10_000, test=2_000),
    # The checksums are those of the publishers' files: sha256 taken from the files themselves
    # (Fashion-MNIST's README and CIFAR's page list md5).
    "fashion-mnist": _IdxSet(
        "fashion-mnist",
        FASHION_CLASSES,
        train=60_000,
        test=10_000,
        mirrors=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
        ),
        checksums=(
            "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "mnist": _IdxSet(
        "mnist",
        tuple("0123456789"),
        train=60_000,
        test=10_000,
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            "https://storage.googleapis.com/cvdf-datasets/mnist",
        ),
        checksums=(
            "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "cifar10": _CifarSet(CIFAR10, "md5:c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": _CifarSet(CIFAR100, "md5:03b5dce01913d631647c71ecec9e9cb8"),
}
NAMES = tuple(_SETS)


def where(name, data_dir=None):
    """Every place in which load() looks for a set, in its order: a list of Place.

    That is data_dir where it is given, the environment's SPARSETRAIN_DATA where it is set, and the
    user's cache; fashion-mini is part of the package and looked for nowhere else.
    NotADirectoryError if data_dir is given and is not a folder.
    """
    source = _SETS[one_of("name", name, NAMES)]
    if data_dir is not None and not Path(data_dir).is_dir():
        raise NotADirectoryError(f"data_dir is {str(data_dir)!r}, must be an existing folder")
    if name == "fashion-mini":
        roots = {"package": Path(__file__).parent}
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        roots = {
            "data_dir": data_dir,
            ENVIRONMENT: os.environ.get(ENVIRONMENT),
            "cache": Path(cache, "sparsetrain"),
        }
    return [Place(named_by, Path(root), source.missing(Path(root))) for named_by, root in roots.items() if root]


def load(name, data_dir=None, download=True):
    """Loads a data set by name, one of NAMES, from the first place of where() that has all of it.

    Under data_dir (and the other places) lie the publishers' files: mnist/ and fashion-mnist/ with
    four IDX files each, plain or .gz; cifar-10-batches-bin/ and cifar-100-binary/, or the .tar.gz
    of each. A set found nowhere is downloaded into the user's cache by pooch, over https and with
    a checksum, unless download is False. FileNotFoundError, in one line that says which files to
    put where, if there is neither; ValueError if a file is damaged or the set is not complete.
    """
    places = where(name, data_dir)
    source = _SETS[name]
    place = next((place for place in places if place.found), None)
    if place is None:
        place = places[-1]
        try:
            if not download:
                raise OSError("download is False")
            _download(source, place.folder)
        except (ImportError, OSError) as error:  # no pooch, no network
            raise FileNotFoundError(_not_found(name, source, places, error)) from error
    train, test, classes = source.read(place.folder)
    for part, (images, _), count in (("train", train, source.train), ("test", test, source.test)):
        if images.shape != (count, *source.shape):
            raise ValueError(
                f"{name} in {place.folder}: {part} images have shape {images.shape}, must be {(count, *source.shape)}"
            )
    return Dataset(name, train, test, classes)


def _plain_or_gz(path):
    """path, which ends in .gz, or the same without it where only that exists."""
    plain = path.with_suffix("")
    return plain if plain.is_file() and not path.is_file() else path


def _download(source, root):
    """Fetches the files of a set into root, each from the first mirror that has it."""
    try:
        import pooch
    except ImportError as error:
        raise ImportError("pooch is not installed (pip install 'sparsetrain[data]')") from error

    for file, checksum, urls in source.downloads:
        failures = []
        for url in urls:
            try:
                pooch.retrieve(
                    url,
                    known_hash=checksum,
                    fname=Path(file).name,
                    path=(root / file).parent,
                    downloader=pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16),
                )
                break
            except ValueError:  # pooch found another checksum, and has deleted the file
                failures.append(f"{url} has the wrong checksum")
            except OSError as error:  # no network, no such page, no room, no permission
                failures.append(f"{url} gave {type(error).__name__}")
        else:
            raise OSError(", ".join(failures))


def _not_found(name, source, places, error):
    looked = ", ".join(
        f"{place.folder} ({place.named_by}) "
        + ("has none" if place.missing == source.files else f"lacks {' '.join(place.missing)}")
        for place in places
    )
    return (
        f"{name} not found: put {source.wanted} into {places[0].folder}, or name their folder "
        f"with data_dir or {ENVIRONMENT}; searched: {looked}; not downloaded: {error}"
    )
