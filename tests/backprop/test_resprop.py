"""ReSprop: which gradient is used, where the base comes from, thresholds, and when a step is exact."""

from types import SimpleNamespace

import numpy as np
import pytest

import sparsetrain as st
from backward_passes import KINDS, Passes, close
from sparsetrain import arrays
from sparsetrain.backprop import ReSprop

kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
FIRST = 1e-7


def begun(kind, method=None, steps=None, epoch=0, **settings):
    """Passes in an epoch of so many steps, with one pass done: there is a base."""
    passes = Passes(kind, method or ReSprop(), **settings)
    passes.method.begin_epoch(epoch, steps)
    passes.step(passes.gradient())
    return passes


def base(passes):
    """One image of the gradient, as unpacked gradients have it."""
    return passes.state["base"].reshape(passes.shape[1:])


def hybrid(dy, previous, threshold):
    return np.where(abs(dy - previous) > dy.dtype.type(threshold), dy, previous)


def is_exact(passes, dy, x=None):
    """Whether a step with dy uses all of it."""
    passes.check(passes.step(dy, x), dy, dy, x)
    return passes.method.report()["0"]["gradient_sparsity"] == 0


# ---- the gradient that is used


@kinds
@dtypes
@pytest.mark.parametrize("sparsity", [None, 0.6], ids=["dense", "sparse"])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 2.5, np.inf])
def test_the_gradient_is_the_base_where_it_differs_little(threshold, sparsity, dtype, kind, kernel):
    passes = begun(kind, dtype=dtype, sparsity=sparsity)
    passes.method.report()
    passes.state["threshold"] = threshold
    dy, previous = passes.gradient(1), base(passes).copy()
    passes.check(passes.step(dy), hybrid(dy, previous, threshold), dy)
    share = (abs(dy - previous) <= threshold).mean()
    assert passes.method.report()["0"]["gradient_sparsity"] == pytest.approx(share)
    assert share == {0.0: 0.0, np.inf: 1.0}.get(threshold, share)


@kinds
def test_a_threshold_of_zero_is_exact(kind, kernel):
    passes = begun(kind, dtype=np.float64)
    passes.state["threshold"] = 0.0
    dy = passes.gradient(1)
    for found, exact in zip(passes.step(dy), passes.reference(dy), strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-13 * abs(exact).max())


@kinds
def test_an_unchanged_gradient_is_reused_whole_and_exact(kind, kernel):
    passes = Passes(kind, ReSprop())
    dy = np.broadcast_to(passes.gradient()[3], passes.shape).copy()
    passes.step(dy)
    passes.method.report()
    passes.check(passes.step(dy), dy, dy)
    assert passes.method.report()["0"]["gradient_sparsity"] == 1


@kinds
def test_a_base_of_zero_leaves_the_large_values(kind, kernel):
    passes = begun(kind)
    passes.state["base"][...] = 0
    passes.state["threshold"] = 0.8
    dy = passes.gradient(1)
    passes.check(passes.step(dy), np.where(abs(dy) > 0.8, dy, 0), dy)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@kinds
def test_what_is_not_finite_shows_in_dx_and_dw_and_in_the_next_step(value, kind, kernel):
    passes = begun(kind)
    passes.state["threshold"] = 1.0
    dy = passes.gradient(1)
    dy.reshape(-1)[-1] = value
    dx, dw, db = passes.step(dy)
    assert not np.isfinite(dx[-1]).all() and np.isfinite(dx[:-1]).all()
    assert not np.isfinite(dw[-1]).all() and np.isfinite(dw[:-1]).all()
    assert not np.isfinite(db[-1])
    passes.state["base"].reshape(-1)[-1] = value
    dx, dw, _ = passes.step(passes.gradient(2))
    assert not np.isfinite(dx).all() and not np.isfinite(dw).all()


@kinds
def test_many_infinite_values_show_under_quantile_control(kind, kernel):
    passes = begun(kind, ReSprop(control="quantile"))
    dy = passes.gradient(1)
    dy[: len(dy) // 2] = np.inf
    dx, dw, _ = passes.step(dy)
    assert not np.isfinite(dx[0]).all() and not np.isfinite(dw).all()


# ---- the base


@kinds
@pytest.mark.parametrize("n", [1, 18, 40])
def test_the_base_is_an_image_of_the_last_exact_gradient(n, kind):
    passes = begun(kind, n=n)
    chosen = set()
    for t in range(30):
        dy = passes.gradient(t)
        passes.state["threshold"] = 1.0  # much of the gradient that is used is not exact
        passes.step(dy)
        same = (dy == base(passes)).reshape(n, -1).all(1)
        assert same.sum() == 1
        chosen.add(int(same.argmax()))
    assert len(chosen) == 1 if n == 1 else len(chosen) > min(n, 30) * 0.4
    assert n <= 16 or max(chosen) > 15


def test_the_choice_of_the_image_depends_on_the_seed_alone():
    def chosen(seed):
        passes = begun("linear", ReSprop(seed=seed), n=40)
        return [(passes.step(passes.gradient(t)), base(passes).tobytes())[1] for t in range(5)]

    assert chosen(3) == chosen(3)
    assert chosen(3) != chosen(4)


@kinds
def test_any_thread_count_gives_the_same_bits(kind, kernel):
    results = set()
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        passes = begun(kind, ReSprop(control="quantile"), n=700 if kind == "linear" else 60)
        results.add(b"".join(a.tobytes() for t in range(1, 4) for a in passes.step(passes.gradient(t))))
    assert len(results) == 1


# ---- the threshold


def test_the_threshold_doubles_while_too_much_is_used_and_halves_after():
    passes = Passes("linear", ReSprop(reuse=0.7))
    target = passes.method.target(0)
    expected, previous, halved = FIRST, None, 0
    for t in range(80):
        dy = passes.gradient(t) * np.float32(1e-3)
        passes.step(dy)
        share = 1 - passes.method.report()["0"]["gradient_sparsity"]
        if t:
            used = (abs(dy - previous) > np.float32(expected)).mean()
            assert share == pytest.approx(used)
            expected *= 2.0 if used > target else 0.5
            halved += used < target
            assert passes.state["threshold"] == expected
        previous = base(passes).copy()
    assert 20 < halved < 60


def test_the_threshold_stays_where_the_target_is_met():
    passes = begun("linear")
    passes.state["threshold"] = 0.25
    method, dy = passes.method, arrays.pack(np.zeros((1, 5), np.float32))
    for more, expected in ((0.0, 0.25), (1e-9, 0.5), (-1e-9, 0.25)):
        method.after(passes.layer, dy, SimpleNamespace(density=method.target(0) + more))
        assert passes.state["threshold"] == expected


@pytest.mark.parametrize("reuse", [0.3, 0.7, 0.9, 0.95])
@kinds
def test_the_quantile_meets_the_target_within_a_point(reuse, kind):
    """In the mean, and each step up to what a sample allows; also where the gradients' scale changes at once."""
    passes = begun(kind, ReSprop(reuse, control="quantile"), n=2500 if kind == "linear" else 100)
    for scale in (1.0, 1e-6, 1e3):
        passes.step(passes.gradient(99) * np.float32(scale))  # the base is of the last scale
        passes.method.report()
        found = []
        for t in range(8):
            passes.step(passes.gradient(t) * np.float32(scale))
            found.append(passes.method.report()["0"]["gradient_sparsity"])
        assert np.mean(found) == pytest.approx(reuse - 0.05, abs=0.01)
        np.testing.assert_allclose(found, reuse - 0.05, atol=0.025)


# ---- the schedule


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        ({"reuse": 0.9}, [0.15] * 12),
        ({"reuse": 0.8}, [0.25] * 12),
        ({"reuse": 0.0}, [1.0] * 12),
        ({"reuse": 0.9, "warmup": True}, [1, 1, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.15, 0.15]),
        ({"reuse": 0.5, "warmup": True}, [1, 1, 0.8, 0.7, 0.6, 0.55, 0.55, 0.55, 0.55, 0.55, 0.55, 0.55]),
        ({"reuse": 0.95, "warmup": True}, [1, 1, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]),
    ],
    ids=str,
)
def test_the_share_to_compute_in_each_epoch(settings, targets):
    method = ReSprop(**settings)
    np.testing.assert_allclose([method.target(epoch) for epoch in range(12)], targets, rtol=1e-12)


@kinds
def test_first_and_last_step_of_each_epoch_are_exact(kind):
    passes = Passes(kind, ReSprop(control="quantile"))
    for epoch in range(2):
        passes.method.begin_epoch(epoch, 5)
        assert [is_exact_or_reused(passes, epoch * 5 + t) for t in range(5)] == [True, False, False, False, True]


def is_exact_or_reused(passes, t):
    passes.step(passes.gradient(t))
    return passes.method.report()["0"]["gradient_sparsity"] == 0


def test_without_a_number_of_steps_only_the_first_is_exact():
    passes = Passes("linear", ReSprop(control="quantile"))
    passes.method.begin_epoch(0)
    assert [is_exact_or_reused(passes, t) for t in range(4)] == [True, False, False, False]


def test_an_epoch_of_one_step_is_exact():
    passes = Passes("linear", ReSprop(control="quantile"))
    for epoch in range(3):
        passes.method.begin_epoch(epoch, 1)
        assert is_exact_or_reused(passes, epoch)


@kinds
def test_an_exact_step_is_exact(kind, kernel):
    passes = Passes(kind, ReSprop())
    assert is_exact(passes, passes.gradient())
    assert is_exact(Passes(kind, ReSprop(reuse=0.0)), passes.gradient())


@pytest.mark.parametrize("control", ["paper", "quantile"])
def test_warmup_reuses_from_epoch_2_on(control):
    passes = Passes("linear", ReSprop(warmup=True, control=control), n=600)
    for epoch, reused in ((0, False), (1, False), (2, True)):
        passes.method.begin_epoch(epoch, 10)
        passes.step(passes.gradient())
        passes.method.report()
        passes.step(passes.gradient(1))
        used = passes.method.report()["0"]["gradient_sparsity"]
        assert ("threshold" in passes.state) == (reused and control == "paper")
        if control == "quantile":
            assert used == pytest.approx(0.2 if reused else 0, abs=0.02)


@kinds
def test_nothing_is_reused_after_a_batch_of_another_size(kind):
    passes = begun(kind, ReSprop(control="quantile"))
    for n, exact in ((18, False), (11, True), (11, False), (18, True), (18, False)):
        dy, x = passes.gradient(n)[:n], passes.x[:n]
        passes.method.report()
        found = passes.step(dy, x)
        assert (passes.method.report()["0"]["gradient_sparsity"] == 0) == exact
        if exact:
            passes.check(found, dy, dy, x)
        assert (dy == base(passes)).reshape(n, -1).all(1).any()


def test_nothing_is_reused_after_images_of_another_size():
    passes = begun("conv", ReSprop(control="quantile"))
    passes.method.report()
    x = np.concatenate([passes.x, passes.x], 3)
    passes.model(x)
    passes.model.backward(np.ones((18, 5, 5, 14), np.float32))
    assert passes.method.report()["0"]["gradient_sparsity"] == 0


def test_the_state_goes_on_in_another_method():
    first, second = begun("conv"), Passes("conv", ReSprop())
    first.step(first.gradient(1))
    second.method.load_state_dict(first.method.state_dict())
    second.method.begin_epoch(0)
    first.method.begin_epoch(0)
    for passes in (first, second):  # exact, then with the threshold of before
        passes.step(passes.gradient(2))
    assert first.state["threshold"] == second.state["threshold"] == 2 * FIRST
    for a, b in zip(first.step(first.gradient(3)), second.step(second.gradient(3)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reuse": 1}, ValueError, "reuse is 1"),
        ({"reuse": -0.1}, ValueError, "reuse is -0.1"),
        ({"reuse": np.nan}, ValueError, "reuse is nan"),
        ({"reuse": "0.9"}, TypeError, "reuse is '0.9', must be a number"),
        ({"control": "quantil"}, ValueError, "control is 'quantil'.*did you mean 'quantile'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ReSprop(**arguments)


def test_the_weight_gradient_adds_to_what_is_there(kernel):
    passes = begun("conv")
    passes.state["threshold"] = 1.0
    weight, dy = passes.module.weight, passes.gradient(1)
    used = hybrid(dy, base(passes), 1.0)
    before = weight.grad.astype(np.float64)
    passes.model(passes.x)
    passes.model.backward(dy)
    close(weight.grad, before + passes.reference(used)[1])


def test_the_threshold_recovers_from_gradients_of_zero():
    p = Passes("linear", ReSprop(0.7))
    for _ in range(200):
        p.step(0 * p.gradient())
    low = p.state["threshold"]
    assert 0 < low < 1e-7
    p.step(p.gradient())
    p.step(p.gradient(1))
    assert p.state["threshold"] > low
