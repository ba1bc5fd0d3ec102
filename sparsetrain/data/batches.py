"""Shuffled, augmented, normalised batches, the next one prepared while the current one trains."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from sparsetrain.checks import flag, integer
from sparsetrain.data.dataset import check_pair


class Batches:
    """Passes over images (N, C, H, W), uint8 or float32, and labels int64 (N,), in batches.

    Each pass yields (x float32 (n, C, H, W), y int64 (n,)), freshly allocated; n is batch_size but
    for the last batch, which has what remains, or is left out with drop_last. len() is the number
    of batches in a pass.

    shuffle: another order in every pass. crop: each image is shifted by up to crop pixels either
    way in both directions, zeros come in at the edges. flip: each image is mirrored left to right
    with a chance of one half. After that uint8 images are scaled to [0, 1], float32 ones taken as
    they are, and with mean and std (one value a channel) x becomes (x - mean) / std.

    epoch is the number of the next pass; every iter() takes it and adds one. The order and what
    happens to an image in pass e depend on seed and e only: set epoch to resume, and the same
    batches come. prefetch: a thread prepares the next batch while the caller works on the current
    one; it ends with the pass, or when the iterator is closed or dropped, and what it raises comes
    out of the iterator.

    ValueError if images and labels do not fit each other, for NaN or infinity in images, and for
    settings out of range; TypeError for what is not an array, an integer or a bool. The arrays are
    kept, not copied: do not write to them.
    """

    def __init__(
        self,
        images,
        labels,
        batch_size,
        *,
        shuffle=False,
        seed=0,
        crop=0,
        flip=False,
        mean=None,
        std=None,
        drop_last=False,
        prefetch=True,
    ):
        check_pair(images, labels)
        self.images, self.labels = images, labels
        self.batch_size = integer("batch_size", batch_size, low=1)
        self.seed = integer("seed", seed, low=0)
        self.crop = integer("crop", crop, low=0)
        if self.crop >= min(images.shape[2:]):
            size = "x".join(str(side) for side in images.shape[2:])
            raise ValueError(f"crop is {crop}, must be smaller than the images, {size} pixels")
        self.shuffle, self.flip = flag("shuffle", shuffle), flag("flip", flip)
        self.drop_last, self.prefetch = flag("drop_last", drop_last), flag("prefetch", prefetch)
        if self.drop_last and len(images) < self.batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, with drop_last it must be at most the number of images, {len(images)}"
            )
        self._scale, self._shift = _affine(images, mean, std)
        self.epoch = 0

    def __len__(self):
        batches = len(self.images) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self):
        epoch = integer("epoch", self.epoch, low=0)
        self.epoch = epoch + 1
        batches = self._batches(epoch)
        return _prepared_ahead(batches) if self.prefetch else batches

    def _batches(self, epoch):
        """The batches of pass epoch, one after the other."""
        count = len(self.images)
        # spawn_key keeps the streams of every (seed, epoch) apart, which seed + epoch would not
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        corners = rng.integers(0, 2 * self.crop, size=(count, 2), endpoint=True)
        flips = rng.random(count) < 0.5 if self.flip else np.zeros(count, bool)
        for i in range(len(self)):
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            images = self.images[chosen]  # a copy
            if self.crop:
                images = _crop(images, self.crop, corners[chosen])
            if self.flip:
                flip = flips[chosen]
                images[flip] = images[flip, ..., ::-1]
            x = np.empty(images.shape, np.float32)
            np.multiply(images, self._scale, out=x)
            x += self._shift
            yield x, self.labels[chosen]


def _crop(images, pad, corners):
    """The (H, W) window at each image's corner (row, column) of the image padded with zeros."""
    n, channels, height, width = images.shape
    padded = np.zeros((n, channels, height + 2 * pad, width + 2 * pad), images.dtype)
    padded[:, :, pad : pad + height, pad : pad + width] = images
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    return windows[np.arange(n), :, corners[:, 0], corners[:, 1]]


def _prepared_ahead(batches):
    """The same batches; a thread prepares the next one while the caller works on the current."""
    with ThreadPoolExecutor(1, thread_name_prefix="sparsetrain-batches") as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def _affine(images, mean, std):
    """Scale and shift, float32 (C, 1, 1), so that image * scale + shift is normalised."""
    channels = images.shape[1]
    if (mean is None) != (std is None):
        came = "mean is None, std is not" if mean is None else "std is None, mean is not"
        raise ValueError(f"{came}: give both or none")
    if mean is None:
        mean, std = np.zeros(channels), np.ones(channels)
    mean, std = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    if std.min() <= 0:
        raise ValueError(f"std[{std.argmin()}] is {std.min()}, must be > 0")
    unit = 255 if images.dtype == np.uint8 else 1
    return (1 / (unit * std)).astype(np.float32), (-mean / std).astype(np.float32)


def _per_channel(argument, values, channels):
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (channels,) or not np.isfinite(array).all():
        raise ValueError(f"{argument} is {values!r}, must be {channels} finite numbers, one a channel")
    return array.reshape(channels, 1, 1)
