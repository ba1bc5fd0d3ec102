"""Batches: contents, reproducibility, augmentation against plain loops, and the thread."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.data import Batches


def pair(n=10, shape=(2, 5, 4), dtype=np.uint8):
    """Images of which no two are alike, labelled by their number."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, *shape)).astype(dtype), np.arange(n, dtype=np.int64)


def passes(batches, count=1):
    """What count passes yield, as lists of bytes."""
    return [[(x.tobytes(), y.tolist()) for x, y in batches] for _ in range(count)]


def labels_of(batches):
    return [label for _, y in batches for label in y.tolist()]


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [
        (1, False, [1] * 10),
        (3, False, [3, 3, 3, 1]),
        (3, True, [3, 3, 3]),
        (5, False, [5, 5]),
        (5, True, [5, 5]),
        (10, True, [10]),
        (11, False, [10]),
    ],
)
def test_sizes(batch_size, drop_last, sizes):
    batches = Batches(*pair(), batch_size, drop_last=drop_last)
    assert [len(x) for x, _ in batches] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize("options", [{}, {"crop": 2, "flip": True, "shuffle": True}])
def test_what_is_yielded(options):
    images, labels = pair()
    for x, y in Batches(images, labels, 4, **options):
        assert x.dtype == np.float32 and x.shape[1:] == (2, 5, 4) and x.flags.c_contiguous
        assert y.dtype == np.int64 and y.shape == x.shape[:1]
        assert x.flags.writeable and not np.shares_memory(x, images)
        assert not np.shares_memory(y, labels)


def test_in_order_scaled_and_normalised():
    images, labels = pair()
    mean, std = (0.4, 0.5), (0.2, 0.3)
    x = np.concatenate([x for x, _ in Batches(images, labels, 4)])
    np.testing.assert_allclose(x, images / 255, rtol=2e-7)
    x = np.concatenate([x for x, _ in Batches(images, labels, 4, mean=mean, std=std)])
    wanted = (images / 255 - np.reshape(mean, (2, 1, 1))) / np.reshape(std, (2, 1, 1))
    np.testing.assert_allclose(x, wanted, atol=1e-6)
    assert labels_of(Batches(images, labels, 4)) == list(range(10))


def test_float_images_are_taken_as_they_are():
    images, labels = pair(dtype=np.float32)
    images -= 100
    x = np.concatenate([x for x, _ in Batches(images, labels, 4)])
    assert np.array_equal(x, images)
    x = np.concatenate([x for x, _ in Batches(images, labels, 4, mean=(1, 1), std=(2, 2))])
    np.testing.assert_allclose(x, (images - 1) / 2, rtol=1e-6)


def test_shuffled_passes_differ_and_hold_every_image_once():
    batches = Batches(*pair(n=50), 8, shuffle=True)
    first, second = labels_of(batches), labels_of(batches)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != list(range(50)) and first != second


AUGMENTED = {"shuffle": True, "crop": 2, "flip": True, "mean": (0.1, 0.2), "std": (0.3, 0.4)}


def test_the_same_seed_gives_the_same_passes():
    one = passes(Batches(*pair(), 3, seed=5, **AUGMENTED), 3)
    assert one == passes(Batches(*pair(), 3, seed=5, **AUGMENTED), 3)
    assert one != passes(Batches(*pair(), 3, seed=6, **AUGMENTED), 3)


def test_prefetch_changes_nothing():
    one = passes(Batches(*pair(), 3, prefetch=True, **AUGMENTED), 3)
    assert one == passes(Batches(*pair(), 3, prefetch=False, **AUGMENTED), 3)


def test_setting_the_epoch_resumes():
    batches = Batches(*pair(), 3, **AUGMENTED)
    whole = passes(batches, 4)
    assert batches.epoch == 4
    resumed = Batches(*pair(), 3, **AUGMENTED)
    resumed.epoch = 2
    assert passes(resumed, 2) == whole[2:]
    batches.epoch = 0
    assert passes(batches) == whole[:1]


def test_a_pass_does_not_depend_on_the_global_generator_or_on_a_broken_off_pass():
    batches = Batches(*pair(), 3, **AUGMENTED)
    whole = passes(batches, 2)
    batches.epoch = 0
    next(iter(batches))
    assert batches.epoch == 1
    np.random.default_rng().random()
    assert passes(batches) == whole[1:]


def test_large_seeds_do_not_meet_other_epochs():
    # as plain 32-bit words, seed 2**32 in pass 0 would be seed 0 in pass 1
    far, near = (Batches(*pair(n=100), 100, shuffle=True, seed=seed) for seed in (2**32, 0))
    near.epoch = 1
    assert labels_of(far) != labels_of(near)


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crop_and_flip_are_what_a_loop_over_all_possibilities_finds(shape, dtype):
    """Each image must be one of its own (shift, flip) variants; all variants must occur."""
    crop, (_, height, width) = 2, shape
    image = np.random.default_rng(1).integers(1, 256, (1, *shape)).astype(dtype)
    padded = np.pad(image[0], ((0, 0), (crop, crop), (crop, crop)))
    variants = {}
    for row in range(2 * crop + 1):
        for column in range(2 * crop + 1):
            window = padded[:, row : row + height, column : column + width]
            for flip in (False, True):
                variant = window[..., ::-1] if flip else window
                variants[variant.astype(np.float32).tobytes()] = (row, column, flip)
    assert len(variants) == 50

    batches = Batches(np.repeat(image, 2000, axis=0), np.zeros(2000, np.int64), 64, crop=2, flip=True)
    unit = 255 if dtype == np.uint8 else 1
    seen = [variants[np.round(x * unit).tobytes()] for xs, _ in batches for x in xs]
    counts = np.array([seen.count(variant) for variant in variants.values()])
    # 2000 draws of 50 equal chances: 40 each, deviation 6.3; the seed is fixed
    assert counts.min() > 15 and counts.max() < 65


def test_flip_alone_mirrors_about_half_left_to_right():
    images, labels = pair(n=400)
    x = np.concatenate([x for x, _ in Batches(images, labels, 64, flip=True)])
    same = (np.round(x * 255) == images).all(axis=(1, 2, 3))
    mirrored = (np.round(x * 255) == images[..., ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_padding_is_zero_before_normalising():
    images = np.full((1, 1, 4, 4), 255, np.uint8)
    batches = Batches(images, np.zeros(1, np.int64), 1, crop=3, mean=(0.5,), std=(0.5,))
    values = np.unique([x for _ in range(20) for x, _ in batches])
    np.testing.assert_allclose(values, [-1, 1], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    batch_size=st.integers(1, 25),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    crop=st.integers(0, 5),
    prefetch=st.booleans(),
)
def test_every_image_comes_once_whatever_the_sizes(n, batch_size, height, width, crop, prefetch):
    images, labels = pair(n, (1, height, width))
    crop = min(crop, height - 1, width - 1)
    batches = Batches(images, labels, batch_size, shuffle=True, crop=crop, prefetch=prefetch)
    assert sorted(labels_of(batches)) == list(range(n))


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("sparsetrain-batches")]


def test_the_next_batch_is_prepared_meanwhile(monkeypatch):
    batches = Batches(*pair(), 2)
    prepared = []
    original = batches._batches

    def watched(epoch):
        for batch in original(epoch):
            prepared.append(threading.current_thread().name)
            yield batch

    monkeypatch.setattr(batches, "_batches", watched)
    iterator = iter(batches)
    next(iterator)
    deadline = time.monotonic() + 10
    while len(prepared) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)
    assert len(prepared) == 2, "one batch ahead, no more"
    assert all(name.startswith("sparsetrain-batches") for name in prepared)
    iterator.close()


def test_the_thread_ends_with_the_pass_or_the_iterator():
    batches = Batches(*pair(), 2)
    assert len(list(batches)) == 5 and not threads()
    iterator = iter(batches)
    next(iterator)
    assert len(threads()) == 1
    iterator.close()
    assert not threads()
    for _ in batches:
        break
    assert not threads(), "a dropped iterator is closed"
    iter(batches)
    assert not threads(), "an iterator that is not used starts none"


@pytest.mark.parametrize("prefetch", [False, True])
def test_what_the_thread_raises_comes_out(prefetch):
    images, labels = pair()
    batches = Batches(images, labels, 4, prefetch=prefetch)
    batches.labels = labels[:5]  # the second batch asks for more
    iterator = iter(batches)
    next(iterator)
    with pytest.raises(IndexError):
        list(iterator)
    assert not threads()


IMAGES, LABELS = pair()
NAN = IMAGES.astype(np.float32)
NAN[3, 1, 4, 2] = np.nan
INFINITE = IMAGES.astype(np.float32)
INFINITE[0, 0, 0, 1] = -np.inf


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (IMAGES.tolist(), LABELS, TypeError, "images is a list, must be a NumPy array"),
        (IMAGES, LABELS.tolist(), TypeError, "labels is a list"),
        (IMAGES.astype(np.float64), LABELS, ValueError, "is float64, must be uint8 or float32"),
        (IMAGES, LABELS.astype(np.int32), ValueError, "labels is int32, must be int64"),
        (IMAGES[:, 0], LABELS, ValueError, r"has shape \(10, 5, 4\), must be \(N, C, H, W\)"),
        (IMAGES, LABELS[None], ValueError, r"labels has shape \(1, 10\), must be \(N,\)"),
        (IMAGES[:0], LABELS[:0], ValueError, "must not be empty"),
        (IMAGES[:, :0], LABELS, ValueError, "must not be empty"),
        (IMAGES, LABELS[1:], ValueError, "labels has 9 entries, images has 10"),
        (IMAGES, LABELS - 2, ValueError, r"labels\[0\] is -2, must be >= 0"),
        (NAN, LABELS, ValueError, r"images\[3, 1, 4, 2\] is nan, must be finite"),
        (INFINITE, LABELS, ValueError, r"images\[0, 0, 0, 1\] is -inf, must be finite"),
    ],
)
def test_bad_data_is_named(images, labels, error, message):
    with pytest.raises(error, match=message):
        Batches(images, labels, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 11, "drop_last": True}, "batch_size is 11.*number of images, 10"),
        ({"seed": -1}, "seed is -1"),
        ({"crop": -1}, "crop is -1"),
        ({"crop": 4}, "crop is 4, must be smaller than the images, 5x4 pixels"),
        ({"mean": (0, 0)}, "std is None, mean is not: give both or none"),
        ({"std": (1, 1)}, "mean is None, std is not: give both or none"),
        ({"mean": (0,), "std": (1, 1)}, r"mean is \(0,\), must be 2 finite numbers"),
        ({"mean": 0.5, "std": (1, 1)}, "mean is 0.5, must be 2 finite numbers"),
        ({"mean": ("a", "b"), "std": (1, 1)}, "mean is .*must be 2 finite numbers"),
        ({"mean": (0, 0), "std": (1, np.nan)}, "std is .*must be 2 finite numbers"),
        ({"mean": (0, 0), "std": (1, 0)}, r"std\[1\] is 0.0, must be > 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Batches(IMAGES, LABELS, **{"batch_size": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"seed": None}, "seed is None"),
        ({"crop": True}, "crop is True"),
        ({"flip": 0.5}, "flip is 0.5, must be True or False"),
        ({"shuffle": "yes"}, "shuffle is 'yes', must be True or False"),
    ],
)
def test_settings_of_a_wrong_type_are_named(settings, message):
    with pytest.raises(TypeError, match=message):
        Batches(IMAGES, LABELS, **{"batch_size": 4, **settings})


def test_a_bad_epoch_is_named():
    batches = Batches(IMAGES, LABELS, 4)
    batches.epoch = -1
    with pytest.raises(ValueError, match="epoch is -1"):
        iter(batches)
