"""Dataset: its checks and its exact channel statistics."""

import numpy as np
import pytest

from sparsetrain.data import Dataset


def pair(n=6, shape=(2, 3, 4), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return images, np.arange(n, dtype=np.int64) % classes


def test_statistics_are_those_of_the_training_images():
    train = pair(n=2500)  # more than one piece
    dataset = Dataset("x", train, pair(seed=1), ("a", "b", "c"))
    scaled = train[0] / 255
    np.testing.assert_allclose(dataset.mean, scaled.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, scaled.std(axis=(0, 2, 3)), rtol=1e-12)


def test_a_constant_channel_has_no_deviation():
    images, labels = pair()
    images[:, 1] = 51
    dataset = Dataset("x", (images, labels), pair(), ("a", "b", "c"))
    assert dataset.mean[1] == 0.2 and dataset.std[1] == 0


def test_repr_leaves_out_the_arrays():
    assert "array" not in repr(Dataset("x", pair(), pair(), ("a", "b", "c")))


IMAGES, LABELS = pair()


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        ((IMAGES.tolist(), LABELS), TypeError, "x train images is a list, must be a NumPy array"),
        ((IMAGES, [0, 1]), TypeError, "x train labels is a list"),
        ((IMAGES / 255, LABELS), ValueError, "images is float64, must be uint8"),
        ((IMAGES.astype(object), LABELS), ValueError, "images is object, must be uint8"),
        ((IMAGES[0], LABELS), ValueError, r"images has shape \(2, 3, 4\), must be \(N, C, H, W\)"),
        ((IMAGES, LABELS.astype(np.uint8)), ValueError, "labels is uint8, must be int64"),
        ((IMAGES, LABELS[:, None]), ValueError, r"labels has shape \(6, 1\), must be \(N,\)"),
        ((IMAGES[:0], LABELS[:0]), ValueError, r"images has shape \(0, 2, 3, 4\).*not be empty"),
        ((IMAGES, LABELS[:5]), ValueError, "labels has 5 entries, images has 6"),
        ((IMAGES, LABELS - 1), ValueError, r"labels\[0\] is -1, must be >= 0"),
        ((IMAGES, LABELS + 1), ValueError, r"labels\[2\] is 3, must be below.*classes, 3"),
        ((IMAGES[:, :1], LABELS), ValueError, r"test images are \(2, 3, 4\), must be \(1, 3, 4\)"),
    ],
)
def test_bad_pairs_are_named(train, error, message):
    with pytest.raises(error, match=message):
        Dataset("x", train, (IMAGES, LABELS), ("a", "b", "c"))
