"""A data set in memory, and what every pair of images and labels must be."""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images with their labels.

    train and test are (images uint8 (N, C, H, W), labels int64 (N,)); classes names the labels.
    mean and std have one value a channel: those of the training images, scaled to [0, 1].
    ValueError if the arrays do not fit each other or a label has no class.
    """

    name: str
    train: tuple[np.ndarray, np.ndarray] = field(repr=False)
    test: tuple[np.ndarray, np.ndarray] = field(repr=False)
    classes: tuple[str, ...]
    mean: tuple[float, ...] = field(init=False)
    std: tuple[float, ...] = field(init=False)

    def __post_init__(self):
        for part, (images, labels) in (("train", self.train), ("test", self.test)):
            check_pair(images, labels, of=f"{self.name} {part} ", dtypes=(np.uint8,))
            if labels.max() >= len(self.classes):
                first = (labels >= len(self.classes)).argmax()
                raise ValueError(
                    f"{self.name} {part} labels[{first}] is {labels[first]}, "
                    f"must be below the number of classes, {len(self.classes)}"
                )
        train, test = self.train[0].shape[1:], self.test[0].shape[1:]
        if train != test:
            raise ValueError(f"{self.name} test images are {test}, must be {train} as the train images")
        mean, std = channel_statistics(self.train[0])
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)


def check_pair(images, labels, *, of="", dtypes=(np.uint8, np.float32)):
    """Checks images (N, C, H, W) of one of dtypes and labels int64 (N,), N and C at least 1.

    of is put before "images" and "labels" in messages. ValueError also for a label below 0 and for
    NaN or infinity in float images, with the first index.
    """
    wanted = {"images": (4, dtypes), "labels": (1, (np.int64,))}
    for argument, array in (("images", images), ("labels", labels)):
        ndim, allowed = wanted[argument]
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{of}{argument} is a {type(array).__name__}, must be a NumPy array")
        if array.dtype not in allowed:
            names = " or ".join(np.dtype(dtype).name for dtype in allowed)
            raise ValueError(f"{of}{argument} is {array.dtype}, must be {names}")
        if array.ndim != ndim:
            axes = "(N, C, H, W)" if ndim == 4 else "(N,)"
            raise ValueError(f"{of}{argument} has shape {array.shape}, must be {axes}")
    if images.size == 0:
        raise ValueError(f"{of}images has shape {images.shape}, must not be empty")
    if len(labels) != len(images):
        raise ValueError(f"{of}labels has {len(labels)} entries, images has {len(images)}")
    if labels.min() < 0:
        first = (labels < 0).argmax()
        raise ValueError(f"{of}labels[{first}] is {labels[first]}, must be >= 0")
    if images.dtype != np.uint8:
        finite = np.isfinite(images)
        if not finite.all():
            first = np.unravel_index(finite.argmin(), images.shape)
            index = ", ".join(str(i) for i in first)
            raise ValueError(f"{of}images[{index}] is {images[first]}, must be finite")


def channel_statistics(images):
    """Mean and standard deviation of each channel of uint8 images (N, C, H, W), scaled to [0, 1].

    Sums are exact integers, taken a thousand images at a time to stay in little memory.
    """
    means, stds = [], []
    for channel in range(images.shape[1]):
        total = squares = count = 0
        for start in range(0, len(images), 1000):
            pixels = images[start : start + 1000, channel]
            count += pixels.size
            total += int(pixels.sum(dtype=np.int64))
            squares += int(np.square(pixels, dtype=np.uint16).sum(dtype=np.int64))
        means.append(total / (255 * count))
        stds.append(math.sqrt(count * squares - total * total) / (255 * count))
    return tuple(means), tuple(stds)
